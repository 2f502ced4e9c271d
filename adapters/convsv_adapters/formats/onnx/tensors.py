"""Numbers as an ONNX model stores them: in its file, or in a file beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.helper
import onnx.numpy_helper

from convsv_adapters.formats.bfloat16 import to_bfloat16_bits
from convsv_adapters.parameters import HostArray
from convsv_core.layers import ModelError

__all__ = ["STORED_DTYPES", "StoredTensor", "check_external_data", "fill_in", "is_external", "put_array", "to_array"]

STORED_DTYPES = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
}
"""The dtypes that a kernel can be written in, by their names in `convsv_core.layers.Stored`."""


class StoredTensor(NamedTuple):
    """A tensor that the file of a model holds.

    Attributes
    ----------
    key : str
        The tensor's name, behind the names of the bodies that it lies in.
    tensor : onnx.TensorProto
    """

    key: str
    tensor: Any


def is_external(tensor: Any) -> bool:
    """Return whether the numbers of a TensorProto are in another file."""
    return bool(onnx.external_data_helper.uses_external_data(tensor))


def check_external_data(tensors: Iterable[Any], path: Path) -> None:
    """Raise `ModelError` unless the files that hold external data of the model `path` exist and are long enough."""
    for tensor in filter(is_external, tensors):
        info = onnx.external_data_helper.ExternalDataInfo(tensor)
        file = path.parent / info.location
        if not file.is_file():
            raise ModelError(f"{path}: the file of its external data, {info.location}, is missing")
        if file.stat().st_size < (info.offset or 0) + (info.length or 0):
            raise ModelError(f"{path}: the file of its external data, {info.location}, is truncated")


def fill_in(graph: Any, path: Path) -> int:
    """Put a dense initialiser in place of each sparse one, here and in the bodies of nodes; return their number.

    Raises `ModelError`, which names the file `path`, if a sparse initialiser is not valid.
    """
    count = len(graph.sparse_initializer)
    for sparse in graph.sparse_initializer:
        try:
            dense = _dense(sparse)
        except (IndexError, ValueError) as error:
            raise ModelError(f"{path}: its sparse initialiser {sparse.values.name!r} is not valid: {error}") from None
        graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]
    for node in graph.node:
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            count += sum(fill_in(body, path) for body in bodies)
    return count


def _dense(sparse: Any) -> HostArray:
    """Return the numbers of a SparseTensorProto, whose indices are ranks in the array or one index an axis."""
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def to_array(tensor: Any, folder: Path) -> HostArray:
    """Return the numbers of a TensorProto; bfloat16 and smaller floats come as float32, which holds them exactly.

    `folder` is where files with external data lie. A tensor without an element type raises a ValueError.
    """
    if tensor.data_type == onnx.TensorProto.UNDEFINED:  # onnx raises a TypeError
        raise ValueError(f"the tensor {tensor.name!r} has no element type")
    if is_external(tensor):
        stored, tensor = tensor, onnx.TensorProto()
        tensor.CopyFrom(stored)  # which gets the numbers, as `to_array` reads the file into the tensor
    array = np.asarray(onnx.numpy_helper.to_array(tensor, str(folder)))
    small_float = array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8", "float4"))
    return array.astype(np.float32) if small_float else array


def put_array(tensor: Any, array: HostArray) -> None:
    """Replace the numbers of a TensorProto by others that its dtype holds exactly.

    They are put into the field that held the old numbers: the raw bytes, or the list of the dtype.
    """
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        entries = to_bfloat16_bits(array)
    else:
        entries = array.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if tensor.HasField("raw_data"):
        tensor.raw_data = entries.astype(entries.dtype.newbyteorder("<")).tobytes()
        return
    if entries.dtype == np.float16:
        entries = entries.view(np.uint16)
    field = getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))
    field[:] = entries.reshape(-1).tolist()
