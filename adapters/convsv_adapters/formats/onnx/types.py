"""Types of ONNX tensors: their extents, as far as these are known."""

from __future__ import annotations

from typing import Any, TypeAlias

import onnx
import onnx.helper

from convsv_adapters.formats.onnx.graph import Graph, bodies

__all__ = ["Dims", "Types", "copy_of", "dims_of", "forget_shapes", "set_dims", "type_of", "value_info"]

Dims: TypeAlias = tuple[int | None, ...]
"""The extents of a tensor, None for each that is unknown."""

Types: TypeAlias = dict[str, Any]
"""Types of tensors by their names: onnx.TypeProto."""


def dims_of(kind: Any) -> Dims | None:
    """Return the extents of a tensor type, None for each that is unknown; None if the rank is unknown."""
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.dim_value > 0 else None for d in kind.tensor_type.shape.dim)


def set_dims(kind: Any, dims: Dims | None) -> None:
    """Replace the extents of a tensor type; None makes the rank unknown."""
    kind.tensor_type.ClearField("shape")
    if dims is not None:
        kind.tensor_type.shape.SetInParent()
        for extent in dims:
            dim = kind.tensor_type.shape.dim.add()
            if extent is not None:
                dim.dim_value = extent


def copy_of(kind: Any) -> Any:
    """Return a copy of a type."""
    copy = onnx.TypeProto()
    copy.CopyFrom(kind)
    return copy


def type_of(tensor: Any) -> Any:
    """Return the type of a TensorProto."""
    return onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)


def value_info(name: str, kind: Any) -> Any:
    """Return a tensor's name and type as an onnx.ValueInfoProto."""
    return onnx.ValueInfoProto(name=name, type=kind)


def forget_shapes(graph: Graph) -> None:
    """Drop the shapes that a graph and its bodies state for their tensors."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for body in bodies(node):
            forget_shapes(body)
