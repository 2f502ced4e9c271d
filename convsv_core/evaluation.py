"""Matrices at given frequencies: the symbol's, and those of its Gram matrix.

Both are trigonometric polynomials. A product of a small matrix of phases with the coefficients, block by
block, is less work than an FFT for the kernels of real networks, and leaves the matrices contiguous.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from convsv_core.backend import Array, Backend
from convsv_core.operand import Operand
from convsv_core.plan import IntArray, unit_phases

BLOCK_BYTES = 1 << 28
"""Default budget, in bytes, for the frequencies held at one time."""

PAIRED_ENTRIES = 1 << 20
"""Products of entries of the taps, in all pairs, up to which one matrix product makes them all."""

FFT_FACTOR = 24
"""Offsets, in units of log2 of the number of frequencies, from which an FFT is cheaper than a product."""


class Evaluator(Protocol):
    """A function from frequency indices, shape (B, ndim), to matrices, shape (B, groups, rows, columns)."""

    @property
    def row_bytes(self) -> int:
        """Bytes that the matrices of one frequency, their phases, and a decomposition of them take."""

    def __call__(self, frequencies: Array) -> Array:
        """The matrices."""


@dataclass(frozen=True)
class TrigonometricPolynomial:
    """Matrices that depend on the frequency through a sum of coefficients times phases.

    Attributes
    ----------
    coefficients : array, shape (offsets, groups, rows, columns), complex
        One matrix for each combination of the axes' offsets, in row-major order.
    tables : list of array, one an axis, shape (period, offsets of the axis), complex
        The phases.
    """

    operand: Operand
    coefficients: Array
    tables: list[Array]

    @property
    def row_bytes(self) -> int:
        """See `Evaluator`."""
        offsets, groups, rows, columns = self.coefficients.shape
        return (2 * offsets + groups * (2 * rows * columns + min(rows, columns) ** 2)) * itemsize(self.operand)

    def __call__(self, frequencies: Array) -> Array:
        """The matrices at the frequencies of the given indices."""
        xp, shape = self.operand.xp, self.coefficients.shape
        flat = xp.reshape(self.coefficients, (shape[0], math.prod(shape[1:])))
        return xp.reshape(xp.matmul(self.phases(frequencies), flat), (-1, *shape[1:]))

    def phases(self, frequencies: Array) -> Array:
        """The phase of every offset at the frequencies of the given indices: shape (B, offsets)."""
        xp = self.operand.xp
        phases = xp.take(self.tables[0], frequencies[:, 0], axis=0)
        for axis, table in enumerate(self.tables[1:], start=1):
            along = xp.take(table, frequencies[:, axis], axis=0)
            phases = xp.reshape(phases[:, :, None] * along[:, None, :], (phases.shape[0], -1))
        return phases


@dataclass(frozen=True)
class Tabulated:
    """Matrices that were computed for every frequency at once: shape (prod(periods), groups, rows, columns)."""

    operand: Operand
    matrices: Array

    @property
    def row_bytes(self) -> int:
        """See `Evaluator`."""
        return 2 * math.prod(self.matrices.shape[1:]) * itemsize(self.operand)

    def __call__(self, frequencies: Array) -> Array:
        """The matrices at the frequencies of the given indices."""
        places = 0
        for axis, period in enumerate(self.operand.plan.periods):
            places = places * period + frequencies[:, axis]
        return self.operand.xp.take(self.matrices, places, axis=0)


@dataclass(frozen=True)
class RealPart:
    """The matrices of another evaluator where they are real but for rounding."""

    operand: Operand
    evaluate: Evaluator

    @property
    def row_bytes(self) -> int:
        """See `Evaluator`."""
        return self.evaluate.row_bytes

    def __call__(self, frequencies: Array) -> Array:
        """The matrices at the frequencies of the given indices."""
        return self.operand.backend.contiguous(self.operand.xp.real(self.evaluate(frequencies)))


@dataclass(frozen=True)
class GramOf:
    """``A A*`` or ``A* A``, whichever is smaller, of the matrices of another evaluator."""

    operand: Operand
    evaluate: Evaluator

    @property
    def row_bytes(self) -> int:
        """See `Evaluator`."""
        return 2 * self.evaluate.row_bytes

    def __call__(self, frequencies: Array) -> Array:
        """The matrices at the frequencies of the given indices."""
        xp, blocks = self.operand.xp, self.evaluate(frequencies)
        adjoint = self.operand.backend.adjoint(blocks)
        rows, columns = blocks.shape[-2:]
        return xp.matmul(blocks, adjoint) if rows <= columns else xp.matmul(adjoint, blocks)


def symbol_polynomial(operand: Operand) -> TrigonometricPolynomial:
    """The symbol, as a polynomial whose coefficients are the taps."""
    offsets = [axis.offsets for axis in operand.plan.axes]
    taps = operand.xp.astype(operand.taps(), operand.complex_dtype, copy=False)
    return TrigonometricPolynomial(operand, taps, _tables(operand, offsets))


def symbol_evaluator(operand: Operand) -> Evaluator:
    """Return the cheapest way to evaluate the symbol: a polynomial, or for kernels of many taps an FFT."""
    polynomial = symbol_polynomial(operand)
    return _transform(polynomial) if _fft_is_cheaper(operand) else polynomial


def gram_evaluator(operand: Operand, symbol: Evaluator) -> Evaluator:
    """Return the cheapest way to evaluate the Gram matrix ``A A*`` or ``A* A`` of `symbol`, the smaller one.

    The Gram matrix is a polynomial too. Its coefficients cost a product for every pair of taps, which
    soon is less than a product for every frequency.
    """
    plan = operand.plan
    rows, columns = plan.block
    side = min(rows, columns)
    offsets = math.prod(len(axis.offsets) for axis in plan.axes)
    differences = math.prod(len(differences_of(axis.offsets)) for axis in plan.axes)
    direct = len(plan.frequencies) * 8 * rows * columns * (offsets + side)
    pairs = offsets * (offsets + 1) // 2 * (2 if plan.real else 8) * rows * columns * side
    if pairs + len(plan.frequencies) * 8 * differences * side**2 > direct:
        return GramOf(operand, symbol)
    return gram_polynomial(operand)


def gram_polynomial(operand: Operand, coefficients: Array | None = None) -> TrigonometricPolynomial:
    """The symbol's Gram matrix, as a polynomial; its coefficients may be given if they are known."""
    axes = [differences_of(axis.offsets) for axis in operand.plan.axes]
    if coefficients is None:
        coefficients, _ = gram_coefficients(operand)
    return TrigonometricPolynomial(operand, coefficients, _tables(operand, axes))


