"""Functions that exporters write as several nodes, recognised as the one kind that they are.

``x * sigmoid(b x)`` is SiLU, ``x * hard_sigmoid(x)`` and ``x * clip(x + 3, 0, 6) / 6`` are hard swish,
``x * tanh(softplus(x))`` is Mish, ``x / 2 * (1 + erf(x / sqrt(2)))`` is GELU, ``x * x`` the square, and
``(x - m) / sqrt(mean((x - m)^2) + epsilon)`` a normalisation. Each has a bound; a product of activations has none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from convsv_core._network import kinds
from convsv_core._network.elementwise import function_of
from convsv_core._network.graph import Graph, Node

__all__ = ["simplify"]

ERF_SCALE_RTOL = 1e-6
"""Relative tolerance of the scale ``1 / sqrt(2)`` inside of GELU's erf, which float32 rounds. A guess."""


def simplify(graph: Graph) -> Graph:
    """Return the same network with recognised functions as one node each, without nodes that no output needs."""
    found: dict[str, tuple[Node, ...]] = {}
    for node in graph:
        replacement: tuple[Node, ...] = ()
        if isinstance(node.kind, kinds.Product):
            replacement = _product(graph, node)
        elif isinstance(node.kind, kinds.Quotient):
            replacement = _normalization(graph, node)
        if replacement:
            found[node.name] = replacement
    if not found:
        return graph.until(graph.outputs)
    nodes = [part for node in graph for part in found.get(node.name, (node,))]
    return Graph(tuple(nodes), graph.outputs).until(graph.outputs)


class _Affine(NamedTuple):
    """A tensor as ``scale * base + shift`` with numbers `scale` and `shift`."""

    base: Node
    scale: float
    shift: float


def _steps(graph: Graph, name: str) -> Iterator[_Affine]:
    """Yield the tensors that a tensor is an affine function of, through nodes that scale and shift by one number.

    The first is the tensor itself, and the last one is none such node.
    """
    node, scale, shift = graph[name], 1.0, 0.0
    while True:
        yield _Affine(node, scale, shift)
        kind = node.kind
        if isinstance(kind, kinds.Scale) and node.shape == graph[node.inputs[0]].shape:
            factor, added = _number(kind.scale), _number(kind.shift)
            if factor is None or added is None:
                return
            scale, shift = scale * factor, shift + scale * added
        elif not isinstance(kind, kinds.Identity):
            return
        node = graph[node.inputs[0]]


def _affine(graph: Graph, name: str, base: str = "") -> _Affine:
    """Return a tensor as an affine function of `base`, or else of the earliest tensor that `_steps` finds."""
    for found in _steps(graph, name):
        if found.base.name == base:
            break
    return found


def _number(array: kinds.NumberArray) -> float | None:
    """Return the only value of an array; None if it holds several."""
    values = np.unique(np.asarray(array, np.float64))
    return float(values[0]) if len(values) == 1 else None


def _numbers(kind: kinds.Elementwise, *names: str) -> list[float | None]:
    """Return parameters of a function, each as a number; None for one that holds several."""
    _, parameters = function_of(kind)
    return [_number(parameters[name]) for name in names]


def _product(graph: Graph, node: Node) -> tuple[Node, ...]:
    if any(graph[name].shape != node.shape for name in node.inputs):
        return ()
    for first, second in (node.inputs, node.inputs[::-1]):
        for own in _steps(graph, first):
            found = None if own.shift else _gated(graph, own.base, _affine(graph, second, own.base.name))
            if found is not None:
                kind, factor = found
                return _scaled(node, kind, own.base.name, factor * own.scale)
    return ()


def _scaled(node: Node, kind: kinds.Kind, source: str, factor: float) -> tuple[Node, ...]:
    """Return the nodes for ``factor * f(source)`` in place of a node."""
    if factor == 1:
        return (dataclasses.replace(node, kind=kind, inputs=(source,)),)
    inner = dataclasses.replace(node, name=f"{node.name}/function", kind=kind, inputs=(source,))
    return inner, dataclasses.replace(node, kind=kinds.Scale(np.asarray(factor)), inputs=(inner.name,))


