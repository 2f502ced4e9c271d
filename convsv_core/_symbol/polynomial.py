"""The symbol's matrices at given frequencies.

The symbol is a trigonometric polynomial. A product of a small matrix of phases with its coefficients, block by
block, is less work than an FFT for the kernels of real networks, and leaves the matrices contiguous.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np

from convsv_core._geometry.phases import unit_phases
from convsv_core._geometry.plan import HostArray, IntArray
from convsv_core._symbol.operand import COMPLEX_OF, Operand
from convsv_core._symbol.transform import is_long, place_taps
from convsv_core.backend import Array

BLOCK_BYTES = 1 << 28
"""Default budget, in bytes, for the frequencies held at one time."""

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
    coefficients : array, shape (offsets, groups, rows, columns)
        One matrix for each combination of the axes' offsets, in row-major order; real for real kernels.
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
        return self.matrices(self.phases(frequencies))

    def part(self, groups: slice) -> TrigonometricPolynomial:
        """Return the matrices of some of the groups."""
        return dataclasses.replace(self, coefficients=self.coefficients[:, groups, :, :])

    def matrices(self, phases: Array) -> Array:
        """The matrices that rows of phases stand for."""
        xp, shape = self.operand.xp, self.coefficients.shape
        flat = xp.reshape(self.coefficients, (shape[0], math.prod(shape[1:])))
        if self.operand.plan.real:  # two real products are half of the work of a complex one
            parts = xp.matmul(xp.real(phases), flat), xp.matmul(xp.imag(phases), flat)
            return xp.reshape(self.operand.backend.complex(*parts), (-1, *shape[1:]))
        return xp.reshape(xp.matmul(phases, flat), (-1, *shape[1:]))

    def phases(self, frequencies: Array) -> Array:
        """The phase of every offset at the frequencies of the given indices: shape (B, offsets)."""
        return phases_at(self.tables, frequencies, self.operand.xp)


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


def symbol_polynomial(operand: Operand) -> TrigonometricPolynomial:
    """The symbol, as a polynomial whose coefficients are the taps."""
    offsets = [axis.offsets for axis in operand.plan.axes]
    return TrigonometricPolynomial(operand, operand.taps(), phase_tables(operand, offsets))


def symbol_at(operand: Operand, frequencies: IntArray) -> Array:
    """Return the symbol at a few frequencies whose indices are known on the host: shape (B, groups, rows, columns)."""
    backend, phases = operand.backend, np.ones((len(frequencies), 1), COMPLEX_OF[operand.computed_in])
    for axis, along in zip(operand.plan.axes, frequencies.T, strict=True):
        own = unit_phases(np.outer(along, axis.offsets), axis.period).astype(phases.dtype)
        phases = (phases[:, :, None] * own[:, None, :]).reshape(len(frequencies), -1)
    polynomial = TrigonometricPolynomial(operand, operand.taps(), [])
    return polynomial.matrices(backend.asarray_like(phases, operand.kernel))


def symbol_evaluator(operand: Operand) -> TrigonometricPolynomial | Tabulated:
    """Return the cheapest way to evaluate the symbol: a polynomial, or for kernels of many taps an FFT."""
    return _transform(operand) if fft_is_cheaper(operand) else symbol_polynomial(operand)


def itemsize(operand: Operand) -> int:
    """Bytes of one complex number of the computation."""
    return int(2 * operand.xp.finfo(operand.real_dtype).bits // 8)


def phase_tables(operand: Operand, offsets: Sequence[tuple[int, ...]]) -> list[Array]:
    """The phases of each axis's offsets at all frequencies of one period: shape (period, offsets) each, complex."""
    return [
        operand.backend.asarray_like(
            _phases(axis.period, tuple(chosen), COMPLEX_OF[operand.computed_in]), operand.kernel
        )
        for axis, chosen in zip(operand.plan.axes, offsets, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _phases(period: int, offsets: tuple[int, ...], dtype: str) -> HostArray:
    return unit_phases(np.outer(np.arange(period), offsets), period).astype(dtype)


def phases_at(tables: list[Array], frequencies: Array, xp: ModuleType) -> Array:
    """The phase of every combination of the axes' offsets at the frequencies of the given indices."""
    phases = xp.take(tables[0], frequencies[:, 0], axis=0)
    for axis, table in enumerate(tables[1:], start=1):
        along = xp.take(table, frequencies[:, axis], axis=0)
        phases = xp.reshape(phases[:, :, None] * along[:, None, :], (phases.shape[0], -1))
    return phases


def fft_is_cheaper(operand: Operand) -> bool:
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
    return (fits or is_long(operand)) and affordable and offsets > FFT_FACTOR * math.log2(max(count, 2))


def _transform(operand: Operand) -> Tabulated:
    backend, plan = operand.backend, operand.plan
    taps = operand.taps()
    places = [np.asarray(axis.offsets) % axis.period for axis in plan.axes]
    padded = place_taps(operand, taps, plan.periods, places)
    # The symbol's exponent is positive, which is the inverse transform without its normalisation.
    matrices = backend.ifftn(padded, tuple(range(len(plan.axes)))) * math.prod(plan.periods)
    return Tabulated(operand, operand.xp.reshape(matrices, (-1, *taps.shape[1:])))
