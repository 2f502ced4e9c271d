"""A bound for a whole network, shared out over its layers.

The graph of the network says how its bound follows from bounds of its layers. In this graph each bounded layer, with
the normalisation behind it, is a map of which nothing but its bound is known. So what the graph certifies holds for
all weights within the bounds.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from convsv_adapters._layers import ConvLayer, layer_penalty
from convsv_adapters.torch._folding import is_batch_norm
from convsv_adapters.torch._forward import in_evaluation_mode
from convsv_adapters.torch._graph import model_graph
from convsv_adapters.torch._layers import unwrapped
from convsv_core import lipschitz
from convsv_core.networks import Bounded, Constant, Convolution, Graph, Identity, Kind, Matmul, Node, Pad, Scale, Sum

__all__ = ["BoundedGraph", "Share", "bounded_graph", "share_weights", "shared_bounds"]

Share = Literal["equal", "norms"]
"""How a bound is shared out: see `StepOptions`."""

STEPS = 16
"""Number of halvings in the search for the common factor of the layers' bounds.

They narrow an interval of a factor of 2 to a relative 1e-5. Each of them costs one pass over the graph.
"""

DOUBLINGS = 40
"""Largest number of doublings or halvings from which the search starts.

A guess: with smaller bounds than 2 ** -40 a network could not learn, and larger ones than 2 ** 40 bound nothing.
"""

MARGIN = 1e-4
"""Share of its bound by which each layer is kept further below, for the rounding of certificates in float32.

`convsv_core.lipschitz` certifies the stored weights once more. A guess: ten times the rounding in the tests.
"""

FREE_FIELDS = ("bias", "shift", "example")
"""Fields of kinds of maps that do not change how much the map can lengthen a difference of inputs."""

LEAST_SHARE = 1e-3
"""With "norms", the least norm that counts for a layer, as a share of the largest one. A guess.

