"""Fast Fourier transforms for kernels of many taps, whose products in pairs cost too much time and memory.

The number of pairs of taps grows with the square of their number. A transform of the zero-padded taps gives the symbol
at enough frequencies to determine its Gram polynomial, and a second transform returns the coefficients.

A transform's error was bounded by Higham, *Accuracy and Stability of Numerical Algorithms*, 2002, section 24.1: each
output is a tree of ``log2(N)`` levels of sums and products with phases. The error of an output is at most a small
multiple of ``eps log2(N)`` times the sum of the moduli of the inputs (`LEVEL_EPS`).
"""

from __future__ import annotations

import functools
import math

import numpy as np

from convsv_core._geometry.plan import HostArray, IntArray, Plan
from convsv_core._geometry.rounding import summation_units
from convsv_core._symbol.operand import Operand
from convsv_core.backend import Array

__all__ = [
    "LEVEL_EPS",
    "LONG_OFFSETS",
    "fast_length",
    "is_long",
    "lag_lengths",
    "lag_products",
    "place_taps",
    "symbol_error",
    "transform_roundings",
]

LONG_OFFSETS = 100
"""Number of offsets from which the Gram polynomial is made by transforms.

A guess from operation counts: in one dimension the products of all pairs then take a dozen times as many operations.
"""

LONG_OFFSETS_IN_SINGLE = 1024
"""The number of offsets that stands for `LONG_OFFSETS` in single precision. A guess.

The rounding error bound of transforms is larger than the bound of sums, which matters in single precision.
"""

LEVEL_EPS = 8
"""Rounding error of one level of a transform, in units of eps times the sum of the moduli of the inputs.

Twice Higham's bound for radix 2, lemma 3.5 and section 24.1, because libraries also use the radices 3, 5 and more.
"""

TRANSFORM_BYTES = 1 << 22
"""Memory, in bytes, for the part of the symbol that is transformed at one time.

Measured with NumPy: larger parts save no time, and a transform holds about four times this memory.
"""


def is_long(operand: Operand) -> bool:
    """Return whether the kernel has so many taps that its Gram polynomial is made by transforms."""
    return operand.plan.offset_count >= (LONG_OFFSETS if operand.is_double else LONG_OFFSETS_IN_SINGLE)


@functools.lru_cache(maxsize=256)
def fast_length(least: int, even: bool = False) -> int:
    """Return the smallest product of powers of 2, 3 and 5 that is at least `least`, and even if asked for."""
    best = 1 << max(1, math.ceil(math.log2(max(least, 1))))
    for threes in range(math.ceil(math.log(best, 3)) + 1):
        for fives in range(math.ceil(math.log(best, 5)) + 1):
            odd = 3**threes * 5**fives
            twos = max(math.ceil(math.log2(max(least / odd, 1))), int(even))
            while odd << twos < least:
                twos += 1
            best = min(best, odd << twos)
    return best


def lag_lengths(plan: Plan) -> tuple[int, ...]:
    """Return for each axis a length of transforms with which no two differences of offsets coincide."""
    return tuple(fast_length(2 * (max(axis.offsets) - min(axis.offsets)) + 1) for axis in plan.axes)


def place_taps(operand: Operand, taps: Array, lengths: tuple[int, ...], places: list[IntArray]) -> Array:
    """Return taps on a grid of the given lengths, and zeros elsewhere; taps at one place are added.

    Parameters
    ----------
    operand : Operand
    taps : array, shape (offsets, groups, rows, columns)
    lengths : tuple of int
        The number of places along each axis.
    places : list of int array
        The place of each axis's offsets.

    Returns
    -------
    array, shape (*lengths, groups, rows, columns), complex
    """
    xp = operand.xp
    padded = xp.astype(taps, operand.complex_dtype, copy=False)
    padded = xp.reshape(padded, (*map(len, places), *taps.shape[1:]))
    for index, (length, along) in enumerate(zip(lengths, places, strict=True)):
        order = np.argsort(along, kind="stable")
        ordered = along[order]
        layer = np.arange(len(along)) - np.searchsorted(ordered, ordered)  # It counts the taps at one place.
        layers = int(layer.max()) + 1
        source: IntArray = np.full((layers, length), len(along))  # Other places take the appended zeros.
        source[layer, ordered] = order
        padded = operand.take_or_zero(padded, source.reshape(-1), index)
        if layers > 1:
            shape = padded.shape
            padded = xp.sum(xp.reshape(padded, (*shape[:index], layers, length, *shape[index + 1 :])), axis=index)
    return padded


