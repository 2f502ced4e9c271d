"""A kernel within a bound from one that is a little above it, by long clip-and-cut steps.

The kernel of an iterate of the dual is near the nearest kernel, but its norm exceeds the bound at a few frequencies. A
rescaling moves the whole kernel by the largest excess. A clip-and-cut step moves it only as far as each excess needs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._projection.certificate import Above, Problem, frequencies_above
from convsv_core._projection.excess import Samples, dual_excess
from convsv_core._projection.subspace import excess_of_followed, first_columns, leading_vectors
from convsv_core._spectrum.numbers import squared_frobenius
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.small_matrices import absolute_square
from convsv_core.backend import Array

__all__ = ["Restored", "peaks", "restored", "squared_change"]

ROUNDS, PASSES = 6, 12
"""Largest number of rounds, each with a test of all frequencies, and of steps in a round. Guesses."""


class Restored(NamedTuple):
    """Hold a kernel that a rescaling brings within the bound.

    Attributes
    ----------
    kernel : array
        A kernel at the problem's scale.
    converged : bool
        Whether the relative gap is at most the tolerance.
    peaks : int array
        Places of the frequencies at which the first kernel is above the bound, and no neighbour is farther above it.
    """

    kernel: Array
    converged: bool
    peaks: HostArray


def restored(problem: Problem, work: Operand, kernel: Array, value: float, chosen: HostArray) -> Restored:
    """Return a kernel near the given one that a rescaling brings within the bound.

    `value` is a value of the dual problem: half of a lower bound of the squared distance. The steps end when the gap
    to it is at most the tolerance, or when even without a rescaling the kernel is too far from the problem's own. They
    use the chosen frequencies, and the peaks between these, and the dtype of `work`.
    """
    operand, limit = problem.operand, float(problem.bound)
    allowed = 2 * value / (1 - problem.rtol)
    best, least = kernel, math.inf
    first: HostArray | None = None
    for _ in range(ROUNDS):
        above = frequencies_above(problem, kernel, limit)
        squared = _squared(operand, kernel, limit / above.computed)
        if squared < least:
            best, least = kernel, squared
        tops = peaks(problem, above)
        first = tops if first is None else first
        if least <= allowed or _squared(operand, kernel) > allowed:
            break
        chosen = np.union1d(chosen, tops)
        kernel = _lowered(problem, work, kernel, chosen, allowed)
    assert first is not None  # There is at least one round.
    return Restored(best, least <= allowed, first)


def _lowered(problem: Problem, work: Operand, kernel: Array, places: HostArray, allowed: float) -> Array:
    """Return a kernel whose norm at some places is lower, by steps until its squared distance is as allowed."""
    operand, limit = problem.operand, float(problem.bound)
    xp, columns = operand.xp, first_columns(operand)
    bound = xp.astype(problem.bound, work.real_dtype)
    samples, vectors = Samples.at(work, places), None
    for _ in range(PASSES):
        narrow = xp.astype(kernel, work.kernel.dtype)
        if columns:
            if vectors is None:
                vectors = work.run(leading_vectors, columns, arrays=(narrow, samples.frequencies))
            excess, vectors, norms = work.run(excess_of_followed, arrays=(narrow, bound, *samples, None, vectors))
            norm = float(xp.max(norms))
        else:
            above = frequencies_above(problem, kernel, limit, places)
            norm = above.computed
            if len(above.places):
                samples = Samples.at(work, above.places)
                zeros = work.complex_zeros((len(above.places), work.plan.groups, *work.plan.block))
                excess = dual_excess(work, narrow, bound, samples, zeros)
        if norm <= limit or _squared(operand, kernel, limit / norm) <= allowed or _squared(operand, kernel) > allowed:
            break
        change = xp.astype(excess.change, kernel.dtype)
        kernel = kernel - _length(operand, samples.weights, excess.matrices, change) * change
    return kernel


def _length(operand: Operand, weights: Array, excess: Array, change: Array) -> float:
    """Return the length of a step along the taps nearest to an excess.

    The operator of the taps is an orthogonal projection of the excess. A step of length 1 thus reduces the excess only
    by the share of its square that the projection keeps. With the inverse of this share as length, a step would remove
    the whole excess if it were reduced equally everywhere.
    """
    xp = operand.xp
    square = xp.sum(xp.real(weights)[:, None, None, None] * absolute_square(xp, excess)) * operand.plan.copies
    kept = float(squared_frobenius(operand.of(change)))
    return float(square) / kept if kept > 0 else 1.0


def peaks(problem: Problem, found: Above) -> HostArray:
    """Return the places among those found whose norm is at least that of every neighbour on the grid."""
    plan = problem.operand.plan
    values = np.full(len(plan.frequencies), -1.0)
    values[found.places] = found.norms
    on_grid = values[plan.visit].reshape(plan.periods)
    nearby = on_grid
    for axis in range(on_grid.ndim):
        nearby = np.maximum(nearby, np.maximum(np.roll(nearby, 1, axis), np.roll(nearby, -1, axis)))
    visit = plan.visit.reshape(plan.periods)
    return np.intersect1d(visit[on_grid >= nearby], found.places)


def _squared(operand: Operand, kernel: Array, share: float = 1.0) -> float:
    """Return the squared distance of a kernel, multiplied by `share` if that is less than 1."""
    return float(squared_change(operand, kernel * min(1.0, share)))


def squared_change(operand: Operand, kernel: Array) -> Array:
    """Return the squared Frobenius distance, over the grid, between the operators of a kernel and of the operand."""
    return squared_frobenius(operand.of(kernel - operand.kernel))
