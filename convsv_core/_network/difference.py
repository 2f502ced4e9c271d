"""A bound of how far the outputs of two networks of one structure are apart, for all inputs in a range.

At each node, ``A(u) - B(v) = (A(u) - B(u)) + (B(u) - B(v))``: u and v are the two networks' inputs of the node, A and B
its two maps. The first term is the map with the difference of the weights, at an activation of the first network. The
second is at most the node's factor times the bound of ``u - v``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from convsv_core._network import kinds
from convsv_core._network.bounds import Bounds
from convsv_core._network.graph import Graph, Node
from convsv_core._network.logarithms import power_of_ten
from convsv_core._network.norms import euclidean_norm
from convsv_core._network.patterns import simplify
from convsv_core._network.ranges import largest_modulus
from convsv_core._network.rule_types import Factors, NoRule, Range, Tensor
from convsv_core._network.rules import node_factors, node_range

__all__ = ["output_difference"]

MARGIN = 1 + 1e-9
"""Factor for the rounding of sums and products of bounds. It is far above the eps of float64 times their number."""

WEIGHTS = ("kernel", "bias", "matrix", "scale", "shift", "value")
"""The fields of kinds of maps in which two networks may differ. The others have to be equal."""


def output_difference(first: Graph, second: Graph, input_range: tuple[float, float]) -> float:
    """Return an upper bound of the Euclidean distance between two networks' outputs, for all inputs in a range.

    Parameters
    ----------
    first, second : Graph
        Of one structure: the same maps in the same order, which differ in their weights.
    input_range : tuple of float
        The least and the largest value of every element of the input.

    Returns
    -------
    float
        Of several outputs, the bound of all together. Infinite where a node has no bound over the range. All rounding
        is included.

    Raises
    ------
    ValueError
        The networks differ in more than weights.

    Notes
    -----
    Neither traceable nor differentiable. The bound is a sum over the maps that differ, each times the factors of the
    maps behind it. So it is useful for networks that are kept within norms of about 1, and says little where the
    product of the norms is large.

    Examples
    --------
    >>> x = Node("x", kinds.Input(), (), (1, 4))
    >>> scaled = [Node("y", kinds.Scale(np.asarray(scale)), ("x",), (1, 4)) for scale in (1.0, 0.75)]
    >>> first, second = (Graph((x, node), ("y",)) for node in scaled)
    >>> round(output_difference(first, second, (0.0, 1.0)), 6)
    0.5
    """
    first, second = simplify(first.until(first.outputs)), simplify(second.until(second.outputs))
    names = _matched(first, second)
    bounds = Bounds(first, input_range)
    sizes = _largest_norms(first, bounds, input_range)
    of_first, of_second = (_ranges(graph, *input_range) for graph in (first, second))
    apart: dict[str, float] = {}
    for node, other in zip(first, second, strict=True):
        if isinstance(node.kind, kinds.Input):
            apart[node.name] = 0.0
            continue
        given = [apart[name] for name in node.inputs]
        hulls = [_hull(of_first[name], of_second[names[name]]) for name in node.inputs]
        inputs = [Tensor(first[name].shape, hull) for name, hull in zip(node.inputs, hulls, strict=True)]
        carried = _carried(other, inputs, given)
        own = _own(node, other, [of_first[name] for name in node.inputs], [sizes[name] for name in node.inputs])
        apart[node.name] = (carried + own) * MARGIN if carried or own else 0.0
    return math.hypot(*(apart[name] for name in first.outputs)) * MARGIN


def _matched(first: Graph, second: Graph) -> dict[str, str]:
    """Return the second network's name of each node of the first; raise ValueError if the structures differ."""
    names: dict[str, str] = {}
    if len(first) != len(second):
        raise ValueError(f"the networks have {len(first)} and {len(second)} maps: wanted two of one structure")
    for node, other in zip(first, second, strict=True):
        same = type(node.kind) is type(other.kind) and node.shape == other.shape
        if not same or other.inputs != tuple(names[name] for name in node.inputs):
            raise ValueError(
                f"{node.name!r} ({node.op}, {node.shape}) stands where the other network has {other.name!r} "
                f"({other.op}, {other.shape}): wanted two networks of one structure"
            )
        for field in dataclasses.fields(node.kind):
            one, two = (getattr(kind, field.name) for kind in (node.kind, other.kind))
            if field.name not in (*WEIGHTS, "example") and not _equal(one, two):
                raise ValueError(f"{node.name!r} and {other.name!r} differ in {field.name}: wanted it to be the same")
            if field.name in WEIGHTS and np.shape(one) != np.shape(two):
                raise ValueError(f"the {field.name} of {node.name!r} and {other.name!r} have other shapes")
        names[node.name] = other.name
    if tuple(names[name] for name in first.outputs) != second.outputs:
        raise ValueError(f"outputs: {first.outputs} and {second.outputs} are no counterparts")
    return names


