"""Reader of Keras models: `.keras` archives, and `.h5` files with the configuration of the model."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convsv_adapters._keras_rules import per_axis, sides, transposed_pads
from convsv_adapters.formats.errors import damaged, load_library
from convsv_adapters.formats.files import first_bytes, zip_members
from convsv_adapters.parameters import LAYOUTS, HostArray, refuse_geometry
from convsv_core.conv import SPATIAL_LETTERS, Conv, transposed_conv
from convsv_core.layers import Layer, ModelError, ReadOptions, dense_layer
from convsv_core.plugins import hookimpl

__all__ = ["convsv_read_model", "convsv_write_model"]

HDF5 = b"\x89HDF\r\n\x1a\n"
"""The first bytes of an HDF5 file, from the format's definition."""

KERAS_LAYER = re.compile(r"(Depthwise|Separable)?Conv(\d)D(Transpose)?")
"""The names of Keras's classes of convolutions."""

RECURRENT = "a recurrent convolution: it acts on its own output too, and has no single operator"
OTHER_CLASS = "{} is no class of Keras that is known here: what it does to its kernel is not known"
ALTERED = "{} changes the kernel in a way that is not read"
NOT_WRITTEN = "Keras files are not written: set the weights in Keras, or export the model to ONNX"


class _Arrays(NamedTuple):
    """The arrays of a layer, in the order of its variables, and their names where the file has them."""

    values: list[HostArray]
    names: list[str]


