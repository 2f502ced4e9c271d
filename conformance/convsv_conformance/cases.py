"""Describe one convolution, and give everything that its dense matrix says of it."""

from __future__ import annotations

import functools
import math
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

import convsv_core as convsv
from convsv_conformance.dense import Array, Pairs, accurate_singular_values, dense_matrix
from convsv_conformance.kernels import FILLS, random_kernel

__all__ = ["Case", "Truth", "make_case"]


@dataclass(frozen=True)
class Case:
    """One convolution and the input that it acts on.

    Parameters
    ----------
    name : str
        The name is unique in the table, and seeds the kernel.
    channels : tuple of int
        Numbers of output and input channels of the layer.
    taps, input_shape, stride, dilation : tuple of int
        One value for each spatial axis, in the order of the letters of `layout`.
    layout, groups, transposed
        These have the meaning that they have in `convsv_core.Conv`.
    padding : pairs of int or None
        Explicit padding, or None for "same".
    fill : str
        A key of `FILLS`, which names the way in which the kernel is drawn.
    """

    name: str
    channels: tuple[int, int]
    taps: tuple[int, ...]
    input_shape: tuple[int, ...]
    layout: str
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    padding: Pairs | None = None
    fill: str = "random"

    @property
    def conv(self) -> convsv.Conv:
        """Return the description that the library under test is given."""
        return convsv.Conv(
            self.layout,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            padding="same" if self.padding is None else self.padding,
            transposed=self.transposed,
        )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Return the spatial extents of the output."""
        pairs = zip(self.input_shape, self.stride, strict=True)
        return tuple(n * s if self.transposed else n // s for n, s in pairs)

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the extents of the grid of frequencies, which are the extents of the smaller image."""
        return self.input_shape if self.transposed else self.output_shape

    @property
    def block(self) -> tuple[int, int]:
        """Return the rows and columns of one group's symbol; the side of the larger image carries the residues."""
        rows, columns = (channels // self.groups for channels in self.channels)
        residues = math.prod(self.stride)
        return (rows * residues, columns) if self.transposed else (rows, columns * residues)

    @property
    def count(self) -> int:
        """Return the number of singular values of the operator."""
        return min(self.channels[0] * math.prod(self.output_shape), self.channels[1] * math.prod(self.input_shape))

    def values(self, dtype: str) -> Array:
        """Return the kernel in `layout`, equal in every process: complex128 for a complex `dtype`, else float64."""
        outputs, inputs = self.channels
        rows, columns = (inputs, outputs) if self.transposed else (outputs, inputs)
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        shape = (rows, columns // self.groups, *self.taps)
        kernel = FILLS[self.fill](rng, shape)
        if dtype.startswith("complex"):
            # A phase for each row keeps a kernel orthogonal, graded or zero. A random kernel gets an imaginary part.
            phase = np.exp(2j * np.pi * rng.random((rows, *[1] * (len(shape) - 1))))
            kernel = kernel * phase + (1j * random_kernel(rng, shape) if self.fill == "random" else 0)
        letters = ("IO" if self.transposed else "OI") + "".join(x for x in self.layout if x not in "OI")
        return kernel.transpose([letters.index(letter) for letter in self.layout])

    def matrix(self, values: Array, padding_mode: str = "circular") -> Array:
        """Return the whole operator for the kernel `values`; `dense_matrix` gives the order of its indices."""
        return dense_matrix(
            values,
            self.input_shape,
            self.layout,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            pads=self.padding,
            padding_mode=padding_mode,
            transposed=self.transposed,
        )

    def truth(self, values: Array) -> Truth:
        """Return everything known of the operator with these `values`, cached since every backend asks for it."""
        return _truth(self, values.shape, values.dtype.str, values.tobytes())


class Truth:
    """The dense matrix of one case, and the results that follow from it in double precision."""

    def __init__(self, case: Case, values: Array) -> None:
        self.case = case
        self.values = values
        self.matrix = case.matrix(values)

    @functools.cached_property
    def singular_values(self) -> Array:
        """Return every singular value, in descending order."""
        with _one_thread():
            return accurate_singular_values(self.matrix)

    @property
    def norm(self) -> float:
        """Return the largest singular value."""
        return float(self.singular_values[0])

    @functools.cached_property
    def zero_padded_norm(self) -> float:
        """Return the norm of the layer that pads with zeros."""
        with _one_thread():
            return float(np.linalg.norm(self.case.matrix(self.values, "zeros"), 2))

    def derivative(self, weights: Array, direction: Array) -> float:
        """Return the derivative of ``sum_i weights[i] * sigma[i]`` as the kernel moves in `direction`.

        The formula is ``d sigma = Re(u* dA v)``. It also holds for the two values of a conjugate pair, and for
        values that are equal if their weights are equal.
        """
        u, _, vh = self._vectors
        change = self.case.matrix(direction)
        slopes = np.einsum("ij,ij->j", u.conj()[:, : len(weights)], change @ vh.conj().T[:, : len(weights)])
        return float(np.real(weights @ slopes))

    @functools.cached_property
    def _vectors(self) -> tuple[Array, Array, Array]:
        with _one_thread():
            u, s, vh = np.linalg.svd(self.matrix, full_matrices=False)
        return u, s, vh

    @functools.cached_property
    def symbol(self) -> Array:
        """Return the operator's matrices in the Fourier basis, of shape (*grid, groups, rows, columns).

        An image ``x_j = v exp(i j theta)`` gives ``y_j = A(theta) v exp(i j theta)``, where a pixel of the larger
        image is a pixel ``j`` of the grid and a residue modulo the stride. The output at ``j = 0`` gives A(theta).
        """
        case = self.case
        ndim, grid, ones = len(case.taps), case.grid, (1,) * len(case.taps)
        residues = (case.stride, ones) if case.transposed else (ones, case.stride)
        split = self.matrix.reshape(
            case.channels[0],
            *_interleave(grid, residues[0]),
            case.channels[1],
            *_interleave(grid, residues[1]),
        )
        # The new order is: grid of the output, grid of the input, residues, output channels, residues, input channels.
        pixels_out, pixels_in = range(1, 2 * ndim + 1), range(2 * ndim + 2, 4 * ndim + 2)
        ordered = split.transpose(
            *pixels_out[::2], *pixels_in[::2], *pixels_out[1::2], 0, *pixels_in[1::2], 2 * ndim + 1
        )[(0,) * ndim]
        total: Array = ordered.astype(np.complex128)
        for axis, extent in enumerate(grid):
            turns = np.outer(np.arange(extent), np.arange(extent)) % extent / extent
            total = np.moveaxis(np.tensordot(np.exp(2j * np.pi * turns), total, axes=(1, axis)), 0, axis)
        (rows, columns), groups = case.block, case.groups
        out, inner = (channels // groups for channels in case.channels)
        total = total.reshape(*grid, rows // out, groups, out, columns // inner, groups, inner)
        blocks = [total[..., :, g, :, :, g, :].reshape(*grid, rows, columns) for g in range(groups)]
        return np.stack(blocks, axis=ndim)

    def clipped(self, bound: float, lower: float = 0.0) -> Array:
        """Return the kernel of one clip-and-cut step: the clipped operator's entries, averaged for each tap.

        The step brings the singular values between `lower` and `bound`. Where several taps fall on one entry of the
        operator, they share the change of the entry equally.
        """
        case = self.case
        u, s, vh = self._vectors
        change = (u * (np.clip(s, lower, bound) - s)) @ vh
        letters = ["OI".index(x) if x in "OI" else 2 for x in case.layout]
        taps_on = case.matrix(np.ones(self.values.shape))  # the number of taps that fall on each entry of the matrix
        moved = np.zeros(self.values.shape, dtype=change.dtype)
        for tap in np.ndindex(case.taps):
            spatial = iter(tap)
            index = tuple(slice(None) if letter < 2 else next(spatial) for letter in letters)
            only = np.zeros(self.values.shape)
            only[index] = 1
            entries = case.matrix(only)
            shared = np.divide(change * entries, taps_on, where=taps_on > 0, out=np.zeros_like(change))
            channels = (case.channels[0], -1, case.channels[1], math.prod(case.input_shape))
            used = np.maximum(entries.reshape(channels).sum(axis=(1, 3)), 1)
            means = shared.reshape(channels).sum(axis=(1, 3)) / used  # zero outside of the groups
            moved[index] += (
                _of_groups(means, case).T if letters.index(0) > letters.index(1) else _of_groups(means, case)
            )
        return self.values + (moved if np.iscomplexobj(self.values) else moved.real)


def _of_groups(means: Array, case: Case) -> Array:
    """Return the blocks of (output channels, input channels) that a kernel stores, whose one side is one group."""
    out, inner = (channels // case.groups for channels in case.channels)
    blocks = [means[g * out : (g + 1) * out, g * inner : (g + 1) * inner] for g in range(case.groups)]
    return np.concatenate(blocks, axis=1 if case.transposed else 0)


@functools.lru_cache(maxsize=4096)
def _truth(case: Case, shape: tuple[int, ...], dtype: str, data: bytes) -> Truth:
    return Truth(case, np.frombuffer(data, dtype=dtype).reshape(shape))


def _one_thread() -> AbstractContextManager[Any]:
    """Limit the reference's linear algebra to one thread: its matrices are so small that more threads cost time."""
    return _threads().limit(limits=1, user_api="blas")


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _interleave(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value for pair in zip(first, second, strict=True) for value in pair)


def make_case(
    name: str,
    channels: tuple[int, int],
    taps: tuple[int, ...],
    input_shape: tuple[int, ...],
    *,
    layout: str = "",
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    **others: Any,
) -> Case:
    """Return a `Case` with PyTorch's layout unless another is given; one number stands for all axes."""
    ndim = len(taps)
    torch_layout = ("IO" if others.get("transposed") else "OI") + "DHW"[3 - ndim :]
    return Case(
        name,
        channels,
        taps,
        input_shape,
        layout or torch_layout,
        (stride,) * ndim if isinstance(stride, int) else stride,
        (dilation,) * ndim if isinstance(dilation, int) else dilation,
        **others,
    )
