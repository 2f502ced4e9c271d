"""Make the images of a layer for a report: the largest singular value at each frequency, and the top vectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._geometry.shapes import channel_letters
from convsv_core._symbol.singular_pairs import largest_pairs
from convsv_core.conv import Conv

__all__ = ["MOST_CHANNELS", "PATCH", "PIXELS", "TopVectors", "by_frequency", "top_vectors"]

PIXELS = 64
"""Largest number of frequencies along an axis of an image (a guess). Of more, neighbours share a pixel."""

PATCH = 24
"""Largest number of elements along an axis of a singular vector that is kept (a guess): some periods of the wave."""

MOST_CHANNELS = 4
"""Largest number of channels of a singular vector that are kept: the channels with the largest entries (a guess)."""


class TopVectors(NamedTuple):
    r"""A pair of singular vectors of a layer's largest singular value, as images.

    Attributes
    ----------
    frequency : tuple of float
        The angles of the wave in radians for each element of the smaller side, one an axis, above -pi and up to pi.
        With a stride, an element is one of the layer's outputs (of its inputs when transposed).
    value : float
        The singular value, recomputed in float64 from the matrix at this frequency.
    inputs, outputs : numpy.ndarray, shape (channels, \*extents)
        The corner of the right and of the left singular vector at the origin, for the channels that have the largest
        entries. The layer maps the whole right vector to `value` times the left one, up to a shift of the images. The
        wave of all channels has amplitude 1 (the root of the sum of squares over the channels of its side).
    input_channels, output_channels : tuple of int
        The numbers of the channels that are shown, the largest first.
    """

    frequency: tuple[float, ...]
    value: float
    inputs: HostArray
    outputs: HostArray
    input_channels: tuple[int, ...]
    output_channels: tuple[int, ...]


def by_frequency(largest: HostArray) -> HostArray:
    """Return an image of the largest singular value at each frequency, with frequency 0 in the middle.

    Parameters
    ----------
    largest : array, shape grid
        Index j stands for the angle ``2 pi j / grid``.

    Returns
    -------
    array, float32
        At most `PIXELS` along each axis. A pixel for several frequencies has the largest of their values.
    """
    image = np.fft.fftshift(largest)
    for axis, count in enumerate(image.shape):
        if count > PIXELS:
            starts = np.arange(PIXELS) * count // PIXELS
            image = np.maximum.reduceat(image, starts, axis=axis)
    return image.astype(np.float32)


def top_vectors(kernel: HostArray, conv: Conv, extents: tuple[int, ...], index: tuple[int, ...]) -> TopVectors:
    """Return singular vectors of the largest singular value at one frequency, as images.

    Parameters
    ----------
    kernel : array
    conv : Conv
        Of a circular convolution.
    extents : tuple of int
        Of the layer's input; multiples of the strides.
    index : tuple of int
        Index of the frequency on the grid of `frequency_singular_values`.
    """
    grid = extents if conv.transposed else tuple(n // s for n, s in zip(extents, conv.strides, strict=True))
    angles = tuple(2 * math.pi * (j if 2 * j <= n else j - n) / n for j, n in zip(index, grid, strict=True))
    matrices = _matrices(np.asarray(kernel), conv, angles)
    found = largest_pairs(matrices[None])
    group, value, left, right = int(found.groups[0]), float(found.values[0]), found.left[0], found.right[0]
    entry = right[np.argmax(np.abs(right))]
    turn = np.conj(entry) / np.abs(entry)  # The largest entry of the input becomes positive.
    fine, coarse = (turn * left, turn * right) if conv.transposed else (turn * right, turn * left)
    strides = conv.strides
    fine_images = _wave(fine.reshape(math.prod(strides), -1), strides, grid, angles, group)
    coarse_images = _wave(coarse.reshape(1, -1), (1,) * conv.ndim, grid, angles, group)
    ins, outs = (coarse_images, fine_images) if conv.transposed else (fine_images, coarse_images)
    return TopVectors(angles, value, ins.images, outs.images, ins.channels, outs.channels)


def _matrices(kernel: HostArray, conv: Conv, angles: tuple[float, ...]) -> HostArray:
    """Return the layer's matrix of each group at one frequency, shape (groups, outputs, inputs).

    The side of a stride has (class, channel) as its index, with the classes in row-major order. The tap of index t
    lies at ``dilation * t``, so that the operator is the layer up to a shift of its input. A shift changes the
    phases of the singular vectors and leaves the singular values as they are.
    """
    axes = [conv.layout.index(letter) for letter in (*channel_letters(conv), *conv.spatial)]
    taps = np.transpose(kernel, axes).astype(np.result_type(kernel.dtype, np.float64))
    if conv.transposed:  # A transposed layer is the transpose, without conjugation: the adjoint of this convolution.
        taps = np.conj(taps)
    rows, columns, *counts = taps.shape
    strides, groups = conv.strides, conv.groups
    matrix = np.zeros((rows, *strides, columns), complex)
    for tap in np.ndindex(*counts):
        places = [t * d for t, d in zip(tap, conv.dilations, strict=True)]
        classes = tuple(place % s for place, s in zip(places, strides, strict=True))
        turn = sum(place // s * angle for place, s, angle in zip(places, strides, angles, strict=True))
        matrix[(slice(None), *classes)] += np.exp(1j * turn) * taps[(slice(None), slice(None), *tap)]
    matrix = matrix.reshape(groups, rows // groups, -1)
    return np.conj(np.swapaxes(matrix, 1, 2)) if conv.transposed else matrix


class _Images(NamedTuple):
    images: HostArray
    channels: tuple[int, ...]


def _wave(
    vector: HostArray, strides: tuple[int, ...], grid: tuple[int, ...], angles: tuple[float, ...], group: int
) -> _Images:
    """Return the real part of a vector, shape (classes, channels), times the wave, for its largest channels."""
    sizes = np.linalg.norm(vector, axis=0)
    channels = np.argsort(-sizes, kind="stable")[:MOST_CHANNELS]
    extents = [min(PATCH, n * s) for n, s in zip(grid, strides, strict=True)]
    places = np.meshgrid(*map(np.arange, extents), indexing="ij")
    classes = np.ravel_multi_index([place % s for place, s in zip(places, strides, strict=True)], strides)
    turns = sum(place // s * angle for place, s, angle in zip(places, strides, angles, strict=True))
    images = np.moveaxis(vector[classes][..., channels], -1, 0) * np.exp(1j * turns)
    return _Images(np.real(images), tuple(int(channel) + group * vector.shape[1] for channel in channels))
