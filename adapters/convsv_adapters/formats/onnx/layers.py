"""From the nodes of an ONNX graph to layers: weights, padding, extents and geometry of each convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from convsv_adapters.formats.onnx.extents import Dims, Types, dims_of, infer_types, open_inputs, run_for_shapes
from convsv_adapters.formats.onnx.graph import HostArray, Node, Scope, attributes
from convsv_adapters.parameters import LAYOUTS, one_line
from convsv_core.conv import Conv
from convsv_core.layers import Layer, Stored

TRANSPOSED_LAYOUTS = {3: "IOW", 4: "IOHW", 5: "IODHW"}
WEIGHT_INPUT = {"Conv": 1, "FusedConv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3}
STORED_DTYPES = {
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
}
PAD_MODES = {"constant": "zeros", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def convolutions(model: Any, root: Scope, inputs: Types, stored: Mapping[str, Any]) -> list[Layer]:
    """Every convolution of a graph and its bodies, in the order of execution.

    `root` is the scope of ``model.graph``, `inputs` the types of its inputs, and `stored` has the tensors of the file
    by the keys of `Scope.stored`. Where extents have to be
    found by running the network, nodes are added to `model`.
    """
    types = infer_types(root, inputs)
    found = [_find(scope, node) for scope, node in root.walk() if "Conv" in node.op_type]
    for item in found:
        item.dims = _known(types[item.scope], item.source, item.rank)
    _run_for_the_rest(model, root.folder, found, inputs)
    return list(_unique(_layer(item, stored) for item in found))


# ---- weights and padding ----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Found:
    """A convolution on its way to becoming a `Layer`."""

    scope: Scope
    node: Node
    kernel: HostArray | None
    source: str
    pads: tuple[tuple[int, int], ...]
    padding_mode: str
    notes: list[str]
    dims: Dims | None = None

    @property
    def rank(self) -> int | None:
        return None if self.kernel is None else self.kernel.ndim

    @property
    def extents(self) -> tuple[int, ...] | None:
        spatial = None if self.dims is None else self.dims[2:]
        return None if spatial is None or None in spatial else tuple(d for d in spatial if d is not None)


def _find(scope: Scope, node: Node) -> _Found:
    notes: list[str] = []
    item = _Found(scope, node, None, node.input[0], (), "zeros", notes)
    if node.op_type not in WEIGHT_INPUT:
        notes.append(f"{node.op_type} is not supported")
        return item
    try:
        item.kernel = _kernel(scope, node, notes)
    except (LookupError, OSError, ValueError) as error:
        notes.append(f"no weights: {one_line(error)}")
        return item
    ndim = item.kernel.ndim - 2
    if ndim + 2 not in LAYOUTS:
        notes.append(f"a kernel of rank {item.kernel.ndim} is not supported")
        item.kernel = None
        return item
    item.pads = ((0, 0),) * ndim
    if node.op_type != "ConvTranspose":
        _fold_pad(item)
    return item


def _kernel(scope: Scope, node: Node, notes: list[str]) -> HostArray:
    names = list(node.input)
    position = WEIGHT_INPUT[node.op_type]
    if len(names) <= position or not names[position]:
        raise LookupError("the node has no weight input")
    kernel = scope.constant(names[position])
    if node.op_type not in ("QLinearConv", "ConvInteger"):
        return kernel

    def optional(index: int) -> HostArray:
        value = scope.constant(names[index]) if len(names) > index and names[index] else np.zeros(())
        value = value.astype(np.float32)
        return value.reshape(-1, *(1,) * (kernel.ndim - 1)) if value.size > 1 else value.reshape(())

    if node.op_type == "ConvInteger":
        notes.append("integer weights without a scale")
        return kernel.astype(np.float32) - optional(3)
    notes.append("quantised weights, with their scale")
    return (kernel.astype(np.float32) - optional(5)) * optional(4)


def _fold_pad(item: _Found) -> None:
    """Take a `Pad` node before the convolution as part of its padding, and its input as the layer's."""
    assert item.kernel is not None
    scope, name = item.scope, item.source
    node = scope.producer(name)
    while node is not None and node.op_type == "Identity":
        name = node.input[0]
        node = scope.producer(name)
    if node is None or node.op_type != "Pad":
        return
    try:
        pads, mode, value = _read_pad(scope, node, item.kernel.ndim)
    except (LookupError, ValueError) as error:
        item.notes.append(f"after a Pad node that was left out: {one_line(error)}")
        return
    own = _attribute(item.node, "auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(
        _attribute(item.node, "pads", ())
    )
    if any(map(any, pads[:2])) or min(map(min, pads)) < 0 or value != 0 or (mode != "constant" and not own):
        item.notes.append(f"after a Pad node ({mode}, {pads}) that is no part of a convolution's padding")
        return
    if _attribute(item.node, "auto_pad", "NOTSET").startswith("SAME"):
        return  # its padding depends on the extents that it sees, which are those after the node
    item.source, item.pads, item.padding_mode = node.input[0], pads[2:], PAD_MODES[mode]