def gram_coefficients(operand: Operand) -> tuple[Array, list[tuple[int, ...]]]:
    """Coefficients of the symbol's Gram matrix, ``A A* = sum over s of G_s exp(i s theta)``, or of ``A* A``.

    ``G_s`` is the sum of ``K_p K_p'*`` over the taps whose offsets differ by s, and ``G_-s = G_s*``. Returns
    them as an array of shape (differences, groups, side, side), complex, and the differences of each axis, of
    which the first axis of the array holds every combination in row-major order.
    """
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    taps = operand.taps()
    sign = 1
    if taps.shape[-2] > taps.shape[-1]:  # A* A: the same with the adjoint taps, at the opposite offsets
        taps, sign = backend.adjoint(taps), -1
    axes = [differences_of(axis.offsets) for axis in plan.axes]
    pairs = _pairs(tuple(axis.offsets for axis in plan.axes), sign)
    if taps.shape[1] * (taps.shape[0] * taps.shape[2]) ** 2 <= PAIRED_ENTRIES:
        coefficients = _paired_products(backend, taps, pairs)
    else:
        coefficients = _summed_products(backend, taps, pairs)
    return xp.astype(coefficients, operand.complex_dtype, copy=False), axes


def _pairs(offsets: tuple[tuple[int, ...], ...], sign: int) -> list[list[tuple[int, int]]]:
    """For each combination of the axes' differences, in row-major order, the pairs of taps that differ by it."""
    found: dict[tuple[int, ...], list[tuple[int, int]]] = {
        difference: [] for difference in itertools.product(*map(differences_of, offsets))
    }
    for (p, one), (q, other) in itertools.product(enumerate(itertools.product(*offsets)), repeat=2):
        found[tuple(sign * (a - b) for a, b in zip(one, other, strict=True))].append((p, q))
    return list(found.values())


