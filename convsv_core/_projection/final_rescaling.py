"""The last step of a projection: a rescaling that brings the kernel, as its dtype holds it, within the bound."""

from __future__ import annotations

from typing import NamedTuple

from convsv_core._norm.tap_bounds import sum_of_norms
from convsv_core._projection.certificate import CERTIFICATE_RTOL, Problem
from convsv_core._symbol.operand import Operand
from convsv_core.backend import Array

__all__ = ["Rescaled", "rescaled"]

RESCALINGS = 8
"""Largest number of attempts to rescale a kernel.

One attempt is enough unless entries are too small to be normal numbers. Each further attempt lowers the target by
16 times as much as the one before. If no attempt is enough, the kernel becomes 0. A guess.
"""


class Rescaled(NamedTuple):
    """Hold a kernel at the answer's scale and dtype, and a certified upper bound of its norm at the problem's scale."""

    kernel: Array
    upper: float


def rescaled(problem: Problem, kernel: Array, upper: float) -> Rescaled:
    """Return a kernel multiplied by a number that brings it within the bound, with its certified norm.

    `kernel` is at the problem's scale, and `upper` is a certified upper bound of its norm.
    """
    operand, bound = problem.operand, float(problem.bound)
    xp = operand.xp
    eps = operand.answer_eps
    # For every input size, leave room for the gap, so that any certificate with this gap is within the bound.
    gap = CERTIFICATE_RTOL if problem.every_size and len(problem.frequencies) > 1 else 0.0
    target = bound * (1 - 2 * eps) / (1 + gap)
    # Rounding, of the product or to the answer's dtype, adds an error to each tap. The norm grows by at most the sum of
    # the norms of these errors. For normal numbers this sum is at most `size`.
    size = eps * _size(operand, kernel)
    for attempt in range(RESCALINGS):
        share = min(1.0, target / (upper + size))
        exact = kernel * share
        answer = operand.answer(exact)
        stored = xp.astype(answer, exact.dtype) / operand.scale
        # The product itself is rounded too. In a wider dtype the factor below covers that.
        rounding = _size(operand, stored - exact) + (0.0 if operand.widened else eps * _size(operand, exact))
        certified = (share * upper + rounding) * (1 + eps)
        if certified <= bound:
            return Rescaled(answer, certified)
        target *= 1 - min(1.0, eps * 16.0**attempt)
    return Rescaled(operand.answer(kernel * 0), 0.0)


def _size(operand: Operand, kernel: Array) -> float:
    """Return the `sum_of_norms` of another kernel at the operand's scale."""
    return sum_of_norms(operand.of(kernel))
