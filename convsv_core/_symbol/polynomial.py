"""The symbol's matrices at given frequencies.

The symbol is a trigonometric polynomial, whose coefficients are the taps. A block of matrices is the product of a
small matrix of phases with the coefficients. For the kernels of real networks this is less work than an FFT. It also
leaves the matrices contiguous.
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
from convsv_core._geometry.plan import HostArray, IntArray, Plan
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.transform import is_long, place_taps
from convsv_core.backend import Array
from convsv_core.dtypes import COMPLEX_OF

__all__ = [
    "BLOCK_BYTES",
    "Evaluator",
    "RealPart",
    "Tabulated",
    "TrigonometricPolynomial",
    "fft_is_cheaper",
    "phase_tables",
    "phases_at",
    "phases_on_host",
    "symbol_at",
    "symbol_evaluator",
    "symbol_polynomial",
]

BLOCK_BYTES = 1 << 28
"""Default budget, in bytes of working memory, for the frequencies computed at one time. A guess: 256 MiB."""

FFT_FACTOR = 24
"""An FFT replaces the product if there are more offsets than this number times log2 of the number of frequencies.

`fft_is_cheaper` compares the operations. The value itself is a guess, because it assumes a tenth of a product's
speed or less for the FFT.
"""


KEPT_PHASES = 1 << 16
"""Largest number of entries of a table of an axis's phases that is made, and kept, for a few frequencies. A guess."""


class Evaluator(Protocol):
    """A function from indices of frequencies, shape (B, ndim), to matrices, shape (B, groups, rows, columns)."""

    @property
    def row_bytes(self) -> int:
        """Return the bytes that the matrices of one frequency, their phases, and their decompositions take."""

    def __call__(self, frequencies: Array) -> Array:
        """Return the matrices at the frequencies of the given indices."""


@dataclass(frozen=True)
class TrigonometricPolynomial:
    """Evaluate matrices that are sums over the offsets of a coefficient times a phase.

    Attributes
    ----------
    operand : Operand
        Its plan gives the grid.
    coefficients : array, shape (offsets, groups, rows, columns)
        One matrix for each combination of the axes' offsets, in row-major order; real for real kernels.
    tables : list of arrays, shape (period, offsets of the axis) each, complex
        The phases along each axis.
    """

    operand: Operand
    coefficients: Array
    tables: list[Array]

    @property
    def row_bytes(self) -> int:
        """Return the bytes of working memory of one frequency; see `Evaluator`."""
        offsets, groups, rows, columns = self.coefficients.shape
        return (2 * offsets + groups * (2 * rows * columns + min(rows, columns) ** 2)) * self.operand.complex_bytes

    def __call__(self, frequencies: Array) -> Array:
        """Return the matrices at the frequencies of the given indices."""
        return self.matrices(self.phases(frequencies))

    def part(self, groups: slice) -> TrigonometricPolynomial:
        """Return the polynomial of some of the groups."""
        return dataclasses.replace(self, coefficients=self.coefficients[:, groups, :, :])

    def matrices(self, phases: Array) -> Array:
        """Return the matrices for rows of phases, shape (B, offsets)."""
        xp, shape = self.operand.xp, self.coefficients.shape
        flat = xp.reshape(self.coefficients, (shape[0], math.prod(shape[1:])))
        if self.operand.plan.real:  # Two real products are half of the work of a complex product.
            parts = xp.matmul(xp.real(phases), flat), xp.matmul(xp.imag(phases), flat)
            return xp.reshape(self.operand.backend.complex(*parts), (-1, *shape[1:]))
        return xp.reshape(xp.matmul(phases, flat), (-1, *shape[1:]))

    def phases(self, frequencies: Array) -> Array:
        """Return the phase of every offset at the frequencies of the given indices: shape (B, offsets)."""
        return phases_at(self.tables, frequencies, self.operand.xp)


@dataclass(frozen=True)
class Tabulated:
    """Look up matrices that were computed for all frequencies at once.

    Attributes
    ----------
    operand : Operand
        Its plan gives the grid.
    matrices : array, shape (prod(periods), groups, rows, columns)
        The matrices of the whole grid, in row-major order.
    """

    operand: Operand
    matrices: Array

    @property
    def row_bytes(self) -> int:
        """Return the bytes of working memory of one frequency; see `Evaluator`."""
        return 2 * math.prod(self.matrices.shape[1:]) * self.operand.complex_bytes

    def part(self, groups: slice) -> Tabulated:
        """Return the matrices of some of the groups."""
        return dataclasses.replace(self, matrices=self.matrices[:, groups, :, :])

    def __call__(self, frequencies: Array) -> Array:
        """Return the matrices at the frequencies of the given indices."""
        places = 0
        for axis, period in enumerate(self.operand.plan.periods):
            places = places * period + frequencies[:, axis]
        return self.operand.xp.take(self.matrices, places, axis=0)