def _equal(one: object, two: object) -> bool:
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(two))
    return one == two


def _ranges(graph: Graph, low: float, high: float) -> dict[str, Range]:
    """Return bounds of the elements of every tensor, for inputs between two numbers."""
    found: dict[str, Range] = {}
    for node in graph:
        if isinstance(node.kind, kinds.Input):
            found[node.name] = Range(np.full(node.shape, low), np.full(node.shape, high))
        else:
            found[node.name] = node_range(node, [found[name] for name in node.inputs])
    return found


def _largest_norms(graph: Graph, bounds: Bounds, box: tuple[float, float]) -> dict[str, float]:
    """Return upper bounds of the norms of all tensors: from their ranges, or from the constant and the middle input.

    An input is at most the half diagonal of the box away from the middle, so a tensor is at most its Lipschitz constant
    times that away from its value there.
    """
    whole, middle = _ranges(graph, *box), _ranges(graph, *[(box[0] + box[1]) / 2] * 2)
    logs = bounds.from_inputs()
    radius = (box[1] - box[0]) / 2 * math.sqrt(sum(node.size for node in graph.inputs)) * MARGIN
    found = {}
    for node in graph:
        spread = power_of_ten(logs[node.name]) * radius if radius else 0.0
        found[node.name] = min(_norm(whole[node.name]), (_norm(middle[node.name]) + spread) * MARGIN)
    return found


def _norm(box: Range) -> float:
    """Return the largest norm of a tensor with these elements."""
    return float(euclidean_norm(largest_modulus(box))) * MARGIN


def _hull(one: Range, two: Range) -> Range:
    return Range(np.minimum(one.low, two.low), np.maximum(one.high, two.high))


def _carried(node: Node, inputs: Sequence[Tensor], apart: Sequence[float]) -> float:
    """Return the bound of how far a node's results are apart for inputs that are so far apart."""
    if not any(apart):
        return 0.0
    try:
        factors: Factors = node_factors(node, inputs)
    except NoRule:
        return math.inf
    parts = [value * distance if distance else 0.0 for value, distance in zip(factors.values, apart, strict=True)]
    return math.fsum(parts) if factors.join == "sum" else math.hypot(*parts)


def _own(node: Node, other: Node, boxes: Sequence[Range], sizes: Sequence[float]) -> float:
    """Return the bound of how far two maps' results are apart for one input of the first network."""
    kind = _less(node.kind, other.kind)
    if kind is None:
        return 0.0
    if isinstance(kind, kinds.Constant):
        return float(euclidean_norm(np.asarray(kind.value, np.float64)))
    changed = dataclasses.replace(node, kind=kind)
    by_range = _norm(node_range(changed, boxes))
    bare = dataclasses.replace(changed, kind=_without_shift(kind))
    at_zero = node_range(changed, [Range(np.zeros(box.low.shape), np.zeros(box.low.shape)) for box in boxes])
    try:
        (factor,) = node_factors(bare, [Tensor(box.low.shape) for box in boxes]).values
    except NoRule:
        return by_range
    return min(by_range, (factor * sizes[0] if factor else 0.0) + _norm(at_zero))


def _less(kind: kinds.Kind, other: kinds.Kind) -> kinds.Kind | None:
    """Return the map with the difference of two maps' weights; None if they are equal."""
    own = [field.name for field in dataclasses.fields(kind) if field.name in WEIGHTS]
    changes = {}
    for name in own:
        one, two = getattr(kind, name), getattr(other, name)
        if one is not None:
            changes[name] = np.asarray(one, np.float64) - np.asarray(two, np.float64)
    if not any(np.any(change) for change in changes.values()):
        return None
    return dataclasses.replace(kind, **changes)


def _without_shift(kind: kinds.Kind) -> kinds.Kind:
    if isinstance(kind, kinds.Scale):
        return dataclasses.replace(kind, shift=np.zeros(()))
    if isinstance(kind, kinds.Convolution | kinds.Matmul):
        return dataclasses.replace(kind, bias=None)
    return kind
