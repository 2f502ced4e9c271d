"""Reader and writer of ONNX models: every convolution with its geometry, and its extents for a pinned input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsv_adapters.parameters import HostArray, missing
from convsv_core.layers import Layer, ModelError, ReadOptions
from convsv_core.plugins import hookimpl

if TYPE_CHECKING:
    from convsv_adapters.formats.onnx.graph import Scope

# A serialised ModelProto begins with its IR version and goes on with one of these fields.
FIELD_TAGS = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72}


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the convolutions of an ONNX model, in the order of execution."""
    if not _is_onnx(path):
        return None
    if options.layout is not None:
        raise ModelError(f"{path}: ONNX fixes the layout of its kernels; drop {options.layout!r}")
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise missing(path, error, "cli") from None
    import onnx.inliner

    from convsv_adapters.formats.onnx.extents import pin_inputs
    from convsv_adapters.formats.onnx.graph import Scope
    from convsv_adapters.formats.onnx.layers import convolutions

    model = _load(path)
    root = Scope(model.graph, model.opset_import, path.parent)
    stored = root.stored_tensors()
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
        root = Scope(model.graph, model.opset_import, path.parent)
    _check_external_data(root, path)
    return convolutions(model, root, pin_inputs(root, options.input_shapes, path), stored)


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write an ONNX model with other kernels, in the initialisers and Constant nodes that hold them."""
    if not _is_onnx(path):
        return None
    from convsv_adapters.formats.onnx.graph import Scope, put_array

    model = _load(path)
    root = Scope(model.graph, model.opset_import, path.parent)
    if any(map(_is_external, root.tensors())):
        raise ModelError(
            f"{path}: keeps numbers in other files, which would have to move along: save it as one file first "
            "(onnx.save_model with save_as_external_data=False)"
        )
    stored = root.stored_tensors()
    for key, kernel in kernels.items():
        put_array(stored[key], kernel)
    target.write_bytes(model.SerializeToString())
    return True


def _is_onnx(path: Path) -> bool:
    return path.suffix.lower() == ".onnx" or _looks_like_onnx(path)


def _is_external(tensor: Any) -> bool:
    from onnx.external_data_helper import uses_external_data

    return bool(uses_external_data(tensor))


def _looks_like_onnx(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(3)
    return len(head) == 3 and head[0] == 0x08 and 0 < head[1] < 0x40 and head[2] in FIELD_TAGS


def _load(path: Path) -> Any:
    """Parse a model, its external data left where they are."""
    import google.protobuf.message  # type: ignore[import-untyped]
    import onnx
    import onnx.defs

    try:
        model = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    except google.protobuf.message.DecodeError:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one") from None
    if not model.graph.node:
        raise ModelError(f"{path}: not an ONNX model: it holds no graph")
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


def _check_external_data(root: Scope, path: Path) -> None:
    from onnx.external_data_helper import ExternalDataInfo

    for tensor in filter(_is_external, root.tensors()):
        info = ExternalDataInfo(tensor)
        file = path.parent / info.location
        if not file.is_file():
            raise ModelError(f"{path}: the file of its external data, {info.location}, is missing")
        if file.stat().st_size < (info.offset or 0) + (info.length or 0):
            raise ModelError(f"{path}: the file of its external data, {info.location}, is truncated")
