"""A layer among the other nodes of an ONNX graph: its name, its readers, and the normalisation directly behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from convsv_adapters.formats.onnx.graph import STANDARD, Place, Scope, attributes, operator_name
from convsv_core.layers import Layer, Normalisation

__all__ = ["Uses", "following_normalisation", "layer_name", "with_unique_names"]

GRAPH_OUTPUT = "output of a graph"
"""The word for an output of a graph among the operators that read a name."""


class Uses:
    """All places of a model that read a name."""

    def __init__(self, root: Scope) -> None:
        self._nodes: dict[tuple[Scope, str], list[Place]] = defaultdict(list)
        self._outputs: set[tuple[Scope, str]] = set()
        scopes = {root: None}
        for place in root.walk():
            scopes[place.scope] = None
            for name in place.node.input:
                if name and (owner := place.scope.defining(name)) is not None:
                    self._nodes[owner, name].append(place)
        for scope in scopes:
            for value in scope.graph.output:
                if (owner := scope.defining(value.name)) is not None:
                    self._outputs.add((owner, value.name))

    def only(self, scope: Scope, name: str) -> Place | None:
        """Return the one node that reads a name; None if there are several, or if a graph returns the name."""
        key = (scope.defining(name) or scope, name)
        places = self._nodes.get(key, [])
        return places[0] if len(places) == 1 and key not in self._outputs else None

    def operators_of(self, scope: Scope, name: str) -> list[str]:
        """Return the operators of all nodes that read a name."""
        key = (scope.defining(name) or scope, name)
        operators = [operator_name(place.node) for place in self._nodes.get(key, [])]
        return [*operators, GRAPH_OUTPUT] if key in self._outputs else operators


def layer_name(place: Place) -> str:
    """Return the name of the layer that a node is."""
    return str(place.scope.prefix + (place.node.name or place.node.output[0]))


def following_normalisation(place: Place, uses: Uses) -> Normalisation | None:
    """Return the batch normalisation that alone reads the output of a node; None unless it is surely one of inference.

    Parameters
    ----------
    place : Place
        A node and its scope.
    uses : Uses
        All uses of the names of the model.
    """
    behind = uses.only(place.scope, place.node.output[0])
    if behind is None or behind.scope is not place.scope or operator_name(behind.node) != "BatchNormalization":
        return None
    scope, node = behind
    values = attributes(node)
    # Before operator set 7 a node trains by default. Up to operator set 13 a training node has more outputs.
    version = max((opset.version for opset in scope.opsets if opset.domain in STANDARD), default=0)
    trains = version < 7 or values.get("training_mode", 0) or any(node.output[1:])
    if trains or not values.get("spatial", 1) or node.input[0] != place.node.output[0]:
        return None
    try:
        gamma, _, _, variance = (scope.constant(name) for name in node.input[1:5])
    except (LookupError, OSError, ValueError):
        return None
    if gamma.ndim != 1 or variance.shape != gamma.shape:
        return None
    return Normalisation.of_statistics(layer_name(behind), gamma, variance, float(values.get("epsilon", 1e-5)))


def with_unique_names(layers: Iterator[Layer]) -> Iterator[Layer]:
    """Yield layers with names that tell them apart: ONNX lets nodes share a name."""
    seen: dict[str, int] = {}
    for layer in layers:
        count = seen[layer.name] = seen.get(layer.name, 0) + 1
        yield layer if count == 1 else replace(layer, name=f"{layer.name}#{count}")