class _Configured(NamedTuple):
    """A layer of the configuration.

    Attributes
    ----------
    name : str
        Its name, behind the names of the models around it.
    kind : str
        Its class.
    config : mapping
    input_shape : tuple of (int or None), or None
        With the batch.
    keys : tuple of str
        Where its arrays are, by classes: the path in a `.keras` archive.
    is_keras : bool
        Whether its class is one of Keras's own.
    wrapper : str
        The class of the layer around it, "" if there is none.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    input_shape: tuple[int | None, ...] | None
    keys: tuple[str, ...]
    is_keras: bool
    wrapper: str = ""


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the convolutions of a Keras model with the geometry of its configuration, in the order of the model."""
    archive = _is_archive(path)
    if not archive and not _is_hdf5(path):
        return None
    refuse_geometry(options, path)
    if options.layout is not None:
        raise ModelError(f"{path}: Keras fixes the layout of its kernels; drop {options.layout!r}")
    h5py = load_library("h5py", path, "keras")
    try:
        if archive:
            with zipfile.ZipFile(path) as members:
                config = json.loads(members.read("config.json"))
                weights: Path | io.BytesIO = io.BytesIO(members.read("model.weights.h5"))
        else:
            weights, config = path, None
        with h5py.File(weights, "r") as file:
            if config is None:
                stated = file.attrs.get("model_config")
                if stated is None:
                    raise ModelError(
                        f"{path}: holds weights without the configuration of the model, which tells their geometry: "
                        "save the whole model as .keras"
                    )
                config = json.loads(stated)
            layers = [
                layer
                for configured in _configured(config)
                for layer in _layers(
                    configured,
                    _found(file, configured, archive),
                    options,
                    holds_kernels=_holds_kernels(file, configured, archive),
                )
            ]
    except (AttributeError, KeyError, OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise damaged(path, "a Keras model", error) from None
    unknown = [name for name in options.input_shapes if name and name not in {layer.name for layer in layers}]
    if unknown:
        raise ModelError(f"{path}: no convolution is called {unknown[0]!r}")
    return layers


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Refuse to write a Keras model."""
    if _is_archive(path) or _is_hdf5(path):
        raise ModelError(f"{path}: {NOT_WRITTEN}")
    return None


def _is_archive(path: Path) -> bool:
    members = zip_members(path)
    return path.suffix.lower() == ".keras" or {"config.json", "model.weights.h5"} <= set(members)


def _is_hdf5(path: Path) -> bool:
    return path.suffix.lower() in (".h5", ".hdf5") or first_bytes(path, len(HDF5)) == HDF5


# ---- the configuration ------------------------------------------------------------------------------------


def _configured(
    entry: Mapping[str, Any],
    prefix: str = "",
    keys: tuple[str, ...] = (),
    input_shape: Any = None,
    wrapper: str = "",
) -> Iterator[_Configured]:
    """Yield the layers of a configuration in the order of the model, the layers of nested models in their place."""
    kind, config = entry["class_name"], entry["config"]
    built = (
        (entry.get("build_config") or {}).get("input_shape")
        or _inbound_shape(entry)
        or config.get("batch_input_shape")
        or input_shape
    )
    shape = tuple(built) if isinstance(built, list | tuple) and not _is_nested(built) else None
    name = f"{prefix}{config.get('name') or kind}"
    if isinstance(config.get("layers"), list):
        counts: dict[str, int] = {}
        fed: Any = None  # the shape that the first layer of a sequence takes, which an input layer states
        for inner in config["layers"]:
            key = _snake_case(inner["class_name"])
            counts[key] = counts.get(key, -1) + 1
            place = f"{key}_{counts[key]}" if counts[key] else key
            below = "" if not keys else f"{name}/"
            yield from _configured(inner, below, (*keys, "layers", place), fed, wrapper)
            is_input = kind == "Sequential" and inner["class_name"] == "InputLayer"
            fed = inner["config"].get("batch_shape", inner["config"].get("batch_input_shape")) if is_input else None
        return
    if isinstance(config.get("layer"), Mapping):  # a wrapper, such as TimeDistributed
        yield from _configured(config["layer"], f"{name}/", (*keys, "layer"), wrapper=kind)
        return
    is_keras = str(entry.get("module", "keras")).startswith("keras") and not entry.get("registered_name")
    yield _Configured(name, kind, config, shape, keys, is_keras, wrapper)


def _inbound_shape(entry: Mapping[str, Any]) -> Any:
    """Return the shape of the one tensor that a layer takes in a functional model; None if it is not told once."""
    nodes = entry.get("inbound_nodes") or ()
    tensors = [node["args"] for node in nodes if isinstance(node, Mapping) and "args" in node]
    if len(tensors) != 1 or len(tensors[0]) != 1 or not isinstance(tensors[0][0], Mapping):
        return None
    return tensors[0][0].get("config", {}).get("shape")


def _is_nested(shape: Any) -> bool:
    return any(isinstance(part, list | tuple | dict) for part in shape)


def _snake_case(name: str) -> str:
    """Return the name under which a `.keras` archive keeps a layer of a class.

    Examples
    --------
    >>> _snake_case("DepthwiseConv2D"), _snake_case("Conv2DTranspose"), _snake_case("ConvLSTM2D")
    ('depthwise_conv2d', 'conv2d_transpose', 'conv_lstm2d')
    """
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


# ---- the arrays -------------------------------------------------------------------------------------------


def _found(file: Any, layer: _Configured, archive: bool) -> _Arrays | str:
    """Return the arrays of a layer, or the reason why they are not found."""
    return _in_archive(file, layer) if archive else _in_groups(file, layer)


def _in_archive(file: Any, layer: _Configured) -> _Arrays | str:
    group = file.get("/".join((*layer.keys, "vars")))
    if group is None:
        return "the file holds no arrays for it where Keras keeps them"
    known = group.attrs.get("name")
    if known is not None and str(known) != layer.config.get("name"):
        return f"where Keras keeps its arrays, the file holds those of {known}"
    return _Arrays([np.asarray(group[key]) for key in sorted(group, key=int)], [])


def _in_groups(file: Any, layer: _Configured) -> _Arrays | str:
    """Return the arrays from the groups of an .h5 file, one for each layer of the outermost model."""
    outer, *inner = layer.name.split("/")
    weights = file.get("model_weights", file)
    if outer not in weights:
        return "the file holds no arrays for it"
    group = weights[outer]
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs["weight_names"]]
    own = str(layer.config.get("name"))
    mine = [name for name in names if not inner or own in name.split("/")[:-1]]
    last = [name.split("/")[-1].partition(":")[0] for name in mine]
    if len(set(last)) != len(last):
        return "the file holds several arrays of one name for it"
    return _Arrays([np.asarray(group[name]) for name in mine], last)


def _holds_kernels(file: Any, layer: _Configured, archive: bool) -> bool:
    """Return whether the file holds arrays with the rank of a kernel for a layer, whatever its class."""
    weights = file.get("model_weights", file)
    place = "/".join(layer.keys) if archive else layer.name.partition("/")[0]
    group = weights.get(place) if place else weights
    ranks: list[int] = []
    if group is not None:
        group.visititems(lambda name, item: ranks.append(getattr(item, "ndim", 0)))
    return any(rank in LAYOUTS for rank in ranks)


# ---- the layers -------------------------------------------------------------------------------------------


def _layers(layer: _Configured, arrays: _Arrays | str, options: ReadOptions, *, holds_kernels: bool) -> Iterator[Layer]:
    """Yield the convolutions of a layer: two of a separable one, none of a layer without convolutions."""
    match = KERAS_LAYER.fullmatch(layer.kind)
    if options.linear and layer.kind == "Dense" and layer.is_keras:
        yield _dense(layer, arrays)
        return
    if options.linear and layer.kind == "EinsumDense":
        yield Layer(layer.name, None, None, None, "an EinsumDense, which is not read as a dense layer", linear=True)
        return
    if match is None or not layer.is_keras:
        if "Conv" in layer.kind or (not layer.is_keras and holds_kernels):
            recurrent = layer.is_keras and re.fullmatch(r"ConvLSTM\dD", layer.kind)
            yield Layer(layer.name, None, None, None, RECURRENT if recurrent else OTHER_CLASS.format(layer.kind))
        return
    rank = int(match[2])
    reason = _doubt(layer, arrays, rank, separable=match[1] == "Separable")
    if isinstance(arrays, str) or reason:
        yield Layer(layer.name, None, None, None, arrays if isinstance(arrays, str) else reason)
        return
    config = layer.config
    extents = _extents(layer, rank, options)
    letters = SPATIAL_LETTERS[rank]
    kernel = arrays.values[0]
    facts: dict[str, Any] = {
        "stride": per_axis(config.get("strides", 1), rank),
        "dilation": per_axis(config.get("dilation_rate", 1), rank),
        "padding_mode": "zeros",
    }
    note = "" if extents is not None else "extents unknown: give the shape of the layer's input by its name"
    if match[3]:
        taps, stride, dilation = kernel.shape[:rank], facts["stride"], facts["dilation"]
        signed = transposed_pads(config["padding"], taps, stride, dilation, config.get("output_padding"))
        conv = transposed_conv(f"{letters}OI", taps, signed, stride=stride, dilation=dilation)
        yield Layer(layer.name, kernel, conv, extents, note)
        return
    facts["padding"] = sides(config["padding"], kernel.shape[:rank], facts["stride"], facts["dilation"], extents)
    if match[1] is None:
        conv = Conv(f"{letters}IO", groups=config.get("groups", 1), **facts)
        yield Layer(layer.name, kernel, conv, extents, note)
        return
    depthwise = kernel.reshape(*kernel.shape[:-2], 1, -1)
    conv = Conv(f"{letters}IO", groups=kernel.shape[-2], **facts)
    if match[1] == "Depthwise":
        yield Layer(layer.name, depthwise, conv, extents, note)
        return
    yield Layer(f"{layer.name}/depthwise", depthwise, conv, extents, note)
    pads = conv.pads(kernel.shape[:rank])
    outputs = None
    if extents is not None:
        spans = [d * (k - 1) + 1 for k, d in zip(kernel.shape[:rank], conv.dilations, strict=True)]
        axes = zip(extents, pads, spans, conv.strides, strict=True)
        outputs = tuple((n + sum(sides) - span) // s + 1 for n, sides, span, s in axes)
    pointwise = Conv(f"{letters}IO", padding="valid", padding_mode="zeros")
    yield Layer(f"{layer.name}/pointwise", arrays.values[1], pointwise, outputs, note)


def _dense(layer: _Configured, arrays: _Arrays | str) -> Layer:
    reason = _doubt(layer, arrays, 0, separable=False)
    if isinstance(arrays, str) or reason:
        return Layer(layer.name, None, None, None, arrays if isinstance(arrays, str) else reason, linear=True)
    return dense_layer(layer.name, arrays.values[0], "IO")


def _doubt(layer: _Configured, arrays: _Arrays | str, rank: int, *, separable: bool) -> str:
    """Return the reason why the arrays of a layer are not its kernels; "" if they are."""
    config = layer.config
    if layer.wrapper not in ("", "TimeDistributed"):
        return ALTERED.format(layer.wrapper)
    if config.get("lora_rank"):
        return ALTERED.format("its low-rank adaptation")
    if config.get("quantization_config") or "int8" in json.dumps(config.get("dtype")):
        return ALTERED.format("its quantisation")
    if isinstance(arrays, str):
        return ""
    expected = 1 + separable + bool(config.get("use_bias", True))
    if len(arrays.values) != expected:
        return f"the file holds {len(arrays.values)} arrays for it, and {expected} were expected"
    if any(array.ndim != rank + 2 or array.dtype.kind != "f" for array in arrays.values[: 1 + separable]):
        return "where its kernel is expected, the file holds another array"
    return ""


def _extents(layer: _Configured, rank: int, options: ReadOptions) -> tuple[int, ...] | None:
    """Return the spatial extents of a layer's input: the user's for this layer, the file's, or the user's for all."""
    last = layer.config.get("data_format") != "channels_first"
    for shape in (options.input_shapes.get(layer.name), layer.input_shape, options.input_shapes.get("")):
        if shape is None:
            continue
        spatial = shape if len(shape) == rank else shape[-rank - 1 : -1] if last else shape[-rank:]
        known = tuple(extent for extent in spatial if extent is not None)
        if len(known) == rank:
            return known
    return None
