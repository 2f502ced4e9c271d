"""Reader and writer of ONNX models. Importing this module does not import onnx."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convsv_adapters.formats.errors import load_library
from convsv_adapters.formats.files import first_bytes
from convsv_adapters.parameters import HostArray, refuse_geometry
from convsv_core.layers import Layer, ModelError, ReadOptions
from convsv_core.networks import Graph
from convsv_core.plugins import hookimpl

__all__ = ["convsv_model_graph", "convsv_read_graph", "convsv_read_model", "convsv_write_model"]

VERSION_TAG = 0x08
FIELD_TAGS = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72}
"""The first bytes of fields of a serialised ModelProto, from the format's definition.

It begins with `VERSION_TAG` and its IR version, a byte below `TOO_NEW`; one of `FIELD_TAGS` comes next.
"""

TOO_NEW = 0x40
"""A bound of IR versions, for recognising a model by its content. A guess: the largest known version is below 16."""


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the convolutions of an ONNX model with their geometry and extents, in the order of execution."""
    if not _is_onnx(path):
        return None
    if options.layout is not None:
        raise ModelError(f"{path}: ONNX fixes the layout of its kernels; drop {options.layout!r}")
    refuse_geometry(options, path)
    load_library("onnx", path, "cli")
    import onnx.inliner

    from convsv_adapters.formats.onnx.extents import pin_inputs
    from convsv_adapters.formats.onnx.graph import Scope
    from convsv_adapters.formats.onnx.layers import network_layers
    from convsv_adapters.formats.onnx.tensors import check_external_data, fill_in

    model = _load(path)
    root = Scope(model.graph, model.opset_import, path.parent)
    stored = root.stored_tensors()
    has_functions = bool(model.functions)
    if has_functions:
        model = onnx.inliner.inline_local_functions(model)
    if fill_in(model.graph, path) or has_functions:
        root = Scope(model.graph, model.opset_import, path.parent)
    check_external_data(root.tensors(), path)
    inputs = pin_inputs(root, options.input_shapes, path)
    return network_layers(model, root, inputs, stored, linear=options.linear)


@hookimpl
def convsv_read_graph(path: Path, options: ReadOptions) -> Graph | None:
    """Read an ONNX model as a graph of maps."""
    if not _is_onnx(path):
        return None
    load_library("onnx", path, "cli")
    return _graph(_load(path), path, options.input_shapes, {})


@hookimpl
def convsv_model_graph(model: object, example_input: object) -> Graph | None:
    """Return an `onnx.ModelProto` as a graph of maps.

    The example is an array for the first input, or a mapping from the names of inputs to arrays.
    """
    if "onnx" not in sys.modules or not isinstance(model, sys.modules["onnx"].ModelProto):
        return None
    copy = type(model)()
    copy.CopyFrom(model)
    given = example_input if isinstance(example_input, Mapping) else {"": example_input}
    examples = {name: np.asarray(array) for name, array in given.items() if array is not None}
    shapes = {name: tuple(array.shape) for name, array in examples.items()}
    return _graph(copy, Path("model.onnx"), shapes, examples)


def _graph(
    model: Any, path: Path, input_shapes: Mapping[str, tuple[int, ...]], examples: Mapping[str, HostArray]
) -> Graph:
    """Return the graph of a model that may be changed in place."""
    import onnx.inliner

    from convsv_adapters.formats.onnx.extents import pin_inputs
    from convsv_adapters.formats.onnx.graph import Scope
    from convsv_adapters.formats.onnx.network import network_of
    from convsv_adapters.formats.onnx.tensors import check_external_data, fill_in

    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    fill_in(model.graph, path)
    root = Scope(model.graph, model.opset_import, path.parent)
    check_external_data(root.tensors(), path)
    inputs = pin_inputs(root, input_shapes, path)
    first = next(iter(inputs), "")
    return network_of(model, path.parent, inputs, path, {name or first: array for name, array in examples.items()})


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write an ONNX model with other kernels, in the initialisers and Constant nodes that hold them."""
    if not _is_onnx(path):
        return None
    from convsv_adapters.formats.onnx.graph import Scope
    from convsv_adapters.formats.onnx.tensors import is_external, put_array

    model = _load(path)
    root = Scope(model.graph, model.opset_import, path.parent)
    if any(map(is_external, root.tensors())):
        raise ModelError(
            f"{path}: some of its numbers are in other files, which are not written: save it as one file first "
            "(onnx.save_model with save_as_external_data=False)"
        )
    stored = root.stored_tensors()
    for key, kernel in kernels.items():
        put_array(stored[key], kernel)
    target.write_bytes(model.SerializeToString())
    return True


def _is_onnx(path: Path) -> bool:
    if path.suffix.lower() == ".onnx":
        return True
    head = first_bytes(path, 3)
    return len(head) == 3 and head[0] == VERSION_TAG and 0 < head[1] < TOO_NEW and head[2] in FIELD_TAGS


def _load(path: Path) -> Any:
    """Parse a model without loading its external data; ModelError for a file that is no model, or a newer one."""
    import google.protobuf.message  # type: ignore[import-untyped]
    import onnx
    import onnx.defs

    from convsv_adapters.formats.onnx.graph import is_text

    try:
        model = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    except google.protobuf.message.DecodeError:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one") from None
    if not model.graph.node:
        raise ModelError(f"{path}: not an ONNX model: it holds no graph")
    if not is_text(model.graph):
        raise ModelError(f"{path}: a damaged ONNX model: a name in it is no text")
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{path}: too new: its IR version is {model.ir_version}, and onnx {onnx.__version__} reads up to "
            f"{onnx.IR_VERSION}"
        )
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ModelError(
                f"{path}: too new: it uses operator set {opset.version}, and onnx {onnx.__version__} knows "
                f"up to {newest}"
            )
    return model
