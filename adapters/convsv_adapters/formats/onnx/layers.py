"""From the nodes of an ONNX graph to layers: weights, padding, extents and geometry of each convolution."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from convsv_adapters.formats.onnx.dense import dense_layers
from convsv_adapters.formats.onnx.extents import infer_types, open_inputs, shown_inputs, with_free_axes
from convsv_adapters.formats.onnx.graph import STANDARD, Node, Place, Scope, attributes, operator_name
from convsv_adapters.formats.onnx.neighbours import Uses, following_normalisation, layer_name, with_unique_names
from convsv_adapters.formats.onnx.pads import explicit_pads, forward_pads, halves, pads_by_axis
from convsv_adapters.formats.onnx.running import Wanted, run_for_shapes
from convsv_adapters.formats.onnx.stated_geometry import check_stated_geometry
from convsv_adapters.formats.onnx.tensors import STORED_DTYPES
from convsv_adapters.formats.onnx.types import Dims, Types, dims_of
from convsv_adapters.parameters import LAYOUTS, HostArray
from convsv_core.conv import SPATIAL_LETTERS, Conv, Pads, transposed_conv
from convsv_core.layers import Layer, Normalisation, Stored
from convsv_core.plugins import one_line

__all__ = ["PadNode", "declared_geometry", "network_layers", "read_pad"]

WEIGHT_INPUT = {"Conv": 1, "com.microsoft.FusedConv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3}
"""The input of each operator that is the kernel, by its index. Operators of other domains have rules of their own."""

QUANTISED = ("ConvInteger", "QLinearConv")
PAD_MODES = {"constant": "zeros", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
"""The padding mode of a `Conv` for each mode of a Pad node."""


def network_layers(
    model: Any, root: Scope, inputs: Types, stored: Mapping[str, Any], *, linear: bool = False
) -> list[Layer]:
    """Return every convolution of a graph and its bodies, in the order of execution; with `linear` also dense layers.

    Parameters
    ----------
    model : onnx.ModelProto
        Where extents have to be found by running the network, nodes are added to it.
    root : Scope
        The scope of ``model.graph``.
    inputs : Types
        The inputs of the graph.
    stored : mapping of str to onnx.TensorProto
        The tensors of the file, by their keys (`Scope.stored`).
    """
    types, uses = infer_types(root, inputs), Uses(root)
    rows: list[_Found | Layer] = []
    for place in root.walk():
        if not place.node.output:  # Nobody can read what it computes.
            continue
        if "Conv" in place.node.op_type:
            rows.append(_find(place, uses))
        elif linear:
            rows.extend(dense_layers(place, uses, functools.partial(_stored, place.scope, stored)))
    found = [row for row in rows if isinstance(row, _Found)]
    for item in found:
        item.dims = _known_dims(types[item.scope], item.source, item.rank)
    _find_extents(model, root, found, inputs)
    return list(with_unique_names(_layer(row, stored) if isinstance(row, _Found) else row for row in rows))


# ---- weights and padding ----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Found:
    """A convolution on its way to becoming a `Layer`.

    Attributes
    ----------
    scope : Scope
    node : onnx.NodeProto
    source : str
        The layer's input: that of the node, or of a Pad node in front of it that counts as padding.
    kernel : array or None
    pads : tuple of pairs of int
        The padding of the Pad node for each spatial axis, zeros without such a node.
    padding_mode : str
    notes : list of str
        Parts of the layer's note.
    dims : Dims or None
        The shape of `source`.
    assumed : bool
        Whether `dims` depend on extents that were chosen for free axes of the network's inputs.
    normalisation : Normalisation or None
        The batch normalisation that alone reads the layer's output.
    """

    scope: Scope
    node: Node
    source: str
    kernel: HostArray | None = None
    pads: Pads = ()
    padding_mode: str = "zeros"
    notes: list[str] = field(default_factory=list)
    dims: Dims | None = None
    assumed: bool = False
    normalisation: Normalisation | None = None

    @property
    def rank(self) -> int | None:
        return None if self.kernel is None else self.kernel.ndim

    @property
    def extents(self) -> tuple[int, ...] | None:
        """The spatial extents of the layer's input, or None if one of them is unknown."""
        spatial = (None,) if self.dims is None else self.dims[2:]
        return None if None in spatial else tuple(d for d in spatial if d is not None)


