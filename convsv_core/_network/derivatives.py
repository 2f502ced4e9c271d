"""Values of every kind of map in float64, and the linear map that is its derivative at given inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from convsv_core._network import elementwise, kinds
from convsv_core._network.graph import Node, Shape
from convsv_core._network.linear_maps import linear_map, shift_of, unbroadcast, window_reads
from convsv_core._network.rule_types import Evaluated, Float64Array, LinearMap, NoRule

__all__ = ["evaluate"]


def evaluate(node: Node, *inputs: Float64Array) -> Evaluated:
    """Return the value of a node of a kind of this package at its inputs, and its derivative there.

    Raises `NoRule` for a kind without a value.
    """
    found = _NONLINEAR.get(type(node.kind))
    if found is not None:
        return Evaluated(*found(node, *inputs))
    if isinstance(node.kind, kinds.Reduce) and node.kind.function not in ("sum", "mean"):
        return Evaluated(*_reduce(node, *inputs))
    shapes = [x.shape for x in inputs]
    linear = linear_map(node, shapes)
    return Evaluated(linear.apply(*inputs) + shift_of(node, shapes), linear)


Pair: TypeAlias = tuple[Float64Array, LinearMap]
"""The fields of an `Evaluated`: a value, and the derivative there."""


def _diagonal(slopes: Float64Array) -> LinearMap:
    return LinearMap(lambda v: slopes * v, lambda y: (slopes * y,))


def _elementwise(node: Node, x: Float64Array) -> Pair:
    kind = node.kind
    assert isinstance(kind, kinds.Elementwise)
    return elementwise.value(kind, x), _diagonal(elementwise.derivative(kind, x))


def _max_pool(node: Node, x: Float64Array) -> Pair:
    kind = node.kind
    assert isinstance(kind, kinds.MaxPool)
    axes = window_reads(kind, x.shape, node.shape)
    sides = [(axis.before, max(len(axis.span) - axis.before - axis.extent, 0)) for axis in axes]
    padded = np.pad(x, sides, constant_values=-np.inf)
    places = np.pad(np.arange(x.size).reshape(x.shape), sides, constant_values=-1)
    best = np.full(node.shape, -np.inf)
    chosen = np.full(node.shape, -1)
    for tap in itertools.product(*map(range, kind.window)):
        window = tuple(
            slice(first := axis.dilation * t, first + axis.stride * (axis.outputs - 1) + 1, axis.stride)
            for t, axis in zip(tap, axes, strict=True)
        )
        larger = padded[window] > best
        best, chosen = np.where(larger, padded[window], best), np.where(larger, places[window], chosen)
    return best, _selection(chosen, x.shape)


def _selection(chosen: np.ndarray, shape: Shape) -> LinearMap:
    """Return the map that takes, at each place of the output, the chosen element of the input; -1 stands for none."""

    def apply(v: Float64Array) -> Float64Array:
        return np.where(chosen >= 0, v.reshape(-1)[np.maximum(chosen, 0)], 0.0)

    def adjoint(y: Float64Array) -> tuple[Float64Array, ...]:
        flat = chosen.reshape(-1)
        kept = flat >= 0
        weights = np.bincount(flat[kept], weights=y.reshape(-1)[kept], minlength=math.prod(shape))
        return (weights.reshape(shape),)

    return LinearMap(apply, adjoint)


def _reduce(node: Node, x: Float64Array) -> Pair:
    kind = node.kind
    assert isinstance(kind, kinds.Reduce)
    axes = kind.axes
    if kind.function in ("max", "min"):
        sign = 1.0 if kind.function == "max" else -1.0
        rest = tuple(axis for axis in range(x.ndim) if axis not in axes)
        order = (*rest, *axes)
        moved = np.transpose(np.arange(x.size).reshape(x.shape), order)
        flat = moved.reshape(*(x.shape[axis] for axis in rest), -1)
        best = np.argmax(sign * x.reshape(-1)[flat], axis=-1)
        chosen = np.take_along_axis(flat, best[..., None], axis=-1).reshape(node.shape)
        return x.reshape(-1)[chosen], _selection(chosen, x.shape)
    if kind.function == "l1":
        value, weights = np.sum(np.abs(x), axis=axes, keepdims=True), np.sign(x)
    elif kind.function == "l2":
        value = np.sqrt(np.sum(x**2, axis=axes, keepdims=True))
        weights = x / np.where(value > 0, value, 1.0)
    else:
        top = np.max(x, axis=axes, keepdims=True)
        shares = np.exp(x - top)
        total = np.sum(shares, axis=axes, keepdims=True)
        value, weights = top + np.log(total), shares / total
    return value.reshape(node.shape), LinearMap(
        lambda v: np.sum(weights * v, axis=axes).reshape(node.shape),
        lambda y: (weights * y.reshape(value.shape),),
    )


def _softmax(node: Node, x: Float64Array) -> Pair:
    kind = node.kind
    assert isinstance(kind, kinds.Softmax | kinds.LogSoftmax)
    axes = kind.axes
    shifted = x - np.max(x, axis=axes, keepdims=True)
    total = np.sum(np.exp(shifted), axis=axes, keepdims=True)
    p = np.exp(shifted) / total

    def mean(v: Float64Array, weights: Float64Array) -> Float64Array:
        return np.sum(weights * v, axis=axes, keepdims=True)

    if isinstance(kind, kinds.LogSoftmax):
        ones = np.ones_like(x)
        return shifted - np.log(total), LinearMap(lambda v: v - mean(v, p), lambda y: (y - p * mean(y, ones),))
    return p, LinearMap(lambda v: p * (v - mean(v, p)), lambda y: (p * (y - mean(y, p)),))


def _normalize(node: Node, x: Float64Array) -> Pair:
    kind = node.kind
    assert isinstance(kind, kinds.Normalize)
    axes = kind.axes

    def centre(v: Float64Array) -> Float64Array:
        return v - np.mean(v, axis=axes, keepdims=True) if kind.centred else v

    centred = centre(x)
    spread = np.sqrt(np.mean(centred**2, axis=axes, keepdims=True) + kind.epsilon)
    value = centred / spread

    def apply(v: Float64Array) -> Float64Array:  # The derivative is symmetric.
        v = centre(v)
        return (v - value * np.mean(value * v, axis=axes, keepdims=True)) / spread

    return value, LinearMap(apply, lambda y: (apply(y),))


def _local_response(node: Node, x: Float64Array) -> Pair:
    kind = node.kind
    assert isinstance(kind, kinds.LocalResponse)
    extent = x.shape[kind.axis]
    distance = np.arange(extent)[None, :] - np.arange(extent)[:, None]
    band = ((distance >= -((kind.size - 1) // 2)) & (distance <= kind.size // 2)).astype(np.float64)

    def sums(v: Float64Array, matrix: Float64Array) -> Float64Array:
        return np.moveaxis(np.tensordot(matrix, v, (1, kind.axis)), 0, kind.axis)

    base = kind.bias + kind.alpha / kind.size * sums(x**2, band)
    gain, share = base**-kind.beta, -2 * kind.beta * kind.alpha / kind.size * x * base ** (-kind.beta - 1)
    return x * gain, LinearMap(
        lambda v: gain * v + share * sums(x * v, band), lambda y: (gain * y + x * sums(share * y, band.T),)
    )


def _extremum(node: Node, *inputs: Float64Array) -> Pair:
    kind = node.kind
    assert isinstance(kind, kinds.Extremum)
    stacked = np.stack([np.broadcast_to(x, node.shape) for x in inputs])
    winner = (np.argmax if kind.function == "max" else np.argmin)(stacked, axis=0)
    masks = [(winner == index).astype(np.float64) for index in range(len(inputs))]
    value = np.take_along_axis(stacked, winner[None], axis=0)[0]
    return value, _weighted(masks, inputs)


def _weighted(weights: Sequence[Float64Array], inputs: Sequence[Float64Array]) -> LinearMap:
    """Return the map ``sum_i weights_i * v_i`` with broadcasting."""

    def apply(*v: Float64Array) -> Float64Array:
        return np.asarray(sum(weight * part for weight, part in zip(weights, v, strict=True)))

    return LinearMap(
        apply, lambda y: tuple(unbroadcast(weight * y, x.shape) for weight, x in zip(weights, inputs, strict=True))
    )


def _product(node: Node, x: Float64Array, y: Float64Array) -> Pair:
    return x * y, _weighted([np.broadcast_to(y, node.shape), np.broadcast_to(x, node.shape)], [x, y])


def _quotient(node: Node, x: Float64Array, y: Float64Array) -> Pair:
    with np.errstate(all="ignore"):
        value = x / y
        weights = [np.broadcast_to(1 / y, node.shape), -value / y]
    return value, _weighted(weights, [x, y])


def _branch_matmul(node: Node, x: Float64Array, y: Float64Array) -> Pair:
    left = x[None, :] if x.ndim == 1 else x
    right = y[:, None] if y.ndim == 1 else y
    whole = (*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])

    def apply(v: Float64Array, w: Float64Array) -> Float64Array:
        return (np.matmul(v.reshape(left.shape), right) + np.matmul(left, w.reshape(right.shape))).reshape(node.shape)

    def adjoint(z: Float64Array) -> tuple[Float64Array, ...]:
        z = z.reshape(whole)
        back = np.matmul(z, np.swapaxes(right, -1, -2)), np.matmul(np.swapaxes(left, -1, -2), z)
        return unbroadcast(back[0], left.shape).reshape(x.shape), unbroadcast(back[1], right.shape).reshape(y.shape)

    return np.matmul(left, right).reshape(node.shape), LinearMap(apply, adjoint)


def _leaf(node: Node) -> Pair:
    if isinstance(node.kind, kinds.Constant):
        value = np.asarray(node.kind.value, np.float64)
        return value, LinearMap(lambda: np.zeros(node.shape), lambda y: ())
    raise NoRule(f"{type(node.kind).__name__} has no value")


_NONLINEAR: dict[type[kinds.Kind], Callable[..., Pair]] = {
    kinds.Elementwise: _elementwise,
    kinds.MaxPool: _max_pool,
    kinds.Softmax: _softmax,
    kinds.LogSoftmax: _softmax,
    kinds.Normalize: _normalize,
    kinds.LocalResponse: _local_response,
    kinds.Extremum: _extremum,
    kinds.Product: _product,
    kinds.Quotient: _quotient,
    kinds.BranchMatmul: _branch_matmul,
    kinds.Constant: _leaf,
}
"""The kinds that are not linear, by their class."""
