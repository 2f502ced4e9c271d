"""From an ONNX model to the graph of its maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from convsv_adapters._networks import Undescribed
from convsv_adapters.formats.onnx.extents import infer_types, open_inputs
from convsv_adapters.formats.onnx.graph import RANDOM_OPS, Node, Scope, attributes, bodies, operator_name
from convsv_adapters.formats.onnx.operators import FLOATING, Reading
from convsv_adapters.formats.onnx.running import Wanted, run_for_shapes
from convsv_adapters.formats.onnx.translation import translate
from convsv_adapters.formats.onnx.types import Types, dims_of
from convsv_adapters.parameters import HostArray
from convsv_core.layers import ModelError
from convsv_core.networks import Constant, Graph, Input, Unsupported
from convsv_core.networks import Node as GraphNode
from convsv_core.plugins import one_line

__all__ = ["network_of"]

FOLDED = 1 << 16
"""Entries of the largest constant that is put in place of its nodes. A guess: shapes are far smaller."""

SHAPE_KEEPING = ("GroupNormalization",)
"""Operators whose output has the shape of their first input, which shape inference does not know."""

RECURRENT = ("RNN", "LSTM", "GRU")
CONTROL = ("If", "Loop", "Scan", "SequenceMap")


def network_of(model: Any, folder: Path, inputs: Types, path: Path, examples: Mapping[str, HostArray]) -> Graph:
    """Return the graph of an ONNX model.

    Parameters
    ----------
    model : onnx.ModelProto
        Without local functions and sparse initialisers. It is changed in place.
    folder : Path
        Where files with external data lie.
    inputs : Types
        The inputs of the network, with the shapes that the user gave.
    path : Path
        The file, for messages.
    examples : mapping from name of an input to array

    Raises
    ------
    ModelError
        The shape of an input is not known, or shapes cannot be found.
    """
    if opened := open_inputs(inputs):
        raise ModelError(f"{path}: give the shape of the input, {' and '.join(opened)}: --input-shape 3,224,224")
    scope, types = _with_known_shapes(model, folder, inputs)
    reading = Reading(scope, _shapes(model, folder, inputs, scope, types, path), types)
    for name, kind in inputs.items():
        shape = reading.shapes.get(name, ())
        if kind.HasField("tensor_type") and kind.tensor_type.elem_type in FLOATING:
            reading.nodes.append(GraphNode(name, Input(examples.get(name)), (), shape, "Input"))
        else:
            reason = "an input that is not of floating numbers, so that no constant exists"
            reading.nodes.append(GraphNode(name, Unsupported(reason), (), shape, "Input"))
        reading.known.add(name)
    for node in scope.graph.node:
        if not all(scope.is_constant(name) for name in node.output if name):
            _append(reading, node)
    outputs = tuple(value.name for value in scope.graph.output)
    for name in outputs:
        if name in reading.known:
            continue
        if scope.is_constant(name):
            value = scope.constant(name)
            reading.nodes.append(GraphNode(name, Constant(value), (), value.shape))
        else:
            reading.nodes.append(GraphNode(name, Unsupported("no operator computes it"), (), ()))
        reading.known.add(name)
    return Graph(tuple(reading.nodes), outputs)


def _append(reading: Reading, node: Node) -> None:
    """Translate a node, or put in its place a node without a rule."""
    before = len(reading.nodes)
    try:
        reason = _refusal(node)
        if reason is None:
            translate(reading, node)
            return
    except Undescribed as error:
        reason = one_line(error)
    except (LookupError, TypeError, ValueError) as error:
        reason = f"it could not be read: {one_line(error)}"
    del reading.nodes[before:]
    sources = tuple(name for name in dict.fromkeys(_names_read(reading.scope, node)) if name in reading.known)
    for name in node.output:
        if name:
            shape = reading.shapes.get(name, ())
            reading.nodes.append(GraphNode(name, Unsupported(reason), sources, shape, operator_name(node), node.name))
            reading.known.add(name)


def _names_read(scope: Scope, node: Node) -> list[str]:
    """Return the tensors that a node takes, and the outer tensors that the bodies in it take."""
    names = [name for name in node.input if name]
    for body in bodies(node):
        for inner in body.node:
            names += _names_read(scope, inner)
    return names


def _refusal(node: Node) -> str | None:
    """Return why a node has no rule whatever its geometry; None if it may have one."""
    operator = operator_name(node)
    if "." in operator:
        fused = node.domain in ("com.microsoft", "com.ms.internal.nhwc", "com.microsoft.nchwc")
        hint = "fused by onnxruntime: save the network without its graph optimisations" if fused else "custom"
        return f"the operator {operator} is {hint}"
    if operator in RECURRENT:
        return "a recurrent cell, whose gates multiply activations"
    if operator in CONTROL:
        return "control flow: which maps are applied depends on the input"
    if operator in RANDOM_OPS:
        return "its values are random"
    if operator == "Dropout" and attributes(node).get("is_test", 1) == 0:
        return "dropout in training mode"
    return None


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _with_known_shapes(model: Any, folder: Path, inputs: Types) -> tuple[Scope, Types]:
    """Return the scope and the types of a model after all that follows from shapes alone became constants."""
    while True:
        scope = Scope(model.graph, model.opset_import, folder)
        types = _inferred(scope, inputs)
        found: dict[str, HostArray] = {}
        for node in scope.graph.node:
            names = [name for name in node.output if name]
            if operator_name(node) in ("Shape", "Size"):
                dims = _known(types, node.input[0])
                if dims is not None:
                    found[names[0]] = _shape_value(node, dims)
            elif operator_name(node) != "Constant" and names and all(scope.is_constant(name) for name in names):
                found.update(_small_constants(scope, names, types))
        if not found:
            return scope, types
        kept = [node for node in model.graph.node if not (set(node.output) - {""} <= set(found) and node.output)]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in found.items())


def _inferred(scope: Scope, inputs: Types) -> Types:
    """Return the types of a graph's tensors; operators that onnx does not infer count as the identity meanwhile."""
    hidden = [node for node in scope.graph.node if operator_name(node) in SHAPE_KEEPING]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in hidden]
    for node in hidden:
        node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output[:1]))
    try:
        return infer_types(scope, inputs)[scope]
    finally:
        for node, original in zip(hidden, kept, strict=True):
            node.CopyFrom(original)