def _find(place: Place, uses: Uses) -> _Found:
    """Return the convolution of a node, with its kernel and padding."""
    scope, node = place
    item = _Found(scope, node, node.input[0])
    if operator_name(node) not in WEIGHT_INPUT:
        item.notes.append(
            f"{operator_name(node)} is not supported"
            + ("" if node.domain in STANDARD else ": it may store its kernel in another order")
        )
        return item
    try:
        kernel = _kernel(scope, node, item.notes)
    except (LookupError, OSError, ValueError) as error:
        item.notes.append(f"no weights: {one_line(error)}")
        return item
    if kernel.ndim not in LAYOUTS:
        item.notes.append(f"a kernel of rank {kernel.ndim} is not supported")
        return item
    item.kernel, item.normalisation = kernel, following_normalisation(place, uses)
    item.pads = ((0, 0),) * (kernel.ndim - 2)
    if node.op_type != "ConvTranspose":
        _fold_pad(item, kernel.ndim)
    return item


def _kernel(scope: Scope, node: Node, notes: list[str]) -> HostArray:
    """Return the kernel of a node; quantised weights come as float32, with their zero point and scale applied."""
    names = list(node.input)
    position = WEIGHT_INPUT[operator_name(node)]
    if len(names) <= position or not names[position]:
        raise LookupError("the node has no weight input")
    kernel = scope.constant(names[position])
    if node.op_type not in QUANTISED:
        return kernel

    def optional(index: int) -> HostArray:
        """Return an input as one number, or as one number for each output channel; 0 if the node lacks it."""
        value = scope.constant(names[index]) if len(names) > index and names[index] else np.zeros(())
        value = value.astype(np.float32)
        return value.reshape(-1, *(1,) * (kernel.ndim - 1)) if value.size > 1 else value.reshape(())

    if node.op_type == "ConvInteger":
        notes.append("integer weights without a scale")
        return kernel.astype(np.float32) - optional(3)
    notes.append("quantised weights, with their scale")
    return (kernel.astype(np.float32) - optional(5)) * optional(4)


def _fold_pad(item: _Found, rank: int) -> None:
    """Count a Pad node in front of the convolution as part of its padding, and the node's input as the layer's."""
    scope, name = item.scope, item.source
    node = scope.producer(name)
    while node is not None and operator_name(node) == "Identity":
        name = node.input[0]
        node = scope.producer(name)
    if node is None or operator_name(node) != "Pad":
        return
    try:
        pad = read_pad(scope, node, rank)
    except (LookupError, ValueError) as error:
        item.notes.append(f"after a Pad node that was left out: {one_line(error)}")
        return
    values = attributes(item.node)
    auto_pad = values.get("auto_pad", "NOTSET")
    pads_itself = auto_pad not in ("NOTSET", "VALID") or any(values.get("pads", ()))
    pads_channels = any(map(any, pad.sides[:2]))
    crops = min(map(min, pad.sides)) < 0
    if pads_channels or crops or pad.value != 0 or (pad.mode != "constant" and pads_itself):
        item.notes.append(f"after a Pad node ({pad.mode}, {pad.sides}) that is no part of a convolution's padding")
        return
    if auto_pad.startswith("SAME"):
        return  # SAME padding depends on the extents behind the Pad node, so the layer begins there
    item.source, item.pads, item.padding_mode = node.input[0], pad.sides[2:], PAD_MODES[pad.mode]


class PadNode(NamedTuple):
    """The padding of a Pad node: the entries added before and after each axis, and the rule that makes them."""

    sides: Pads
    mode: str
    value: float


def read_pad(scope: Scope, node: Node, rank: int) -> PadNode:
    """Read a Pad node of any operator set.

    Raises `LookupError` if an input is computed at run time, `ValueError` if it does not fit a tensor of `rank`.
    """
    values = attributes(node)
    mode = values.get("mode", "constant")
    inputs = [*node.input, "", "", ""]
    flat = values.get("pads", values.get("paddings", ()))
    if inputs[1]:
        flat = tuple(int(pad) for pad in scope.constant(inputs[1]))
    value = float(values.get("value", 0.0))
    if inputs[2] and mode == "constant":
        value = float(np.reshape(scope.constant(inputs[2]), ()))
    axes = [int(axis) % rank for axis in scope.constant(inputs[3])] if inputs[3] else list(range(rank))
    if len(flat) != 2 * len(axes) or mode not in PAD_MODES:
        raise ValueError(f"{len(flat)} pads in mode {mode!r} for a tensor of rank {rank}")
    sides = dict(zip(axes, pads_by_axis(flat), strict=True))
    return PadNode(tuple(sides.get(axis, (0, 0)) for axis in range(rank)), mode, value)


