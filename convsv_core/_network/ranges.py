"""Interval arithmetic: bounds of the elements of a tensor, from bounds of the elements of a node's inputs.

Every range is widened by the rounding of its computation. An end that is not known is infinite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from convsv_core._network import elementwise, kinds
from convsv_core._network.derivatives import evaluate
from convsv_core._network.graph import Node
from convsv_core._network.linear_maps import forward_kernel, linear_map, shift_of
from convsv_core._network.norms import EPS
from convsv_core._network.rule_types import Float64Array, Range

__all__ = ["RANGES", "everything", "is_damping", "largest_modulus", "moduli_of"]


def largest_modulus(box: Range) -> Float64Array:
    """Return the largest modulus that each element can have."""
    return np.maximum(np.abs(box.low), np.abs(box.high))


def everything(node: Node) -> Range:
    """Return the range of elements of which nothing is known."""
    return Range(np.full(node.shape, -np.inf), np.full(node.shape, np.inf))


def _widened(low: Float64Array, high: Float64Array, rounding: Float64Array | float) -> Range:
    low, high = low - rounding, high + rounding
    return Range(np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high))


def _increasing(node: Node, *boxes: Range) -> Range:
    """Return the range of a map that grows with each element of its inputs."""
    rounding: Float64Array | float = 0.0
    with np.errstate(all="ignore"):
        low, high = (evaluate(node, *(box[end] for box in boxes)).value for end in (0, 1))
        if _adds(node.kind):  # The rounding of a sum is relative to the moduli of its terms.
            terms = max(math.prod(box.low.shape) for box in boxes)
            rounding = 4 * terms * EPS * (1 + np.abs(evaluate(node, *map(largest_modulus, boxes)).value))
    return _widened(low, high, rounding)


def _adds(kind: kinds.Kind) -> bool:
    return isinstance(kind, kinds.AveragePool) or (
        isinstance(kind, kinds.Reduce) and kind.function in ("sum", "mean", "logsumexp")
    )


def moduli_of(kind: kinds.Kind) -> kinds.Kind:
    """Return a linear kind with the moduli of its weights."""
    if isinstance(kind, kinds.Convolution):
        return dataclasses.replace(kind, kernel=_moduli(kind.kernel))
    if isinstance(kind, kinds.Matmul):
        return dataclasses.replace(kind, matrix=_moduli(kind.matrix))
    if isinstance(kind, kinds.Scale):
        return dataclasses.replace(kind, scale=_moduli(kind.scale))
    if isinstance(kind, kinds.AxisMaps):
        return dataclasses.replace(kind, matrices={axis: _moduli(matrix) for axis, matrix in kind.matrices.items()})
    if isinstance(kind, kinds.Sum):
        return dataclasses.replace(kind, weights=tuple(map(abs, kind.weights)))
    return kind


def _moduli(array: kinds.NumberArray) -> Float64Array:
    return np.abs(np.asarray(array, np.float64))  # The modulus of the least integer of a dtype overflows in that dtype.


def _terms(kind: kinds.Kind, shape: tuple[int, ...]) -> int:
    """Return a bound of how many terms a linear map adds for one element."""
    if isinstance(kind, kinds.Convolution):
        kernel = forward_kernel(kind)
        return kernel[:, 0].size if not kind.conv.transposed else kernel[:, :, 0].size
    if isinstance(kind, kinds.Matmul):
        return max(shape)
    return sum(shape)


def _affine(node: Node, box: Range) -> Range:
    """Return the range of an affine map: its value at the centre, and the moduli of its weights times the radius."""
    if not (np.all(np.isfinite(box.low)) and np.all(np.isfinite(box.high))):
        return everything(node)
    shape = box.low.shape
    centre, radius = (box.high + box.low) / 2, (box.high - box.low) / 2
    moduli = linear_map(dataclasses.replace(node, kind=moduli_of(node.kind)), [shape])
    middle = linear_map(node, [shape]).apply(centre) + shift_of(node, [shape])
    # A sum of n terms has an error of at most n roundings of the sum of the moduli. The centre is rounded too.
    error = 4 * (_terms(node.kind, shape) + 4) * EPS
    spread = moduli.apply(radius * (1 + error) + error * np.abs(centre)) * (1 + error)
    return _widened(middle - spread, middle + spread, 4 * EPS * np.abs(middle))


def _scale(node: Node, box: Range) -> Range:
    kind = node.kind
    assert isinstance(kind, kinds.Scale)
    scale, shift = np.asarray(kind.scale, np.float64), np.asarray(kind.shift, np.float64)
    with np.errstate(all="ignore"):
        ends = [np.where(scale == 0, 0.0, end * scale) for end in box]
        low, high = np.minimum(*ends) + shift, np.maximum(*ends) + shift
        rounding = 4 * EPS * (np.maximum(*map(np.abs, ends)) + np.abs(shift))
        rounding = np.where(np.isfinite(rounding), rounding, 0.0)
    return _widened(np.broadcast_to(low, node.shape), np.broadcast_to(high, node.shape), rounding)


def _sum(node: Node, *boxes: Range) -> Range:
    kind = node.kind
    assert isinstance(kind, kinds.Sum)
    weights = kind.weights or (1.0,) * len(boxes)
    low, high, moduli = np.zeros(node.shape), np.zeros(node.shape), np.zeros(node.shape)
    for weight, box in zip(weights, boxes, strict=True):
        low = low + weight * (box.low if weight >= 0 else box.high)
        high = high + weight * (box.high if weight >= 0 else box.low)
        moduli = moduli + abs(weight) * largest_modulus(box)
    return _widened(low, high, np.where(np.isfinite(moduli), 2 * (len(boxes) + 1) * EPS * moduli, 0.0))


def _product(node: Node, x: Range, y: Range) -> Range:
    with np.errstate(all="ignore"):
        # An end that is 0 makes a product 0, even with an infinite end.
        ends = [np.where((a == 0) | (b == 0), 0.0, a * b) for a in x for b in y]
        low, high = np.min(np.broadcast_arrays(*ends), axis=0), np.max(np.broadcast_arrays(*ends), axis=0)
        rounding = 2 * EPS * np.maximum(np.abs(low), np.abs(high))
    return _widened(low, high, np.where(np.isfinite(rounding), rounding, 0.0))


def _quotient(node: Node, x: Range, y: Range) -> Range:
    with np.errstate(all="ignore"):
        crosses = (y.low <= 0) & (y.high >= 0)
        inverse = Range(np.where(crosses, -np.inf, 1 / y.high), np.where(crosses, np.inf, 1 / y.low))
        inverse = _widened(inverse.low, inverse.high, np.where(crosses, 0.0, 2 * EPS * largest_modulus(inverse)))
    return _product(node, x, inverse)


def _branch_matmul(node: Node, x: Range, y: Range) -> Range:
    with np.errstate(all="ignore"):
        most = evaluate(node, largest_modulus(x), largest_modulus(y)).value
    most = np.where(np.isnan(most), np.inf, most) * (1 + 4 * x.low.shape[-1] * EPS)
    return Range(-most, most)


def _elementwise(node: Node, box: Range) -> Range:
    assert isinstance(node.kind, kinds.Elementwise)
    return elementwise.function_range(node.kind, box)


def _softmax(node: Node, box: Range) -> Range:
    return Range(np.zeros(node.shape), np.ones(node.shape))


def _log_softmax(node: Node, box: Range) -> Range:
    return Range(np.full(node.shape, -np.inf), np.zeros(node.shape))


def _normalize(node: Node, box: Range) -> Range:
    kind = node.kind
    assert isinstance(kind, kinds.Normalize)
    # The mean of the squares is at most 1.
    most = math.sqrt(math.prod(node.shape[axis] for axis in kind.axes)) * (1 + 8 * EPS)
    return Range(np.full(node.shape, -most), np.full(node.shape, most))


def is_damping(kind: kinds.LocalResponse) -> bool:
    """Tell whether a local response normalisation divides by a power that only grows with the neighbours."""
    return kind.bias > 0 and kind.alpha >= 0 and kind.beta > 0


def _local_response(node: Node, box: Range) -> Range:
    kind = node.kind
    assert isinstance(kind, kinds.LocalResponse)
    if not is_damping(kind):
        return everything(node)
    gain = kind.bias**-kind.beta * (1 + 8 * EPS)
    return Range(np.minimum(box.low, 0) * gain, np.maximum(box.high, 0) * gain)


def _reduce(node: Node, box: Range) -> Range:
    kind = node.kind
    assert isinstance(kind, kinds.Reduce)
    if kind.function not in ("l1", "l2"):
        return _increasing(node, box)
    with np.errstate(all="ignore"):
        most = evaluate(node, largest_modulus(box)).value * (1 + 4 * box.low.size * EPS)
    return Range(np.zeros(node.shape), np.where(np.isnan(most), np.inf, most))


RANGES: dict[type[kinds.Kind], Callable[..., Range]] = {
    kinds.Convolution: _affine,
    kinds.Matmul: _affine,
    kinds.AxisMaps: _affine,
    kinds.Scale: _scale,
    kinds.Sum: _sum,
    kinds.Elementwise: _elementwise,
    kinds.Product: _product,
    kinds.Quotient: _quotient,
    kinds.BranchMatmul: _branch_matmul,
    kinds.Softmax: _softmax,
    kinds.LogSoftmax: _log_softmax,
    kinds.Normalize: _normalize,
    kinds.LocalResponse: _local_response,
    kinds.Reduce: _reduce,
    **dict.fromkeys(
        (
            kinds.Constant,
            kinds.AveragePool,
            kinds.Identity,
            kinds.Reshape,
            kinds.Permute,
            kinds.Expand,
            kinds.Slice,
            kinds.Gather,
            kinds.Pad,
            kinds.Concatenate,
            kinds.MaxPool,
            kinds.Extremum,
        ),
        _increasing,
    ),
}
"""The functions that bound the elements of each kind of map, by the kind's class."""
