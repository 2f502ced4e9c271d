"""Gram matrices of the symbol at given frequencies: ``A A*`` or ``A* A``, whichever is smaller.

A Gram matrix is a trigonometric polynomial of the frequency, ``sum over s of G_s exp(i s theta)``. The offset s is a
difference of two offsets of the symbol. Because ``G_-s = G_s*``, the polynomial is a sum of cosines and sines times
Hermitian matrices. For a real kernel this sum is two products of real matrices, a quarter of the work of a complex
product.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from convsv_core._geometry.plan import HostArray, Plan
from convsv_core._geometry.rounding import summation_units
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import Evaluator, phase_tables, phases_at
from convsv_core._symbol.small_matrices import squared_norm
from convsv_core._symbol.transform import is_long, lag_lengths, lag_products, transform_roundings
from convsv_core.backend import Array, Backend

__all__ = [
    "GramOf",
    "GramPolynomial",
    "coefficient_norms",
    "differences_of",
    "factor_rows",
    "gram_coefficients",
    "gram_evaluator",
    "gram_polynomial",
    "half_differences",
    "polynomial_roundings",
    "smaller_gram",
    "sum_rounding",
    "useful_polynomial",
]

PAIRED_ENTRIES = 1 << 18
"""Largest number of entries of the products of all pairs of taps for which one matrix product computes them all.

With more entries, one product for each difference needs less memory. A guess.
"""

SMALL_PRODUCTS = 4
"""Time of the products that make the coefficients, in units of the time of one product with as many operations.