# ---- the extents -----------------------------------------------------------------------------------------


def _known_dims(types: Types, name: str, rank: int | None) -> Dims | None:
    dims = dims_of(types[name]) if name in types else None
    return dims if dims is not None and len(dims) == rank else None


def _find_extents(model: Any, root: Scope, found: list[_Found], inputs: Types) -> None:
    """Find the extents of layers that depend on free axes or that shape inference leaves unknown; note the choices.

    Of the extents for free axes, those are chosen for which every layer has an output and the network runs.
    """
    rest = [item for item in found if item.rank is not None and item.extents is None]
    if not rest:
        return
    choices = [inputs | taken for taken in with_free_axes(inputs)]
    chosen = _first_that_fits(root, rest, choices)
    to_run = choices[chosen:] if choices else [inputs]
    unknown = [item for item in rest if item.extents is None]
    reason = ""
    if unknown and not choices and (opened := open_inputs(inputs)):
        reason = f"extents unknown: give the shape of the input, {' and '.join(opened)}"
    elif unknown:
        wanted = [Wanted(item.scope, item.source, item.rank or 0) for item in unknown]
        try:
            index, shapes = run_for_shapes(model, root.folder, to_run, wanted)
        except ModuleNotFoundError:
            reason = "extents unknown to shape inference, and onnxruntime is not installed"
        except RuntimeError as error:
            shown = f" for the input {' and '.join(shown_inputs(_taken(inputs, to_run[0])))}" if choices else ""
            reason = f"extents unknown to shape inference, and running{shown} fails: {one_line(error)}"
            reason += "; --input-shape gives another input" if choices else ""
        else:
            if index:
                _take(root, rest, to_run[index])
            to_run = to_run[index:]
            for item, seen in zip(unknown, shapes, strict=True):
                _take_seen(item, seen)
    for item in rest:
        if item.extents is None:
            item.notes.extend(filter(None, [reason]))
        elif choices:
            item.notes.append(
                f"the model leaves axes free, {' and '.join(open_inputs(inputs))}: its extents are those for the input "
                f"{' and '.join(shown_inputs(_taken(inputs, to_run[0])))}; --input-shape gives others"
            )


def _first_that_fits(root: Scope, rest: list[_Found], choices: list[Types]) -> int:
    """Take the first choice of inputs for which every layer has an output, or else the first; return its index."""
    for index, inputs in enumerate(choices):
        types = _take(root, rest, inputs)
        if all(_has_output(item, types[item.scope]) for item in rest):
            return index
    if choices:
        _take(root, rest, choices[0])
    return 0


def _take(root: Scope, rest: list[_Found], inputs: Types) -> dict[Scope, Types]:
    """Give layers the extents that shape inference finds for inputs with chosen extents, and return all types."""
    types = infer_types(root, inputs)
    for item in rest:
        item.dims, item.assumed = _known_dims(types[item.scope], item.source, item.rank), True
    return types


def _taken(inputs: Types, chosen: Types) -> Types:
    """Return the inputs whose shape was not fully known, with the shapes that were chosen."""
    return {name: kind for name, kind in chosen.items() if kind is not inputs[name]}


def _has_output(item: _Found, types: Types) -> bool:
    """Return whether the padded input of a layer is at least as large as its kernel reaches, as far as is known."""
    assert item.kernel is not None
    dims, values = _known_dims(types, item.source, item.rank), attributes(item.node)
    if dims is None:
        return True
    taps = item.kernel.shape[2:]
    auto_pad = values.get("auto_pad", "NOTSET")
    if item.node.op_type == "ConvTranspose" or auto_pad.startswith("SAME"):
        return all(d is None or d > 0 for d in dims)
    reach = (d * (k - 1) + 1 for k, d in zip(taps, values.get("dilations", (1,) * len(taps)), strict=True))
    pads = zip(explicit_pads(values, auto_pad, len(taps)), item.pads, strict=True)
    return all(
        d is None or d + sum(own) + sum(pad) >= r for d, (own, pad), r in zip(dims[2:], pads, reach, strict=True)
    )


