"""The largest norm among the frequencies of a grid, and where: one search behind everything that asks for it.

`operator_norm`, `norm_bounds` on a grid and the certificates of projections all call it. The search itself is in
`convsv_core._norm.search`. Its tests run in the precision of the answer, and double precision repeats the few tests
that fail.

The search reads values. Under tracing there are none. The search then runs on the host, if the backend can call it from
a traced program. Otherwise all eigenvalues are computed (`norm_on_grid`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from convsv_core._norm.cover import grid_cover
from convsv_core._norm.search import Largest, largest_of_each, moments_of, parts_of
from convsv_core._norm.slopes import slopes_at
from convsv_core._symbol.gram import GramOf, GramPolynomial, gram_evaluator, polynomial_roundings, smaller_gram
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import (
    BLOCK_BYTES,
    RealPart,
    Tabulated,
    symbol_at,
    symbol_evaluator,
    symbol_polynomial,
)
from convsv_core._symbol.rows import ProductRows, grid_rows, product_rounding
from convsv_core._symbol.small_matrices import largest_eigenvalues, real_and_complex, safe_sqrt
from convsv_core._symbol.transform import is_long, symbol_error
from convsv_core.backend import Array, ArraySpec, BlockWork

__all__ = ["GridNorm", "Largest", "largest_of_kernels", "largest_on_grid", "norm_on_grid", "norms_of_groups"]

SEARCHED_SIDE = 8
"""Smallest side of matrices for which the norms of groups are searched for. Smaller ones decompose as fast. A guess."""

TIED_EPS = 8
"""Values that differ by at most this many eps, relative, are equal to the largest one in a derivative. A guess."""


class GridNorm(NamedTuple):
    """Hold the largest norm on a grid, for use in traced and differentiated code.

    Attributes
    ----------
    norm : 0-d array
        At the operand's scale, differentiable: the gradient is that of the maximiser, 0 for the zero kernel.
    widening : 0-d array or float
        At least 1, a constant to differentiation: ``norm * widening`` is at least the exact norm.
    """

    norm: Array
    widening: Array | float


def norm_on_grid(operand: Operand, *, exact: bool = True) -> GridNorm:
    """Return the largest norm at the visited frequencies of an operand: differentiable and traceable.

    If values can be read and double precision is fast, a search finds the frequency, and only the norm there is
    differentiated. The search runs on the host where the backend allows it, also from a traced program. Otherwise all
    eigenvalues are computed, in the operand's own precision. Without `exact`, the search may settle for a norm that is
    smaller than the largest one by the rounding errors of single precision; the widening includes them.
    """
    return GridNorm(*operand.run(_norm_and_widening, exact))


def _norm_and_widening(operand: Operand, exact: bool) -> tuple[Array, ...]:
    number = ArraySpec((), operand.computed_in)
    return operand.call_host(
        _norm_on_host, exact, results=(number, number), otherwise=_norm_in_library, gradient=_norm_and_gradient
    )


def _norm_on_host(operand: Operand, exact: bool) -> tuple[Array, ...]:
    """Return the norm and the widening, rounded to the dtype of an operand of NumPy arrays."""
    return _rounded(operand, _search(operand, exact))


def _norm_and_gradient(operand: Operand, exact: bool) -> tuple[Array, ...]:
    """Return the norm, the widening and the derivative of the norm, as `Backend.call_host` wants them."""
    found = _search(operand, exact)
    slope = slopes_at(operand.widen() if exact else operand, [found.place], [found.norm**2])
    return *_rounded(operand, found), slope


def _norm_in_library(operand: Operand, exact: bool) -> tuple[Array, ...]:
    """Return the norm and the widening, computed by the kernel's own library, which differentiates the norm."""
    backend, wide = operand.backend, operand.widen()
    # In single precision the margin of a test for its own rounding, up to 1e-4 of the square, would hide larger norms.
    if not wide.is_double or backend.compiles or not backend.has_values(operand.kernel):
        return tuple(_norm_of_all(operand))
    found = _search(operand.of(backend.stop_gradient(operand.kernel)), exact)
    norm = operand.xp.astype(_norm_at(wide, found.place), operand.real_dtype, copy=False)
    return norm, operand.xp.full_like(backend.stop_gradient(norm), found.widening)


def _rounded(operand: Operand, found: _Found) -> tuple[Array, ...]:
    dtype = np.dtype(operand.computed_in)
    return np.asarray(found.norm, dtype), np.asarray(found.widening * (1 + operand.eps), dtype)


class _Found(NamedTuple):
    """Hold the place of a largest norm, the norm there, and its `GridNorm.widening`."""

    place: int
    norm: float
    widening: float


def _search(operand: Operand, exact: bool) -> _Found:
    """Find the largest norm on the grid, for an operand whose values can be read and are constants."""
    with operand.backend.computation_context(operand.kernel):
        found = largest_on_grid(operand, exact=exact)
    norm = math.sqrt(max(found.value, 0.0))
    return _Found(found.place or 0, norm, math.sqrt(found.upper) / norm if norm > 0 else 1.0)