def _paired_products(backend: Backend, taps: Array, pairs: list[list[tuple[int, int]]]) -> Array:
    """The sums of ``K_p K_q*`` over each list of pairs, from one product that holds every pair: for small taps."""
    xp = backend.namespace(taps)
    count, groups, side, inner = taps.shape
    flat = xp.reshape(xp.permute_dims(taps, (1, 0, 2, 3)), (groups, count * side, inner))
    products = xp.reshape(xp.matmul(flat, backend.adjoint(flat)), (groups, count, side, count, side))
    products = xp.reshape(xp.permute_dims(products, (1, 3, 0, 2, 4)), (count**2, -1))
    chosen = np.zeros((len(pairs), count**2))
    for row, listed in zip(chosen, pairs, strict=True):
        row[[p * count + q for p, q in listed]] = 1
    chosen = xp.astype(backend.constant(chosen, products), products.dtype, copy=False)
    return xp.reshape(xp.matmul(chosen, products), (len(pairs), groups, side, side))


def _summed_products(backend: Backend, taps: Array, pairs: list[list[tuple[int, int]]]) -> Array:
    """The same, from one product for each list, whose opposite has the adjoint."""
    xp = backend.namespace(taps)
    _, groups, side, inner = taps.shape
    upper = []
    for listed in pairs[len(pairs) // 2 :]:
        left, right = (
            xp.reshape(
                xp.permute_dims(backend.take(taps, np.asarray(chosen), 0), (1, 2, 0, 3)),
                (groups, side, len(chosen) * inner),
            )
            for chosen in zip(*listed, strict=True)
        )
        upper.append(xp.matmul(left, backend.adjoint(right)))
    coefficients = xp.stack(upper)
    return xp.concat([backend.adjoint(xp.flip(coefficients[1:, ...], axis=0)), coefficients], axis=0)


def itemsize(operand: Operand) -> int:
    """Bytes of one complex number of the computation."""
    return int(2 * operand.xp.finfo(operand.real_dtype).bits // 8)


def _tables(operand: Operand, offsets: Sequence[tuple[int, ...]]) -> list[Array]:
    phases = [
        unit_phases(np.outer(np.arange(axis.period), chosen), axis.period)
        for axis, chosen in zip(operand.plan.axes, offsets, strict=True)
    ]
    return [
        operand.xp.astype(operand.backend.constant(table, operand.kernel), operand.complex_dtype, copy=False)
        for table in phases
    ]


def differences_of(offsets: tuple[int, ...]) -> tuple[int, ...]:
    """Every difference of two of the offsets, ascending."""
    return tuple(sorted({a - b for a in offsets for b in offsets}))


def _fft_is_cheaper(operand: Operand) -> bool:
    """Whether to transform the whole zero-padded kernel rather than multiply phases with taps.

    The product takes ``8 * offsets`` operations for each entry of each visited matrix, at the speed of a
    matrix product; the FFT ``5 * log2(frequencies)``, at a tenth of that speed or less, for both halves of the
    grid, and it needs the whole symbol in memory.
    """
    plan = operand.plan
    offsets = math.prod(len(axis.offsets) for axis in plan.axes)
    count = math.prod(plan.periods)
    fits = all(len({q % axis.period for q in axis.offsets}) == len(axis.offsets) for axis in plan.axes)
    entries = count * plan.groups * math.prod(plan.block)
    affordable = 2 * entries * itemsize(operand) <= BLOCK_BYTES
    return fits and affordable and offsets > FFT_FACTOR * math.log2(max(count, 2))


def _transform(polynomial: TrigonometricPolynomial) -> Tabulated:
    operand = polynomial.operand
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    shape = polynomial.coefficients.shape[1:]
    padded = xp.reshape(polynomial.coefficients, (*(len(axis.offsets) for axis in plan.axes), *shape))
    for index, axis in enumerate(plan.axes):
        count = len(axis.offsets)
        source: IntArray = np.full(axis.period, count)  # the appended zeros, except at the offsets
        source[np.asarray(axis.offsets) % axis.period] = np.arange(count)
        padded = operand.take_or_zero(padded, source, index)
    # The symbol's exponent is positive, which is the inverse transform without its normalisation.
    matrices = backend.ifftn(padded, tuple(range(len(plan.axes)))) * math.prod(plan.periods)
    return Tabulated(operand, xp.reshape(matrices, (-1, *shape)))