These products are small and run one after another. A guess.
"""


@dataclass(frozen=True)
class GramOf:
    """Evaluate the Gram matrices of the matrices of another evaluator: the smaller of ``A A*`` and ``A* A``."""

    operand: Operand
    evaluate: Evaluator

    @property
    def row_bytes(self) -> int:
        """Return the bytes of working memory of one frequency; see `Evaluator`."""
        return 2 * self.evaluate.row_bytes

    def __call__(self, frequencies: Array) -> Array:
        """Return the Gram matrices at the frequencies of the given indices."""
        return smaller_gram(self.operand.backend, self.evaluate(frequencies))


@dataclass(frozen=True)
class GramPolynomial:
    """Evaluate the Gram matrices from their own coefficients.

    A row of factors stands for the matrix ``level I + sum of cos C_s + sum of sin S_s``. It holds the level, then the
    cosine of each difference's angle, then the sine of each difference's angle. The sine of the first difference, which
    is 0, is left out.

    Attributes
    ----------
    operand : Operand
        Its plan gives the grid.
    differences : int array, shape (half, ndim)
        One difference of each pair s and -s, with 0 first.
    coefficients : array, shape (half, groups, side, side)
        ``G_s``, real for real kernels.
    cosines, sines : arrays, shapes (1 + half, entries) and (half - 1, entries)
        For real kernels, the real parts of I and of each ``C_s``, and the imaginary parts of each ``S_s``. For
        complex kernels, the real and the imaginary parts of I and of all ``C_s`` and ``S_s``, shape (2 * half,
        entries) each.
    tables : list of array
        The phases of the differences along each axis; see `phase_tables`.
    """

    operand: Operand
    differences: HostArray
    coefficients: Array
    cosines: Array
    sines: Array
    tables: list[Array]

    @property
    def row_bytes(self) -> int:
        """Return the bytes of working memory of one frequency; see `Evaluator`."""
        half, groups, side, _ = self.coefficients.shape
        return (4 * half + 4 * groups * side**2) * self.operand.complex_bytes

    def __call__(self, frequencies: Array) -> Array:
        """Return the Gram matrices at the frequencies of the given indices."""
        cosines, sines = self._waves(frequencies)
        return self.matrices(self.operand.xp.concat([cosines[:, :1] * 0, cosines, sines], axis=1))

    def on_grid(self, plan: Plan) -> GramPolynomial | None:
        """Return the same polynomial on the grid of another plan, or None if the offsets differ there."""
        if plan.offsets != self.operand.plan.offsets:
            return None
        operand = dataclasses.replace(self.operand, plan=plan)
        tables = phase_tables(operand, [*map(differences_of, plan.offsets)])
        return dataclasses.replace(self, operand=operand, tables=tables)

    def _waves(self, frequencies: Array) -> tuple[Array, Array]:
        """Return the cosines and the sines of the angles of the differences at the given frequencies."""
        xp = self.operand.xp
        phases = phases_at(self.tables, frequencies, xp)[:, -len(self.differences) :]
        return xp.real(phases), xp.imag(phases)[:, 1:]

    def matrices(self, factors: Array) -> Array:
        """Return the matrices that rows of factors stand for: shape (B, groups, side, side)."""
        xp, backend = self.operand.xp, self.operand.backend
        for_real = for_imaginary = factors
        if self.operand.plan.real:
            count = 1 + len(self.differences)
            for_real, for_imaginary = factors[:, :count], factors[:, count:]
        parts = xp.matmul(for_real, self.cosines), xp.matmul(for_imaginary, self.sines)
        return xp.reshape(backend.complex(*parts), (-1, *self.coefficients.shape[1:]))

    def part(self, groups: slice) -> GramPolynomial:
        """Return the Gram matrices of some of the groups."""
        entries = self.coefficients.shape[-1] ** 2
        columns = slice(groups.start * entries, groups.stop * entries)
        return dataclasses.replace(
            self,
            coefficients=self.coefficients[:, groups, :, :],
            cosines=self.cosines[:, columns],
            sines=self.sines[:, columns],
        )

    def roundings(self) -> HostArray:
        """Return a rounding error bound of the eigenvalues of each group, at all frequencies: shape (groups,)."""
        return self.operand.backend.to_numpy(polynomial_roundings(self.operand, self.coefficients)).astype(float)


def factor_rows(reach: HostArray) -> HostArray:
    """Return rows of factors that stand for ``-G``, on the host.

    `reach` holds the angle of each of the `half_differences` in radians: shape (rows, half). The level is 0.
    """
    return np.concatenate([np.zeros((len(reach), 1)), -np.cos(reach), -np.sin(reach[:, 1:])], axis=1)


def coefficient_norms(operand: Operand, coefficients: Array) -> Array:
    """Return the Frobenius norm of each coefficient plus the norm of its opposite: shape (half, groups).

    The result is a constant for differentiation. The coefficient of 0 is its own opposite, and counts once.
    """
    xp = operand.xp
    squares = squared_norm(xp, operand.backend.stop_gradient(coefficients), axis=(-2, -1))
    norms = xp.sqrt(squares)
    return xp.concat([norms[:1, ...], 2 * norms[1:, ...]])


def polynomial_roundings(operand: Operand, coefficients: Array) -> Array:
    """Return a rounding error bound of the eigenvalues of each group's Gram matrices: shape (groups,).

    The bound holds at every frequency, for matrices that are computed from these coefficients.
    """
    moduli = operand.xp.sum(coefficient_norms(operand, coefficients), axis=0)
    roundings = sum_rounding(operand.plan) * operand.eps * moduli
    return roundings + transform_roundings(operand) if is_long(operand) else roundings


def sum_rounding(plan: Plan) -> float:
    """Return the rounding error bound of the sums that make a Gram matrix and its eigenvalues.

    The unit is eps times the sum of the absolute values of the terms.
    """
    rows, columns = plan.block
    differences = math.prod(map(len, map(differences_of, plan.offsets)))
    terms = differences + plan.offset_count * max(rows, columns) + min(rows, columns)
    return summation_units(terms) / 2


def smaller_gram(backend: Backend, matrices: Array) -> Array:
    """Return ``W W*`` or ``W* W`` for each matrix W in the last two axes, whichever is smaller."""
    xp, adjoint = backend.namespace(matrices), backend.adjoint(matrices)
    wide = matrices.shape[-2] <= matrices.shape[-1]
    return xp.matmul(matrices, adjoint) if wide else xp.matmul(adjoint, matrices)


def gram_evaluator(operand: Operand, symbol: Evaluator) -> Evaluator:
    """Return the cheapest way to evaluate the Gram matrices of `symbol`.

    The coefficients of the polynomial cost one product for each pair of taps. Without them, each frequency costs one
    product.
    """
    return gram_polynomial(operand) if _is_cheaper(operand, SMALL_PRODUCTS) else GramOf(operand, symbol)


def useful_polynomial(operand: Operand) -> GramPolynomial | None:
    """Return the Gram matrices as a polynomial, or None if its coefficients cost more than a product at each frequency.

    Here the work on coefficients counts once, because `moment_bounds` uses them too.
    """
    return gram_polynomial(operand) if _is_cheaper(operand, 1) else None


def _is_cheaper(operand: Operand, pair_cost: float) -> bool:
    """Tell whether a polynomial costs less than a product at each frequency.

    The products of a pair of taps count `pair_cost` times.
    """
    plan = operand.plan
    rows, columns = plan.block
    side = min(rows, columns)
    offsets, differences = plan.offset_count, math.prod(map(len, map(differences_of, plan.offsets)))
    direct = len(plan.frequencies) * rows * columns * ((4 if plan.real else 8) * offsets + 8 * side)
    if is_long(operand):
        points = math.prod(lag_lengths(plan))
        pairs = points * rows * columns * (8 * side + 40 * math.log2(points))
    else:
        pairs = pair_cost * offsets * (offsets + 1) // 2 * (2 if plan.real else 8) * rows * columns * side
    return pairs + len(plan.frequencies) * (2 if plan.real else 4) * differences * side**2 <= direct


def gram_polynomial(operand: Operand, coefficients: Array | None = None) -> GramPolynomial:
    """Return the symbol's Gram matrices as a polynomial, from `coefficients` if the caller has them."""
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    coefficients = gram_coefficients(operand) if coefficients is None else coefficients
    _, groups, side, _ = coefficients.shape
    others = coefficients[1:, ...]
    adjoint = backend.adjoint(others)
    identity = backend.asarray_like(np.tile(np.eye(side), (1, groups, 1, 1)), coefficients)
    even = xp.concat(
        [xp.astype(identity, coefficients.dtype, copy=False), coefficients[:1, ...], others + adjoint], axis=0
    )
    odd = others - adjoint  # The factor i of the sines is added below.
    if plan.real:
        cosines, sines = even, odd
    else:
        cosines = xp.concat([xp.real(even), -xp.imag(odd)], axis=0)
        sines = xp.concat([xp.imag(even), xp.real(odd)], axis=0)
    return GramPolynomial(
        operand,
        half_differences(plan),
        coefficients,
        xp.reshape(cosines, (cosines.shape[0], math.prod(cosines.shape[1:]))),
        xp.reshape(sines, (sines.shape[0], math.prod(sines.shape[1:]))),
        phase_tables(operand, [*map(differences_of, plan.offsets)]),
    )


