"""The kernel of operator norm at most 1 with the largest inner product with a gradient."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, NamedTuple

from convsv_core._geometry.rounding import summation_units
from convsv_core._norm.every_size import EverySizeGrid
from convsv_core._norm.fixed_grid import grid_for, operand_on
from convsv_core._norm.largest import norms_of_groups
from convsv_core._projection.candidates import (
    DirectionMethod,
    candidate,
    check_direction_method,
    check_matrices,
    furthest_in_the_ball,
    take_iterations,
)
from convsv_core._projection.certificate import Problem, certify
from convsv_core._projection.final_rescaling import rescaled
from convsv_core._projection.splitting import (
    Pull,
    Split,
    advance,
    begin,
    by_group,
    choose_by_group,
    dual_uppers,
    inner_products,
    pull_of,
    resume,
    with_norm_one,
)
from convsv_core._symbol.operand import Operand, shape_of
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_int, check_positive
from convsv_core.plugins import backend_of, on_values

__all__ = [
    "DirectionState",
    "SteepestDirection",
    "steepest_direction",
]

EVERY_SIZE_RISES = {1: 0.5, 2: 1.0, 3: 3.0}
"""Largest relative rise of the norm between the frequencies of the grid that stands for every input size.

The unit is the tolerance, and the key is the number of spatial axes. In 3-D a finer grid would take many times longer.
A guess, after measurements of layers of ResNet-32 in training: a rise of 0.07 (12 x 12 frequencies) cost 0.01 of the
optimum, and a rise of 0.17 (8 x 8 frequencies) cost 0.03. Layers with few channels lose more.
"""

LEAST_RISE = 0.003
"""Least value of the same rise, which bounds the number of frequencies: 3600 for 3 x 3 taps. A guess."""

CHECK_EVERY = 10
"""Iterations between two computations of the bounds, which decide whether to stop. A guess.