def _small_constants(scope: Scope, names: list[str], types: Types) -> dict[str, HostArray]:
    """Return the constants that a node computes, if all of them are small and can be evaluated."""
    sizes = [_known(types, name) for name in names]
    if any(dims is not None and math.prod(dims) > FOLDED for dims in sizes):
        return {}
    try:
        values = {name: scope.constant(name) for name in names}
    except (LookupError, OSError, ValueError):
        return {}
    fits = all(isinstance(value, np.ndarray) and value.size <= FOLDED for value in values.values())
    return values if fits and all(value.dtype.kind in "fiub" for value in values.values()) else {}


def _shape_value(node: Node, dims: tuple[int, ...]) -> HostArray:
    if node.op_type == "Size":
        return np.asarray(math.prod(dims), np.int64)
    values = attributes(node)
    return np.asarray(dims[slice(values.get("start", 0), values.get("end"))], np.int64)


def _known(types: Types, name: str) -> tuple[int, ...] | None:
    dims = dims_of(types[name]) if name in types else None
    return None if dims is None or None in dims else tuple(d for d in dims if d is not None)


def _shapes(
    model: Any, folder: Path, inputs: Types, scope: Scope, types: Types, path: Path
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor: as inferred, or as found by running the network once."""
    names = [*inputs, *(name for node in scope.graph.node for name in node.output if name)]
    shapes = {name: dims for name in names if (dims := _known(types, name)) is not None}
    rest = []
    for node in scope.graph.node:
        for name in node.output:
            if name and name not in shapes and not scope.is_constant(name) and name in types:
                partly = dims_of(types[name])
                if types[name].HasField("tensor_type") and partly is not None:
                    rest.append(Wanted(scope, name, len(partly)))
    if rest:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        again = Scope(copy.graph, copy.opset_import, folder)
        try:
            found = run_for_shapes(copy, folder, [inputs], [want._replace(scope=again) for want in rest]).shapes
        except ImportError:
            raise ModelError(
                f"{path}: the shape of {rest[0].name!r} is unknown to shape inference, and onnxruntime is not installed"
            ) from None
        except RuntimeError as error:
            raise ModelError(f"{path}: the shape of {rest[0].name!r} is unknown: {one_line(error)}") from None
        shapes.update({want.name: seen[0] for want, seen in zip(rest, found, strict=True) if len(seen) == 1})
    return shapes