def _read_pad(scope: Scope, node: Node, rank: int) -> tuple[tuple[tuple[int, int], ...], str, float]:
    mode = _attribute(node, "mode", "constant")
    inputs = [*node.input, "", "", ""]
    flat = _attribute(node, "pads", _attribute(node, "paddings", ()))
    if inputs[1]:
        flat = tuple(int(pad) for pad in scope.constant(inputs[1]))
    value = float(_attribute(node, "value", 0.0))
    if inputs[2] and mode == "constant":
        value = float(np.reshape(scope.constant(inputs[2]), ()))
    axes = [int(axis) % rank for axis in scope.constant(inputs[3])] if inputs[3] else list(range(rank))
    if len(flat) != 2 * len(axes) or mode not in PAD_MODES:
        raise ValueError(f"{len(flat)} pads in mode {mode!r} for a tensor of rank {rank}")
    sides = dict(zip(axes, zip(flat[: len(axes)], flat[len(axes) :], strict=True), strict=True))
    return tuple(sides.get(axis, (0, 0)) for axis in range(rank)), mode, value


# ---- the extents -----------------------------------------------------------------------------------------


def _known(types: Types, name: str, rank: int | None) -> Dims | None:
    dims = dims_of(types[name]) if name in types else None
    return dims if dims is not None and len(dims) == rank else None


def _run_for_the_rest(model: Any, folder: Path, found: list[_Found], inputs: Types) -> None:
    """Find what shape inference left unknown by running the network, or say why it stays unknown."""
    rest = [item for item in found if item.rank is not None and item.extents is None]
    if not rest:
        return
    reason = ""
    if unpinned := open_inputs(inputs):
        reason = f"extents unknown: give the shape of the input, {' and '.join(unpinned)}"
    else:
        try:
            shapes = run_for_shapes(model, folder, inputs, [(item.scope, item.source, item.rank or 0) for item in rest])
        except ModuleNotFoundError:
            reason = "extents unknown to shape inference, and onnxruntime is not installed"
        except RuntimeError as error:
            reason = f"extents unknown to shape inference, and running fails: {one_line(error)}"
    if reason:
        for item in rest:
            item.notes.append(reason)
        return
    for item, seen in zip(rest, shapes, strict=True):
        if seen:
            item.dims = max(seen, key=math.prod)
        else:
            item.notes.append("extents unknown: it is in a branch that is not taken for an input of ones")
        if len(seen) > 1:
            item.notes.append(f"takes {len(seen)} different extents in a loop, of which the largest is used")


# ---- the geometry ------------------------------------------------------------------------------------------


def _layer(item: _Found, stored: Mapping[str, Any]) -> Layer:
    name = item.scope.prefix + (item.node.name or item.node.output[0])
    conv = None
    if item.kernel is not None:
        try:
            conv = _conv(item)
        except (TypeError, ValueError) as error:
            item.notes.append(f"its geometry is not valid: {one_line(error)}")
    return Layer(name, item.kernel, conv, item.extents, "; ".join(item.notes), _stored(item, stored))