def gram_coefficients(operand: Operand) -> Array:
    """Return the coefficients of the symbol's Gram matrix ``sum over s of G_s exp(i s theta)``.

    ``G_s`` is the sum of ``K_p K_q*`` over the taps p and q whose offsets differ by s. Because ``G_-s = G_s*``, one
    coefficient of each such pair is enough.

    Returns
    -------
    array, shape (half, groups, side, side)
        Real for real kernels, with ``G_0`` first. The order is that of `half_differences`.
    """
    taps, sign = operand.taps(), 1
    if taps.shape[-2] > taps.shape[-1]:  # A* A is the Gram matrix of the adjoint taps at the opposite offsets.
        taps, sign = operand.backend.adjoint(taps), -1
    if is_long(operand):
        return _transformed_coefficients(operand, taps, reverse=sign < 0)
    pairs = _pairs(operand.plan.offsets, sign)
    if taps.shape[1] * (taps.shape[0] * taps.shape[2]) ** 2 <= PAIRED_ENTRIES:
        return _paired_products(operand.backend, taps, pairs)
    return _summed_products(operand.backend, taps, pairs)


def _transformed_coefficients(operand: Operand, taps: Array, *, reverse: bool) -> Array:
    """Return the coefficients of a long kernel's Gram matrix, as `gram_coefficients` does."""
    xp, lengths = operand.xp, lag_lengths(operand.plan)
    products = lag_products(operand, taps, reverse=reverse)
    products = xp.reshape(products, (math.prod(lengths), *products.shape[len(lengths) :]))
    places = np.ravel_multi_index(tuple((half_differences(operand.plan) % lengths).T), lengths)
    products = operand.backend.take(products, places, 0)
    return xp.real(products) if operand.plan.real else products


