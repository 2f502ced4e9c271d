"""A projection by a number of steps over the whole grid, which shapes alone decide, so that it can be traced."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convsv_core._norm.fixed_grid import grid_upper_bound
from convsv_core._projection.certificate import SLACK_EPS, Problem
from convsv_core._projection.dykstra import DualState, advance, begin, nearest, shrunk
from convsv_core._projection.excess import Method, Samples, clip_and_cut
from convsv_core._projection.restoration import squared_change
from convsv_core._projection.working_set import ProjectionState
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.small_matrices import divisors, safe_sqrt
from convsv_core.backend import Array, ArraySpec
from convsv_core.dtypes import COMPLEX_OF

__all__ = ["clip_and_cut_step", "distance_of", "fixed_steps"]


def fixed_steps(
    operand: Operand,
    bound: Array,
    dual: Array,
    method: str,
    steps: int,
    every_size: bool,
    factor: float,
    rtol: float,
) -> tuple[Array, ...]:
    """Return the kernel, a certified norm, the distance, whether it has converged, and the dual variables."""
    xp = operand.xp
    value = xp.full_like(operand.scale, -math.inf)
    kernel = operand.kernel
    shape = ArraySpec(tuple(kernel.shape), operand.kernel_dtype)
    if method == "dykstra":
        results = (
            shape,
            ArraySpec((), operand.computed_in),
            ArraySpec(tuple(dual.shape), COMPLEX_OF[operand.computed_in]),
        )
        kernel, value, dual = operand.call_host(
            _dykstra_on_host,
            steps,
            every_size,
            factor,
            rtol,
            arrays=(bound, dual),
            results=results,
            otherwise=_dykstra,
        )
    elif method != "rescale":
        how: Method = "products" if method == "newton-schulz" else "gram"
        (kernel,) = operand.call_host(
            _alternating_on_host, steps, how, arrays=(bound,), results=(shape,), otherwise=_alternating
        )
    before = after = grid_upper_bound(operand, factor)
    if method != "rescale":
        after = grid_upper_bound(operand.of(kernel), factor)
    eps = operand.answer_eps
    share = xp.where(after > bound, bound / divisors(xp, after) * (1 - SLACK_EPS * eps), xp.ones_like(after))
    inside = before <= bound * (1 + SLACK_EPS * eps)
    kernel = xp.where(inside, operand.kernel, kernel * share)
    squared = xp.where(inside, xp.zeros_like(share), squared_change(operand, kernel))
    if method == "dykstra":
        converged = inside | (squared - 2 * value <= rtol * squared)
    else:
        converged = inside | (after <= bound * (1 + rtol))
    norm = xp.where(inside, before, after * share)
    distance = xp.where(inside, xp.zeros_like(share), distance_of(operand, kernel, every_size))
    return operand.answer(kernel), operand.answer_upper(norm), operand.answer(distance), converged, dual


def _dykstra(
    operand: Operand, bound: Array, dual: Array, steps: int, every_size: bool, factor: float, rtol: float
) -> tuple[Array, ...]:
    """Return the kernel, the value of the dual problem and the dual variables after steps over the whole grid."""
    samples = Samples.at(operand)

    def step(*state: Array) -> tuple[Array, ...]:
        return advance(operand, bound, *samples, *state)

    norm = divisors(operand.xp, grid_upper_bound(operand))
    begun = shrunk(operand, begin(operand, *samples, dual, 0), bound / norm)
    state = DualState(*operand.backend.repeat(step, begun, steps, operand.kernel))
    return operand.kernel - state.change, state.value, state.dual


def _dykstra_on_host(
    operand: Operand, bound: Array, dual: Array, steps: int, every_size: bool, factor: float, rtol: float
) -> tuple[Any, ...]:
    """Return what `_dykstra` does, from at most as many iterations on a working set of frequencies."""
    wide = operand.widen()
    problem = Problem(wide, operand, np.asarray(bound, float), True, every_size, factor, "dykstra", rtol)
    used = np.flatnonzero(np.abs(dual).max(axis=(1, 2, 3), initial=0))
    state = ProjectionState(problem.frequencies[used], dual[used] * wide.scale) if len(used) else None
    found = nearest(problem, steps, state)
    whole, plan = np.zeros_like(dual), wide.plan
    places = plan.visit[np.ravel_multi_index(tuple(found.state.frequencies.T), plan.periods)]
    whole[places] = found.state.dual / wide.scale
    return found.kernel, found.value, whole


def _alternating(operand: Operand, bound: Array, steps: int, method: Method) -> tuple[Array, ...]:
    """Return the kernel after a number of clip-and-cut steps."""

    def alternate(kernel: Array) -> tuple[Array, ...]:
        return (clip_and_cut_step(operand, kernel, bound, method),)

    return operand.backend.repeat(alternate, (operand.kernel,), steps, operand.kernel)


def _alternating_on_host(operand: Operand, bound: Array, steps: int, method: Method) -> tuple[Array, ...]:
    """Return what `_alternating` does, in double precision."""
    return _alternating(operand.widen(), np.asarray(bound, float), steps, method)


def clip_and_cut_step(operand: Operand, kernel: Array, bound: Array, method: Method) -> Array:
    """Return the kernel after one clip-and-cut step."""
    return kernel - clip_and_cut(operand, kernel, bound, method)


def distance_of(operand: Operand, kernel: Array, every_size: bool) -> Array:
    """Return the Frobenius distance from the operand's own kernel.

    It is the distance of the operators, or for every input size the distance of the taps.
    """
    squared = squared_change(operand, kernel)
    return safe_sqrt(operand.xp, squared / math.prod(operand.plan.grid) if every_size else squared)
