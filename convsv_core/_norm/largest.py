"""The largest norm among the frequencies of a grid, and where: one search behind everything that asks for it.

`operator_norm`, `norm_bounds` on a grid, the step hooks and the certificates of projections all call it. Two moments of
the Gram matrices bound the eigenvalues at every frequency without a matrix. Eigenvalues are computed where these bounds
are largest. All other frequencies are tested against the largest eigenvalue so far, at a fraction of the cost of their
eigenvalues. The search repeats both steps among the frequencies that fail the test. The tests run in the precision of
the answer, and double precision repeats the few tests that fail.

The search reads values. Under tracing there are none. The search then runs on the host, if the backend can call it from
a traced program. Otherwise all eigenvalues are computed (`norm_on_grid`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.gram import GramOf, GramPolynomial, gram_evaluator, polynomial_roundings, smaller_gram
from convsv_core._symbol.moments import MomentBounds, moment_bounds
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import (
    BLOCK_BYTES,
    RealPart,
    Tabulated,
    phases_on_host,
    symbol_at,
    symbol_evaluator,
    symbol_polynomial,
)
from convsv_core._symbol.rows import (
    GramRows,
    PolynomialRows,
    ProductRows,
    grid_rows,
    largest_eigenvalues,
    product_rounding,
)
from convsv_core._symbol.small_matrices import real_and_complex, safe_sqrt
from convsv_core._symbol.transform import is_long, symbol_error
from convsv_core.backend import Array, ArraySpec, BlockWork

__all__ = ["GridNorm", "Largest", "largest_among", "largest_on_grid", "norm_on_grid", "norms_of_groups"]

DOUBLE_EPS = 1e-15
"""Largest eps of an arithmetic in which a search is exact to the rounding of its answer. It separates the two dtypes.

In single precision the margin of a test for its own rounding, up to 1e-4 of the square, would hide larger norms.
"""

TIED_EPS = 8
"""Values that differ by at most this many eps, relative, are equal to the largest one in a derivative. A guess."""

FIRST_PROBES = 1
"""Frequencies whose eigenvalues are computed before the others are tested against the largest of them.

Each further round doubles it. It was chosen by measurement: with 1, most kernels in training need two tests.
"""


class Largest(NamedTuple):
    """Hold the largest eigenvalue of the Gram matrices of a grid, which is the square of the largest norm.

    Attributes
    ----------
    value : float
        The eigenvalue as computed. It is 0 if no eigenvalue exceeds the level, because none was computed then.
    upper : float
        An upper bound of all eigenvalues, or the level if the level is larger. It counts the rounding error bound of
        `value` twice, so that eigenvalues equal to `value` up to rounding pass a test against it.
    place : int or None
        The place of `value` among the visited frequencies.
    """

    value: float
    upper: float
    place: int | None

    @property
    def lower(self) -> float:
        """Return a lower bound of the largest eigenvalue: `value` less its rounding error bound."""
        return max(self.value - (self.upper - self.value) / 2, 0.0) if self.place is not None else 0.0


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
    return *_rounded(operand, found), _gradient_at(operand.widen() if exact else operand, found.place)


def _norm_in_library(operand: Operand, exact: bool) -> tuple[Array, ...]:
    """Return the norm and the widening, computed by the kernel's own library, which differentiates the norm."""
    backend, wide = operand.backend, operand.widen()
    if wide.eps > DOUBLE_EPS or backend.compiles or not backend.has_values(operand.kernel):
        return tuple(_norm_of_all(operand))
    found = _search(dataclasses.replace(operand, kernel=backend.stop_gradient(operand.kernel)), exact)
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


def _gradient_at(operand: Operand, place: int) -> HostArray:
    """Return the derivative of the norm at one of the visited frequencies, for an operand of NumPy arrays.

    At this frequency the symbol is ``A = sum_p exp(i p theta) K_p``. The derivative of its norm is ``Re u* dA v`` for
    a pair of singular vectors u and v. It is 0 at the zero kernel.
    """
    backend = operand.backend
    frequency = operand.plan.frequencies[place : place + 1]
    with backend.computation_context(operand.kernel):
        matrices = symbol_at(operand, frequency)[0, ...]
        squares, vectors = backend.eigh(smaller_gram(backend, matrices))
    group = int(np.argmax(squares[:, -1]))
    matrix, vector = matrices[group], vectors[group, :, -1]
    if matrix.shape[0] <= matrix.shape[1]:
        left, right = vector, backend.adjoint(matrix) @ vector
    else:
        left, right = matrix @ vector, vector
    norm = float(np.linalg.norm(left) * np.linalg.norm(right))
    phases = phases_on_host(operand.plan, frequency, operand.computed_in)[0]
    taps = np.zeros((len(phases), *matrices.shape), operand.kernel.dtype)
    if norm > 0:
        pair = np.outer(np.conj(left / norm), right)
        if operand.plan.real:  # The real part of the product of the phases with the pair.
            waves, parts = np.stack([phases.real, -phases.imag], axis=1), np.stack([pair.real, pair.imag])
            taps[:, group] = np.tensordot(waves, parts, axes=1)
        else:
            taps[:, group] = phases[:, None, None] * pair
    return operand.from_taps(taps)


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
    xp = operand.xp
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
    wide = operand.widen()
    if wide is operand or (exact and is_long(operand)):
        return _largest_of_rows(grid_rows(wide))
    fine = None
    if exact:
        frequencies = wide.backend.asarray_like(wide.plan.frequencies, wide.kernel)
        fine = ProductRows(symbol_polynomial(wide), frequencies)
    return _largest_of_rows(grid_rows(operand), fine)


def _largest_of_rows(rows: GramRows, fine: GramRows | None = None) -> Largest:
    bounds = moment_bounds(rows.gram) if isinstance(rows, PolynomialRows) else None
    return largest_among(rows, bounds, fine=fine)


def largest_among(
    rows: GramRows, bounds: MomentBounds | None, *, level: float = 0.0, fine: GramRows | None = None
) -> Largest:
    """Return the largest eigenvalue at all visited frequencies, if it may be above a level.

    Parameters
    ----------
    rows : GramRows
        They are named by place.
    bounds : MomentBounds or None
        Bounds of the same matrices. The search begins where they are largest.
    level : float, default 0
        The search ignores eigenvalues up to this level.
    fine : GramRows, optional
        The same matrices in a wider dtype. If given, the eigenvalues are computed from them, and they are tested where
        a test of `rows` fails.
    """
    uppers = np.full(len(rows.operand.plan.frequencies), np.inf)
    tested, probes, found = level > 0, FIRST_PROBES, Largest(0.0, level, None)
    if bounds is not None:
        assert isinstance(rows, PolynomialRows)
        uppers = bounds.uppers.max(axis=1) + rows.rounding
        tested = float(bounds.estimates.max()) <= level  # Otherwise an eigenvalue exceeds the level.
    left = np.argsort(-uppers, kind="stable")
    while len(left := left[uppers[left] > found.upper]):
        if tested:
            left = left[rows.above(left, found.upper)]
            if fine is not None:
                left = left[fine.above(left, found.upper)]
        if len(left):
            first = (fine or rows).largest(left[:probes])
            best = int(np.argmax(first.values))
            upper = max(found.upper, float((2 * first.uppers - first.values).max()))
            if found.place is None or first.values[best] > found.value:
                found = Largest(float(first.values[best]), upper, int(left[best]))
            else:
                found = found._replace(upper=upper)
        left, tested, probes = left[probes:], True, 2 * probes
    return found