def _take_seen(item: _Found, seen: list[tuple[int, ...]]) -> None:
    """Give a layer the extents that it had while the network ran."""
    if seen:
        item.dims = max(seen, key=math.prod)
    else:
        item.notes.append("extents unknown: it is in a branch that is not taken for an input of ones")
    if len(seen) > 1:
        item.notes.append(f"takes {len(seen)} different extents in a loop, of which the largest is used")


# ---- the geometry ------------------------------------------------------------------------------------------


def _layer(item: _Found, stored: Mapping[str, Any]) -> Layer:
    conv = None
    if item.kernel is not None:
        try:
            conv = _conv(item, item.kernel)
        except (TypeError, ValueError) as error:
            item.notes.append(f"its geometry is not valid: {one_line(error)}")
    as_stored = item.kernel is not None and item.node.op_type not in QUANTISED
    weight = item.node.input[WEIGHT_INPUT[operator_name(item.node)]] if as_stored else ""
    return Layer(
        layer_name(Place(item.scope, item.node)),
        item.kernel,
        conv,
        item.extents,
        "; ".join(item.notes),
        _stored(item.scope, stored, weight) if as_stored else None,
        assumed_extents=item.assumed,
        normalisation=item.normalisation,
    )


def _stored(scope: Scope, stored: Mapping[str, Any], name: str) -> Stored | None:
    """Return where the file stores a constant; None if it is computed, or of a dtype that is not written."""
    found = scope.stored(name)
    if found is None or found.key not in stored or found.tensor.data_type not in STORED_DTYPES:
        return None
    return Stored(found.key, STORED_DTYPES[found.tensor.data_type])


def _conv(item: _Found, kernel: HostArray) -> Conv:
    values, taps = attributes(item.node), kernel.shape[2:]
    channels = item.dims[1] if item.dims and len(item.dims) > 1 and not item.assumed else None
    check_stated_geometry(values, kernel.shape, channels or None, item.node.op_type == "ConvTranspose")
    stride = values.get("strides", (1,) * len(taps))
    dilation = values.get("dilations", (1,) * len(taps))
    options = {"stride": stride, "dilation": dilation, "groups": values.get("group", 1)}
    reach = [d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True)]
    if item.node.op_type == "ConvTranspose":
        return transposed_conv(
            f"IO{SPATIAL_LETTERS[len(taps)]}", taps, _transposed_pads(item, stride, reach), **options
        )
    own = forward_pads(attributes(item.node), item.extents or stride, stride, reach)
    padding = tuple((a + c, b + d) for (a, b), (c, d) in zip(own, item.pads, strict=True))
    return Conv(LAYOUTS[kernel.ndim], padding=padding, padding_mode=item.padding_mode, **options)


def declared_geometry(scope: Scope, node: Node, kernel: HostArray, dims: tuple[int, ...]) -> Conv:
    """Return the geometry of a Conv or ConvTranspose node on an input of shape `dims`; an error if it is invalid."""
    return _conv(_Found(scope, node, node.input[0], kernel, ((0, 0),) * (kernel.ndim - 2), dims=dims), kernel)


def _transposed_pads(item: _Found, stride: tuple[int, ...], reach: list[int]) -> list[tuple[int, int]]:
    """Return the padding of the convolution whose transpose a ConvTranspose node is.

    Output padding counts as less padding at the end of an axis, which may make it negative.
    """
    values, ndim = attributes(item.node), len(reach)
    auto_pad = values.get("auto_pad", "NOTSET")
    extra = values.get("output_padding", (0,) * ndim)
    wanted = values.get("output_shape", ())
    if wanted or auto_pad.startswith("SAME"):
        extents = item.extents or (1,) * ndim
        if not wanted or item.extents is None:
            wanted = tuple(n * s for n, s in zip(extents, stride, strict=True))
        sizes = zip(extents, stride, extra, reach, wanted[-ndim:], strict=True)
        totals = [s * (n - 1) + e + r - w for n, s, e, r, w in sizes]
        pads = halves(totals, auto_pad)
    else:
        pads = explicit_pads(values, auto_pad, ndim)
    return [(before, after - e) for (before, after), e in zip(pads, extra, strict=True)]
