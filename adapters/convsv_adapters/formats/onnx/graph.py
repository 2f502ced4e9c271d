"""An ONNX graph and the bodies nested in it: who defines a name, and which names are constants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.helper
import onnx.numpy_helper
import onnx.reference

from convsv_adapters.parameters import bfloat16_bits

Node: TypeAlias = Any
Graph: TypeAlias = Any
HostArray: TypeAlias = np.ndarray[Any, Any]

RANDOM_OPS = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}

# Reference implementations that begin at an operator set later than the operator, and compute the same.
IMPLEMENTED_SINCE = {"DequantizeLinear": 19}


class Scope:
    """A graph, and the scope that its names are looked up in when it does not define them itself.

    Parameters
    ----------
    graph : onnx.GraphProto
    opsets : list of onnx.OperatorSetIdProto
        What the model imports.
    folder : Path
        Where external data lies.
    parent, owner : Scope and onnx.NodeProto, or None
        For a body of an `If`, `Loop` or `Scan`: the scope around it, and the node that holds it.
    prefix : str
        What the names of its layers begin with.

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
        for index, node in enumerate(graph.node):  # in topological order, so one pass settles the constants
            for body in bodies(node):
                name = f"{prefix}{node.name or node.op_type}/{body.name}/"
                child = Scope(body, opsets, folder, parent=self, owner=node, prefix=name)
                self.children.setdefault(index, []).append(child)
            foldable = index not in self.children and node.op_type not in RANDOM_OPS
            if foldable and all(self.is_constant(name) for name in node.input if name):
                self._constants.update(node.output)

    def defining(self, name: str) -> Scope | None:
        """Find the innermost scope, from this one outwards, that defines `name`."""
        return next((scope for scope in self.outwards() if scope._defines(name)), None)

    def producer(self, name: str) -> Node | None:
        """Find the node that computes `name`, here or around; None for inputs and initialisers."""
        scope = self.defining(name)
        return None if scope is None else scope.producers.get(name)

    def is_constant(self, name: str) -> bool:
        """Whether `name` depends on nothing but numbers stored in the model."""
        scope = self.defining(name)
        return scope is not None and name in scope._constants

    def constant(self, name: str) -> HostArray:
        """Evaluate a constant: an initialiser, or what nodes make of initialisers.

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

    def walk(self) -> Iterator[tuple[Scope, Node]]:
        """Yield every node with its scope, in the order of execution, bodies at the place of their owners."""
        for index, node in enumerate(self.graph.node):
            yield self, node
            for child in self.children.get(index, ()):
                yield from child.walk()

    def tensors(self) -> Iterator[Any]:
        """Yield every stored tensor, of the bodies too."""
        yield from self.graph.initializer
        for node in self.graph.node:
            yield from (a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)
        for children in self.children.values():
            for child in children:
                yield from child.tensors()

    def stored(self, name: str) -> tuple[str, Any] | None:
        """Find the tensor that `name` is, of an initialiser or a Constant node, and what it is known by.

        None for what is computed, but by Identity, and for what lies in another file.
        """
        scope = self.defining(name)
        if scope is None:
            return None
        tensor, node = scope.initializers.get(name), scope.producers.get(name)
        if tensor is None and node is not None and node.op_type == "Identity":
            return scope.stored(node.input[0])
        if tensor is None and node is not None and node.op_type == "Constant":
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return f"{scope.prefix}{name}", tensor

    def stored_tensors(self) -> dict[str, Any]:
        """Every tensor that `stored` can find, of the bodies too; without those that their keys do not tell apart."""
        found: dict[str, list[Any]] = {}
        scopes = dict.fromkeys([self, *(scope for scope, _ in self.walk())])
        for scope in scopes:
            names = [*scope.initializers, *(output for node in scope.graph.node for output in node.output if output)]
            for name in names:
                kept = scope.stored(name)
                if kept is not None and not any(kept[1] is tensor for tensor in found.get(kept[0], ())):
                    found.setdefault(kept[0], []).append(kept[1])
        return {key: tensors[0] for key, tensors in found.items() if len(tensors) == 1}

    def outwards(self) -> Iterator[Scope]:
        """Yield this scope and those around it, the innermost first."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def siblings(self) -> list[Scope]:
        """List the other bodies of the same node: the other branch of an `If`."""
        assert self.parent is not None
        families = self.parent.children.values()
        return [child for family in families if self in family for child in family if child is not self]

    def _defines(self, name: str) -> bool:
        return name in self.initializers or name in self.producers or name in self.inputs

    def _evaluate(self, node: Node) -> None:
        feeds = {name: self.constant(name) for name in node.input if name}
        graph = onnx.GraphProto(name="constant")
        graph.node.add().CopyFrom(node)
        graph.input.extend(onnx.ValueInfoProto(name=name) for name in feeds)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
        since = IMPLEMENTED_SINCE.get(node.op_type, 1)
        opsets = [onnx.helper.make_opsetid(o.domain, max(o.version, since)) for o in self.opsets]
        model = onnx.helper.make_model(graph, opset_imports=opsets)
        try:
            values = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
        except Exception as error:  # the reference implementation of an operator may fail in any way
            raise ValueError(f"{node.op_type} could not be evaluated: {error}") from error
        names = [name for name in node.output if name]
        self._values.update(zip(names, map(np.asarray, values), strict=True))


def to_array(tensor: Any, folder: Path) -> HostArray:
    """Read a TensorProto, from `folder` where it is external; bfloat16 and smaller floats as float32."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        stored, tensor = tensor, onnx.TensorProto()
        tensor.CopyFrom(stored)
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    array = np.asarray(onnx.numpy_helper.to_array(tensor))
    small_float = array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8", "float4"))
    return array.astype(np.float32) if small_float else array


def put_array(tensor: Any, array: HostArray) -> None:
    """Replace the entries of a TensorProto in the field that holds them, in its dtype, which holds them exactly."""
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        entries = bfloat16_bits(array)
    else:
        entries = array.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if tensor.HasField("raw_data"):
        tensor.raw_data = entries.astype(entries.dtype.newbyteorder("<")).tobytes()
        return
    if entries.dtype == np.float16:
        entries = entries.view(np.uint16)
    field = getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))
    field[:] = entries.reshape(-1).tolist()


def bodies(node: Node) -> list[Graph]:
    """List the graphs that a node holds: the branches of an `If`, the body of a `Loop`."""
    found = []
    for attribute in node.attribute:
        found += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
    return found


def attributes(node: Node) -> dict[str, Any]:
    """Read the attributes of a node by name; strings as str, lists as tuples."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        found[attribute.name] = tuple(value) if attribute.type == onnx.AttributeProto.INTS else value
    return found