A layer of zeros would get a bound of 0, and could never learn.
"""


@dataclass(frozen=True, eq=False)
class BoundedGraph:
    """The graph of a network whose layers have nothing but a bound.

    Attributes
    ----------
    graph : Graph
    places : dict of str to int
        For the name of each node that stands for a layer, the number of the layer.
    """

    graph: Graph
    places: dict[str, int]

    def log10_upper(self, bounds: Sequence[float]) -> float:
        """Return the decimal logarithm of the network's Lipschitz constant, from the bound of each layer.

        Raises ValueError if a part of the network has no bound.
        """
        nodes = tuple(
            dataclasses.replace(node, kind=Bounded(bounds[self.places[node.name]]))
            if node.name in self.places
            else node
            for node in self.graph
        )
        found = lipschitz(Graph(nodes, self.graph.outputs), lower=False)
        if found.missing:
            first = found.missing[0]
            raise ValueError(
                f"network_bound: the node {first.name!r} ({first.op}) of the model has no bound: {first.reason}"
            )
        return found.log10_upper


def share_weights(layers: Sequence[ConvLayer], share: Share) -> list[float]:
    """Return the proportions of the layers' bounds; with "norms" these are the layers' certified norms."""
    if share == "equal":
        return [1.0] * len(layers)
    norms = []
    with torch.no_grad():
        for layer in layers:
            norms.append(math.exp(float(layer_penalty(layer, layer.kernel.detach(), "log_lipschitz", {}))))
    least = LEAST_SHARE * max(norms)
    return [max(norm, least) for norm in norms]


def shared_bounds(graph: BoundedGraph, limit: float, weights: Sequence[float]) -> list[float]:
    """Return bounds of the layers in fixed proportions, with which the network's constant is at most `limit`.

    Parameters
    ----------
    graph : BoundedGraph
    limit : float
        Positive.
    weights : sequence of float
        The proportions, positive.

    Raises
    ------
    ValueError
        The network's constant is above the limit even if every layer is zero, or a part of it has no bound.
    """
    goal = math.log10(limit)

    def bounds(factor: float) -> list[float]:
        return [factor * weight for weight in weights]

    def fits(factor: float) -> bool:
        return graph.log10_upper(bounds(factor)) <= goal

    if not fits(0.0):
        least = 10 ** graph.log10_upper(bounds(0.0))
        raise ValueError(
            f"network_bound={limit}: the network's constant would be {least:.4g} even if every bounded layer were "
            f"zero; wanted a larger bound"
        )
    low, high = 1.0, 1.0
    for _ in range(DOUBLINGS):
        if not fits(high):
            break
        low, high = high, 2 * high
    else:
        raise ValueError(f"network_bound={limit}: no bound of the layers of the model is too large for it")
    while not fits(low):
        low, high = low / 2, low
        if low < 2.0**-DOUBLINGS:
            raise ValueError(
                f"network_bound={limit}: layers would need bounds below {low * max(weights):.1g}; wanted a larger bound"
            )
    for _ in range(STEPS):
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return [bound * (1 - MARGIN) for bound in bounds(low)]


def bounded_graph(
    model: nn.Module, layers: Sequence[ConvLayer], modules: Mapping[str, nn.Module], example_input: object
) -> BoundedGraph:
    """Return the graph of a model in which each layer has nothing but a bound.

    Parameters
    ----------
    model : torch.nn.Module
    layers : sequence of ConvLayer
        All of its layers, linear ones too, with their normalisations.
    modules : mapping from str to torch.nn.Module
        The modules of the layers and of the normalisations, by name.
    example_input : object
        As for `conv_layers`.

    Raises
    ------
    ValueError
        The model cannot be traced, or its constant depends on parameters that no layer holds.
    """
    for layer in layers:
        if layer.unknown_forward:
            raise ValueError(f"network_bound: the layer {layer.name!r} is {layer.note}; wanted PyTorch's own class")
    graph, places = _without_weights(_graph(model, example_input), layers, modules)
    # With other parameters, whatever is left of the graph has to be the same.
    other = copy.deepcopy(unwrapped(model))
    with torch.no_grad():
        for tensor in [*other.parameters(), *(b for m in other.modules() if is_batch_norm(m) for b in m.buffers())]:
            if tensor.is_floating_point():
                tensor.mul_(1.25).add_(0.125)
    again, _ = _without_weights(_graph(other, example_input), layers, modules)
    for node in graph:
        if node.name in places or (isinstance(node.kind, Constant) and _is_offset(graph, node)):
            continue
        if node.name not in again or not _same(node.kind, again[node.name].kind):
            raise ValueError(
                f"network_bound: the node {node.name!r} ({node.op}) of the model depends on parameters of no bounded "
                f"layer: wanted a network whose other parts have no parameters, such as activations and pooling"
            )
    return BoundedGraph(graph, places)


def _graph(model: nn.Module, example_input: object) -> Graph:
    with in_evaluation_mode(unwrapped(model)):
        return model_graph(model, example_input)


def _without_weights(
    graph: Graph, layers: Sequence[ConvLayer], modules: Mapping[str, nn.Module]
) -> tuple[Graph, dict[str, int]]:
    """Return a graph in which a map without data stands for each layer, and the numbers of the layers."""
    names = {module: name for name, module in modules.items()}
    numbers = {
        (layer.name, "" if layer.normalisation is None else names[layer.normalisation]): number
        for number, layer in enumerate(layers)
    }
    nodes: list[Node] = []
    places: dict[str, int] = {}
    # The key is an output of a layer. The value names the layer and the tensor that the layer takes.
    outputs: dict[str, tuple[str, str]] = {}

    def stand_in(node: Node, key: tuple[str, str], source: str) -> None:
        if key not in numbers:
            raise ValueError(
                f"network_bound: the node {node.name!r} ({node.op}) of the model holds weights of no bounded layer"
            )
        places[node.name] = numbers[key]
        nodes.append(dataclasses.replace(node, kind=Bounded(0.0), inputs=(source,)))

    for node in graph:
        if isinstance(node.kind, Convolution | Matmul):
            source = _before_padding(graph, node)
            outputs[node.name] = node.source, source
            if (node.source, "") in numbers or not any(name == node.source for name, _ in numbers):
                stand_in(node, (node.source, ""), source)
            else:
                nodes.append(node)  # Only normalisations use this node. `until` removes it below.
        elif isinstance(node.kind, Scale) and is_batch_norm(modules.get(node.source, nn.Identity())):
            layer, source = outputs.get(node.inputs[0], ("", ""))
            if (layer, node.source) in numbers and layer != node.source:
                stand_in(node, (layer, node.source), source)
            else:
                stand_in(node, (node.source, node.source), node.inputs[0])
        else:
            if isinstance(node.kind, Identity) and node.inputs[0] in outputs:
                outputs[node.name] = outputs[node.inputs[0]]
            nodes.append(node)
    left = Graph(tuple(nodes), graph.outputs).until(graph.outputs)
    for node in left:
        if isinstance(node.kind, Convolution | Matmul):
            raise ValueError(f"network_bound: the output of the layer {node.name!r} is used without its normalisation")
    return left, places


def _before_padding(graph: Graph, node: Node) -> str:
    """Return the tensor that a layer takes, before the padding that is part of the layer."""
    before = graph[node.inputs[0]]
    return before.inputs[0] if isinstance(before.kind, Pad) and before.source == node.source else before.name


def _is_offset(graph: Graph, node: Node) -> bool:
    """Return whether a constant is only added to tensors."""
    return all(isinstance(user.kind, Sum) for user in graph.users[node.name])


def _same(kind: Kind, other: Kind) -> bool:
    """Return whether two maps can lengthen a difference by the same amount, because they differ in offsets alone."""
    if type(kind) is not type(other):
        return False
    fields = (field.name for field in dataclasses.fields(kind) if field.name not in FREE_FIELDS)
    return all(_equal(getattr(kind, name), getattr(other, name)) for name in fields)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return value.keys() == other.keys() and all(_equal(value[key], other[key]) for key in value)
    if isinstance(value, np.ndarray) or isinstance(other, np.ndarray):
        return bool(np.array_equal(value, other, equal_nan=True))
    return bool(value == other)