def lag_products(operand: Operand, taps: Array, *, reverse: bool) -> Array:
    """Return the sum of ``K_p K_q*`` over all pairs of taps of each difference p - q of their offsets.

    Parameters
    ----------
    operand : Operand
    taps : array, shape (offsets, groups, side, inner)
    reverse : bool
        Whether the taps stand at the opposite offsets.

    Returns
    -------
    array, shape (*lengths, groups, side, side), complex
        The difference s is at the place s modulo `lag_lengths`.
    """
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    lengths = lag_lengths(plan)
    places = [_places(np.asarray(axis.offsets), reverse) for axis in plan.axes]
    axes = tuple(range(len(lengths)))
    _, groups, side, inner = taps.shape
    row_bytes = math.prod(lengths) * groups * side * operand.complex_bytes
    step = max(1, min(inner, TRANSFORM_BYTES // row_bytes))
    total = None
    for start in range(0, inner, step):
        symbol = backend.ifftn(place_taps(operand, taps[..., start : start + step], lengths, places), axes)
        # The symbol's exponent is positive, as in the inverse transform. Libraries leave its axes out of order.
        symbol = backend.contiguous(symbol) * math.prod(lengths)
        with backend.products_context(side):
            products = xp.matmul(symbol, backend.adjoint(symbol))
        total = products if total is None else total + products
    return backend.fftn(total, axes) / math.prod(lengths)


def transform_roundings(operand: Operand) -> Array:
    """Return a bound of the error of Gram matrices whose coefficients came from `lag_products`: shape (groups,).

    Notes
    -----
    Let N be the number of frequencies, m the terms of a matrix product and S the Frobenius norm of the matrix of the
    sums of moduli (`_modulus`). The symbol's error is at most ``c S`` with ``c = LEVEL_EPS eps log2(N)``. So a Gram
    matrix on the grid has an error of at most ``e = (2 c + m eps) S^2``. The transform is unitary up to its length, so
    the coefficients' errors have a root sum of squares of at most e, and ``c S^2`` is added by the second transform.
    The sum of N such errors is at most ``sqrt(N)`` times that root. The last term counts the angles' own rounding.
    """
    plan = operand.plan
    count = math.prod(lag_lengths(plan))
    span = sum(max(axis.offsets) - min(axis.offsets) for axis in plan.axes)
    units = 3 * LEVEL_EPS * math.log2(count) + summation_units(max(plan.block))
    return (math.sqrt(count) * units + 2 * math.pi * span) * operand.eps * _modulus(operand) ** 2


def symbol_error(operand: Operand, count: int) -> Array:
    """Return a bound of the error of a symbol that was transformed at `count` frequencies: shape (groups,)."""
    return LEVEL_EPS * operand.eps * math.log2(max(count, 2)) * _modulus(operand)


def _modulus(operand: Operand) -> Array:
    """Return the Frobenius norm of each group's matrix of sums of moduli: shape (groups,)."""
    xp = operand.xp
    taps = operand.backend.stop_gradient(operand.taps())
    return xp.linalg.vector_norm(xp.sum(xp.abs(taps), axis=0), axis=(-2, -1))


def _places(offsets: HostArray, reverse: bool) -> IntArray:
    return np.max(offsets) - offsets if reverse else offsets - np.min(offsets)
