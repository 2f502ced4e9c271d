"""Projection onto the ball of kernels whose operator norm is at most a bound."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, TypeAlias

from convsv_core._geometry.padding import check_repeats_no_pixel
from convsv_core._geometry.shapes import check_input_shape
from convsv_core._norm.fixed_grid import EverySizeGrid, every_size_grid, grid_upper_bound
from convsv_core._projection.certificate import (
    CERTIFICATE_RTOL,
    SLACK_EPS,
    Problem,
    certify,
    certify_original,
    frequencies_above,
    rescaled,
)
from convsv_core._projection.clipping import check_bound
from convsv_core._projection.dykstra import (
    CHECK_EVERY,
    DualState,
    ProjectionState,
    advance,
    begin,
    from_state,
    nearest,
    squared_change,
)
from convsv_core._projection.excess import Method, Samples, clip_and_cut
from convsv_core._symbol.operand import Operand, make_operand, shape_of
from convsv_core._symbol.small_matrices import safe_sqrt
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_int, check_positive
from convsv_core.plugins import backend_of, on_values

ProjectionMethod: TypeAlias = Literal["dykstra", "alternating", "rescale", "newton-schulz"]
__all__ = ["METHODS", "Projection", "ProjectionMethod", "ProjectionState", "project"]

METHODS = ("dykstra", "alternating", "rescale", "newton-schulz")

GRID_RTOL = 0.01
"""Share by which the norm can rise between the frequencies of the grid that stands for every input size. A guess."""


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
    with problem.operand.backend.computation_context(problem.operand.kernel):
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
    check_positive("rtol", rtol)
    shape = shape_of(kernel, conv)
    backend = backend_of(kernel)
    kernel = backend.stop_gradient(kernel)
    if input_shape is None:
        check_repeats_no_pixel(shape, conv)
        grid = every_size_grid(shape, conv, GRID_RTOL)
    else:
        grid = EverySizeGrid(check_input_shape(input_shape, conv), conv, 1.0)
    try:
        operand = make_operand(kernel, grid.input_shape, grid.conv)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{error}; input_shape=None bounds circular, zero and 'valid' padding of every size"
        ) from None
    limit = check_bound(operand, bound) / operand.scale
    narrow, operand = operand, operand.widen()
    limit = operand.xp.astype(limit, operand.real_dtype)
    known = backend.truth(limit >= 0) is not None
    rtol = max(rtol, CERTIFICATE_RTOL) if input_shape is None else rtol
    return Problem(operand, narrow, limit, known, input_shape is None, grid.factor, method, float(rtol))


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
        kernel, iterations, converged, reached = nearest(problem, max_iterations, state)
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
    return bool(squared_change(problem.operand, rescaling) < squared_change(problem.operand, moved))


def _alternate(problem: Problem, max_iterations: int) -> tuple[Array, int, bool]:
    """Clip and cut in turns."""
    operand, limit = problem.operand, float(problem.bound)
    kernel, iterations = operand.kernel, 0
    method: Method = "products" if problem.method == "newton-schulz" else "gram"
    while iterations < max_iterations:
        kernel = operand.run(_clip_and_cut, method, arrays=(kernel, problem.bound))
        iterations += 1
        if iterations % CHECK_EVERY and iterations < max_iterations:
            continue
        if not len(frequencies_above(problem, kernel, limit * (1 + problem.rtol)).places):
            return kernel, iterations, True
    return kernel, iterations, False


def _clip_and_cut(operand: Operand, kernel: Array, bound: Array, method: Method) -> Array:
    return kernel - clip_and_cut(operand, kernel, bound, method)


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
        _, dual = from_state(problem, state)
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
        frequencies = operand.backend.asarray_like(plan.frequencies, operand.kernel)
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
    xp, backend = operand.xp, operand.backend
    samples = Samples.at(operand)
    value = xp.full_like(operand.scale, -math.inf)
    kernel = operand.kernel
    if method == "dykstra":

        def step(*state: Array) -> tuple[Array, ...]:
            return advance(operand, bound, *samples, *state)

        state = DualState(*backend.repeat(step, begin(operand, *samples, dual), steps, operand.kernel))
        dual, value, kernel = state.dual, state.value, kernel - state.change
    elif method != "rescale":
        how: Method = "products" if method == "newton-schulz" else "gram"

        def alternate(kernel: Array) -> tuple[Array, ...]:
            return (_clip_and_cut(operand, kernel, bound, how),)

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
    squared = xp.where(inside, xp.zeros_like(share), squared_change(operand, kernel))
    if method == "dykstra":
        converged = inside | (squared - 2 * value <= rtol * squared)
    else:
        converged = inside | (after <= bound * (1 + rtol))
    norm = xp.where(inside, before, after * share)
    distance = xp.where(inside, xp.zeros_like(share), _distance(operand, kernel, every_size))
    return operand.answer(kernel), operand.answer(norm), operand.answer(distance), converged, dual


# ---- both ------------------------------------------------------------------------------------------


def _distance(operand: Operand, kernel: Array, every_size: bool) -> Array:
    """Frobenius distance from the operand's kernel: of the operators, or for every input size of the taps."""
    squared = squared_change(operand, kernel)
    return safe_sqrt(operand.xp, squared / math.prod(operand.plan.grid) if every_size else squared)


def _number(operand: Operand, value: float | Array) -> Array:
    return operand.answer(operand.xp.full_like(operand.scale, float(value)))
