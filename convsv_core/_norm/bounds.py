"""Certified bounds of the operator norm, for every input size at once or for one input size."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.padding import check_repeats_no_pixel, layer_operators
from convsv_core._geometry.plan import is_circulant
from convsv_core._geometry.shapes import check_input_shape
from convsv_core._norm.grid import search_grid
from convsv_core._norm.largest import largest_on_grid
from convsv_core._norm.padded import padded_operator_norm, padded_rounding
from convsv_core._norm.torus import TorusNorms, search_torus
from convsv_core._norm.transformed import transforms_pay
from convsv_core._symbol.kernel_values import check_values
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core._symbol.polynomial import fft_is_cheaper, symbol_polynomial
from convsv_core._symbol.singular_pairs import largest_pairs
from convsv_core._symbol.transform import is_long
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_int, check_positive
from convsv_core.plugins import backend_of, on_values

__all__ = ["NormBounds", "norm_bounds"]

ENUMERATED = 4096
"""Most frequencies of a grid that are all visited; larger grids are searched. A guess."""


LEAST_GAP, LARGEST_GAP = 2.0**-52, 1.0
"""The smallest and the largest relative gap that a search is asked for; a user's `rtol` may lie outside.

A gap below the rounding of float64 cannot be reached. With a very large one the cells would be so large that rounding
alone decides whether the Bernstein-Szego bound holds.
"""


class NormBounds(NamedTuple):
    """Hold certified bounds of an operator norm.

    Attributes
    ----------
    lower, upper : 0-d arrays
        ``lower <= norm <= upper``, rounding included.
    frequency : tuple of float
        The angle of each axis, in radians, at which `lower` is attained.
    evaluations : int
        The number of matrices of the symbol whose norm was computed.
    converged : bool
        Whether ``upper <= (1 + rtol) * lower``.
    left, right : arrays, shapes (groups, rows) and (groups, columns), complex
        Singular vector pair of the `symbol` at that frequency, 0 outside the group that attains it.
    """

    lower: Array
    upper: Array
    frequency: tuple[float, ...]
    evaluations: int
    converged: bool
    left: Array
    right: Array


@on_values
def norm_bounds(
    kernel: Array,
    conv: Conv,
    *,
    input_shape: tuple[int, ...] | None = None,
    rtol: float = 1e-3,
    max_evaluations: int = 20_000,
) -> NormBounds:
    """Bound the operator norm of a convolution from both sides, with a proof.

    Without an `input_shape` the bounds are those of the supremum of the symbol's norm over all frequencies, which is
    the norm on the infinite lattice. The supremum bounds the layer's norm from above for every input size, with
    circular, zero and 'valid' padding. It is the limit of the norms as the input grows. The cost does not depend on
    any input size. With an `input_shape` the bounds are those of the norm on input of these extents, with the padding
    that `conv` declares.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    conv : Conv
        The geometry. Without an `input_shape` its padding does not matter where it repeats no pixel: reflect,
        replicate and more circular padding than "same" has are refused, and for circular padding the bound
        is that of the extents which the stride divides.
    input_shape : tuple of int, optional
        Spatial extents of the layer's input, in the order of ``conv.spatial``.
    rtol : float, default 1e-3
        Relative gap to reach.
    max_evaluations : int, default 20000
        Most matrices of the symbol to visit after the first cover. When they are spent, the certificate reached so
        far is returned. For a kernel of 100 taps or more with one input or output channel in a group, a Fourier
        transform visits the first cover, which then is fine: about 35 matrices a tap.

    Returns
    -------
    NormBounds
        The bounds are true in any case, and ``upper <= (1 + rtol) * lower`` where `converged`.

    Raises
    ------
    TypeError, ValueError
        As for `singular_values`; also for an `rtol` that is not positive, and for a kernel that is traced.
    NotImplementedError
        The padding repeats pixels, and there is no `input_shape`.

    Notes
    -----
    On a circular grid both bounds close in on the largest of the grid's norms. With another padding, `lower` is the
    norm that `operator_norm` finds, less the tolerance of its rounding, and `upper` is the supremum over all
    frequencies times the norm of the padding. The gap between the two is real, and as a rule larger than `rtol`; it
    closes as the input grows.

    Neither traceable nor differentiable: the search reads norms on the host to decide where to look next. A kernel of
    JAX or PyTorch on one device of a CPU is bounded with NumPy. A lazy kernel (Dask) is computed now, and bounded as
    one task in the library of its chunks. (The gradient of the norm by the kernel is the real part of
    ``left_a exp(i q theta) conj(right_b)``, conjugated.)
    The computation runs in float64 where the library is fast in it. Both bounds are widened by the rounding error
    bounds of the norms and of the answer. A sum of n terms has a bound of ``min(n, 8 sqrt(n))`` unit roundoffs of the
    sum of the moduli (Higham and Mary, SIAM Journal on Scientific Computing, 2019). A Fourier transform of length N
    has a bound of ``8 log2(N)`` eps of the sum of the moduli (`convsv_core._symbol.transform`).

    Examples
    --------
    >>> import numpy as np
    >>> bounds = norm_bounds(np.ones((1, 1, 3, 3)), Conv("OIHW"))
    >>> bool(bounds.lower <= 9.0 <= bounds.upper), bounds.converged, bounds.frequency
    (True, True, (0.0, 0.0))
    """
    backend = backend_of(kernel)
    check_positive("rtol", rtol)
    budget = as_int("max_evaluations", max_evaluations, least=1)
    operand = make_operand(backend.stop_gradient(kernel), None, conv, lattice=True)
    check_values(operand.backend, operand.kernel, "the search reads norms; norm_upper_bound can be traced")
    if input_shape is None:
        check_repeats_no_pixel(tuple(kernel.shape), conv)
    extents = None if input_shape is None else check_input_shape(input_shape, conv)
    with operand.backend.computation_context(operand.kernel):
        return _norm_bounds(operand, kernel, extents, rtol, budget)


class _Found(NamedTuple):
    """Hold bounds at an operand's scale, before the answer is rounded, and the best frequency.

    Attributes
    ----------
    lower, upper : float
    frequency : tuple of float
        The angles of the best frequency.
    square : float
        The square of the symbol's norm there, as computed.
    evaluations : int
    """

    lower: float
    upper: float
    frequency: tuple[float, ...]
    square: float
    evaluations: int


def _norm_bounds(
    narrow: Operand, kernel: Array, input_shape: tuple[int, ...] | None, rtol: float, budget: int
) -> NormBounds:
    operand = narrow.widen()
    # The answer's own rounding, once up and once down, is part of the gap.
    margin = 2 * operand.answer_eps
    gap = min(max(rtol - 3 * margin, rtol / 2, LEAST_GAP), LARGEST_GAP)
    if input_shape is None:
        found = _on_torus(TorusNorms(operand, budget), gap)
    elif is_circulant(tuple(kernel.shape), input_shape, operand.plan.conv):
        found = _on_grid(narrow.on(input_shape), operand, gap, budget)
    else:
        norms = TorusNorms(operand, budget)
        found = _on_torus(norms, gap)
        scale = float(operand.scale)
        (operator,) = layer_operators(kernel.shape, operand.plan.conv, [input_shape])
        upper = operator.layer_upper(found.upper)
        attained = float(padded_operator_norm(kernel, input_shape, operand.plan.conv)) / scale
        attained -= padded_rounding(kernel, input_shape, operand.plan.conv, upper * scale) / scale
        found = found._replace(lower=max(0.0, attained * (1 - norms.relative_rounding)), upper=upper)
    lower, upper = found.lower * (1 - margin), max(found.upper, found.lower) * (1 + margin)
    left, right = _singular_pair(operand.on(None, all_residues=True), found.frequency, found.square)
    return NormBounds(
        operand.answer_lower(operand.xp.full_like(operand.scale, lower)),
        operand.answer_upper(operand.xp.full_like(operand.scale, upper)),
        found.frequency,
        found.evaluations,
        bool(upper <= (1 + rtol) * lower),
        left,
        right,
    )


def _on_torus(norms: TorusNorms, gap: float) -> _Found:
    upper = search_torus(norms, gap)
    steps = [axis.step for axis in norms.operand.plan.axes]
    frequency = tuple(float(angle) / step for angle, step in zip(norms.best_angles, steps, strict=True))
    return _Found(norms.best, upper, frequency, norms.best_square, norms.evaluations)


def _on_grid(narrow: Operand, lattice: Operand, gap: float, budget: int) -> _Found:
    grid = narrow.widen()
    count = len(grid.plan.frequencies)
    transformed = transforms_pay(grid) and fft_is_cheaper(grid)
    if transformed or count <= min(ENUMERATED, budget):
        largest = largest_on_grid(narrow)
        place = largest.place or 0
        lower, upper = math.sqrt(largest.lower), math.sqrt(largest.upper)
        frequency = _angles(grid, tuple(grid.plan.frequencies[place].tolist()))
        return _Found(lower, upper, frequency, largest.value, count)
    supremum = _on_torus(norms := TorusNorms(lattice, budget), gap)
    norms = TorusNorms(grid, budget, spent=norms.evaluations)
    search = search_grid(norms, gap, supremum.upper, supremum.frequency)
    return _Found(norms.best, search.upper, _angles(grid, search.frequency), norms.best_square, norms.evaluations)


def _angles(grid: Operand, frequency: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(2 * math.pi * j / axis.grid for j, axis in zip(frequency, grid.plan.axes, strict=True))


def _singular_pair(operand: Operand, frequency: tuple[float, ...], square: float) -> tuple[Array, Array]:
    """Return left and right singular vectors of the symbol at the given angles, 0 outside the best group.

    The square of the largest singular value there is known, at the operand's scale.
    """
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    polynomial = symbol_polynomial(operand)
    coefficients = polynomial.coefficients
    offsets = np.asarray(list(itertools.product(*plan.offsets)), float)
    steps = np.asarray([axis.step for axis in plan.axes])
    phases = np.exp(1j * (offsets * steps) @ np.asarray(frequency))
    phases = xp.astype(backend.asarray_like(phases, coefficients), operand.complex_dtype, copy=False)
    if is_long(operand):
        matrices = polynomial.matrices(phases[None, :])[0, ...]
    else:
        matrices = xp.sum(xp.reshape(phases, (-1, 1, 1, 1)) * coefficients, axis=0)
    bases = np.asarray(list(itertools.product(*(axis.bases for axis in plan.axes))), float)
    shifts = np.repeat(np.exp(1j * bases @ np.asarray(frequency)), plan.columns)
    matrices = matrices * xp.astype(backend.asarray_like(shifts, matrices), operand.complex_dtype, copy=False)
    if plan.conv.transposed:
        matrices = backend.adjoint(matrices)
    found = largest_pairs(backend.to_numpy(matrices)[None], np.asarray([square]))
    best = np.arange(plan.groups)[:, None] == found.groups
    left, right = (backend.asarray_like(best * vectors, matrices) for vectors in (found.left, found.right))
    return operand.answer(left, scaled=False), operand.answer(right, scaled=False)
