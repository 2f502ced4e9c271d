"""The frequencies that a projection works on, with one matrix of dual variables for each of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._projection.certificate import Problem
from convsv_core._symbol.operand import Operand
from convsv_core.backend import Array

__all__ = ["ProjectionState", "WorkingSet", "extended", "from_state"]

DUAL_BYTES = 1 << 30
"""Bytes that the dual variables of the working set, and the two more copies of an iteration, may take. A guess."""


class ProjectionState(NamedTuple):
    """Hold the dual variables of a projection, from which a later projection can start.

    Attributes
    ----------
    frequencies : array, shape (count, ndim), int
        Indices of frequencies on the grid.
    dual : array, shape (count, groups, rows, columns), complex
        One matrix for each of the frequencies.
    """

    frequencies: Array
    dual: Array


class WorkingSet(NamedTuple):
    """Hold places among the visited frequencies, and one dual matrix for each place."""

    places: HostArray
    dual: Array


def from_state(problem: Problem, state: ProjectionState | None) -> WorkingSet:
    """Return the working set of a state, at the operand's scale; an empty one if there is no state."""
    operand, plan = problem.operand, problem.operand.plan
    xp = operand.xp
    shape = (plan.groups, *plan.block)
    if state is None:
        return WorkingSet(np.zeros(0, int), operand.complex_zeros((0, *shape)))
    if not isinstance(state, ProjectionState):
        raise TypeError(f"state is a {type(state).__qualname__}: wanted the state of an earlier result, or None")
    frequencies, dual = state
    if tuple(dual.shape[1:]) != shape or frequencies.ndim != 2 or frequencies.shape[1] != len(plan.axes):
        raise ValueError(
            f"state has matrices of shape {tuple(dual.shape[1:])}: wanted {shape}; is it of another layer?"
        )
    dual = xp.astype(dual / operand.scale, operand.complex_dtype)
    if not problem.known:
        return WorkingSet(np.arange(dual.shape[0]), dual)
    indices = operand.backend.to_numpy(frequencies).astype(int)
    if np.any((indices < 0) | (indices >= np.asarray(plan.periods))):
        raise ValueError(f"state holds frequencies beyond the grid {plan.periods}: is it of another input shape?")
    return WorkingSet(plan.visit[np.ravel_multi_index(tuple(indices.T), plan.periods)], dual)


def extended(operand: Operand, chosen: HostArray, dual: Array, above: HostArray) -> WorkingSet:
    """Return a working set with more places, as far as memory allows, and zeros as their dual matrices."""
    xp = operand.xp
    fresh = np.setdiff1d(above, chosen)
    affordable = DUAL_BYTES // (3 * math.prod(dual.shape[1:]) * operand.complex_bytes)
    fresh = fresh[: max(1, affordable - len(chosen))]
    zeros = operand.complex_zeros((len(fresh), *dual.shape[1:]))
    dual = xp.concat([xp.astype(dual, zeros.dtype, copy=False), zeros], axis=0)
    return WorkingSet(np.concatenate([chosen, fresh]), dual)
