"""The linear part of each linear kind of map, and its adjoint, applied to arrays in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from convsv_core._geometry.padding import AxisReads, padding_sources
from convsv_core._geometry.shapes import channel_letters, forward_extents
from convsv_core._network import kinds
from convsv_core._network.graph import Node, Shape
from convsv_core._network.rule_types import Float64Array, LinearMap, NoRule
from convsv_core.conv import Conv

__all__ = [
    "axis_matrices",
    "axis_sources",
    "forward_kernel",
    "is_linear",
    "linear_map",
    "shift_of",
    "stack_shapes",
    "unbroadcast",
    "window_reads",
]

LINEAR_KINDS = (
    kinds.Convolution,
    kinds.Matmul,
    kinds.Scale,
    kinds.AveragePool,
    kinds.AxisMaps,
    kinds.Identity,
    kinds.Reshape,
    kinds.Permute,
    kinds.Expand,
    kinds.Slice,
    kinds.Gather,
    kinds.Pad,
    kinds.Sum,
    kinds.Concatenate,
)
"""The kinds that are affine maps of their inputs, besides the sums and means of `Reduce`."""


def is_linear(kind: kinds.Kind) -> bool:
    """Return whether maps of this kind are affine, so that `linear_map` describes them."""
    if isinstance(kind, kinds.Reduce):
        return kind.function in ("sum", "mean")
    return isinstance(kind, LINEAR_KINDS)


def linear_map(node: Node, shapes: Sequence[Shape]) -> LinearMap:
    """Return the linear part of a node of a linear kind, given the shapes of its inputs."""
    kind = node.kind
    if isinstance(kind, kinds.Convolution):
        return _convolution(kind, shapes[0], node.shape)
    if isinstance(kind, kinds.Matmul):
        return _matmul(kind, shapes[0], node.shape)
    if isinstance(kind, kinds.Scale):
        scale = np.asarray(kind.scale, np.float64)
        return _one(
            lambda x: np.broadcast_to(x * scale, node.shape), lambda y: unbroadcast(y * scale, shapes[0]), shapes
        )
    if isinstance(kind, kinds.AveragePool | kinds.AxisMaps):
        matrices = axis_matrices(kind, shapes[0], node.shape)
        return _one(
            lambda x: _along_axes(x, matrices.items()),
            lambda y: _along_axes(y, ((axis, matrix.T) for axis, matrix in matrices.items())),
            shapes,
        )
    if isinstance(kind, kinds.Slice | kinds.Gather | kinds.Pad):
        return _gathering(kind, shapes[0], node.shape)
    if isinstance(kind, kinds.Permute):
        back = tuple(int(place) for place in np.argsort(kind.permutation))
        return _one(lambda x: np.transpose(x, kind.permutation), lambda y: np.transpose(y, back), shapes)
    if isinstance(kind, kinds.Identity | kinds.Reshape):
        return _one(lambda x: np.reshape(x, node.shape), lambda y: np.reshape(y, shapes[0]), shapes)
    if isinstance(kind, kinds.Expand):
        return _one(lambda x: np.broadcast_to(x, node.shape), lambda y: unbroadcast(y, shapes[0]), shapes)
    if isinstance(kind, kinds.Reduce) and kind.function in ("sum", "mean"):
        return _reduction(kind, shapes[0], node.shape)
    if isinstance(kind, kinds.Sum):
        return _sum(kind, shapes, node.shape)
    if isinstance(kind, kinds.Concatenate):
        places = np.cumsum([shape[kind.axis] for shape in shapes])[:-1]
        return LinearMap(
            lambda *x: np.concatenate(x, axis=kind.axis), lambda y: tuple(np.split(y, places, axis=kind.axis))
        )
    raise NoRule(f"{type(kind).__name__} is not a linear kind")


def shift_of(node: Node, shapes: Sequence[Shape]) -> Float64Array | float:
    """Return what a node of a linear kind adds to its linear part; it broadcasts against the output."""
    kind = node.kind
    if isinstance(kind, kinds.Scale):
        return np.asarray(kind.shift, np.float64)
    if isinstance(kind, kinds.Matmul) and kind.bias is not None:
        return np.asarray(kind.bias, np.float64)
    if isinstance(kind, kinds.Convolution) and kind.bias is not None:
        shape = [1] * len(kind.layout)
        shape[kind.layout.index("C")] = -1
        return np.asarray(kind.bias, np.float64).reshape(shape)
    if isinstance(kind, kinds.Pad) and kind.mode == "constant" and kind.value:
        added = np.zeros(node.shape, bool)
        for axis, source in axis_sources(kind, shapes[0]).items():
            added |= np.expand_dims(source < 0, tuple(i for i in range(added.ndim) if i != axis))
        return np.where(added, kind.value, 0.0)
    return 0.0


def unbroadcast(array: Float64Array, shape: Shape) -> Float64Array:
    """Return the sum over the copies that broadcasting from `shape` made: the adjoint of broadcasting."""
    extra = array.ndim - len(shape)
    array = array.sum(axis=tuple(range(extra))) if extra else array
    axes = tuple(axis for axis, extent in enumerate(shape) if extent == 1 and array.shape[axis] != 1)
    return array.sum(axis=axes, keepdims=True) if axes else array


def _one(
    apply: Callable[[Float64Array], Float64Array],
    adjoint: Callable[[Float64Array], Float64Array],
    shapes: Sequence[Shape],
) -> LinearMap:
    """Return the map of one array."""
    return LinearMap(apply, lambda y: (np.reshape(adjoint(y), shapes[0]),))


# ---- convolutions ------------------------------------------------------------------------------------------------


def forward_kernel(kind: kinds.Convolution) -> Float64Array:
    """Return the kernel of the forward convolution, in the order groups, rows, columns of a group, taps.

    A transposed layer is the adjoint of its forward convolution.
    """
    conv = kind.conv
    order = [conv.layout.index(letter) for letter in (*channel_letters(conv), *conv.spatial)]
    kernel = np.transpose(np.asarray(kind.kernel, np.float64), order)
    return kernel.reshape(conv.groups, kernel.shape[0] // conv.groups, *kernel.shape[1:])


def _convolution(kind: kinds.Convolution, in_shape: Shape, out_shape: Shape) -> LinearMap:
    conv, kernel = kind.conv, forward_kernel(kind)
    order = tuple(kind.layout.index(letter) for letter in "NC" + conv.spatial)
    back = tuple(int(place) for place in np.argsort(order))
    taps = kernel.shape[3:]
    extents = tuple(in_shape[axis] for axis in order[2:])
    forward, outputs = forward_extents(taps, extents, conv), tuple(out_shape[axis] for axis in order[2:])
    outputs = extents if conv.transposed else outputs
    steps = _Taps(kernel, conv, forward, outputs)

    def convolve(x: Float64Array) -> Float64Array:
        return np.transpose(steps.convolve(np.transpose(x, order)), back)

    def adjoint(y: Float64Array) -> Float64Array:
        return np.transpose(steps.adjoint(np.transpose(y, order)), back)

    return _one(adjoint, convolve, [in_shape]) if conv.transposed else _one(convolve, adjoint, [in_shape])


class _Taps:
    """A forward convolution, applied tap by tap as matrix products.

    Parameters
    ----------
    kernel : array
        As `forward_kernel` returns it.
    conv : Conv
    extents, outputs : tuple of int
        The forward convolution's spatial extents.
    """

    def __init__(self, kernel: Float64Array, conv: Conv, extents: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        self.kernel, self.conv, self.extents, self.outputs = kernel, conv, extents, outputs
        taps = kernel.shape[3:]
        pads = conv.pads(taps)
        self.before = tuple(before for before, _ in pads)
        self.reach = tuple(
            stride * (count - 1) + dilation * (k - 1) + 1
            for stride, count, dilation, k in zip(conv.strides, outputs, conv.dilations, taps, strict=True)
        )

    def convolve(self, x: Float64Array) -> Float64Array:
        groups, rows, columns = self.kernel.shape[:3]
        for axis in range(len(self.extents)):
            x = self._padded(x, axis)
        x = x.reshape(len(x), groups, columns, *self.reach)
        result = np.zeros((len(x), groups, rows, math.prod(self.outputs)))
        for tap, window in self._windows():
            part = x[window].reshape(len(x), groups, columns, -1)
            result += np.matmul(self.kernel[tap], part)
        return result.reshape(len(x), groups * rows, *self.outputs)

    def adjoint(self, y: Float64Array) -> Float64Array:
        groups, rows, columns = self.kernel.shape[:3]
        flat = y.reshape(len(y), groups, rows, -1)
        padded = np.zeros((len(y), groups, columns, *self.reach))
        for tap, window in self._windows():
            matrices = self.kernel[tap]
            part = np.matmul(np.swapaxes(matrices, -1, -2), flat)
            padded[window] += part.reshape(*part.shape[:3], *self.outputs)
        x = padded.reshape(len(y), groups * columns, *self.reach)
        for axis in range(len(self.extents)):
            x = self._cropped(x, axis)
        return x

    def _windows(self) -> Iterable[tuple[Any, Any]]:
        """Yield where the kernel holds each tap, and where the padded image holds the elements that it multiplies."""
        conv, leading = self.conv, (slice(None),) * 3
        for tap in itertools.product(*map(range, self.kernel.shape[3:])):
            axes = zip(conv.dilations, tap, conv.strides, self.outputs, strict=True)
            window = tuple(slice(d * place, d * place + s * (count - 1) + 1, s) for d, place, s, count in axes)
            yield (*leading, *tap), (*leading, *window)

    def _sides(self, axis: int) -> tuple[int, int, int, int]:
        """Return which elements of the input are read along an axis, and how many zeros stand on both sides of them."""
        first, last = -self.before[axis], self.reach[axis] - self.before[axis]
        start = min(max(first, 0), self.extents[axis])
        stop = max(min(last, self.extents[axis]), start)
        before = min(max(start - first, 0), self.reach[axis])
        return start, stop, before, self.reach[axis] - before - (stop - start)

    def _padded(self, x: Float64Array, axis: int) -> Float64Array:
        if self.conv.padding_mode != "zeros":
            return np.take(x, self._sources(axis), axis=axis + 2)
        start, stop, before, after = self._sides(axis)
        x = x[(slice(None),) * (axis + 2) + (slice(start, stop),)]
        return np.pad(x, [(before, after) if place == axis + 2 else (0, 0) for place in range(x.ndim)])

    def _cropped(self, x: Float64Array, axis: int) -> Float64Array:
        if self.conv.padding_mode != "zeros":
            return _scatter(x, self._sources(axis), axis + 2, self.extents[axis])
        start, stop, before, _ = self._sides(axis)
        x = x[(slice(None),) * (axis + 2) + (slice(before, before + stop - start),)]
        sides = (start, self.extents[axis] - stop)
        return np.pad(x, [sides if place == axis + 2 else (0, 0) for place in range(x.ndim)])

    def _sources(self, axis: int) -> np.ndarray:
        places = np.arange(self.reach[axis]) - self.before[axis]
        return padding_sources(places, self.extents[axis], self.conv.padding_mode)


# ---- matrices ------------------------------------------------------------------------------------------------------


def stack_shapes(kind: kinds.Matmul, in_shape: Shape) -> tuple[Float64Array, Shape]:
    """Return a constant of a matrix product as a stack of matrices that stand on the right, and the input's shape.

    Vectors become matrices of one row or column. A constant on the left is transposed, and the input is seen with its
    last two axes exchanged.
    """
    matrix = np.asarray(kind.matrix, np.float64)
    if kind.side == "right":
        matrix = matrix[:, None] if matrix.ndim == 1 else matrix
        return matrix, ((1, *in_shape) if len(in_shape) == 1 else in_shape)
    matrix = matrix[None, :] if matrix.ndim == 1 else matrix
    shape = (*in_shape, 1) if len(in_shape) == 1 else in_shape
    return np.swapaxes(matrix, -1, -2), (*shape[:-2], shape[-1], shape[-2])


def _matmul(kind: kinds.Matmul, in_shape: Shape, out_shape: Shape) -> LinearMap:
    matrix, shape = stack_shapes(kind, in_shape)
    left = kind.side == "left"
    whole = (*np.broadcast_shapes(shape[:-2], matrix.shape[:-2]), shape[-2], matrix.shape[-1])

    def exchange(x: Float64Array) -> Float64Array:
        return np.swapaxes(x, -1, -2) if left else x

    def apply(x: Float64Array) -> Float64Array:
        x = exchange(x.reshape((*shape[:-2], shape[-1], shape[-2]) if left else shape))
        return exchange(np.matmul(x, matrix)).reshape(out_shape)

    def adjoint(y: Float64Array) -> Float64Array:
        y = exchange(y.reshape((*whole[:-2], whole[-1], whole[-2]) if left else whole))
        return exchange(unbroadcast(np.matmul(y, np.swapaxes(matrix, -1, -2)), shape))

    return _one(apply, adjoint, [in_shape])


def window_reads(kind: kinds.AveragePool | kinds.MaxPool, in_shape: Shape, out_shape: Shape) -> list[AxisReads]:
    """Return where the windows of a pooling lie along each axis; places outside of the extent lie in the padding."""
    before = [pads[0] for pads in kind.padding]
    axes = zip(out_shape, kind.window, kind.strides, kind.dilations, before, in_shape, strict=True)
    return [AxisReads(*axis) for axis in axes]


def axis_matrices(
    kind: kinds.AveragePool | kinds.AxisMaps, in_shape: Shape, out_shape: Shape
) -> dict[int, Float64Array]:
    """Return the matrix along each axis that the map is the Kronecker product of; axes without one are left out."""
    if isinstance(kind, kinds.AxisMaps):
        return {axis: np.asarray(matrix, np.float64) for axis, matrix in kind.matrices.items()}
    found = {}
    for axis, reads in enumerate(window_reads(kind, in_shape, out_shape)):
        places, extent, counted = reads.places(), reads.extent, kind.counted[axis]
        divisors = np.count_nonzero((places >= -counted[0]) & (places < extent + counted[1]), axis=1)
        matrix = np.zeros((reads.outputs, extent))
        rows, columns = np.nonzero((places >= 0) & (places < extent))
        matrix[rows, places[rows, columns]] = 1 / divisors[rows]
        if kind.window[axis] != 1 or matrix.shape != (extent, extent) or not np.array_equal(matrix, np.eye(extent)):
            found[axis] = matrix
    return found


def _along_axes(x: Float64Array, matrices: Iterable[tuple[int, Float64Array]]) -> Float64Array:
    for axis, matrix in matrices:
        x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    return x


# ---- rearranging and adding ------------------------------------------------------------------------------------------


def axis_sources(kind: kinds.Slice | kinds.Gather | kinds.Pad, in_shape: Shape) -> dict[int, np.ndarray]:
    """Return, along each axis that changes, the element of the input at each place; -1 for elements that are added."""
    if isinstance(kind, kinds.Gather):
        return {kind.axis: np.asarray(kind.indices).reshape(-1) % in_shape[kind.axis]}
    if isinstance(kind, kinds.Slice):
        return {
            axis: np.arange(extent)[part]
            for axis, (extent, part) in enumerate(zip(in_shape, kind.slices, strict=True))
            if part != slice(None)
        }
    found = {}
    for axis, (extent, (before, after)) in enumerate(zip(in_shape, kind.padding, strict=True)):
        gap = kind.interior[axis] if kind.interior is not None else 0
        if not (before or after or gap):
            continue
        sources = np.arange(extent)
        if gap and extent:
            sources = np.full((extent - 1) * (gap + 1) + 1, -1)
            sources[:: gap + 1] = np.arange(extent)
        sources = sources[max(-before, 0) : len(sources) - max(-after, 0)]
        mode = "zeros" if kind.mode == "constant" else kind.mode
        places = padding_sources(np.arange(-max(before, 0), len(sources) + max(after, 0)), len(sources), mode)
        found[axis] = np.where(places < 0, -1, sources[np.maximum(places, 0)])
    return found


def _gathering(kind: kinds.Slice | kinds.Gather | kinds.Pad, in_shape: Shape, out_shape: Shape) -> LinearMap:
    sources = axis_sources(kind, in_shape)

    def apply(x: Float64Array) -> Float64Array:
        for axis, source in sources.items():
            taken = np.take(x, np.maximum(source, 0), axis=axis)
            if np.any(source < 0):
                taken = taken * np.expand_dims(source >= 0, tuple(i for i in range(x.ndim) if i != axis))
            x = taken
        return x.reshape(out_shape)

    def adjoint(y: Float64Array) -> Float64Array:
        flat = list(in_shape)
        for axis, source in sources.items():
            flat[axis] = len(source)
        y = y.reshape(flat)
        for axis, source in reversed(sources.items()):
            y = _scatter(y, source, axis, in_shape[axis])
        return y

    return _one(apply, adjoint, [in_shape])


def _scatter(y: Float64Array, source: np.ndarray, axis: int, extent: int) -> Float64Array:
    """Add each element along an axis to its source; the adjoint of taking elements from there."""
    moved = np.moveaxis(y, axis, 0)
    result = np.zeros((extent, *moved.shape[1:]))
    np.add.at(result, source[source >= 0], moved[source >= 0])
    return np.moveaxis(result, 0, axis)


def _reduction(kind: kinds.Reduce, in_shape: Shape, out_shape: Shape) -> LinearMap:
    divisor = math.prod(in_shape[axis] for axis in kind.axes) if kind.function == "mean" else 1
    kept = tuple(1 if axis in kind.axes else extent for axis, extent in enumerate(in_shape))
    return _one(
        lambda x: np.sum(x, axis=kind.axes).reshape(out_shape) / divisor,
        lambda y: np.broadcast_to(y.reshape(kept) / divisor, in_shape),
        [in_shape],
    )


def _sum(kind: kinds.Sum, shapes: Sequence[Shape], out_shape: Shape) -> LinearMap:
    weights = kind.weights or (1.0,) * len(shapes)

    def apply(*x: Float64Array) -> Float64Array:
        result = np.zeros(out_shape)
        for weight, part in zip(weights, x, strict=True):
            result += weight * part
        return result

    return LinearMap(
        apply,
        lambda y: tuple(unbroadcast(weight * y, shape) for weight, shape in zip(weights, shapes, strict=True)),
    )
