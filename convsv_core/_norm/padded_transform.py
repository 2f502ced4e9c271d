"""The operator of a layer of many taps on an image of fixed extents, applied through Fourier transforms.

A table of output pixels and taps grows with the product of the two. Here the padding is applied along each axis alone.
The convolution of the padded image is a product with the symbol on a grid that is long enough to hold it. The adjoint
takes the same steps backwards.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.padded_plan import readers
from convsv_core._geometry.padding import AxisReads, padding_sources
from convsv_core._geometry.plan import IntArray
from convsv_core._norm.image_operator import ImageOperator
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.transform import LEVEL_EPS, LONG_OFFSETS, fast_length, place_taps, symbol_error
from convsv_core.backend import Array

__all__ = ["TransformedOperator", "make_transformed_operator", "transform_error", "transforms_are_cheaper"]

TABLE_ENTRIES = 1 << 20
"""Least number of output pixels times taps for which transforms are considered. A guess: tables of 16 MiB."""


class TransformAxis(NamedTuple):
    """One axis of the transforms, as tables of integers on the host.

    Attributes
    ----------
    padded : int array, shape (length,)
        The element of the image at each place of the padded axis; the extent stands for a zero.
    unpadded : int array, shape (extent, most copies)
        The places of each element; the length stands for none.
    outputs : int array, shape (outputs,)
        The place of each output.
    inserted : int array, shape (length,)
        The output at each place; their number stands for a zero.
    taps : int array, shape (taps,)
        The place of each tap.
    """

    padded: IntArray
    unpadded: IntArray
    outputs: IntArray
    inserted: IntArray
    taps: IntArray


@dataclass(frozen=True)
class TransformedOperator(ImageOperator):
    """The linear operator of a layer on an image, applied by Fourier transforms.

    Attributes
    ----------
    operand, transposed
        As for `ImageOperator`.
    axes : tuple of TransformAxis
    taps : array, shape (offsets, groups, rows, columns)
    symbol : array, shape (groups, *lengths, rows, columns), complex
    """

    axes: tuple[TransformAxis, ...]
    taps: Array
    symbol: Array

    @property
    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        plan = self.operand.plan
        return (
            (plan.groups, math.prod(len(axis.unpadded) for axis in self.axes), plan.columns),
            (plan.groups, math.prod(len(axis.outputs) for axis in self.axes), plan.rows),
        )

    def widened(self) -> TransformedOperator:
        """Return the same operator in float64, where the library computes in it fast."""
        operand = self.operand.widen()
        taps = operand.xp.astype(self.taps, operand.kernel.dtype, copy=False)
        if operand is self.operand:
            return self
        return dataclasses.replace(self, operand=operand, taps=taps, symbol=_symbol(operand, taps, self.axes))

    def detached(self) -> TransformedOperator:
        """Return the same operator as a constant to automatic differentiation."""
        stop = self.operand.backend.stop_gradient
        return dataclasses.replace(self, taps=stop(self.taps), symbol=stop(self.symbol))

    def _convolve(self, images: Array) -> Array:
        extents = [len(axis.unpadded) for axis in self.axes]
        padded = self._taken(images, extents, [axis.padded for axis in self.axes])
        return self._taken_back(self._multiplied(padded, self.symbol), [axis.outputs for axis in self.axes])

    def _convolve_adjoint(self, images: Array) -> Array:
        xp = self.operand.xp
        outputs = [len(axis.outputs) for axis in self.axes]
        inserted = self._taken(images, outputs, [axis.inserted for axis in self.axes])
        found = self._multiplied(inserted, self.operand.backend.adjoint(self.symbol))
        first = found.ndim - 1 - len(self.axes)
        for place, axis in enumerate(self.axes, first):
            found = self.operand.take_or_zero(found, axis.unpadded.reshape(-1), place)
            shape = (*found.shape[:place], *axis.unpadded.shape, *found.shape[place + 1 :])
            found = xp.sum(xp.reshape(found, shape), axis=place + 1)
        return xp.reshape(found, (*found.shape[:first], -1, found.shape[-1]))

    def _taken(self, images: Array, extents: list[int], tables: list[IntArray]) -> Array:
        """Return images as arrays of one axis for each spatial one, with the entries that the tables name."""
        xp, batch = self.operand.xp, images.shape[:-2]
        found = xp.reshape(images, (*batch, *extents, images.shape[-1]))
        for place, table in enumerate(tables, len(batch)):
            found = self.operand.take_or_zero(found, table, place)
        return found

    def _taken_back(self, found: Array, tables: list[IntArray]) -> Array:
        first = found.ndim - 1 - len(tables)
        for place, table in enumerate(tables, first):
            found = self.operand.backend.take(found, table, place)
        return self.operand.xp.reshape(found, (*found.shape[:first], -1, found.shape[-1]))

    def _multiplied(self, images: Array, symbol: Array) -> Array:
        """Return the convolution of padded images with the kernel of a symbol."""
        xp, backend = self.operand.xp, self.operand.backend
        axes = tuple(range(images.ndim - 1 - len(self.axes), images.ndim - 1))
        spectrum = backend.fftn(xp.astype(images, self.operand.complex_dtype, copy=False), axes)
        products = xp.matmul(symbol, spectrum[..., None])[..., 0]
        found = backend.ifftn(products, axes)
        return xp.real(found) if self.operand.plan.real else found


def transforms_are_cheaper(operand: Operand, reads: list[AxisReads]) -> bool:
    """Return whether to apply a layer by transforms: it has many taps, and the symbol takes less memory than tables.

    Parameters
    ----------
    operand : Operand
        Its plan describes the taps alone, without stride, dilation and padding.
    reads : list of AxisReads
    """
    taps = math.prod(axis.taps for axis in reads)
    pairs = taps * math.prod(axis.outputs for axis in reads)
    if taps < LONG_OFFSETS or pairs < TABLE_ENTRIES:
        return False
    plan, word = operand.plan, operand.kernel_bytes
    # Tables take two arrays of integers and the pixels that the taps read. Transforms take the complex symbol.
    tables = pairs * (16 + plan.groups * plan.columns * word)
    symbol = math.prod(map(_length, reads)) * plan.groups * plan.rows * plan.columns * 2 * word
    return symbol < tables


def transform_error(operand: Operand, reads: list[AxisReads], norm: float) -> float:
    """Return a bound of the rounding error of the norm of an operator that is applied by transforms.

    Parameters
    ----------
    operand : Operand
        Its plan describes the taps alone.
    reads : list of AxisReads
    norm : float
        An upper bound of the norm.

    Notes
    -----
    An application takes two transforms of images, whose relative errors are the error of one level times the number of
    levels, and a product with the symbol, which has the error of a transform of the taps (`symbol_error`).
    """
    count = math.prod(map(_length, reads))
    symbol = float(operand.xp.max(symbol_error(operand, count)))
    return symbol + 2 * LEVEL_EPS * operand.eps * math.log2(max(count, 2)) * norm


def make_transformed_operator(operand: Operand, reads: list[AxisReads], padding_mode: str) -> TransformedOperator:
    """Return the operator of a layer.

    Parameters
    ----------
    operand : Operand
        Its plan describes the taps alone, without stride, dilation and padding.
    reads : list of AxisReads
    padding_mode : str
    """
    axes = tuple(_axis(one, padding_mode) for one in reads)
    taps = operand.taps()
    return TransformedOperator(operand, operand.plan.conv.transposed, axes, taps, _symbol(operand, taps, axes))


def _length(reads: AxisReads) -> int:
    """Return the length of the transforms along an axis: no output reads around its end."""
    return fast_length(len(reads.span))


def _axis(reads: AxisReads, padding_mode: str) -> TransformAxis:
    length, span = _length(reads), reads.span
    source = padding_sources(span, reads.extent, padding_mode)
    padded = np.full(length, reads.extent)
    padded[: len(span)] = np.where(source >= 0, source, reads.extent)
    outputs = np.arange(reads.outputs) * reads.stride
    inserted = np.full(length, reads.outputs)
    inserted[outputs] = np.arange(reads.outputs)
    return TransformAxis(
        padded, readers(padded, reads.extent), outputs, inserted, np.arange(reads.taps) * reads.dilation
    )


def _symbol(operand: Operand, taps: Array, axes: tuple[TransformAxis, ...]) -> Array:
    """Return the symbol on the grid of the transforms: shape (groups, *lengths, rows, columns).

    Its exponent is positive, because a convolution layer correlates the image with the taps.
    """
    xp, backend = operand.xp, operand.backend
    lengths = tuple(len(axis.padded) for axis in axes)
    placed = place_taps(operand, taps, lengths, [axis.taps for axis in axes])
    symbol = backend.ifftn(placed, tuple(range(len(axes)))) * math.prod(lengths)
    count = len(axes)
    return backend.contiguous(xp.permute_dims(symbol, (count, *range(count), count + 1, count + 2)))