def _gated(graph: Graph, x: Node, gate: _Affine) -> tuple[kinds.Elementwise, float] | None:
    """Return the function f and the number c with ``x * gate == c * f(x)``; None if the product is none of these."""
    if gate.base.name == x.name and not gate.shift:
        return kinds.Elementwise("square"), gate.scale
    kind = gate.base.kind
    if not isinstance(kind, kinds.Elementwise):
        return None
    inner = _affine(graph, gate.base.inputs[0], x.name)
    if kind.function == "tanh" and isinstance(inner.base.kind, kinds.Elementwise):
        outer, inner_kind = inner, inner.base.kind
        inner = _affine(graph, inner.base.inputs[0], x.name)
        plain = (outer.scale, outer.shift, inner.scale, inner.shift, gate.shift) == (1, 0, 1, 0, 0)
        softplus = inner_kind.function == "softplus" and _numbers(inner_kind, "beta") == [1]
        fits = plain and softplus and inner.base.name == x.name
        return (kinds.Elementwise("mish"), gate.scale) if fits else None
    if inner.base.name != x.name:
        return None
    if kind.function == "erf":
        scale = math.isclose(inner.scale, 1 / math.sqrt(2), rel_tol=ERF_SCALE_RTOL)
        half = math.isclose(gate.shift, gate.scale, rel_tol=1e-12)
        return (kinds.Elementwise("gelu"), 2 * gate.scale) if scale and half and not inner.shift else None
    if gate.shift:
        return None
    if kind.function == "sigmoid" and not inner.shift:
        return kinds.Elementwise("silu", {"beta": inner.scale}), gate.scale
    if kind.function == "hard_sigmoid":
        alpha, beta = _numbers(kind, "alpha", "beta")
        if alpha is not None and beta is not None:
            gates = {"alpha": alpha * inner.scale, "beta": beta + alpha * inner.shift}
            return kinds.Elementwise("hard_swish", gates), gate.scale
    if kind.function == "clip":
        low, high = _numbers(kind, "low", "high")
        if low == 0 and high is not None and 0 < high < math.inf:
            gates = {"alpha": inner.scale / high, "beta": inner.shift / high}
            return kinds.Elementwise("hard_swish", gates), gate.scale * high
    return None


def _normalization(graph: Graph, node: Node) -> tuple[Node, ...]:
    """Return the node for ``d / sqrt(mean(d ** 2) + epsilon)``; d may be ``x`` less its mean."""
    top, bottom = (_affine(graph, name) for name in node.inputs)
    root = bottom.base.kind
    if top.shift or bottom.shift or bottom.scale != 1 or top.base.shape != node.shape:
        return ()
    if not (isinstance(root, kinds.Elementwise) and _is_power(root, "sqrt", 0.5)):
        return ()
    variance = _affine(graph, bottom.base.inputs[0])
    mean = variance.base.kind
    if variance.scale != 1 or not (isinstance(mean, kinds.Reduce) and mean.function == "mean"):
        return ()
    if variance.base.shape != _kept_shape(top.base, mean.axes):
        return ()  # A mean without the axes that it was taken along is broadcast along others.
    square = graph[variance.base.inputs[0]]
    if not _is_square_of(graph, square, top.base):
        return ()
    centred = _centred_input(graph, top.base, mean.axes)
    kind = kinds.Normalize(mean.axes, variance.shift, centred is not None)
    return _scaled(node, kind, centred or top.base.name, top.scale)


def _is_power(kind: kinds.Kind, name: str, exponent: float) -> bool:
    if not isinstance(kind, kinds.Elementwise):
        return False
    power = kind.function == "power" and _numbers(kind, "exponent") == [exponent]
    return kind.function == name or power


def _is_square_of(graph: Graph, square: Node, base: Node) -> bool:
    """Return whether a node is the square of a tensor, or of another node that computes the same difference."""
    if isinstance(square.kind, kinds.Product):
        if square.inputs[0] != square.inputs[1]:
            return False
    elif not _is_power(square.kind, "square", 2.0):
        return False
    source = graph[square.inputs[0]]
    same = isinstance(source.kind, kinds.Sum) and isinstance(base.kind, kinds.Sum)
    if same and source.inputs == base.inputs:
        assert isinstance(source.kind, kinds.Sum)
        assert isinstance(base.kind, kinds.Sum)
        return source.kind.weights == base.kind.weights
    return source.name == base.name


def _centred_input(graph: Graph, node: Node, axes: tuple[int, ...]) -> str | None:
    """Return the name of x if a node is x less its mean along the axes."""
    kind = node.kind
    if not isinstance(kind, kinds.Sum) or kind.weights != (1.0, -1.0):
        return None
    x, mean = node.inputs
    other = graph[mean].kind
    fits = isinstance(other, kinds.Reduce) and other.function == "mean" and other.axes == axes
    return x if fits and graph[mean].inputs == (x,) and graph[mean].shape == _kept_shape(graph[x], axes) else None


def _kept_shape(node: Node, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor after a reduction that keeps the axes with the extent 1."""
    return tuple(1 if axis in axes else extent for axis, extent in enumerate(node.shape))