def _stored(item: _Found, stored: Mapping[str, Any]) -> Stored | None:
    if item.kernel is None or item.node.op_type in ("QLinearConv", "ConvInteger"):
        return None
    found = item.scope.stored(item.node.input[WEIGHT_INPUT[item.node.op_type]])
    if found is None or found[0] not in stored or found[1].data_type not in STORED_DTYPES:
        return None
    return Stored(found[0], STORED_DTYPES[found[1].data_type])


def _conv(item: _Found) -> Conv:
    node, kernel = item.node, item.kernel
    assert kernel is not None
    taps = kernel.shape[2:]
    stride = _attribute(node, "strides", (1,) * len(taps))
    dilation = _attribute(node, "dilations", (1,) * len(taps))
    transposed = node.op_type == "ConvTranspose"
    reach = [d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True)]
    own = (_transposed_pads if transposed else _forward_pads)(item, stride, reach)
    return Conv(
        (TRANSPOSED_LAYOUTS if transposed else LAYOUTS)[kernel.ndim],
        stride=stride,
        dilation=dilation,
        groups=_attribute(node, "group", 1),
        padding=tuple((a + c, b + d) for (a, b), (c, d) in zip(own, item.pads, strict=True)),
        padding_mode=item.padding_mode,
        transposed=transposed,
    )


def _forward_pads(item: _Found, stride: tuple[int, ...], reach: list[int]) -> list[tuple[int, int]]:
    auto_pad = _attribute(item.node, "auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        return _explicit_pads(item.node, len(reach))
    if auto_pad == "VALID":
        return [(0, 0)] * len(reach)
    totals = []
    for s, r, extent in zip(stride, reach, item.extents or stride, strict=True):
        outputs = -(-extent // s)
        totals.append(max((outputs - 1) * s + r - extent, 0))
    return _halves(totals, smaller_first=auto_pad == "SAME_UPPER")


def _transposed_pads(item: _Found, stride: tuple[int, ...], reach: list[int]) -> list[tuple[int, int]]:
    """Find the padding of the convolution whose transpose this is; output padding takes from its end."""
    node, ndim = item.node, len(reach)
    auto_pad = _attribute(node, "auto_pad", "NOTSET")
    extra = _attribute(node, "output_padding", (0,) * ndim)
    wanted = _attribute(node, "output_shape", ())
    if wanted or auto_pad.startswith("SAME"):
        extents = item.extents or (1,) * ndim
        if not wanted or item.extents is None:
            wanted = tuple(n * s for n, s in zip(extents, stride, strict=True))
        sizes = zip(extents, stride, extra, reach, wanted[-ndim:], strict=True)
        totals = [s * (n - 1) + e + r - w for n, s, e, r, w in sizes]
        pads = _halves(totals, smaller_first=auto_pad == "SAME_UPPER")
    else:
        pads = [(0, 0)] * ndim if auto_pad == "VALID" else _explicit_pads(node, ndim)
    pads = [(before, after - e) for (before, after), e in zip(pads, extra, strict=True)]
    if min(map(min, pads)) < 0:
        item.notes.append("its output padding goes beyond the reach of the kernel")
    return [(max(before, 0), max(after, 0)) for before, after in pads]


def _explicit_pads(node: Node, ndim: int) -> list[tuple[int, int]]:
    flat = _attribute(node, "pads", (0,) * 2 * ndim)
    return list(zip(flat[:ndim], flat[ndim:], strict=True))


def _halves(totals: list[int], *, smaller_first: bool) -> list[tuple[int, int]]:
    halves = [(total // 2, total - total // 2) for total in totals]
    return halves if smaller_first else [(after, before) for before, after in halves]


def _attribute(node: Node, name: str, default: Any) -> Any:
    return attributes(node).get(name, default)


def _unique(layers: Iterator[Layer]) -> Iterator[Layer]:
    """Layers with names that tell them apart, since ONNX lets nodes share one."""
    seen: dict[str, int] = {}
    for layer in layers:
        count = seen[layer.name] = seen.get(layer.name, 0) + 1
        yield layer if count == 1 else replace(layer, name=f"{layer.name}#{count}")
