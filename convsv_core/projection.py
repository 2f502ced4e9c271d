"""Projection onto the ball of kernels whose operator norm is at most a bound.

The nearest kernel is found from the dual of the convex problem "least distance to K, norm at most c". With one matrix
Y a frequency, P(Y) the taps nearest to the operator of these matrices, and N frequencies, the dual is

    maximise  N (<P(Y), K> - |P(Y)|^2 / 2) - c sum |Y|_*,        with the kernel  X = K - P(Y).

Dykstra's algorithm of alternating projections is its proximal gradient method with step 1: ``Y <- excess over c of
Y + symbol(X)``. Here the same step is accelerated (Nesterov's momentum, restarted where it turns back), longer where
the dual is flatter, and applied to the frequencies alone that matter: about a thirtieth of the iterations. The gap
between the dual's value and that of a kernel within the ball says how near the nearest one is.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from convsv_core._geometry.padding import check_repeats_no_pixel
from convsv_core.backend import Array
from convsv_core.certificate import (
    CERTIFICATE_RTOL,
    SLACK_EPS,
    Problem,
    certify,
    certify_original,
    frequencies_above,
    rescaled,
)
from convsv_core.clipping import check_bound
from convsv_core.conv import Conv, as_int
from convsv_core.decomposition import absolute_square, safe_sqrt
from convsv_core.evaluation import itemsize
from convsv_core.excess import excess_pass, frequency_tables, sharing, taps_of
from convsv_core.fixed_grid import every_size_grid, grid_upper_bound
from convsv_core.operand import Operand, check_conv, make_operand
from convsv_core.plan import HostArray, check_input_shape
from convsv_core.plugins import backend_of, on_values
from convsv_core.spectrum import squared_frobenius
from convsv_core.threshold import Method

ProjectionMethod: TypeAlias = Literal["dykstra", "alternating", "rescale", "newton-schulz"]
METHODS = ("dykstra", "alternating", "rescale", "newton-schulz")

GRID_RTOL = 0.01
"""How far the norm can rise between the frequencies of the grid that stands for every input size."""

LONGER = 1.1
"""What the step of the dual is multiplied by after one that was not too long."""

NEAR = 0.97
"""Frequencies of at least this share of the bound enter the first working set."""

CHECK_EVERY = 5
"""Iterations from one look at the norm to the next."""

TOLERANCE = 0.1
"""Share of the gap that frequencies outside the working set may add by their excess over the bound."""

INNER = 0.5
"""Share of the gap that the problem of a working set is solved to."""

DUAL_BYTES = 1 << 30
"""What the dual variables of the working set may take."""


class ProjectionState(NamedTuple):
    """What a projection can begin from: the dual variables of an earlier one.

    Attributes
    ----------
    frequencies : array, shape (count, ndim), int
        Indices on the grid.
    dual : array, shape (count, groups, rows, columns), complex
        One matrix for each of them.
    """

    frequencies: Array
    dual: Array


class Projection(NamedTuple):
    """A kernel within a ball of the operator norm.

    Attributes
    ----------
    kernel : array
        Of the shape of the one that was projected.
    norm : 0-d array
        A certified upper bound of its operator norm.
    distance : 0-d array
        Frobenius norm of the operators' difference; of the taps' difference for every input size at once.
    iterations : int
    converged : bool
        Whether the method's own aim was reached (`project` says which); the bound holds in any case. A 0-d array
        where `steps` were asked for.
    state : ProjectionState or None
        To begin the next projection of a similar kernel from; None but for "dykstra".
    """

    kernel: Array
    norm: Array
    distance: Array
    iterations: int
    converged: bool | Array
    state: ProjectionState | None


@on_values
def project(
    kernel: Array,
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    bound: float | Array,
    *,
    method: ProjectionMethod = "dykstra",
    rtol: float = 1e-4,
    max_iterations: int = 1000,
    steps: int | None = None,
    state: ProjectionState | None = None,
) -> Projection:
    """Project a kernel onto the kernels of its shape whose operator norm is at most a bound.

    Every method returns a kernel that satisfies the bound, as its certificate says; they differ in how far
    they move it. A kernel within the bound comes back unchanged, bit for bit, for the price of the certificate.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    input_shape : tuple of int or None
        Spatial extents of the input of a circular convolution, in the order of ``conv.spatial``. None: the bound
        holds for every input size, and for circular, zero and 'valid' padding alike. The distance is then the
        least one but for the gap of the certificate: the last rescaling leaves a norm of 0.998 to 0.999 times the
        bound, which `norm_bounds` finds to be within it too.
    conv : Conv
        The geometry.
    bound : float or 0-d array of the kernel's library
        Not negative.
    method : {"dykstra", "alternating", "rescale", "newton-schulz"}, default "dykstra"
        "dykstra": the nearest such kernel, by an accelerated form of Dykstra's algorithm. "alternating": clip and cut
        in turns, as the paper proposes, until the norm is within ``1 + rtol`` of the bound. "rescale":
        multiply by ``bound / norm``. "newton-schulz": as "alternating", with matrix products alone and no
        decomposition, for accelerators; a pass is off by at most about 1e-5 of a matrix's Frobenius norm. Each
        ends with a rescaling by what the certificate leaves above the bound.
    rtol : float, default 1e-4
        "dykstra": relative gap, ``(distance^2 - d^2) / distance^2``, to a lower bound d of the least distance, on
        the grid of frequencies; for every input size 1e-3 at least. Otherwise, the excess over the bound,
        relative, at which to stop.
    max_iterations : int, default 1000
    steps : int, optional
        Take just so many iterations, over the whole grid, with no look at the values: traceable.
    state : ProjectionState, optional
        From the projection of a similar kernel, such as that of the training step before, with the same geometry.

    Returns
    -------
    Projection
        Unpacks as ``kernel, norm, distance, iterations, converged, state``. Arrays are float32 for kernels of 32
        bits or fewer, else float64.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `clip`; also for an unknown `method`, a `state` of another geometry, and where a call is
        traced without `steps`.

    Notes
    -----
    A constant to differentiation, like `clip`. A lazy kernel (Dask) is computed now, and projected as one task in the
    library of its chunks, with `steps` too. The certificate covers rounding: ``norm <= bound * (1 + 1e-6)``, and
    below `bound` after any change. Projecting twice changes nothing.

    Traceable with `steps`, where the certificate is the norm over the grid, for every input size that
    divided by the product of ``cos(d_i pi / N_i)`` (see `norm_bounds`); `state` is then over the whole grid. Source:
    Boyle and Dykstra, *Advances in Order Restricted Statistical Inference*, 1986; Beck and Teboulle, SIAM Journal on
    Imaging Sciences, 2009; O'Donoghue and Candes, *Foundations of Computational Mathematics*, 2015; alternating
    projections: Sedghi, Gupta and Long, ICLR 2019; Newton and Schulz: Higham, *Functions of Matrices*, 2008.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 3))
    >>> nearest = project(kernel, (8, 8), Conv("OIHW"), 1.0)
    >>> bool(nearest.norm <= 1.0), nearest.converged
    (True, True)
    >>> scaled = project(kernel, (8, 8), Conv("OIHW"), 1.0, method="rescale")
    >>> bool(nearest.distance < scaled.distance)
    True
    """
    problem = _make_problem(kernel, input_shape, conv, bound, method, rtol)
    with problem.operand.backend.computing(problem.operand.kernel):
        return _solve(problem, max_iterations, steps, state)


def _solve(problem: Problem, max_iterations: int, steps: int | None, state: ProjectionState | None) -> Projection:
    if steps is not None:
        return _project_steps(problem, as_int("steps", steps, least=1), state)
    if not problem.known:
        raise ValueError("steps=None: under tracing, where no value can be looked at, wanted a number of iterations")
    return _project(problem, as_int("max_iterations", max_iterations, least=1), state)


def _make_problem(
    kernel: Array,
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    bound: float | Array,
    method: ProjectionMethod,
    rtol: float,
) -> Problem:
    if method not in METHODS:
        raise ValueError(f"method={method!r}: wanted one of {', '.join(METHODS)}")
    if not isinstance(rtol, int | float) or isinstance(rtol, bool) or not rtol > 0:
        raise ValueError(f"rtol={rtol!r}: wanted a positive number")
    backend = backend_of(kernel)
    check_conv(conv)
    kernel = backend.stop_gradient(kernel)
    if input_shape is None:
        shape = tuple(int(extent) for extent in kernel.shape)
        check_repeats_no_pixel(shape, conv)
        extents, circular, factor = every_size_grid(shape, conv, GRID_RTOL)
    else:
        extents, circular, factor = check_input_shape(input_shape, conv), conv, 1.0
    try:
        operand = make_operand(kernel, extents, circular)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{error}; input_shape=None bounds circular, zero and 'valid' padding of every size"
        ) from None
    limit = check_bound(operand, bound) / operand.scale
    narrow, operand = operand, operand.widen()
    limit = operand.xp.astype(limit, operand.real_dtype)
    known = backend.truth(limit >= 0) is not None
    rtol = max(rtol, CERTIFICATE_RTOL) if input_shape is None else rtol
    return Problem(operand, narrow, limit, known, input_shape is None, factor, method, float(rtol))


# ---- eager: until it has converged -----------------------------------------------------------------


def _project(problem: Problem, max_iterations: int, state: ProjectionState | None) -> Projection:
    operand, limit = problem.operand, float(problem.bound)
    xp = operand.xp
    original = operand.answer(operand.kernel)
    upper, within = certify_original(problem)
    if within:
        eps = operand.answer_eps
        zero = operand.answer(xp.zeros_like(operand.scale))
        return Projection(original, _number(operand, upper * (1 + eps)), zero, 0, True, state)
    kernel, iterations, converged, reached = operand.kernel, 0, True, None
    if limit > 0 and problem.method == "dykstra":
        kernel, iterations, converged, reached = _nearest(problem, max_iterations, state)
    elif limit > 0 and problem.method != "rescale":
        kernel, iterations, converged = _alternate(problem, max_iterations)
    if problem.method != "rescale":
        before, (upper, _) = upper, certify(problem, kernel)
        # A search that was ended early may be beyond what one number does.
        if not converged and _is_nearer_rescaled(problem, before, kernel, upper):
            kernel, upper = operand.kernel, before
    answer, upper = rescaled(problem, kernel, upper)
    change = xp.astype(answer, operand.kernel.dtype) / operand.scale
    distance = _number(operand, _distance(operand, change, problem.every_size))
    return Projection(answer, _number(operand, upper), distance, iterations, converged, reached)


def _is_nearer_rescaled(problem: Problem, before: float, kernel: Array, upper: float) -> bool:
    """Whether the original, of norm `before`, is moved less by a rescaling than to a kernel of norm `upper`."""
    original, limit = problem.operand.kernel, float(problem.bound)
    moved = kernel * min(1.0, limit / upper) if upper > 0 else kernel
    rescaling = original * (limit / before)
    return bool(_squared_change(problem.operand, rescaling) < _squared_change(problem.operand, moved))


def _nearest(
    problem: Problem, max_iterations: int, state: ProjectionState | None
) -> tuple[Array, int, bool, ProjectionState]:
    """A kernel within the bound on the grid, iterations, whether it is near enough to the nearest, and the dual."""
    operand, limit = problem.operand, float(problem.bound)
    xp = operand.xp
    chosen, dual = _from_state(problem, state)
    above, *_ = frequencies_above(problem, operand.kernel, NEAR * limit)
    iterations = 0
    while True:
        chosen, dual = _extended(problem, chosen, dual, above)
        kernel, dual, spent, value = _accelerated(problem, chosen, dual, max_iterations - iterations)
        iterations += spent
        # An excess moves the whole kernel in the last rescaling, so it counts by the kernel's size over the distance.
        size = math.sqrt(float(squared_frobenius(dataclasses.replace(operand, kernel=kernel))))
        tolerance = TOLERANCE * problem.rtol * min(1.0, math.sqrt(max(2 * value, 0.0)) / max(size, sys.float_info.min))
        above, upper, rounding = frequencies_above(problem, kernel, limit * (1 + tolerance))
        squared = float(_squared_change(operand, kernel * min(1.0, limit / _computed(upper, rounding))))
        converged = squared - 2 * value <= problem.rtol * squared
        fresh = np.setdiff1d(above, chosen)
        if converged or iterations >= max_iterations or not len(fresh):
            break
        above = fresh
    used: HostArray = operand.backend.to_numpy(xp.any(xp.abs(dual) > 0, axis=(1, 2, 3)))
    frequencies = operand.backend.constant(problem.frequencies[chosen[used]], operand.kernel)
    dual = xp.take(dual, operand.backend.constant(np.flatnonzero(used), operand.kernel), axis=0)
    return kernel, iterations, converged, ProjectionState(frequencies, dual * operand.scale)


def _accelerated(
    problem: Problem, chosen: HostArray, dual: Array, max_iterations: int
) -> tuple[Array, Array, int, float]:
    """Solve the problem that knows the chosen frequencies alone: its kernel, dual, iterations, and dual value."""
    operand, limit = problem.operand, float(problem.bound)
    frequencies, weights = frequency_tables(operand, chosen)
    state = operand.run(_begin, arrays=(frequencies, weights, dual))
    iterations = 0
    while True:
        state = operand.run(_advance, arrays=(problem.bound, frequencies, weights, *state))
        iterations += 1
        if iterations % CHECK_EVERY and iterations < max_iterations:
            continue
        kernel, value = operand.kernel - state[2], float(state[-1])
        threshold = problem.threshold(kernel, chosen)
        above = threshold.rows_above(limit)
        upper = limit if above is None or not len(above) else _computed(*threshold.largest(above))
        squared = float(_squared_change(operand, kernel * min(1.0, limit / upper)))
        if squared - 2 * value <= INNER * problem.rtol * squared or iterations >= max_iterations:
            return kernel, state[0], iterations, value


def _computed(upper: float, rounding: float) -> float:
    """The norm that an upper bound was computed from: without what rounding may have taken from its square."""
    return math.sqrt(max(upper**2 - rounding, sys.float_info.min))


def _begin(operand: Operand, frequencies: Array, weights: Array, dual: Array) -> tuple[Array, ...]:
    """The state of the accelerated iteration: a dual, where to step from, the taps of both, momentum, step, value."""
    one = operand.xp.ones_like(operand.scale)
    change = taps_of(operand, frequencies, weights, dual)
    return dual, dual, change, change, one, one, -math.inf * one


def _advance(operand: Operand, bound: Array, frequencies: Array, weights: Array, *state: Array) -> tuple[Array, ...]:
    """One accelerated step of the dual, or none but a shorter step to try if the step was too long.

    A step of 1 is never too long; longer ones are tried, because where few frequencies matter they are right.
    """
    xp, plan = operand.xp, operand.plan
    dual, ahead, change, change_ahead, momentum, step, value = state
    longest = max(1.0, math.prod(plan.periods) / math.prod(axis.taps for axis in plan.axes))  # right for one frequency
    kernel = (operand.kernel - change_ahead) * xp.astype(step, change.dtype)
    new_change, new, trace = excess_pass(operand, kernel, bound * step, frequencies, weights, ahead, "gram", keep=True)
    assert new is not None
    assert trace is not None
    counts = xp.real(weights)[:, None, None, None] * plan.copies
    moved, moved_change = new - ahead, new_change - change_ahead
    taken = (step <= 1) | (
        step * _inner(operand, moved_change, moved_change) <= xp.sum(counts * absolute_square(xp, moved))
    )
    turned = xp.sum(counts * xp.real(operand.backend.conj(moved) * (new - dual))) < 0
    momentum = xp.where(taken & turned, xp.ones_like(momentum), momentum)
    following = (1 + xp.sqrt(1 + 4 / LONGER * momentum**2)) / 2
    beyond = (momentum - 1) / following
    new_value = _inner(operand, new_change, operand.kernel - new_change / 2)
    new_value = new_value - bound * plan.copies * xp.sum(xp.real(weights) * trace)
    advanced = (
        new,
        new + xp.astype(beyond, new.dtype) * (new - dual),
        new_change,
        new_change + xp.astype(beyond, new_change.dtype) * (new_change - change),
        following,
        xp.clip(step * LONGER, None, longest),
        new_value,
    )
    kept = (dual, ahead, change, change_ahead, momentum, xp.clip(step / 2, 1.0, None), value)
    known = operand.backend.truth(taken)
    if known is not None:
        return advanced if known else kept
    return tuple(xp.where(taken, one, other) for one, other in zip(advanced, kept, strict=True))


def _alternate(problem: Problem, max_iterations: int) -> tuple[Array, int, bool]:
    """Clip and cut in turns."""
    operand, limit = problem.operand, float(problem.bound)
    frequencies, weights = frequency_tables(operand, np.arange(len(problem.frequencies)))
    kernel, iterations = operand.kernel, 0
    method: Method = "products" if problem.method == "newton-schulz" else "gram"
    while iterations < max_iterations:
        kernel = operand.run(_clip_and_cut, method, arrays=(kernel, problem.bound, frequencies, weights))
        iterations += 1
        if iterations % CHECK_EVERY == 0 or iterations == max_iterations:
            above, *_ = frequencies_above(problem, kernel, limit * (1 + problem.rtol))
            if not len(above):
                return kernel, iterations, True
    return kernel, iterations, False


def _clip_and_cut(
    operand: Operand, kernel: Array, bound: Array, frequencies: Array, weights: Array, method: Method
) -> Array:
    return kernel - excess_pass(operand, kernel, bound, frequencies, weights, None, method)[0]


# ---- traceable: so many steps over the whole grid --------------------------------------------------


def _project_steps(problem: Problem, steps: int, state: ProjectionState | None) -> Projection:
    operand = problem.operand
    plan = operand.plan
    if state is None:
        shape = (len(plan.frequencies), plan.groups, *plan.block)
        dual = operand.xp.broadcast_to(
            operand.xp.astype(operand.xp.zeros_like(operand.scale), operand.complex_dtype), shape
        )
    else:
        _, dual = _from_state(problem, state)
        if dual.shape[0] != len(plan.frequencies):
            raise ValueError(
                f"state holds {dual.shape[0]} frequencies: with steps, wanted all {len(plan.frequencies)} of the grid"
            )
    arrays = (problem.bound, dual)
    kernel, norm, distance, converged, dual = operand.run(
        _fixed_steps, problem.method, steps, problem.every_size, problem.factor, problem.rtol, arrays=arrays
    )
    reached = None
    if problem.method == "dykstra":
        frequencies = operand.backend.constant(plan.frequencies, operand.kernel)
        reached = ProjectionState(frequencies, dual * operand.scale)
    return Projection(kernel, norm, distance, steps, converged, reached)


def _fixed_steps(
    operand: Operand,
    bound: Array,
    dual: Array,
    method: str,
    steps: int,
    every_size: bool,
    factor: float,
    rtol: float,
) -> tuple[Array, ...]:
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    frequencies, weights = frequency_tables(operand, np.arange(len(plan.frequencies)))
    value = xp.full_like(operand.scale, -math.inf)
    kernel = operand.kernel
    if method == "dykstra":

        def step(*state: Array) -> tuple[Array, ...]:
            return _advance(operand, bound, frequencies, weights, *state)

        begin = _begin(operand, frequencies, weights, dual)
        dual, _, change, _, _, _, value = backend.repeat(step, begin, steps, operand.kernel)
        kernel = kernel - change
    elif method != "rescale":
        how: Method = "products" if method == "newton-schulz" else "gram"

        def alternate(kernel: Array) -> tuple[Array, ...]:
            return (_clip_and_cut(operand, kernel, bound, frequencies, weights, how),)

        (kernel,) = backend.repeat(alternate, (kernel,), steps, operand.kernel)
    before, after = (
        grid_upper_bound(dataclasses.replace(operand, kernel=one), factor) for one in (operand.kernel, kernel)
    )
    eps = operand.answer_eps
    positive = after > 0
    share = xp.where(positive, bound / xp.where(positive, after, xp.ones_like(after)), xp.ones_like(after))
    share = xp.where(after > bound, share * (1 - SLACK_EPS * eps), xp.ones_like(share))
    inside = before <= bound * (1 + SLACK_EPS * eps)
    kernel = xp.where(inside, operand.kernel, kernel * share)
    squared = xp.where(inside, xp.zeros_like(share), _squared_change(operand, kernel))
    if method == "dykstra":
        converged = inside | (squared - 2 * value <= rtol * squared)
    else:
        converged = inside | (after <= bound * (1 + rtol))
    norm = xp.where(inside, before, after * share)
    distance = xp.where(inside, xp.zeros_like(share), _distance(operand, kernel, every_size))
    return operand.answer(kernel), operand.answer(norm), operand.answer(distance), converged, dual


# ---- both ------------------------------------------------------------------------------------------


def _inner(operand: Operand, change: Array, kernel: Array) -> Array:
    """Real inner product of two operators, of which the first is one that `to_kernel` gave."""
    xp = operand.xp
    products = xp.real(operand.backend.conj(change) * kernel)
    return xp.sum(products * sharing(operand)) * math.prod(operand.plan.grid)


def _squared_change(operand: Operand, kernel: Array) -> Array:
    """Squared Frobenius distance, over the grid, of an operator from the operand's own."""
    return squared_frobenius(dataclasses.replace(operand, kernel=kernel - operand.kernel))


