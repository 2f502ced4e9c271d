"""The nearest kernel of an operator norm at most a bound, by an accelerated form of Dykstra's algorithm.

The convex problem is: among kernels X of norm at most c, find the one nearest to K. Its dual has one matrix Y for
each of N frequencies. Let P(Y) be the taps nearest to the operator of these matrices. The dual is

    maximise  N (<P(Y), K> - |P(Y)|^2 / 2) - c sum |Y|_*,        with the kernel  X = K - P(Y).

Dykstra's algorithm of alternating projections is the proximal gradient method of the dual with step 1: ``Y <- excess
over c of Y + symbol(X)``. Three changes reduce the iterations to about a thirtieth. The step has Nesterov's momentum,
which restarts if a step goes back. The step is longer where the dual is flatter. It changes only a working set of
frequencies, those that matter. The kernel of an iterate is a little above the bound: `restored` brings it within.

The gap between the value of the dual and the value of a kernel within the bound says how near the nearest kernel is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._projection.certificate import Problem, places_above, upper_of
from convsv_core._projection.excess import Samples, dual_excess, nearest_taps, sharing
from convsv_core._projection.momentum import next_momentum
from convsv_core._projection.restoration import restored
from convsv_core._projection.subspace import (
    excess_of_followed,
    first_columns,
    first_vectors,
    has_full_support,
    more_columns,
)
from convsv_core._projection.working_set import ProjectionState, extended, from_state
from convsv_core._spectrum.numbers import squared_frobenius
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import symbol_polynomial
from convsv_core._symbol.small_matrices import absolute_square, divisors, squared_norm
from convsv_core.backend import Array

__all__ = [
    "CHECK_EVERY",
    "DualState",
    "Nearest",
    "advance",
    "begin",
    "nearest",
    "shrunk",
]

LONGER = 1.03
"""Factor by which the step of the dual grows after each step that was not too long.

Measured as for `SLOW`: 1.03 took 4.6 processor seconds and 1.1 took 5.0.
"""

NEAR = 0.97
"""Frequencies with a norm of at least this share of the bound enter the first working set. A guess."""

CHECK_EVERY = 5
"""Iterations between two looks at the gain of the dual. A guess."""

SLOW = 0.1
"""Relative gain of the dual in `CHECK_EVERY` iterations, as a share of the gap, at which a kernel is restored.

Measured on the 3 x 3 and 2 x 2 layers of the network that comes along and of facenet-pytorch's onet, in processor
seconds: 0.05 took 4.5, 0.1 took 4.6, 0.2 took 5.6, 0.4 took 6.1.
"""

NARROW_RTOL, NARROW_NORM = 1e-3, 1.1
"""Smallest gap, and smallest norm over the bound, for which iterations have the dtype of the answer. Guesses.

The value of the dual that ends a projection is computed again in the wider dtype.
"""

COARSE_POINTS = 4
"""Frequencies of the first working set, along each axis and for each offset of the taps.