The bounds cost about two iterations.
"""

GRID_SHARE = 0.5
"""Share of the tolerance that the gap on a grid which stands for every size may take. A guess."""


class DirectionState(NamedTuple):
    """Hold the matrices from which a later search for a direction starts.

    Attributes
    ----------
    matrices : array, shape (visited, groups, rows, columns), complex
        One matrix for each visited frequency of the grid, without a unit.
    """

    matrices: Array


class SteepestDirection(NamedTuple):
    """Hold a kernel of operator norm at most 1 with a large inner product with a gradient.

    Attributes
    ----------
    direction : array
        A kernel of the gradient's shape.
    alignment : 0-d array
        The inner product of `direction` with the gradient, less its rounding error bound.
    upper : 0-d array
        An upper bound of the inner product over all kernels of norm at most 1.
    iterations : int
    converged : bool
        Whether ``alignment >= (1 - rtol) * upper``. A 0-d array if the call is traced.
    state : DirectionState or None
        The start of a later search for a similar gradient. None unless the method "exact" took iterations.
    """

    direction: Array
    alignment: Array
    upper: Array
    iterations: int
    converged: bool | Array
    state: DirectionState | None


@on_values
def steepest_direction(
    gradient: Array,
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    *,
    method: DirectionMethod = "exact",
    rtol: float = 1e-2,
    max_iterations: int = 400,
    state: DirectionState | None = None,
) -> SteepestDirection:
    r"""Find the kernel of operator norm at most 1 with the largest inner product with a gradient.

    This is the direction of steepest descent in the operator norm of the convolution:

        maximise  Re <gradient, D>  over kernels D of the gradient's shape, subject to \|D\| <= 1.

    The inner product is taken over the taps. For a 1 x 1 kernel, D is the polar factor of the gradient's matrix, which
    Muon steps along. For other kernels D is neither the polar factor of the flattened kernel nor the cut polar factors
    at the frequencies.

    Parameters
    ----------
    gradient : array
        Gradient of a kernel, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64
        or complex128.
    input_shape : tuple of int or None
        Spatial extents of the input of a circular convolution, in the order of ``conv.spatial``. None: the norm is
        bounded for every input size, and for circular, zero and 'valid' padding.
    conv : Conv
        The geometry.
    method : {"exact", "polar", "flat"}, default "exact"
        Every method ends with a scaling by a certified norm, for each group of channels by itself.

        - "exact": the maximiser, by an iteration that stops when its share of the optimum is proved.
        - "polar": the polar factor at each frequency, cut back to the taps.
        - "flat": the polar factor of the kernel as a matrix, with all taps of all inputs in one row.
    rtol : float, default 1e-2
        For "exact", stop at ``alignment >= (1 - rtol) * upper``.
    max_iterations : int, default 400
        Largest number of iterations of "exact". If the call is traced, the number that is taken.
    state : DirectionState, optional
        From the search for a similar gradient with the same geometry, such as in the training step before.

    Returns
    -------
    SteepestDirection
        It unpacks as ``direction, alignment, upper, iterations, converged, state``, with ``alignment <= optimum <=
        upper``. Arrays have the precision of the gradient, but float32 for gradients of 16 bits. A gradient of zero
        has the direction zero.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `project`. Also for an unknown `method`, and for a `state` of another geometry.

    Notes
    -----
    A constant for differentiation. Traceable: a gradient with NaN or infinity then gives NaN. A lazy gradient (Dask) is
    computed now, as one task in the library of its chunks. The search for gradients of JAX and PyTorch on one device of
    a CPU is made with NumPy.

    Both bounds include rounding errors. The certified norm of the direction is at most 1, to a relative 1e-6. For every
    input size, the search takes place on a grid, and a certificate for all frequencies scales the direction. If the
    call is traced, the certificate is the norm on the grid, divided by the product of ``cos(d_i pi / N_i)`` (see
    `norm_upper_bound`); the direction then is shorter by up to `rtol`, and by up
    to three times as much for three spatial axes.

    If a tap acts at each place of the grid, as for 1 x 1 kernels and for kernels that the stride does not let overlap,
    the polar factors are the maximiser, and no iteration is needed. If taps of a kernel larger than the input wrap onto
    each other, the direction has equal parts at them, and the optimum is taken over such kernels.

    "exact" returns the direction of "flat" if few iterations do not lead to a better one. A traced call compares the
    two for matrices of at least 48 rows and columns alone.

    An iteration takes a decomposition at each frequency of the grid. A kernel with one input or output channel in a
    group needs none. On accelerators, matrix products replace the decompositions, outside of compilers.

    Sources: Carlson, Cevher and Carin, AISTATS 2015, and Jordan et al., *Muon*, 2024, for steps along polar factors.
    For the iteration: Lions and Mercier, *SIAM Journal on Numerical Analysis*, 1979.

    Examples
    --------
    >>> import numpy as np
    >>> gradient = np.random.default_rng(0).normal(size=(4, 4, 3, 3))
    >>> exact = steepest_direction(gradient, (8, 8), Conv("OIHW"))
    >>> bool(0.99 * exact.upper <= exact.alignment <= exact.upper), exact.converged
    (True, True)
    >>> flat = steepest_direction(gradient, (8, 8), Conv("OIHW"), method="flat")
    >>> bool(flat.alignment < exact.alignment)
    True
    """
    check_direction_method(method)
    check_positive("rtol", rtol)
    limit = as_int("max_iterations", max_iterations, least=1)
    shape = shape_of(gradient, conv)
    gradient = backend_of(gradient).stop_gradient(gradient)
    rise = max(EVERY_SIZE_RISES[conv.ndim] * float(rtol), LEAST_RISE)
    grid = grid_for(shape, input_shape, conv, rise)
    narrow = operand_on(gradient, grid, name="gradient")
    operand = narrow.widen()
    matrices = None if state is None else _checked(operand, state)
    with operand.backend.computation_context(operand.kernel):
        if operand.backend.truth(operand.scale > 0) is None:
            return _take(operand, grid.factor, method, float(rtol), limit, matrices)
        return _search(operand, narrow, grid, input_shape is None, method, float(rtol), limit, matrices)


def _checked(operand: Operand, state: DirectionState) -> Array:
    """Return the matrices of a state in the dtype of the computation, after a check of their shape."""
    if not isinstance(state, DirectionState):
        raise TypeError(f"state is a {type(state).__qualname__}: wanted the state of an earlier result, or None")
    check_matrices(operand, state.matrices)
    return operand.xp.astype(state.matrices, operand.complex_dtype, copy=False)


# ---- in eager mode, until it has converged ---------------------------------------------------------


def _search(
    operand: Operand,
    narrow: Operand,
    grid: EverySizeGrid,
    every_size: bool,
    method: DirectionMethod,
    rtol: float,
    limit: int,
    matrices: Array | None,
) -> SteepestDirection:
    """Search until the share of the optimum is proved, and scale the best direction by a certified norm."""
    xp = operand.xp
    pull = Pull(*operand.run(pull_of))
    pulled = operand.of(pull.kernel)
    weights = pull.weights * operand.scale
    iterations, reached = 0, None
    if method == "exact" and not operand.plan.is_full and bool(xp.any(pull.nonzero)):
        gap = rtol * GRID_SHARE if every_size else rtol
        split = Split(*(pulled.run(begin) if matrices is None else pulled.run(resume, arrays=(matrices,))))
        # After few iterations the flattened polar factor may still be the better direction.
        best, lowers = pulled.run(_aligned, arrays=(pulled.run(candidate, "flat"),))
        uppers = xp.full_like(lowers, math.inf)
        while True:
            split = Split(*pulled.run(advance, arrays=split))
            iterations += 1
            if iterations % CHECK_EVERY and iterations < limit:
                continue
            found = _Bounds(*pulled.run(_bounds, arrays=(split.direction, split.matrices)))
            best, lowers, uppers = _better(pulled, found, best, lowers, uppers)
            if iterations >= limit or float(xp.sum(weights * (lowers - (1 - gap) * uppers))) >= 0:
                break
        reached = DirectionState(split.matrices)
    else:
        best, _ = pulled.run(_aligned, arrays=(pulled.run(candidate, method),))
        uppers = pulled.run(dual_uppers, None)
    best = by_group(pulled, best, xp.astype(pull.nonzero, weights.dtype))
    one = xp.ones_like(operand.scale)
    ball = dataclasses.replace(operand, kernel=best, scale=one)
    problem = Problem(
        ball,
        dataclasses.replace(narrow, scale=xp.ones_like(narrow.scale)),
        one,
        True,
        every_size,
        grid.factor,
        "",
        rtol,
    )
    direction = rescaled(problem, best, _upper_norm(problem, best)).kernel
    alignment = _alignment(operand, xp.astype(direction, operand.kernel.dtype)) * operand.scale
    upper = xp.sum(weights * xp.astype(pull.nonzero, weights.dtype) * uppers) * (1 + 4 * operand.eps)
    converged = bool(alignment >= (1 - rtol) * upper)
    return SteepestDirection(direction, *_rounded(operand, alignment, upper), iterations, converged, reached)


def _upper_norm(problem: Problem, kernel: Array) -> float:
    """Return a certified upper bound of a kernel's norm, above 0."""
    upper = certify(problem, kernel).upper
    if problem.every_size:
        # In 3-D a search over all frequencies may end before its bound is as close as the bound of the grid.
        norms = problem.operand.of(kernel).run(norms_of_groups)
        upper = min(upper, float(problem.operand.xp.max(norms)) * problem.factor * (1 + 4 * problem.operand.eps))
    return max(upper, sys.float_info.min)


