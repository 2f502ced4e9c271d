"""Projection onto the ball of kernels whose operator norm is at most a bound."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from convsv_core._norm.fixed_grid import grid_for, operand_on
from convsv_core._projection.certificate import (
    CERTIFICATE_RTOL,
    Problem,
    certify,
    certify_original,
    frequencies_above,
)
from convsv_core._projection.dykstra import CHECK_EVERY, nearest
from convsv_core._projection.excess import Method
from convsv_core._projection.final_rescaling import rescaled
from convsv_core._projection.fixed_steps import clip_and_cut_step, distance_of, fixed_steps
from convsv_core._projection.restoration import squared_change
from convsv_core._projection.working_set import ProjectionState, from_state
from convsv_core._symbol.bound_argument import check_bound
from convsv_core._symbol.operand import Operand, shape_of
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_int, check_positive
from convsv_core.plugins import backend_of, on_values

__all__ = ["METHODS", "Projection", "ProjectionMethod", "ProjectionState", "project"]

ProjectionMethod: TypeAlias = Literal["dykstra", "alternating", "rescale", "newton-schulz"]
"""The type of a method's name."""

METHODS = ("dykstra", "alternating", "rescale", "newton-schulz")
"""The methods of `project`, which its docstring describes."""

GRID_RTOL = 0.01
"""Relative rise of the norm between the frequencies of the grid that stands for every input size. A guess."""


class Projection(NamedTuple):
    """Hold a kernel within a ball of the operator norm, and how it was found.

    Attributes
    ----------
    kernel : array
        A kernel of the shape of the projected one.
    norm : 0-d array
        A certified upper bound of the kernel's operator norm.
    distance : 0-d array
        For one input size, the Frobenius norm of the difference between the two operators. For every input size, the
        Frobenius norm of the difference between the taps.
    iterations : int
    converged : bool
        Whether the method reached its own aim, which `project` describes. The norm is within the bound in any case. A
        0-d array if `steps` were asked for.
    state : ProjectionState or None
        The start of a later projection of a similar kernel. None unless the method is "dykstra".
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

    Every method returns a kernel within the bound, with a certificate. The methods differ in how far they move the
    kernel. A kernel within the bound is returned unchanged, bit for bit, at the price of the certificate.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or complex128.
    input_shape : tuple of int or None
        Spatial extents of the input of a circular convolution, in the order of ``conv.spatial``. None: the bound
        holds for every input size, and for circular, zero and 'valid' padding. The last rescaling then leaves a norm
        of 0.998 to 0.999 times the bound, so that `norm_bounds` finds the kernel within the bound too. The distance
        is the least one up to this gap.
    conv : Conv
        The geometry.
    bound : float or 0-d array of the kernel's library
        At least 0. Infinity leaves every kernel unchanged.
    method : {"dykstra", "alternating", "rescale", "newton-schulz"}, default "dykstra"
        Every method ends with a rescaling, if the certificate is above the bound.

        - "dykstra": the nearest kernel, by an accelerated form of Dykstra's algorithm.
        - "alternating": clip and cut in turns, as the paper proposes, until the norm is at most ``1 + rtol`` times
          the bound.
        - "rescale": multiply by ``bound / norm``.
        - "newton-schulz": as "alternating", for accelerators, with matrix products and no decomposition. The error of
          a pass is at most about 1e-5 of a matrix's Frobenius norm.
    rtol : float, default 1e-4
        For "dykstra", the relative gap ``(distance^2 - d^2) / distance^2`` at which to stop. Here d is a lower bound
        of the least distance on the grid of frequencies. The gap is at least 1e-3 for every input size. For the
        other methods, the relative excess over the bound at which to stop.
    max_iterations : int, default 1000
    steps : int, optional
        Take this number of iterations over the whole grid, without reading values: traceable.
    state : ProjectionState, optional
        From the projection of a similar kernel with the same geometry, such as in the training step before.

    Returns
    -------
    Projection
        It unpacks as ``kernel, norm, distance, iterations, converged, state``. Arrays have the precision of the
        kernel, but float32 for kernels of 16 bits.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `clip`. Also for an unknown `method`, for a `state` of another geometry, and if a call is traced
        without `steps`.

    Notes
    -----
    A constant for differentiation, like `clip`. A lazy kernel (Dask) is computed now, and projected as one task in
    the library of its chunks, also with `steps`. The certificate includes rounding errors. ``norm`` is at most
    ``bound * (1 + 1e-6)``, and at most `bound` if the kernel was changed. A second projection changes nothing.

    Kernels of JAX and PyTorch on one device of a CPU are projected with NumPy, those of JAX from compiled programs too;
    there `steps` is the largest number of iterations, on a working set of frequencies.

    Traceable with `steps`. The certificate is then the norm over the grid. For every input size it is divided by the
    product of ``cos(d_i pi / N_i)``; see `norm_bounds`. `state` then holds the whole grid.

    Sources: Boyle and Dykstra, *Advances in Order Restricted Statistical Inference*, 1986; Beck and Teboulle, SIAM
    Journal on Imaging Sciences, 2009; O'Donoghue and Candes, *Foundations of Computational Mathematics*, 2015. For
    alternating projections: Sedghi, Gupta and Long, ICLR 2019. For Newton and Schulz: Higham, *Functions of
    Matrices*, 2008.

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
    """Solve the problem by a number of steps if one is given, else until it has converged."""
    if steps is not None:
        return _project_steps(problem, as_int("steps", steps, least=1), state)
    if not problem.known:
        raise ValueError("steps=None: under tracing no value can be read: wanted a number of iterations")
    return _project(problem, as_int("max_iterations", max_iterations, least=1), state)


def _make_problem(
    kernel: Array,
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    bound: float | Array,
    method: ProjectionMethod,
    rtol: float,
) -> Problem:
    """Check the arguments of a call and return the problem."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: wanted one of {', '.join(METHODS)}")
    check_positive("rtol", rtol)
    shape = shape_of(kernel, conv)
    backend = backend_of(kernel)
    kernel = backend.stop_gradient(kernel)
    grid = grid_for(shape, input_shape, conv, GRID_RTOL)
    operand = operand_on(kernel, grid)
    limit = check_bound(operand, bound) / operand.scale
    narrow, operand = operand, operand.widen()
    limit = operand.xp.astype(limit, operand.real_dtype)
    known = backend.truth(limit >= 0) is not None
    rtol = max(rtol, CERTIFICATE_RTOL) if input_shape is None else rtol
    return Problem(operand, narrow, limit, known, input_shape is None, grid.factor, method, float(rtol))


