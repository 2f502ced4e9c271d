"""A kernel within a bound from one that is a little above it, by long clip-and-cut steps.

The kernel of an iterate of the dual is near the nearest kernel, but its norm exceeds the bound at a few frequencies. A
rescaling moves the whole kernel by the largest excess. A clip-and-cut step moves it only as far as each excess needs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from convsv_core._projection.certificate import Above, Problem, frequencies_above
from convsv_core._projection.excess import clip_and_cut
from convsv_core._spectrum.numbers import squared_frobenius
from convsv_core._symbol.operand import Operand
from convsv_core.backend import Array

__all__ = ["Restored", "restored", "squared_change"]

PASSES = 12
"""Largest number of clip-and-cut steps. A guess."""

LENGTH = 3.0
"""Length of a step, in units of the one that is right if all the frequencies above the bound are equal."""


class Restored(NamedTuple):
    """Hold a kernel that a rescaling brings within the bound.

    Attributes
    ----------
    kernel : array
        A kernel at the problem's scale.
    converged : bool
        Whether the relative gap is at most the tolerance.
    above : Above
        The frequencies at which the first kernel is above the bound.
    """

    kernel: Array
    converged: bool
    above: Above


def restored(problem: Problem, kernel: Array, value: float) -> Restored:
    """Return a kernel near the given one that a rescaling brings within the bound.

    `value` is a value of the dual problem: half of a lower bound of the squared distance. The steps end when the gap
    to it is at most the tolerance, or when even without a rescaling the kernel is too far from the problem's own.
    """
    operand, limit = problem.operand, float(problem.bound)
    first, least, best = None, math.inf, kernel
    for _ in range(PASSES):
        found = frequencies_above(problem, kernel, limit)
        first = found if first is None else first
        squared = float(squared_change(operand, kernel * min(1.0, limit / found.computed)))
        if squared < least:
            least, best = squared, kernel
        allowed = 2 * value / (1 - problem.rtol)
        if least <= allowed or float(squared_change(operand, kernel)) > allowed:
            break
        step = LENGTH * math.prod(operand.plan.periods) / float(operand.plan.weights()[found.places].sum())
        kernel = kernel - step * clip_and_cut(operand, kernel, problem.bound, "gram", places=found.places)
    return Restored(best, least - 2 * value <= problem.rtol * least, first)


def squared_change(operand: Operand, kernel: Array) -> Array:
    """Return the squared Frobenius distance, over the grid, between the operators of a kernel and of the operand."""
    return squared_frobenius(dataclasses.replace(operand, kernel=kernel - operand.kernel))