def _distance(operand: Operand, kernel: Array, every_size: bool) -> Array:
    """Frobenius distance from the operand's kernel: of the operators, or for every input size of the taps."""
    squared = _squared_change(operand, kernel)
    return safe_sqrt(operand.xp, squared / math.prod(operand.plan.grid) if every_size else squared)


def _from_state(problem: Problem, state: ProjectionState | None) -> tuple[HostArray, Array]:
    """Places and dual of a state, at the operand's scale; of none, no place."""
    operand, plan = problem.operand, problem.operand.plan
    xp = operand.xp
    shape = (plan.groups, *plan.block)
    if state is None:
        dual = xp.astype(xp.zeros_like(operand.scale), operand.complex_dtype)
        return np.zeros(0, int), xp.broadcast_to(dual, (0, *shape))
    frequencies, dual = state
    if tuple(dual.shape[1:]) != shape or frequencies.ndim != 2 or frequencies.shape[1] != len(plan.axes):
        raise ValueError(
            f"state has matrices of shape {tuple(dual.shape[1:])}: wanted {shape}; is it of another layer?"
        )
    dual = xp.astype(dual / operand.scale, operand.complex_dtype)
    if not problem.known:
        return np.arange(dual.shape[0]), dual
    indices = operand.backend.to_numpy(frequencies).astype(int)
    if np.any((indices < 0) | (indices >= np.asarray(plan.periods))):
        raise ValueError(f"state holds frequencies beyond the grid {plan.periods}: is it of another input shape?")
    return plan.visit[np.ravel_multi_index(tuple(indices.T), plan.periods)], dual


def _extended(problem: Problem, chosen: HostArray, dual: Array, above: HostArray) -> tuple[HostArray, Array]:
    """A working set with more places, as far as memory goes, and its dual with zeros for these."""
    operand = problem.operand
    xp = operand.xp
    fresh = np.setdiff1d(above, chosen)
    affordable = DUAL_BYTES // (3 * math.prod(dual.shape[1:]) * itemsize(operand))
    fresh = fresh[: max(1, affordable - len(chosen))]
    zeros = xp.broadcast_to(
        xp.astype(xp.zeros_like(operand.scale), operand.complex_dtype), (len(fresh), *dual.shape[1:])
    )
    return np.concatenate([chosen, fresh]), xp.concat([dual, zeros], axis=0)


def _number(operand: Operand, value: float | Array) -> Array:
    return operand.answer(operand.xp.full_like(operand.scale, float(value)))
