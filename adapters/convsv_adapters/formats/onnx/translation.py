"""Translate operators of ONNX to kinds of maps, by a table with one function for each operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from convsv_adapters._networks import Undescribed, stored_normalization
from convsv_adapters.formats.onnx.graph import Node, Scope, attributes, operator_name
from convsv_adapters.formats.onnx.types import Types
from convsv_adapters.parameters import HostArray
from convsv_core.networks import Constant, Identity, Kind, Shape
from convsv_core.networks import Node as GraphNode

__all__ = ["FLOATING", "OPERATORS", "Reading", "Translate", "operator", "translate"]

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


def translate(reading: Reading, node: Node) -> None:
    """Append the nodes that an ONNX node is.

    Raises `Undescribed` for an operator that is no kind of map; LookupError or ValueError for one that is not valid.
    """
    # These modules enter their operators when they are imported, and import this one.
    from convsv_adapters.formats.onnx import translation_arithmetic, translation_layers, translation_rearranging

    del translation_arithmetic, translation_layers, translation_rearranging
    name = operator_name(node)
    if name in DISCONTINUOUS:
        raise Undescribed("its values jump, so that no constant exists")
    if name not in OPERATORS:
        raise Undescribed(f"there is no rule for the operator {name}")
    for output in node.output:
        kind = reading.types.get(output)
        if output and kind is not None and kind.HasField("tensor_type"):
            floating = kind.tensor_type.elem_type in (*FLOATING, onnx.TensorProto.UNDEFINED)
            if not floating and output in _used(reading):
                raise Undescribed("its output is not of floating numbers")
    OPERATORS[name](reading, node, attributes(node))


def _used(reading: Reading) -> set[str]:
    """Return the tensors that a node or the network's outputs take."""
    graph = reading.scope.graph
    return {name for node in graph.node for name in node.input} | {value.name for value in graph.output}


DISCONTINUOUS = (
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "ThresholdedRelu",
    "ArgMax",
    "ArgMin",
    "Hardmax",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Equal",
    "Not",
    "And",
    "Or",
    "Xor",
    "IsNaN",
    "IsInf",
    "Mod",
)
"""Operators whose values jump."""


# ---- operators that return their input ----------------------------------------------------------------


@operator("Identity", "Dropout", "Cast", "CastLike")
def _identity(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    if node.op_type == "Dropout":
        training = reading.optional(node, 2)
        if training is not None and bool(np.all(training)):
            raise Undescribed("dropout in training mode")
    kind = reading.types.get(node.input[0])
    if kind is not None and kind.tensor_type.elem_type not in (*FLOATING, onnx.TensorProto.UNDEFINED):
        raise Undescribed("its input is not of floating numbers")
    reading.add(node, Identity(), node.input[:1])


@operator("BatchNormalization")
def _batch_normalization(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    training = values.get("training_mode", 0) or values.get("is_test", 1) == 0 or len([n for n in node.output if n]) > 1
    if training:
        raise Undescribed("batch normalisation in training mode: its scale depends on the batch")
    weight, bias, mean, variance = (reading.constant(name) for name in node.input[1:5])
    rank, epsilon = len(reading.shape(node.input[0])), values.get("epsilon", 1e-5)
    reading.add(node, stored_normalization(rank, mean, variance, epsilon, weight, bias), node.input[:1])
