"""Shapes of the tensors of an ONNX graph: inputs pinned, stale shapes dropped, bodies included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference

from convsv_adapters.formats.onnx.graph import Graph, Scope, attributes, bodies
from convsv_core.layers import ModelError

Dims: TypeAlias = tuple[int | None, ...]
Types: TypeAlias = dict[str, Any]  # name of a tensor -> onnx.TypeProto

SMALL = 1024  # elements: constants up to this size can say something about shapes


# ---- the inputs of the network ---------------------------------------------------------------------


def pin_inputs(scope: Scope, wanted: Mapping[str, tuple[int, ...]], path: Path) -> Types:
    """Type of each input of the network, with the shapes that the user gave.

    Shapes in the model that are symbolic or not positive count as unknown; an unknown batch is taken
    as 1. Raises `ModelError` for a shape that the model contradicts.
    """
    inputs = [value for value in scope.graph.input if value.name in scope.inputs]
    names = [value.name for value in inputs]
    unknown = [name for name in wanted if name and name not in names]
    if unknown:
        raise ModelError(f"{path}: no input is called {unknown[0]!r}; its inputs are {', '.join(names)}")
    types: Types = {}
    for position, value in enumerate(inputs):
        kind = onnx.TypeProto()
        kind.CopyFrom(value.type)
        given = wanted.get(value.name, wanted.get("") if position == 0 else None)
        if kind.HasField("tensor_type"):
            declared = dims_of(kind)
            if given is not None:
                dims: Dims | None = _fit(given, declared, f"{path}: input {value.name!r}")
            elif declared is None:
                dims = None
            else:
                dims = tuple(1 if axis == 0 and d is None else d for axis, d in enumerate(declared))
            set_dims(kind, dims)
        types[value.name] = kind
    return types


def open_inputs(types: Types) -> list[str]:
    """List the inputs whose shape is not known in full, as a user would pin them: ``x=1,3,?,?``."""
    rows = []
    for name, kind in types.items():
        dims = dims_of(kind)
        if kind.HasField("tensor_type") and (dims is None or None in dims):
            rows.append(f"{name}={','.join('?' if d is None else str(d) for d in dims) if dims else '?'}")
    return rows


def _fit(given: tuple[int, ...], declared: Dims | None, what: str) -> Dims:
    """`given` as a full shape: the batch may be left out, and channels may come last."""
    if declared is None:
        return given
    batch = (declared[0] or 1,) if declared else ()
    complete = given if len(given) == len(declared) else (*batch, *given)
    moved = (*complete[:1], *complete[-1:], *complete[1:-1])  # from channels last to channels first
    for candidate in (complete, moved):
        if len(candidate) == len(declared) and all(
            d is None or d == g for d, g in zip(declared, candidate, strict=True)
        ):
            return candidate
    shape = "x".join("?" if d is None else str(d) for d in declared)
    raise ModelError(f"{what} is {shape} in the model, which {','.join(map(str, given))} does not fit")


# ---- shape inference ---------------------------------------------------------------------------------


def infer_types(scope: Scope, inputs: Types, outer: Types | None = None) -> dict[Scope, Types]:
    """Types of all tensors, for `scope` and each body in it, those of the scopes around included.

    ONNX infers the shapes of a body but does not hand them over, so each body is inferred as a model of
    its own, whose inputs are what it receives and what it captures.
    """
    types = {**(outer or {}), **_infer(scope, inputs, outer or {})}
    found = {scope: types}
    for child in itertools.chain.from_iterable(scope.children.values()):
        received = _received(child, types)
        inferred = infer_types(child, received, types)
        # The state of a loop may change its shape from one iteration to the next: what does is unknown.
        while changed := [n for n in _changing(child, inferred[child]) if dims_of(received[n]) is not None]:
            for name in changed:
                set_dims(received[name], None)
            inferred = infer_types(child, received, types)
        found.update(inferred)
    return found


def _infer(scope: Scope, inputs: Types, outer: Types) -> Types:
    """Types of the tensors that `scope` defines itself."""
    graph = onnx.GraphProto(name="skeleton")
    used = set(_names_used(scope))
    for name in used:
        defining = scope.defining(name)
        if defining is None or (defining is not scope and not defining.is_constant(name)):
            if name in outer:
                graph.input.append(_value_info(name, outer[name]))
        elif defining.is_constant(name) and (defining is not scope or name in scope.initializers):
            _add_constant(graph, name, defining, outer)
    for name, kind in inputs.items():
        graph.input.append(_value_info(name, kind))
    for node in scope.graph.node:
        tensor = next((a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None)
        if tensor is not None and math.prod(tensor.dims) > SMALL:
            kind = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            graph.input.append(_value_info(node.output[0], kind))
        else:
            graph.node.add().CopyFrom(node)
    graph.output.extend(scope.graph.output)
    pinned = [onnx.TypeProto.FromString(value.type.SerializeToString()) for value in graph.input]
    _forget_shapes(graph)
    for value, kind in zip(graph.input, pinned, strict=True):
        value.type.CopyFrom(kind)
    model = onnx.helper.make_model(graph, opset_imports=scope.opsets)
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        graph = model.graph  # nothing could be inferred, beyond what was put in
    types = {value.name: value.type for value in (*graph.input, *graph.output, *graph.value_info)}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    return types


def _add_constant(graph: Graph, name: str, scope: Scope, outer: Types) -> None:
    """Put a constant into `graph`, by value if it is small, else by its type alone."""
    tensor = scope.initializers.get(name)
    if tensor is not None and math.prod(tensor.dims) > SMALL:
        kind = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        graph.input.append(_value_info(name, kind))
    elif tensor is not None and tensor.data_location != onnx.TensorProto.EXTERNAL:
        graph.initializer.add().CopyFrom(tensor)
    elif name in outer and _is_large(outer[name]):
        graph.input.append(_value_info(name, outer[name]))
    else:
        try:
            graph.initializer.append(onnx.numpy_helper.from_array(scope.constant(name), name))
        except ValueError:
            return  # no reference implementation: its shape stays unknown


def _is_large(kind: Any) -> bool:
    dims = dims_of(kind)
    return dims is None or math.prod(d or 1 for d in dims) > SMALL


def _names_used(scope: Scope) -> Iterator[str]:
    """Names that `scope` and its bodies read, save those that its bodies define."""
    visible = set(scope.outwards())
    for inner, node in scope.walk():
        yield from (name for name in node.input if name and inner.defining(name) in visible)
    yield from (value.name for value in scope.graph.output)


def _received(body: Scope, types: Types) -> Types:
    """Types of the declared inputs of a body, from what its owner is given."""
    owner = body.owner
    assert owner is not None
    declared: Types = {}
    for value in body.graph.input:
        kind = onnx.TypeProto()
        kind.CopyFrom(value.type)
        if kind.HasField("tensor_type"):
            set_dims(kind, None)
        declared[value.name] = kind
    names = list(declared)
    given = {"Loop": list(owner.input[2:]), "Scan": list(owner.input)}.get(owner.op_type, [])
    targets = names[2:] if owner.op_type == "Loop" else names
    values = attributes(owner)
    scanned = values.get("num_scan_inputs", 0)
    axes = values.get("scan_input_axes", (0,) * scanned)
    for position, (source, target) in enumerate(zip(given, targets, strict=False)):
        if source not in types or not types[source].HasField("tensor_type"):
            continue
        dims = dims_of(types[source])
        slot = position - (len(given) - scanned)
        if owner.op_type == "Scan" and slot >= 0 and dims is not None:
            axis = axes[slot] % len(dims)
            dims = (*dims[:axis], *dims[axis + 1 :])
        declared[target].tensor_type.elem_type = types[source].tensor_type.elem_type
        set_dims(declared[target], dims)
    return declared


def _changing(body: Scope, types: Types) -> list[str]:
    """States of a loop that do not leave an iteration with the shape they entered it."""
    assert body.owner is not None
    skipped = {"Loop": (2, 1), "Scan": (0, 0)}.get(body.owner.op_type)
    if skipped is None:
        return []
    states = len(body.owner.input) - 2
    if body.owner.op_type == "Scan":
        states = len(body.owner.input) - int(attributes(body.owner)["num_scan_inputs"])
    entering = list(body.graph.input)[skipped[0] :][:states]
    leaving = list(body.graph.output)[skipped[1] :][:states]
    return [
        before.name
        for before, after in zip(entering, leaving, strict=False)
        if after.name not in types or dims_of(types[before.name]) != dims_of(types[after.name])
    ]


# ---- running the graph once --------------------------------------------------------------------------


def run_for_shapes(
    model: Any, folder: Path, inputs: Types, wanted: list[tuple[Scope, str, int]]
) -> list[list[tuple[int, ...]]]:
    """Find the shapes that tensors take when the network runs once on ones: for each, those seen.

    What is wanted are names, each with its scope and its rank. A tensor in a body of a loop may take
    several; one in a branch that is not taken has none. Works on `model` in place: a `Shape` node is put
    beside each tensor and its result led out of the bodies.
    Raises `ImportError` without onnxruntime, `RuntimeError` if it cannot run the network.
    """
    import onnxruntime

    labels = [_lead_out(*tensor, f"convsv.shape.{index}") for index, tensor in enumerate(wanted)]
    for value in model.graph.input:
        if value.name in inputs:
            value.type.CopyFrom(inputs[value.name])
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        results = session.run(labels, {name: _ones(kind) for name, kind in inputs.items()})
    except Exception as error:  # onnxruntime's exceptions share no base class; protobuf's limit is another
        raise RuntimeError(" ".join(str(error).split())) from error
    seen = []
    for result, (_, _, rank) in zip(results, wanted, strict=True):
        rows = {tuple(int(extent) for extent in row) for row in np.reshape(result, (-1, rank))}
        seen.append(sorted(row for row in rows if min(row) > 0))
    return seen


def _lead_out(scope: Scope, name: str, rank: int, label: str) -> str:
    """Make the shape of a tensor an output of the whole network, and return that output's name.

    Out of a loop it comes as a scan output, one row an iteration; a branch of an `If` beside its own
    answers with negative extents.
    """
    scope.graph.node.append(onnx.helper.make_node("Shape", [name], [label]))
    while True:
        scope.graph.output.append(onnx.helper.make_tensor_value_info(label, onnx.TensorProto.INT64, None))
        if scope.parent is None:
            return label
        owner = scope.owner
        assert owner is not None
        for sibling in scope.siblings():
            absent = onnx.helper.make_node("Constant", [], [label], value_ints=[-1] * rank)
            sibling.graph.node.append(absent)
            sibling.graph.output.append(onnx.helper.make_tensor_value_info(label, onnx.TensorProto.INT64, None))
        for attribute in owner.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        label += "'"
        owner.output.append(label)
        scope = scope.parent


def _ones(kind: Any) -> np.ndarray[Any, Any]:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
    return np.ones(dims_of(kind) or (), dtype)


# ---- types -------------------------------------------------------------------------------------------


def dims_of(kind: Any) -> Dims | None:
    """Extents of a tensor type, None for those that are unknown; None if not even their number is known."""
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.dim_value > 0 else None for d in kind.tensor_type.shape.dim)


def set_dims(kind: Any, dims: Dims | None) -> None:
    """Replace the extents of a tensor type."""
    kind.tensor_type.ClearField("shape")
    if dims is not None:
        kind.tensor_type.shape.SetInParent()
        for extent in dims:
            dim = kind.tensor_type.shape.dim.add()
            if extent is not None:
                dim.dim_value = extent


def _value_info(name: str, kind: Any) -> Any:
    return onnx.ValueInfoProto(name=name, type=kind)


def _forget_shapes(graph: Graph) -> None:
    """Drop what a graph says of its shapes: exporters leave symbols and extents that no longer hold."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for body in bodies(node):
            _forget_shapes(body)