def _norm_at(operand: Operand, place: int) -> Array:
    """Return the norm at one of the visited frequencies, computed so that it can be differentiated."""
    xp, backend = operand.xp, operand.backend
    gram = smaller_gram(backend, symbol_at(operand, operand.plan.frequencies[place : place + 1]))
    return safe_sqrt(xp, xp.max(largest_eigenvalues(backend, gram)))


def _norm_of_all(operand: Operand) -> GridNorm:
    """Return the largest norm from the eigenvalues at all visited frequencies."""
    xp, backend = operand.xp, operand.backend
    found = _squares_of_all(operand)
    squares = found[..., 0]
    norm = safe_sqrt(xp, _maximum(operand, squares))
    known = backend.stop_gradient(norm)
    nonzero = xp.where(known == 0, xp.ones_like(known), known)
    share = xp.max(backend.stop_gradient(found[..., 1])) / nonzero**2
    return GridNorm(norm, xp.sqrt(1 + xp.where(known == 0, xp.zeros_like(share), share)))


def norms_of_groups(operand: Operand) -> Array:
    """Return an upper bound of each group's norm at the visited frequencies, rounding included: shape (groups,)."""
    xp, backend = operand.xp, operand.backend
    if min(operand.plan.block) >= SEARCHED_SIDE and backend.has_values(operand.kernel) and not backend.compiles:
        found = largest_of_kernels(operand, operand.plan.groups, exact=False)
        uppers = backend.asarray_like(np.asarray([one.upper for one in found]), operand.kernel)
        uppers = xp.astype(uppers, operand.real_dtype)
    else:
        uppers = xp.max(xp.sum(_squares_of_all(operand), axis=-1), axis=0)
    return safe_sqrt(xp, uppers) * (1 + 4 * operand.eps)


def _squares_of_all(operand: Operand) -> Array:
    """Return the squared norm of each matrix, and a bound of its rounding error: shape (visited, groups, 2)."""
    found: Array = operand.backend.concatenate(
        [
            operand.map_blocks(_squares_of_block, frequencies, real, budget=BLOCK_BYTES)
            for real, frequencies in real_and_complex(operand.plan)
        ]
    )
    return found


def _maximum(operand: Operand, values: Array) -> Array:
    """Return the largest of some values, whose derivative is the mean derivative of those that are equal to it.

    The derivative of `max` itself looks for equal values, and is NaN if there are none: a compiler may compute the
    values twice, with different roundings.
    """
    xp, known = operand.xp, operand.backend.stop_gradient(values)
    largest = xp.max(known)
    is_largest = xp.astype(known >= largest * (1 - TIED_EPS * operand.eps), values.dtype)
    shares = is_largest / xp.clip(xp.sum(is_largest), 1.0, None)
    return largest + xp.sum(shares * (values - known))


def _squares_of_block(operand: Operand, real: bool) -> BlockWork:
    """Return a function that gives the largest eigenvalue of each group, and a bound of its rounding error."""
    xp, backend = operand.xp, operand.backend
    symbol = symbol_evaluator(operand) if is_long(operand) else symbol_polynomial(operand)
    evaluate = GramOf(operand, RealPart(operand, symbol)) if real else gram_evaluator(operand, symbol)
    transformed = isinstance(symbol, Tabulated)
    error = symbol_error(operand, math.prod(operand.plan.periods)) if transformed else None

    def squares(frequencies: Array) -> Array:
        grams = evaluate(frequencies)
        if isinstance(evaluate, GramPolynomial):
            rounding = polynomial_roundings(operand, evaluate.coefficients)
        else:
            trace = backend.stop_gradient(xp.real(xp.linalg.trace(grams)))
            rounding = product_rounding(operand, trace, error)
        values = largest_eigenvalues(backend, grams)
        return xp.stack([values, rounding + 0 * values], axis=-1)

    return BlockWork(squares, 2 * evaluate.row_bytes)


def largest_on_grid(operand: Operand, *, exact: bool = True) -> Largest:
    """Return the largest eigenvalue at the visited frequencies of an operand, at its scale.

    Parameters
    ----------
    operand : Operand
        In the dtype of the answer: the search widens the operand itself.
    exact : bool, default True
        Whether the eigenvalue is exact to the rounding of double precision, if the library has it. The tests run in
        the operand's own precision. Double precision repeats the tests that fail, and computes the eigenvalues.
    """
    (found,) = largest_of_kernels(operand, 1, exact=exact)
    return found


def largest_of_kernels(operand: Operand, count: int, *, exact: bool) -> list[Largest]:
    """Return what `largest_on_grid` returns for each of `count` kernels, which are the groups of one operand."""
    wide = operand.widen() if exact else operand
    long = wide is not operand and is_long(operand)
    rows, fine = grid_rows(wide if long else operand), None
    if wide is not operand and not long:
        frequencies = wide.backend.asarray_like(wide.plan.frequencies, wide.kernel)
        fine = parts_of(ProductRows(symbol_polynomial(wide), frequencies), count)
    bounds = moments_of(rows, count)
    return largest_of_each(parts_of(rows, count), bounds, [0.0] * count, fine, grid_cover(operand.plan))
