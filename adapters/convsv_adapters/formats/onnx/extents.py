"""Shapes of the tensors of an ONNX graph and its bodies, from the shapes of its inputs.

Shapes that the model states for other tensors are dropped: exporters leave symbols and extents that no longer hold.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference

from convsv_adapters.formats.onnx.graph import Graph, Scope, attributes, constant_tensor
from convsv_adapters.formats.onnx.tensors import is_external
from convsv_adapters.formats.onnx.types import (
    Dims,
    Types,
    copy_of,
    dims_of,
    forget_shapes,
    set_dims,
    type_of,
    value_info,
)
from convsv_core.layers import ModelError

__all__ = ["FREE_EXTENTS", "infer_types", "open_inputs", "pin_inputs", "shown_inputs", "with_free_axes"]

SMALL = 1024
"""Entries of the largest constant that shape inference gets by value; of a larger one it gets the shape alone.

Constants that determine shapes have few entries, such as one for each axis. The number is a guess.
"""

FREE_EXTENTS = (128, 4096)
"""Extents that a free axis of an input is given, in turn, until every layer has an output. Guesses.

The first suits images and spectrograms, and leaves 4 pixels after five strides of 2. The second suits sampled sound; it
is tried only where one axis is free, because two of them would take too long.
"""

SYMBOL = re.compile(r"[A-Za-z_][\w.]*")
"""The form of a symbol that stands for one extent wherever it is. Some exporters write "?" for every free axis."""


# ---- the inputs of the network ---------------------------------------------------------------------


def pin_inputs(scope: Scope, wanted: Mapping[str, tuple[int, ...]], path: Path) -> Types:
    """Return the type of each input of the network, with the shapes that the user gave.

    Extents in the model that are symbolic or not positive count as unknown. An unknown batch size is taken as 1. An
    axis has the extent of another axis with the same symbol.

    Parameters
    ----------
    scope : Scope
        The graph of the whole network.
    wanted : mapping from name of an input to tuple of int
        The shapes that the user gave; the name ``""`` stands for the first input.
    path : Path
        The file, for messages.

    Raises
    ------
    ModelError
        A name is not that of an input, or the model contradicts a shape.
    """
    inputs = [value for value in scope.graph.input if value.name in scope.inputs]
    names = [value.name for value in inputs]
    unknown = [name for name in wanted if name and name not in names]
    if unknown:
        raise ModelError(f"{path}: no input is called {unknown[0]!r}; its inputs are {', '.join(names)}")
    types: Types = {}
    for position, value in enumerate(inputs):
        kind = copy_of(value.type)
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
    _equate_symbols(inputs, types)
    return types


def _equate_symbols(inputs: Sequence[Any], types: Types) -> None:
    """Give axes of unknown extent the extent that another axis with the same symbol has, if there is only one."""
    symbols = {
        value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in inputs
        if value.type.HasField("tensor_type")
    }
    known: dict[str, set[int]] = {}
    for name, axes in symbols.items():
        for symbol, extent in zip(axes, dims_of(types[name]) or (), strict=False):
            if extent is not None and SYMBOL.fullmatch(symbol):
                known.setdefault(symbol, set()).add(extent)
    told = {symbol: extents.pop() for symbol, extents in known.items() if len(extents) == 1}
    for name, axes in symbols.items():
        dims = dims_of(types[name])
        if dims is not None and None in dims:
            set_dims(types[name], tuple(told.get(s) if d is None else d for s, d in zip(axes, dims, strict=True)))


def open_inputs(types: Types) -> list[str]:
    """Return the inputs whose shape is not fully known, as a user would pin them: ``x=1,3,?,?``."""
    return shown_inputs({name: kind for name, kind in types.items() if _is_open(kind)})


def shown_inputs(types: Types) -> list[str]:
    """Return the shapes of inputs as a user would give them: ``x=1,3,224,224``."""
    shapes = {name: dims_of(kind) for name, kind in types.items()}
    return [
        f"{name}={','.join('?' if d is None else str(d) for d in dims) if dims else '?'}"
        for name, dims in shapes.items()
    ]


def with_free_axes(types: Types) -> Iterator[Types]:
    """Yield the inputs whose shape is not fully known, with each of `FREE_EXTENTS` on their free axes.

    Nothing is yielded where no axis is free, or where the number of axes of an input is not known.
    """
    opened = {name: kind for name, kind in types.items() if _is_open(kind)}
    shapes = {name: dims_of(kind) or () for name, kind in opened.items()}
    if not shapes or not all(shapes.values()):
        return
    one_axis = all(dims.count(None) <= 1 for dims in shapes.values())
    for extent in FREE_EXTENTS if one_axis else FREE_EXTENTS[:1]:
        taken: Types = {}
        for name, dims in shapes.items():
            taken[name] = copy_of(opened[name])
            set_dims(taken[name], tuple(extent if d is None else d for d in dims))
        yield taken


def _is_open(kind: Any) -> bool:
    dims = dims_of(kind)
    return bool(kind.HasField("tensor_type")) and (dims is None or None in dims)


def _fit(given: tuple[int, ...], declared: Dims | None, what: str) -> Dims:
    """Return the full shape that `given` stands for: the batch size may be left out, and channels may come last.

    Raises `ModelError`, which begins with `what`, if the model declares another shape.
    """
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
    """Return the types of all tensors that `scope`, and each body in it, defines or can look up.

    ONNX infers the shapes inside a body but does not return them. So each body is inferred as a model of its own,
    whose inputs are the tensors that its node passes to it and the tensors that it takes from the scopes around it.

    Parameters
    ----------
    scope : Scope
    inputs : Types
        The inputs of the scope's graph.
    outer : Types, optional
        The tensors of the scopes around it.
    """
    types = {**(outer or {}), **_infer(scope, inputs, outer or {})}
    found = {scope: types}
    for child in itertools.chain.from_iterable(scope.children.values()):
        received = _received(child, types)
        inferred = infer_types(child, received, types)
        # A loop may change the shape of its state from one iteration to the next: such a shape is unknown.
        while changed := [n for n in _changing(child, inferred[child]) if dims_of(received[n]) is not None]:
            for name in changed:
                set_dims(received[name], None)
            inferred = infer_types(child, received, types)
        found.update(inferred)
    return found


def _infer(scope: Scope, inputs: Types, outer: Types) -> Types:
    """Return the types of the tensors that `scope` defines itself."""
    graph = onnx.GraphProto(name="skeleton")
    used = set(_names_used(scope))
    for name in used:
        defining = scope.defining(name)
        if defining is None or (defining is not scope and not defining.is_constant(name)):
            if name in outer:
                graph.input.append(value_info(name, outer[name]))
        elif defining.is_constant(name) and (defining is not scope or name in scope.initializers):
            _add_constant(graph, name, defining, outer)
    for name, kind in inputs.items():
        graph.input.append(value_info(name, kind))
    for node in scope.graph.node:
        tensor = constant_tensor(node)
        if tensor is not None and math.prod(tensor.dims) > SMALL:
            graph.input.append(value_info(node.output[0], type_of(tensor)))
        else:
            graph.node.add().CopyFrom(node)
    graph.output.extend(scope.graph.output)
    pinned = [copy_of(value.type) for value in graph.input]
    forget_shapes(graph)
    for value, kind in zip(graph.input, pinned, strict=True):
        value.type.CopyFrom(kind)
    model = onnx.helper.make_model(graph, opset_imports=scope.opsets)
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        graph = model.graph  # inference failed: only the types that were put in are known
    types = {value.name: value.type for value in (*graph.input, *graph.output, *graph.value_info)}
    return types | {tensor.name: type_of(tensor) for tensor in graph.initializer}


def _add_constant(graph: Graph, name: str, scope: Scope, outer: Types) -> None:
    """Put a constant into `graph`: by value if it is small, else as an input of its type."""
    tensor = scope.initializers.get(name)
    if tensor is not None and math.prod(tensor.dims) > SMALL:
        graph.input.append(value_info(name, type_of(tensor)))
    elif tensor is not None and not is_external(tensor):
        graph.initializer.add().CopyFrom(tensor)
    elif name in outer and _is_large(outer[name]):
        graph.input.append(value_info(name, outer[name]))
    else:
        try:
            graph.initializer.append(onnx.numpy_helper.from_array(scope.constant(name), name))
        except ValueError:
            return  # onnx has no reference implementation of the operator: the shape stays unknown


def _is_large(kind: Any) -> bool:
    dims = dims_of(kind)
    return dims is None or math.prod(d or 1 for d in dims) > SMALL


def _names_used(scope: Scope) -> Iterator[str]:
    """Yield the names that `scope` and its bodies read, except names that the bodies define."""
    visible = set(scope.outwards())
    for inner, node in scope.walk():
        yield from (name for name in node.input if name and inner.defining(name) in visible)
    yield from (value.name for value in scope.graph.output)


class _Carried(NamedTuple):
    """The tensors that a loop carries into its body and out of it, in matching order.

    Attributes
    ----------
    sources : list of str
        Inputs of the node: first the states, then the inputs that a `Scan` cuts into slices.
    entering : list of onnx.ValueInfoProto
        The inputs of the body that receive them.
    leaving : list of onnx.ValueInfoProto
        Outputs of the body, which begin with the states for the next iteration.
    states : int
        The number of states.
    """

    sources: list[str]
    entering: list[Any]
    leaving: list[Any]
    states: int


def _carried(body: Scope) -> _Carried:
    """Return the tensors that a body carries; none for a branch of an `If`."""
    owner, graph = body.owner, body.graph
    assert owner is not None
    if owner.op_type == "Loop":  # the trip count and the condition come before the states
        sources = list(owner.input[2:])
        return _Carried(sources, list(graph.input)[2:], list(graph.output)[1:], len(sources))
    if owner.op_type == "Scan":
        states = len(owner.input) - int(attributes(owner)["num_scan_inputs"])
        return _Carried(list(owner.input), list(graph.input), list(graph.output), states)
    return _Carried([], [], [], 0)


def _received(body: Scope, types: Types) -> Types:
    """Return the types of the inputs of a body, given the types of the tensors around it."""
    declared: Types = {}
    for value in body.graph.input:
        kind = copy_of(value.type)
        if kind.HasField("tensor_type"):
            set_dims(kind, None)
        declared[value.name] = kind
    carried = _carried(body)
    scanned = len(carried.sources) - carried.states
    axes = attributes(body.owner).get("scan_input_axes", (0,) * scanned)
    for position, (source, target) in enumerate(zip(carried.sources, carried.entering, strict=False)):
        if source not in types or not types[source].HasField("tensor_type"):
            continue
        dims = dims_of(types[source])
        slot = position - carried.states
        if slot >= 0 and dims is not None:  # a `Scan` passes slices, which lack the axis that it runs along
            axis = axes[slot] % len(dims)
            dims = (*dims[:axis], *dims[axis + 1 :])
        declared[target.name].tensor_type.elem_type = types[source].tensor_type.elem_type
        set_dims(declared[target.name], dims)
    return declared


def _changing(body: Scope, types: Types) -> list[str]:
    """Return the states of a loop whose shape an iteration changes, by their names in the body."""
    carried = _carried(body)
    states = zip(carried.entering[: carried.states], carried.leaving[: carried.states], strict=False)
    return [
        before.name
        for before, after in states
        if after.name not in types or dims_of(types[before.name]) != dims_of(types[after.name])
    ]