def half_differences(plan: Plan) -> HostArray:
    """Return one difference of each pair s and -s: shape (half, ndim). The caller must not write to it.

    They are the second half of all combinations of the axes' differences, in row-major order, so 0 comes first.
    """
    return _half_differences(plan.offsets)


@functools.lru_cache(maxsize=64)
def _half_differences(offsets: tuple[tuple[int, ...], ...]) -> HostArray:
    """Return the `half_differences` of the offsets along each axis, from a cache."""
    found = np.asarray(list(itertools.product(*map(differences_of, offsets))))
    return found[len(found) // 2 :]


@functools.lru_cache(maxsize=256)
def differences_of(offsets: tuple[int, ...]) -> tuple[int, ...]:
    """Return every difference of two of the offsets, ascending."""
    steps = {b - a for a, b in itertools.pairwise(offsets)}
    if len(steps) == 1:  # The differences of equally spaced offsets need no pairs.
        (step,) = steps
        return tuple(range(offsets[0] - offsets[-1], offsets[-1] - offsets[0] + step, step))
    return tuple(sorted({a - b for a in offsets for b in offsets}))


Pairs: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
"""For each of the `half_differences`, the indices (p, q) of all pairs of taps whose offsets differ by it."""


@functools.lru_cache(maxsize=64)
def _pairs(offsets: tuple[tuple[int, ...], ...], sign: int) -> Pairs:
    """Return the pairs of taps for each of the `half_differences`.

    The offsets of the two taps of a pair differ by `sign` times the difference.
    """
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {
        difference: [] for difference in itertools.product(*map(differences_of, offsets))
    }
    for (p, one), (q, other) in itertools.product(enumerate(itertools.product(*offsets)), repeat=2):
        found[tuple(sign * (a - b) for a, b in zip(one, other, strict=True))].append((p, q))
    return tuple(tuple(listed) for listed in list(found.values())[len(found) // 2 :])


def _paired_products(backend: Backend, taps: Array, pairs: Pairs) -> Array:
    """Return the sum of ``K_p K_q*`` over each list of pairs, from one product of all taps with all taps."""
    xp = backend.namespace(taps)
    count, groups, side, inner = taps.shape
    flat = xp.reshape(xp.permute_dims(taps, (1, 0, 2, 3)), (groups, count * side, inner))
    products = xp.reshape(xp.matmul(flat, backend.adjoint(flat)), (groups, count, side, count, side))
    products = xp.reshape(xp.permute_dims(products, (1, 3, 0, 2, 4)), (count**2, -1))
    chosen = xp.astype(backend.asarray_like(_chosen(pairs, count), products), products.dtype, copy=False)
    return xp.reshape(xp.matmul(chosen, products), (len(pairs), groups, side, side))


@functools.lru_cache(maxsize=64)
def _chosen(pairs: Pairs, count: int) -> HostArray:
    """Return the matrix that adds the products of each list of pairs: shape (lists, count * count)."""
    chosen = np.zeros((len(pairs), count**2))
    for row, listed in zip(chosen, pairs, strict=True):
        row[[p * count + q for p, q in listed]] = 1
    return chosen


def _summed_products(backend: Backend, taps: Array, pairs: Pairs) -> Array:
    """Return the sum of ``K_p K_q*`` over each list of pairs, from one product for each list."""
    xp = backend.namespace(taps)
    count, groups, side, inner = taps.shape
    beside = xp.permute_dims(taps, (1, 2, 0, 3))
    beside = backend.contiguous(beside)
    sums = []
    for listed in pairs:
        left, right = (
            xp.reshape(
                beside if chosen == tuple(range(count)) else backend.take(beside, np.asarray(chosen), 2),
                (groups, side, len(chosen) * inner),
            )
            for chosen in zip(*listed, strict=True)
        )
        sums.append(xp.matmul(left, backend.adjoint(right)))
    return xp.stack(sums)