@dataclass(frozen=True)
class RealPart:
    """Evaluate the real parts of another evaluator's matrices, which are real up to rounding."""

    operand: Operand
    evaluate: Evaluator

    @property
    def row_bytes(self) -> int:
        """Return the bytes of working memory of one frequency; see `Evaluator`."""
        return self.evaluate.row_bytes

    def __call__(self, frequencies: Array) -> Array:
        """Return the real matrices at the frequencies of the given indices."""
        return self.operand.backend.contiguous(self.operand.xp.real(self.evaluate(frequencies)))


def symbol_polynomial(operand: Operand) -> TrigonometricPolynomial:
    """Return the symbol as a polynomial whose coefficients are the taps."""
    return TrigonometricPolynomial(operand, operand.taps(), phase_tables(operand, operand.plan.offsets))


def symbol_at(operand: Operand, frequencies: IntArray) -> Array:
    """Return the symbol at a few frequencies whose indices are known on the host: shape (B, groups, rows, columns)."""
    phases = phases_on_host(operand.plan, frequencies, operand.computed_in)
    polynomial = TrigonometricPolynomial(operand, operand.taps(), [])
    return polynomial.matrices(operand.backend.asarray_like(phases, operand.kernel))


def phases_on_host(plan: Plan, frequencies: IntArray, dtype: str) -> HostArray:
    """Return the phase of every offset at a few frequencies: shape (B, offsets), complex; `dtype` is the real one."""
    phases = np.ones((len(frequencies), 1), COMPLEX_OF[dtype])
    for axis, along in zip(plan.axes, frequencies.T, strict=True):
        if axis.period * len(axis.offsets) <= KEPT_PHASES:
            own = _phases(axis.period, axis.offsets, COMPLEX_OF[dtype])[along]
        else:
            own = unit_phases(np.outer(along, axis.offsets), axis.period).astype(phases.dtype)
        phases = (phases[:, :, None] * own[:, None, :]).reshape(len(frequencies), -1)
    return phases


def symbol_evaluator(operand: Operand) -> TrigonometricPolynomial | Tabulated:
    """Return the cheapest way to evaluate the symbol: a polynomial, or an FFT for kernels of many taps."""
    return _transform(operand) if fft_is_cheaper(operand) else symbol_polynomial(operand)


def phase_tables(operand: Operand, offsets: Sequence[tuple[int, ...]]) -> list[Array]:
    """Return the phases of each axis's offsets at all frequencies of a period.

    They are complex tables, shape (period, offsets of the axis), one for each axis.
    """
    return [
        operand.backend.asarray_like(
            _phases(axis.period, tuple(chosen), COMPLEX_OF[operand.computed_in]), operand.kernel
        )
        for axis, chosen in zip(operand.plan.axes, offsets, strict=True)
    ]


@functools.lru_cache(maxsize=256)
def _phases(period: int, offsets: tuple[int, ...], dtype: str) -> HostArray:
    """Return the phases of one axis on the host, from a cache."""
    return unit_phases(np.outer(np.arange(period), offsets), period).astype(dtype)


def phases_at(tables: list[Array], frequencies: Array, xp: ModuleType) -> Array:
    """Return the phase of every combination of the axes' offsets at the given frequencies: shape (B, combinations)."""
    phases = xp.take(tables[0], frequencies[:, 0], axis=0)
    for axis, table in enumerate(tables[1:], start=1):
        along = xp.take(table, frequencies[:, axis], axis=0)
        phases = xp.reshape(phases[:, :, None] * along[:, None, :], (phases.shape[0], -1))
    return phases


def fft_is_cheaper(operand: Operand) -> bool:
    """Tell whether an FFT of the whole zero-padded kernel takes less time than products of phases with taps.

    For each entry of each visited matrix, the product takes ``8 * offsets`` operations. For each entry on the whole
    grid, twice as many, the FFT takes ``5 * log2(frequencies)``, at a tenth of the product's speed or less. The FFT
    also holds the whole symbol in memory.
    """
    plan = operand.plan
    count = math.prod(plan.periods)
    fits = all(len({q % axis.period for q in axis.offsets}) == len(axis.offsets) for axis in plan.axes)
    entries = count * plan.groups * math.prod(plan.block)
    affordable = 2 * entries * operand.complex_bytes <= BLOCK_BYTES
    return (fits or is_long(operand)) and affordable and plan.offset_count > FFT_FACTOR * math.log2(max(count, 2))


def _transform(operand: Operand) -> Tabulated:
    """Return the symbol at all frequencies, from one FFT of the zero-padded coefficients."""
    backend, plan = operand.backend, operand.plan
    taps = operand.taps()
    places = [np.asarray(axis.offsets) % axis.period for axis in plan.axes]
    padded = place_taps(operand, taps, plan.periods, places)
    # The symbol's exponent is positive, as in the inverse transform. The product removes its normalisation.
    matrices = backend.ifftn(padded, tuple(range(len(plan.axes)))) * math.prod(plan.periods)
    return Tabulated(operand, operand.xp.reshape(matrices, (-1, *taps.shape[1:])))
