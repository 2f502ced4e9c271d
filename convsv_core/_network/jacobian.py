"""The value of a network at a point, and products with its Jacobian there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from convsv_core._network.graph import Graph, Node
from convsv_core._network.kinds import Input
from convsv_core._network.rule_types import Float64Array, LinearMap, NoRule
from convsv_core._network.rules import rule_of

__all__ = ["Linearized", "linearize", "tensors_of"]


class Linearized:
    """A network at one point of its input space.

    Vectors of inputs and outputs hold all inputs, or all outputs, one behind another.

    Attributes
    ----------
    values : dict
        The value of each node, by its name.
    """

    def __init__(self, graph: Graph, maps: Mapping[str, LinearMap], values: dict[str, Float64Array]) -> None:
        self.graph, self.values = graph, values
        self._maps = maps
        self._depends: set[str] = {node.name for node in graph.inputs}
        for node in graph:
            if any(name in self._depends for name in node.inputs):
                self._depends.add(node.name)

    @property
    def input_size(self) -> int:
        """Return the number of elements of all inputs."""
        return sum(node.size for node in self.graph.inputs)

    def apply(self, vector: Float64Array) -> Float64Array:
        """Return the Jacobian times a vector."""
        tangents = dict(tensors_of(vector, self.graph.inputs))
        for node in self.graph:
            if node.name in self._maps and node.name in self._depends:
                parts = [tangents.get(name, np.zeros(self.graph[name].shape)) for name in node.inputs]
                tangents[node.name] = self._maps[node.name].apply(*parts)
        outputs = [tangents.get(name, np.zeros(self.graph[name].shape)) for name in self.graph.outputs]
        return np.concatenate([output.reshape(-1) for output in outputs])

    def adjoint(self, vector: Float64Array) -> Float64Array:
        """Return the transposed Jacobian times a vector."""
        cotangents: dict[str, Float64Array] = {}
        for name, part in tensors_of(vector, [self.graph[name] for name in self.graph.outputs]):
            cotangents[name] = cotangents[name] + part if name in cotangents else part
        for node in reversed(self.graph.nodes):
            if node.name not in self._maps or node.name not in self._depends or node.name not in cotangents:
                continue
            parts = self._maps[node.name].adjoint(cotangents.pop(node.name))
            for name, part in zip(node.inputs, parts, strict=True):
                if name in self._depends:
                    cotangents[name] = cotangents[name] + part if name in cotangents else part
        inputs = [cotangents.get(node.name, np.zeros(node.shape)) for node in self.graph.inputs]
        return np.concatenate([part.reshape(-1) for part in inputs])


def tensors_of(vector: Float64Array, nodes: Iterable[Node]) -> Iterator[tuple[str, Float64Array]]:
    """Yield the name of each node, and the part of a vector that holds the node's tensor behind the other ones."""
    start = 0
    for node in nodes:
        yield node.name, vector[start : start + node.size].reshape(node.shape)
        start += node.size


def linearize(graph: Graph, inputs: Mapping[str, Float64Array]) -> Linearized:
    """Evaluate a network in float64 at given inputs, and return it with its derivative there.

    Parameters
    ----------
    graph : Graph
    inputs : mapping from name to array
        The value of each node of the kind `Input`.

    Raises
    ------
    NoRule
        A node has no value, or no derivative that is known here.
    """
    values: dict[str, Float64Array] = {}
    maps: dict[str, LinearMap] = {}
    for node in graph:
        if isinstance(node.kind, Input):
            values[node.name] = np.asarray(inputs[node.name], np.float64).reshape(node.shape)
        else:
            evaluate = rule_of(node.kind).evaluate
            if evaluate is None:
                raise NoRule(f"{type(node.kind).__name__} has no value")
            arrays = [values[name] for name in node.inputs]
            values[node.name], maps[node.name] = evaluate(node, *arrays)
            if values[node.name].shape != node.shape:
                raise NoRule(f"{node.name} has the shape {values[node.name].shape}, and the graph states {node.shape}")
    return Linearized(graph, maps, values)