class _Bounds(NamedTuple):
    """Hold a direction of norm 1 on the grid, and for each group both bounds of the optimum, for the pull."""

    direction: Array
    lowers: Array
    uppers: Array


def _bounds(operand: Operand, direction: Array, matrices: Array) -> _Bounds:
    """Return a direction scaled to norm 1 in each group, with the bounds of the optimum."""
    return _Bounds(*_aligned(operand, direction), dual_uppers(operand, matrices))


def _aligned(operand: Operand, direction: Array) -> tuple[Array, Array]:
    """Return a direction scaled to norm 1 in each group, and the inner products of the groups with the pull."""
    direction = with_norm_one(operand, direction)
    return direction, inner_products(operand, operand.kernel, direction)


def _better(operand: Operand, found: _Bounds, best: Array, lowers: Array, uppers: Array) -> tuple[Array, Array, Array]:
    """Return for each group the direction with the larger inner product, and the closer bounds."""
    xp = operand.xp
    best = choose_by_group(operand, lowers > found.lowers, best, found.direction)
    return best, xp.maximum(lowers, found.lowers), xp.minimum(uppers, found.uppers)


# ---- traceable, by a number of iterations ------------------------------------------------------------


def _take(
    operand: Operand, factor: float, method: DirectionMethod, rtol: float, count: int, matrices: Array | None
) -> SteepestDirection:
    """Take a number of iterations over the whole grid."""
    arrays = () if matrices is None else (matrices,)
    direction, alignment, upper, converged, *reached = operand.run(_taken, method, count, factor, rtol, arrays=arrays)
    iterations = count if reached else 0
    state = DirectionState(*reached) if reached else None
    return SteepestDirection(direction, alignment, upper, iterations, converged, state)


def _taken(operand: Operand, *arguments: Any) -> tuple[Array, ...]:
    """Return the direction, its bounds, whether it has converged, and the last matrices if there are any."""
    *arrays, method, count, factor, rtol = arguments
    xp = operand.xp
    pull = pull_of(operand)
    found = take_iterations(operand, pull, method, count, arrays[0] if arrays else None)
    direction = furthest_in_the_ball(operand, pull, found.kernels, factor)
    uppers = dual_uppers(operand.of(pull.kernel), found.matrices)
    upper = xp.sum(pull.weights * uppers * xp.astype(pull.nonzero, uppers.dtype)) * (1 + 4 * operand.eps)
    alignment = _alignment(operand, direction)
    converged = alignment >= (1 - rtol) * upper
    bounds = _rounded(operand, alignment * operand.scale, upper * operand.scale)
    reached = () if found.matrices is None else (found.matrices,)
    return (operand.answer(direction, scaled=False), *bounds, converged, *reached)


# ---- for both --------------------------------------------------------------------------------------


def _alignment(operand: Operand, direction: Array) -> Array:
    """Return the inner product of a direction with the operand's kernel, less a bound of its rounding error."""
    xp = operand.xp
    products = xp.real(operand.backend.conj(operand.kernel) * direction)
    units = 2 + summation_units(math.prod(operand.kernel.shape))
    rounding = units * operand.eps * xp.sum(xp.abs(operand.kernel) * xp.abs(direction))
    return xp.sum(products) - rounding


def _rounded(operand: Operand, alignment: Array, upper: Array) -> tuple[Array, Array]:
    """Return both bounds, given at the user's scale, in the dtype of the answer; a zero stays a zero."""
    eps = operand.answer_eps
    lower = alignment - eps * operand.xp.abs(alignment)
    return operand.answer_lower(lower, scaled=False), operand.answer_upper(upper * (1 + eps), scaled=False)
