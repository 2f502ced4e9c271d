"""Resolve a convolution with zero padding to integers, and to matrix products with slices of flattened images."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from benchmarks.shapes import HostArray, Shape

__all__ = ["Tap", "TapProducts", "ZeroPadding", "pad"]


class ZeroPadding(NamedTuple):
    """Hold the zero padding of a convolution: one number an axis.

    Attributes
    ----------
    pads : tuple of int
        Zeros on each side of the input: "same", for kernels of odd extents.
    outputs : tuple of int
        Elements of the output.
    unread : tuple of int
        Elements at the end of the padded input that no output reads, because of the stride.
    """

    pads: tuple[int, ...]
    outputs: tuple[int, ...]
    unread: tuple[int, ...]


class Tap(NamedTuple):
    """Say where one tap reads.

    Attributes
    ----------
    place : tuple of int
        The tap in the kernel.
    residue : int
        The class of input elements that it reads, in row-major order.
    shift : int
        Its distance from the place of the output, in elements of the flattened image of that class.
    """

    place: tuple[int, ...]
    residue: int
    shift: int


def pad(shape: Shape) -> ZeroPadding:
    """Return the zero padding with which the outputs number the input's extents over the stride, rounded up."""
    pads, outputs, unread = [], [], []
    for extent, taps, stride, dilation in zip(shape.extents, shape.taps, shape.stride, shape.dilation, strict=True):
        reach = dilation * (taps - 1)
        steps, rest = divmod(extent + 2 * (reach // 2) - reach - 1, stride)
        pads.append(reach // 2)
        outputs.append(steps + 1)
        unread.append(rest)
    return ZeroPadding(tuple(pads), tuple(outputs), tuple(unread))


class TapProducts:
    """Find where the taps of a two-dimensional convolution read, in flattened images with margins of zeros.

    An image is held as one image for each class of places modulo the stride. So every tap reads one class at a
    constant shift of the flattened places.

    Attributes
    ----------
    extents : tuple of int
        Extents of the image of one class, with its margins.
    outputs : tuple of int
        Extents of the result, without margins.
    taps : list of Tap
    """

    def __init__(self, shape: Shape) -> None:
        padding = pad(shape)
        self.outputs = padding.outputs
        moves = {
            place: [
                divmod(t * d - before, s)
                for t, d, before, s in zip(place, shape.dilation, padding.pads, shape.stride, strict=True)
            ]
            for place in np.ndindex(*shape.taps)
        }
        shifts = np.asarray([[shift for shift, _ in move] for move in moves.values()])
        self._low = np.maximum(-shifts.min(axis=0), 0)
        needed = np.maximum(np.asarray(shape.grid), np.asarray(self.outputs) + shifts.max(axis=0))
        self.extents = tuple(int(n) for n in self._low + needed)
        width = self.extents[1]
        self._start = int(self._low[0]) * width + int(self._low[1])
        self._count = (self.outputs[0] - 1) * width + self.outputs[1]
        self.taps = []
        for place, ((down, row), (along, column)) in moves.items():
            residue = int(np.ravel_multi_index((row, column), shape.stride))
            self.taps.append(Tap(place, residue, down * width + along))

    def window(self, extents: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the slices of an image of shape (channels, *extents) that leave out its margins."""
        return (slice(None), *(slice(int(a), int(a) + n) for a, n in zip(self._low, extents, strict=True)))

    def run(self, shift: int) -> slice:
        """Return the slice of the flattened places that a tap at this shift reads for all outputs."""
        return slice(self._start + shift, self._start + shift + self._count)

    def classes(self, shape: Shape, image: HostArray) -> HostArray:
        """Return the image of shape (inputs, *extents) as one image with margins for each class.

        The shape of the result is (classes, inputs, *extents with margins).
        """
        held = np.zeros((math.prod(shape.stride), shape.inputs, *self.extents), image.dtype)
        for number, (row, column) in enumerate(np.ndindex(*shape.stride)):
            part = image[:, row :: shape.stride[0], column :: shape.stride[1]]
            held[number][self.window(part.shape[1:])] = part
        return held

    def mask(self, extents: tuple[int, ...]) -> HostArray:
        """Return 1 within an image of these extents and 0 in its margins, flattened."""
        inside = np.zeros(self.extents, np.float32)
        inside[self.window(extents)[1:]] = 1
        return inside.reshape(-1)
