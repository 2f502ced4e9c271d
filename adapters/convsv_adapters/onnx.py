"""Reader of ONNX models: every convolution with its geometry, and its extents for a pinned input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsv_adapters.parameters import missing
from convsv_core.layers import Layer, ModelError, ReadOptions
from convsv_core.plugins import hookimpl

if TYPE_CHECKING:
    from convsv_adapters._onnx_graph import Scope

# A serialised ModelProto begins with its IR version and goes on with one of these fields.
FIELD_TAGS = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72}


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the convolutions of an ONNX model, in the order of execution."""
    if path.suffix.lower() != ".onnx" and not _looks_like_onnx(path):
        return None
    if options.layout is not None:
        raise ModelError(f"{path}: ONNX fixes the layout of its kernels; drop {options.layout!r}")
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise missing(path, error, "cli") from None
    import onnx.inliner

    from convsv_adapters._onnx_extents import pin_inputs
    from convsv_adapters._onnx_graph import Scope
    from convsv_adapters._onnx_layers import convolutions

    model = _load(path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    root = Scope(model.graph, model.opset_import, path.parent)
    _check_external_data(root, path)
    return convolutions(model, root, pin_inputs(root, options.input_shapes, path))


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
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    for tensor in filter(uses_external_data, root.tensors()):
        info = ExternalDataInfo(tensor)
        file = path.parent / info.location
        if not file.is_file():
            raise ModelError(f"{path}: the file of its external data, {info.location}, is missing")
        if file.stat().st_size < (info.offset or 0) + (info.length or 0):
            raise ModelError(f"{path}: the file of its external data, {info.location}, is truncated")