# ---- in eager mode, until it has converged ---------------------------------------------------------


def _project(problem: Problem, max_iterations: int, state: ProjectionState | None) -> Projection:
    """Project by the problem's method, certify the result and rescale it."""
    operand, limit = problem.operand, float(problem.bound)
    xp = operand.xp
    original = operand.answer(operand.kernel)
    upper, within = certify_original(problem)
    if within:
        eps = operand.answer_eps
        zero = operand.answer(xp.zeros_like(operand.scale))
        return Projection(original, _upper_bound(operand, upper * (1 + eps)), zero, 0, True, state)
    kernel, iterations, converged, reached = operand.kernel, 0, True, None
    if limit > 0 and problem.method == "dykstra":
        kernel, iterations, converged, reached, _ = nearest(problem, max_iterations, state)
    elif limit > 0 and problem.method != "rescale":
        kernel, iterations, converged = _alternate(problem, max_iterations)
    if problem.method != "rescale":
        before, (upper, _) = upper, certify(problem, kernel)
        # The result of a search that ended early may be farther away than a rescaled original.
        if not converged and _is_nearer_rescaled(problem, before, kernel, upper):
            kernel, upper = operand.kernel, before
    answer, upper = rescaled(problem, kernel, upper)
    change = xp.astype(answer, operand.kernel.dtype) / operand.scale
    distance = operand.answer(distance_of(operand, change, problem.every_size))
    return Projection(answer, _upper_bound(operand, upper), distance, iterations, converged, reached)


def _is_nearer_rescaled(problem: Problem, before: float, kernel: Array, upper: float) -> bool:
    """Tell whether a rescaling moves the original less than the search did.

    The original has the norm `before`. The search found `kernel`, of norm `upper`.
    """
    original, limit = problem.operand.kernel, float(problem.bound)
    moved = kernel * min(1.0, limit / upper) if upper > 0 else kernel
    rescaling = original * (limit / before)
    return bool(squared_change(problem.operand, rescaling) < squared_change(problem.operand, moved))


def _alternate(problem: Problem, max_iterations: int) -> tuple[Array, int, bool]:
    """Clip and cut in turns.

    Return the kernel, the number of iterations, and whether the norm is within the tolerance.
    """
    operand, limit = problem.operand, float(problem.bound)
    kernel, iterations = operand.kernel, 0
    method: Method = "products" if problem.method == "newton-schulz" else "gram"
    while iterations < max_iterations:
        kernel = operand.run(clip_and_cut_step, method, arrays=(kernel, problem.bound))
        iterations += 1
        if iterations % CHECK_EVERY and iterations < max_iterations:
            continue
        if not len(frequencies_above(problem, kernel, limit * (1 + problem.rtol)).places):
            return kernel, iterations, True
    return kernel, iterations, False


# ---- traceable, by a number of steps over the whole grid -------------------------------------------


def _project_steps(problem: Problem, steps: int, state: ProjectionState | None) -> Projection:
    """Project by a number of steps over the whole grid."""
    operand = problem.operand
    plan = operand.plan
    if state is None:
        dual = operand.complex_zeros((len(plan.frequencies), plan.groups, *plan.block))
    else:
        _, dual = from_state(problem, state)
        if dual.shape[0] != len(plan.frequencies):
            raise ValueError(
                f"state holds {dual.shape[0]} frequencies: with steps, wanted all {len(plan.frequencies)} of the grid"
            )
    arrays = (problem.bound, dual)
    kernel, norm, distance, converged, dual = operand.run(
        fixed_steps, problem.method, steps, problem.every_size, problem.factor, problem.rtol, arrays=arrays
    )
    reached = None
    if problem.method == "dykstra":
        frequencies = operand.backend.asarray_like(plan.frequencies, operand.kernel)
        reached = ProjectionState(frequencies, dual * operand.scale)
    return Projection(kernel, norm, distance, steps, converged, reached)


def _upper_bound(operand: Operand, upper: float) -> Array:
    """Return an upper bound of a norm as a 0-d array of the answer's dtype, at the user's scale."""
    return operand.answer_upper(operand.xp.full_like(operand.scale, upper))