Measured as for `SLOW`: with 2, 3 and 4 the projections took 6.8, 6.4 and 4.6 seconds.
"""


class DualState(NamedTuple):
    """Hold the state of the accelerated iteration.

    Attributes
    ----------
    dual, ahead : arrays, shape (count, groups, rows, columns), complex
        The dual variables, and the point from which the next step starts.
    change, change_ahead : arrays of the kernel's shape
        The taps nearest to `dual`, and the taps nearest to `ahead`.
    momentum, step, value : 0-d arrays
        Nesterov's number, the length of the next step, and the value of the dual problem.
    vectors : array, shape (count, groups, columns, followed), complex
        The singular vectors that are followed; none if each step decomposes the matrices.
    """

    dual: Array
    ahead: Array
    change: Array
    change_ahead: Array
    momentum: Array
    step: Array
    value: Array
    vectors: Array


class Nearest(NamedTuple):
    """Hold the result of `nearest`.

    Attributes
    ----------
    kernel : array
        A kernel at the operand's scale. It is within the bound up to a rescaling.
    iterations : int
    converged : bool
        Whether the relative gap is at most the tolerance.
    state : ProjectionState
        The dual variables, at the user's scale.
    value : float
        The value of the dual problem: half of a lower bound of the squared distance.
    """

    kernel: Array
    iterations: int
    converged: bool
    state: ProjectionState
    value: float


def nearest(problem: Problem, max_iterations: int, state: ProjectionState | None) -> Nearest:
    """Return a kernel that is, after a rescaling, within the bound on the grid and nearly nearest.

    `state` is the state of an earlier projection, from which this one starts.
    """
    operand = problem.operand
    xp, exact = operand.xp, has_full_support(operand.plan)
    chosen, dual = from_state(problem, state)
    coarse = _coarse(problem, places_above(problem, operand.kernel, NEAR * float(problem.bound)))
    if not len(coarse):
        frequencies = operand.backend.asarray_like(problem.frequencies[chosen], operand.kernel)
        return Nearest(operand.kernel, 0, True, ProjectionState(frequencies, dual * 0), 0.0)
    norm = upper_of(problem.rows(operand.kernel), coarse).computed
    work = _working_operand(problem, norm)
    chosen, dual = extended(work, chosen, dual, coarse)
    running = shrunk(work, _continued(work, chosen, dual, None), problem.bound / norm)
    iterations, before, slow = 0, -math.inf, SLOW * problem.rtol
    while True:
        spent = min(1 if exact and not iterations else CHECK_EVERY, max_iterations - iterations)
        running = _advanced(work, problem.bound, chosen, running, spent)
        iterations += spent
        gain, before = float(running.value) - before, float(running.value)
        if gain > slow * abs(before) and max_iterations > iterations > 1:
            continue
        change, value = running.change, before
        if work is not operand:
            change, value = _exact(problem, chosen, running.dual)
        found = restored(problem, work, operand.kernel - change, value, chosen)
        if found.converged or iterations >= max_iterations:
            break
        slow = slow / 2 if iterations > 1 else slow
        running = _with_enough_vectors(work, running)
        fresh = np.setdiff1d(found.peaks, chosen)
        if len(fresh):
            chosen, dual = extended(work, chosen, running.dual, fresh)
            running = _continued(work, chosen, dual, running)
    used: HostArray = operand.backend.to_numpy(xp.any(xp.abs(running.dual) > 0, axis=(1, 2, 3)))
    frequencies = operand.backend.asarray_like(problem.frequencies[chosen[used]], operand.kernel)
    dual = xp.take(running.dual, operand.backend.asarray_like(np.flatnonzero(used), operand.kernel), axis=0)
    reached = ProjectionState(frequencies, xp.astype(dual, operand.complex_dtype) * operand.scale)
    return Nearest(found.kernel, iterations, found.converged, reached, value)


def _working_operand(problem: Problem, norm: float) -> Operand:
    """Return the operand in the dtype of the iterations: that of the answer if it is precise enough.

    Its rounding errors are a share of the kernel. The gap is a share of the distance, which may be much less.
    """
    far = norm > NARROW_NORM * float(problem.bound)
    narrow = far and problem.rtol >= NARROW_RTOL and not has_full_support(problem.operand.plan)
    return problem.narrow if narrow else problem.operand


class _Exact(NamedTuple):
    """Hold the taps nearest to dual variables, and the value of the dual, in the dtype of the computation."""

    change: Array
    value: float


def _exact(problem: Problem, chosen: HostArray, dual: Array) -> _Exact:
    """Return the taps nearest to dual variables of a narrower dtype, and their value."""
    operand = problem.operand
    xp = operand.xp
    dual, samples = xp.astype(dual, operand.complex_dtype), Samples.at(operand, chosen)
    change = operand.run(begin, 0, arrays=(*samples, dual)).change
    trace = xp.sum(operand.backend.svdvals(dual), axis=(-2, -1))
    return _Exact(change, float(_value(operand, problem.bound, samples.weights, change, trace)))


def _advanced(operand: Operand, bound: Array, chosen: HostArray, state: DualState, iterations: int) -> DualState:
    """Return the state of the dual after some iterations on the chosen frequencies."""
    samples = Samples.at(operand, chosen)
    bound = operand.xp.astype(bound, operand.real_dtype)
    for _ in range(iterations):
        state = operand.run(advance, arrays=(bound, *samples, *state))
    return state


def _continued(operand: Operand, chosen: HostArray, dual: Array, state: DualState | None) -> DualState:
    """Return the state of the iteration on a larger working set, whose new frequencies have a dual of 0.

    The first step is the one that is right for a uniform grid of as many frequencies.
    """
    plan = operand.plan
    if state is None:
        state = operand.run(begin, first_columns(operand), arrays=(*Samples.at(operand, chosen), dual))
        return state._replace(
            step=state.step * (math.prod(plan.periods) / max(1.0, float(plan.weights()[chosen].sum())))
        )
    known = state.dual.shape[0]
    ahead = operand.xp.concat([state.ahead, dual[known:, ...]], axis=0)
    fresh = first_vectors(operand, dual.shape[0] - known, state.vectors.shape[-1])
    return state._replace(dual=dual, ahead=ahead, vectors=operand.xp.concat([state.vectors, fresh], axis=0))


def _with_enough_vectors(operand: Operand, state: DualState) -> DualState:
    """Return a state that follows more singular vectors if an excess has as many as are followed."""
    xp, vectors = operand.xp, state.vectors
    columns = vectors.shape[-1]
    if not columns:
        return state
    squares = squared_norm(xp, xp.matmul(state.dual, vectors), axis=-2)
    rounding = (operand.eps * max(operand.plan.block)) ** 2 * xp.sum(squares, axis=-1)
    if not operand.backend.truth(xp.any(xp.min(squares, axis=-1) > rounding)):
        return state
    wanted = more_columns(operand, columns)
    fresh = first_vectors(operand, vectors.shape[0], wanted)
    return state._replace(vectors=xp.concat([vectors, fresh[..., columns:]], axis=-1) if wanted else fresh)


def _coarse(problem: Problem, places: HostArray) -> HostArray:
    """Return those of the places that lie on a coarse grid, or all of them where that would save nothing.

    The symbol has few coefficients, so a coarse grid nearly determines the nearest kernel. A matrix with one row or
    column needs no decomposition: there every frequency is cheap.
    """
    plan = problem.operand.plan
    counts = [min(axis.period, COARSE_POINTS * len(axis.offsets)) for axis in plan.axes]
    if min(plan.block) == 1 or math.prod(counts) >= len(places):
        return places
    along = [np.round(np.arange(n) * axis.period / n).astype(int) for n, axis in zip(counts, plan.axes, strict=True)]
    indices = np.meshgrid(*along, indexing="ij")
    kept = np.intersect1d(places, plan.visit[np.ravel_multi_index([one.ravel() for one in indices], plan.periods)])
    return kept if len(kept) else places


def begin(operand: Operand, frequencies: Array, weights: Array, dual: Array, columns: int) -> DualState:
    """Return the first state of the accelerated iteration, from dual variables.

    `columns` is the number of singular vectors that are followed.
    """
    one, symbol = operand.xp.ones_like(operand.scale), symbol_polynomial(operand)
    change = operand.xp.zeros_like(operand.kernel)
    if dual.shape[0]:
        (change,) = nearest_taps(
            symbol, Samples(frequencies, weights), lambda _, chosen: (operand.xp.take(dual, chosen, axis=0),)
        )
    vectors = first_vectors(operand, dual.shape[0], columns)
    return DualState(dual, dual, change, change, one, one, -math.inf * one, vectors)


def advance(operand: Operand, bound: Array, frequencies: Array, weights: Array, *arrays: Array) -> DualState:
    """Return the state after one accelerated step of the dual. If the step was too long, only shorten it.

    A step of 1 is never too long. Longer steps are tried, because they are right if few frequencies matter.
    """
    xp, plan, state = operand.xp, operand.plan, DualState(*arrays)
    step = state.step
    # The longest step is the right one if a single frequency matters.
    longest = max(1.0, math.prod(plan.periods) / math.prod(axis.taps for axis in plan.axes))
    kernel = (operand.kernel - state.change_ahead) * xp.astype(step, state.change.dtype)
    samples, limit, vectors = Samples(frequencies, weights), bound * step, state.vectors
    if vectors.shape[-1]:
        new, vectors, _ = excess_of_followed(operand, kernel, limit, *samples, state.ahead, vectors)
    else:
        new = dual_excess(operand, kernel, limit, samples, state.ahead)
    counts = xp.real(weights)[:, None, None, None] * plan.copies
    moved, moved_change = new.matrices - state.ahead, new.change - state.change_ahead
    taken = (step <= 1) | (
        step * _inner(operand, moved_change, moved_change) <= xp.sum(counts * absolute_square(xp, moved))
    )
    turned = xp.sum(counts * xp.real(operand.backend.conj(moved) * (new.matrices - state.dual))) < 0
    momentum, beyond = next_momentum(xp, state.momentum, taken & turned, LONGER)
    value = _value(operand, bound, weights, new.change, new.trace)
    advanced = DualState(
        new.matrices,
        new.matrices + xp.astype(beyond, new.matrices.dtype) * (new.matrices - state.dual),
        new.change,
        new.change + xp.astype(beyond, new.change.dtype) * (new.change - state.change),
        momentum,
        xp.clip(step * LONGER, None, longest),
        value,
        vectors,
    )
    kept = state._replace(step=xp.clip(step / 2, 1.0, None))
    known = operand.backend.truth(taken)
    if known is not None:
        return advanced if known else kept
    return DualState(*(xp.where(taken, one, other) for one, other in zip(advanced, kept, strict=True)))


def shrunk(operand: Operand, state: DualState, share: Array) -> DualState:
    """Return a first state whose kernel is no farther from the operand's own than the rescaled kernel is.

    `share` is the bound over the norm of the operand's kernel. The dual of a kernel far outside the bound is too large
    for one near the bound.
    """
    xp = operand.xp
    share = xp.astype(share, operand.real_dtype)
    size = xp.sqrt(_inner(operand, state.change, state.change))
    zero = xp.zeros_like(size)
    most = xp.maximum(1 - share, zero) * xp.sqrt(squared_frobenius(operand))
    factor = xp.where(size > most, most / divisors(xp, size), xp.ones_like(size))
    dual, change = (array * xp.astype(factor, array.dtype) for array in (state.dual, state.change))
    return state._replace(dual=dual, ahead=dual, change=change, change_ahead=change)


def _value(operand: Operand, bound: Array, weights: Array, change: Array, trace: Array) -> Array:
    """Return the value of the dual, from the taps nearest to its variables and the sums of their singular values."""
    value = _inner(operand, change, operand.kernel - change / 2)
    return value - bound * operand.plan.copies * operand.xp.sum(operand.xp.real(weights) * trace)


def _inner(operand: Operand, change: Array, kernel: Array) -> Array:
    """Return the real inner product of two operators over the grid.

    The first kernel must be a result of `to_kernel`.
    """
    xp = operand.xp
    products = xp.real(operand.backend.conj(change) * kernel)
    return xp.sum(products * sharing(operand)) * math.prod(operand.plan.grid)
