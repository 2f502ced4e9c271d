"""A network on its way from ONNX to a graph of maps, and the table of the operators that can be translated.

The modules `translation` and `translation_*` enter their operators into the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from convsv_adapters._networks import Undescribed
from convsv_adapters.formats.onnx.graph import Node, Scope, operator_name
from convsv_adapters.formats.onnx.types import Types
from convsv_adapters.parameters import HostArray
from convsv_core.networks import Constant, Kind, Shape
from convsv_core.networks import Node as GraphNode

__all__ = ["FLOATING", "OPERATORS", "Reading", "Translate", "operator"]

FLOATING = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
)
"""The types of elements that have derivatives."""


@dataclass
class Reading:
    """A graph on its way from ONNX.

    Attributes
    ----------
    scope : Scope
    shapes : dict from name to tuple of int
    types : Types
    nodes : list of GraphNode
        The nodes so far.
    known : set of str
        The names of tensors that a node so far computes.
    """

    scope: Scope
    shapes: dict[str, Shape]
    types: Types
    nodes: list[GraphNode] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    @property
    def opset(self) -> int:
        """Return the version of ONNX's own operators."""
        return max((o.version for o in self.scope.opsets if o.domain in ("", "ai.onnx")), default=1)

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor does not depend on the network's inputs."""
        return self.scope.is_constant(name)

    def constant(self, name: str) -> HostArray:
        """Return the value of a tensor; raise `Undescribed` where it depends on the network's inputs."""
        if not self.scope.is_constant(name):
            raise Undescribed(f"its parameter {name!r} depends on the input")
        return self.scope.constant(name)

    def optional(self, node: Node, index: int) -> HostArray | None:
        """Return the value of an input of a node; None if the node lacks it."""
        return self.constant(node.input[index]) if len(node.input) > index and node.input[index] else None

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor."""
        if name in self.shapes:
            return self.shapes[name]
        if self.scope.is_constant(name):
            return tuple(self.scope.constant(name).shape)
        raise Undescribed(f"the shape of {name!r} is not known")

    def source(self, name: str) -> str:
        """Return the name of the node that computes a tensor; a constant becomes a node."""
        if name not in self.known:
            value = self.constant(name)
            self.nodes.append(GraphNode(name, Constant(value), (), tuple(value.shape), "Constant"))
            self.known.add(name)
        return name

    def add(self, node: Node, kind: Kind, inputs: Sequence[str], *, output: int = 0) -> None:
        """Append the node that computes an output of an ONNX node."""
        name = node.output[output]
        sources = tuple(self.source(one) for one in inputs)
        self._append(GraphNode(name, kind, sources, self.shape(name), operator_name(node), node.name))

    def step(self, node: Node, label: str, kind: Kind, inputs: Sequence[str], shape: Shape) -> str:
        """Append a node that is a step towards an ONNX node's output, and return its name."""
        name = f"{node.output[0]}/{label}"
        sources = tuple(self.source(one) for one in inputs)
        self._append(GraphNode(name, kind, sources, shape, operator_name(node), ""))
        self.shapes[name] = shape
        return name

    def _append(self, node: GraphNode) -> None:
        self.nodes.append(node)
        self.known.add(node.name)


Translate = Callable[[Reading, Node, dict[str, Any]], None]

OPERATORS: dict[str, Translate] = {}
"""How each operator is translated, by its name."""


def operator(*names: str) -> Callable[[Translate], Translate]:
    """Make a decorator that enters a function into `OPERATORS`."""

    def enter(function: Translate) -> Translate:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return enter
