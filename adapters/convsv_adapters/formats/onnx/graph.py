"""An ONNX graph and the bodies nested in it: which node computes a name, and which names are constants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnx.helper
import onnx.reference

from convsv_adapters.formats.onnx.tensors import StoredTensor, is_external, to_array
from convsv_adapters.parameters import HostArray

__all__ = [
    "RANDOM_OPS",
    "STANDARD",
    "Graph",
    "Node",
    "Place",
    "Scope",
    "attributes",
    "bodies",
    "constant_tensor",
    "is_text",
    "operator_name",
]

Node: TypeAlias = Any
"""An onnx.NodeProto."""

Graph: TypeAlias = Any
"""An onnx.GraphProto."""

STANDARD = ("", "ai.onnx")
"""The names of the domain of ONNX's own operators."""

RANDOM_OPS = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
"""Operators whose outputs are no constants even if all their inputs are."""

IMPLEMENTED_SINCE = {"DequantizeLinear": 19}
"""The first operator set for which onnx's reference implementation of an operator runs.

A node of an older operator set is evaluated by this one, which computes the same numbers.
"""


class Place(NamedTuple):
    """A node and the scope whose graph holds it."""

    scope: Scope
    node: Node


class Scope:
    """A graph, with the scope around it in which names are looked up that the graph does not define.

    Parameters
    ----------
    graph : onnx.GraphProto
    opsets : list of onnx.OperatorSetIdProto
        The operator sets that the model imports.
    folder : Path
        Where files with external data lie.
    parent, owner : Scope and onnx.NodeProto, or None
        For a body of an `If`, `Loop` or `Scan`: the scope around it, and the node that holds the body.
    prefix : str
        How the names of its layers begin.

    Attributes
    ----------
    children : dict from index of a node to list of Scope
        The bodies that the nodes of the graph hold.
    """

    def __init__(
        self,
        graph: Graph,
        opsets: Any,
        folder: Path,
        *,
        parent: Scope | None = None,
        owner: Node | None = None,
        prefix: str = "",
    ) -> None:
        self.graph, self.opsets, self.folder = graph, opsets, folder
        self.parent, self.owner, self.prefix = parent, owner, prefix
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output if output}
        self.inputs = {value.name for value in graph.input} - set(self.initializers)
        self._values: dict[str, HostArray] = {}
        self._constants = set(self.initializers)
        self.children: dict[int, list[Scope]] = {}
        for index, node in enumerate(graph.node):  # nodes come in topological order: one pass finds all constants
            for body in bodies(node):
                name = f"{prefix}{node.name or node.op_type}/{body.name}/"
                child = Scope(body, opsets, folder, parent=self, owner=node, prefix=name)
                self.children.setdefault(index, []).append(child)
            foldable = index not in self.children and node.op_type not in RANDOM_OPS
            if foldable and all(self.is_constant(name) for name in node.input if name):
                self._constants.update(node.output)

    def defining(self, name: str) -> Scope | None:
        """Return the innermost scope, from this one outwards, that defines `name`; None if no scope does."""
        return next((scope for scope in self.outwards() if scope._defines(name)), None)

    def producer(self, name: str) -> Node | None:
        """Return the node that computes `name`, in this scope or around it; None for inputs and initialisers."""
        scope = self.defining(name)
        return None if scope is None else scope.producers.get(name)

    def is_constant(self, name: str) -> bool:
        """Return whether `name` depends only on numbers stored in the model."""
        scope = self.defining(name)
        return scope is not None and name in scope._constants

    def constant(self, name: str) -> HostArray:
        """Evaluate a constant: an initialiser, or the output of nodes whose inputs are constants.

        Raises `LookupError` if the name is not a constant, `ValueError` if it cannot be evaluated.
        """
        scope = self.defining(name)
        if scope is None:
            raise LookupError(f"{name!r} is defined nowhere in the model")
        if name not in scope._constants:
            raise LookupError(f"{name!r} is computed at run time")
        if name not in scope._values:
            if name in scope.initializers:
                return to_array(scope.initializers[name], scope.folder)
            scope._evaluate(scope.producers[name])
        return scope._values[name]

    def walk(self) -> Iterator[Place]:
        """Yield every node with its scope, in the order of execution; the nodes of a body follow its owner."""
        for index, node in enumerate(self.graph.node):
            yield Place(self, node)
            for child in self.children.get(index, ()):
                yield from child.walk()

    def tensors(self) -> Iterator[Any]:
        """Yield every TensorProto of the graph and of the bodies in it."""
        yield from self.graph.initializer
        for node in self.graph.node:
            yield from (a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)
        for children in self.children.values():
            for child in children:
                yield from child.tensors()

    def stored(self, name: str) -> StoredTensor | None:
        """Return the tensor of the file that `name` stands for: an initialiser, or the value of a Constant node.

        Identity nodes are passed through. Returns None for a name that other nodes compute, and for external data.
        """
        scope = self.defining(name)
        if scope is None:
            return None
        tensor, node = scope.initializers.get(name), scope.producers.get(name)
        if tensor is None and node is not None and operator_name(node) == "Identity":
            return scope.stored(node.input[0])
        if tensor is None and node is not None:
            tensor = constant_tensor(node)
        if tensor is None or is_external(tensor):
            return None
        return StoredTensor(f"{scope.prefix}{name}", tensor)

    def stored_tensors(self) -> dict[str, Any]:
        """Return by its key every tensor that `stored` finds, here and in the bodies.

        Tensors that have the same key are left out.
        """
        found: dict[str, list[Any]] = {}
        scopes = dict.fromkeys([self, *(place.scope for place in self.walk())])
        for scope in scopes:
            names = [*scope.initializers, *(output for node in scope.graph.node for output in node.output if output)]
            for name in names:
                kept = scope.stored(name)
                if kept is not None and not any(kept.tensor is tensor for tensor in found.get(kept.key, ())):
                    found.setdefault(kept.key, []).append(kept.tensor)
        return {key: tensors[0] for key, tensors in found.items() if len(tensors) == 1}

    def outwards(self) -> Iterator[Scope]:
        """Yield this scope and the scopes around it, the innermost first."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def siblings(self) -> list[Scope]:
        """Return the other bodies of the node that holds this one, such as the other branch of an `If`."""
        assert self.parent is not None
        families = self.parent.children.values()
        return [child for family in families if self in family for child in family if child is not self]

    def _defines(self, name: str) -> bool:
        return name in self.initializers or name in self.producers or name in self.inputs

    def _evaluate(self, node: Node) -> None:
        """Keep the outputs of a node whose inputs are constants."""
        feeds = {name: self.constant(name) for name in node.input if name}
        graph = onnx.GraphProto(name="constant")
        graph.node.add().CopyFrom(node)
        graph.input.extend(onnx.ValueInfoProto(name=name) for name in feeds)
        names = [name for name in node.output if name]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        since = IMPLEMENTED_SINCE.get(node.op_type, 1)
        opsets = [onnx.helper.make_opsetid(o.domain, max(o.version, since)) for o in self.opsets]
        model = onnx.helper.make_model(graph, opset_imports=opsets)
        try:
            values = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
        except Exception as error:  # the reference implementation of an operator may raise any exception
            raise ValueError(f"{node.op_type} could not be evaluated: {error}") from error
        self._values.update(zip(names, map(np.asarray, values), strict=True))


def operator_name(node: Node) -> str:
    """Return the operator of a node, with its domain unless that is ONNX's own, as in ``com.microsoft.FusedConv``."""
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def bodies(node: Node) -> list[Graph]:
    """Return the graphs that a node holds: the branches of an `If`, the body of a `Loop` or `Scan`."""
    found = []
    for attribute in node.attribute:
        found += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
    return found


def is_text(graph: Graph) -> bool:
    """Return whether all names in a graph are text. In a damaged file they can be bytes that are no UTF-8."""
    names = [value.name for value in (*graph.initializer, *graph.input, *graph.output, *graph.value_info)]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
    return all(isinstance(name, str) for name in names) and all(
        is_text(body) for node in graph.node for body in bodies(node)
    )


def attributes(node: Node) -> dict[str, Any]:
    """Return the attributes of a node by name: strings as str, lists of integers as tuples."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        found[attribute.name] = tuple(value) if attribute.type == onnx.AttributeProto.INTS else value
    return found


def constant_tensor(node: Node) -> Any | None:
    """Return the TensorProto that a Constant node holds; None for other nodes and for values that are no tensor."""
    if operator_name(node) != "Constant":
        return None
    return next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
