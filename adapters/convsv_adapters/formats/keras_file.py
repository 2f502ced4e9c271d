"""Reader and writer of Keras models: `.keras` archives, and `.h5` files with the configuration or without it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convsv_adapters._keras_rules import per_axis, sides, transposed_pads
from convsv_adapters.formats.errors import damaged, load_library
from convsv_adapters.formats.files import DAMAGED_ZIP, first_bytes, zip_members
from convsv_adapters.formats.keras_arrays import Arrays, arrays_of, holds_arrays_of_rank, replace_entries
from convsv_adapters.formats.keras_config import Configured, configured_layers
from convsv_adapters.formats.keras_shapes import Shape, ShapeMisfit, input_names, inputs_of_layers
from convsv_adapters.formats.keras_weights import is_of_older_format, weights_alone
from convsv_adapters.parameters import LAYOUTS, HostArray, kernel_ranks, layers_from_networks, refuse_geometry
from convsv_core.conv import SPATIAL_LETTERS, Conv, transposed_conv
from convsv_core.layers import Extents, Layer, ModelError, Normalisation, ReadOptions, dense_layer
from convsv_core.plugins import hookimpl

__all__ = ["convsv_read_model", "convsv_write_model"]

HDF5 = b"\x89HDF\r\n\x1a\n"
"""The first bytes of an HDF5 file, from the format's definition."""

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
"""The members of a `.keras` archive with the configuration and with the arrays."""

QUANTISED = re.compile(r"int8|int4|float8|Quantized")
"""Words of policies of dtypes that compute with other numbers than the kernel's, from Keras's own policies."""

EPSILON = 1e-3
"""Keras adds this to the variance in a batch normalisation whose configuration does not say, by its documentation."""

KERAS_LAYER = re.compile(r"(Depthwise|Separable)?Conv(\d)D(Transpose)?")
"""The names of Keras's classes of convolutions."""

RECURRENT = "a recurrent convolution: it acts on its own output too, and has no single operator"
OTHER_CLASS = "{} is no class of Keras that is known here: what it does to its kernel is not known"
ALTERED = "{} changes the kernel in a way that is not read"


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the convolutions of a Keras model with the geometry of its configuration, in the order of the model.

    Of a file that holds weights alone, the kernels are read whose class the file tells: see `weights_alone`.
    """
    archive = _is_archive(path)
    if not archive and not _is_hdf5(path):
        return None
    if options.layout is not None:
        raise ModelError(f"{path}: Keras fixes the layout of its kernels; drop {options.layout!r}")
    h5py = load_library("h5py", path, "keras")
    try:
        with _weights(path, archive) as weights, h5py.File(weights, "r") as file:
            config = _config(path, archive, file)
            if config is None:
                network = weights_alone(file, path, kernel_ranks(options))
                ordered = is_of_older_format(file)
            else:
                refuse_geometry(options, path)
                layers = list(_Reading(file, archive, options).layers(config))
    except ShapeMisfit as error:
        raise ModelError(f"{path}: {error}") from None
    except (AttributeError, KeyError, TypeError, *DAMAGED_ZIP) as error:
        raise damaged(path, "a Keras model", error) from None
    if config is None:
        if options.network is not None:
            raise ModelError(f"{path}: holds one network, and none that is called {options.network!r}")
        return layers_from_networks([network], options, path, ordered=ordered)
    known = {*(layer.name for layer in layers), *input_names(config)}
    if unknown := [name for name in options.input_shapes if name and name not in known]:
        raise ModelError(f"{path}: no convolution is called {unknown[0]!r}, and no input")
    return layers


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write a copy of a Keras model in which the entries of `kernels` are replaced.

    The members of an archive stay as they are, but for the one with the arrays.
    """
    archive = _is_archive(path)
    if not archive and not _is_hdf5(path):
        return None
    h5py = load_library("h5py", path, "keras")
    if not archive:
        shutil.copyfile(path, target)
        with h5py.File(target, "r+") as file:
            replace_entries(file, kernels, path)
        return True
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new, _copy_of(old, target.parent) as weights:
        with h5py.File(weights, "r+") as file:
            replace_entries(file, kernels, path)
        weights.seek(0)
        for member in old.infolist():
            content = weights if member.filename == WEIGHTS else old.open(member)
            with content, new.open(copy.copy(member), "w") as written:  # a member of two archives has two places
                shutil.copyfileobj(content, written)
    return True


def _is_archive(path: Path) -> bool:
    members = zip_members(path)
    return path.suffix.lower() == ".keras" or {CONFIG, WEIGHTS} <= set(members)


def _is_hdf5(path: Path) -> bool:
    return path.suffix.lower() in (".h5", ".hdf5") or first_bytes(path, len(HDF5)) == HDF5


@contextlib.contextmanager
def _weights(path: Path, archive: bool) -> Iterator[Any]:
    """Return a context manager that gives the HDF5 file of a model, as h5py opens it."""
    if not archive:
        yield path
        return
    with zipfile.ZipFile(path) as members, _copy_of(members) as weights:
        yield weights


def _config(path: Path, archive: bool, file: Any) -> Any:
    """Return the configuration of a model; None if the file holds weights alone."""
    if archive:
        with zipfile.ZipFile(path) as members:
            return json.loads(members.read(CONFIG))
    stated = file.attrs.get("model_config")
    return None if stated is None else json.loads(stated)


@contextlib.contextmanager
def _copy_of(archive: zipfile.ZipFile, folder: Path | None = None) -> Iterator[Any]:
    """Return a context manager that gives a file without a name, open for writing, with the arrays of an archive."""
    with tempfile.TemporaryFile(dir=folder) as file, archive.open(WEIGHTS) as weights:
        shutil.copyfileobj(weights, file)
        yield file


# ---- the layers -------------------------------------------------------------------------------------------


class _Reading:
    """An open file of a model on its way to becoming layers."""

    def __init__(self, file: Any, archive: bool, options: ReadOptions) -> None:
        self.file, self.archive, self.options = file, archive, options
        self.shapes: dict[str, Shape] = {}

    def layers(self, config: Mapping[str, Any]) -> Iterator[Layer]:
        """Yield the layers of a configuration, each with the normalisation that is directly behind it."""
        configured = list(configured_layers(config))
        self.shapes = inputs_of_layers(config, self.options.input_shapes)
        by_name = {layer.name: layer for layer in configured}
        for layer in configured:
            arrays = arrays_of(self.file, layer, self.archive)
            found = list(self._layers(layer, arrays))
            behind = by_name.get(layer.follower)
            if found and behind is not None and layer.config.get("activation") in (None, "linear"):
                outputs = found[-1]  # a separable layer's second kernel
                found[-1] = dataclasses.replace(outputs, normalisation=self._normalisation(behind, layer, outputs))
            yield from found

    def _layers(self, layer: Configured, arrays: Arrays | str) -> Iterator[Layer]:
        """Yield the convolutions of a layer: two of a separable one, none of a layer without convolutions."""
        match = KERAS_LAYER.fullmatch(layer.kind)
        if self.options.linear and layer.kind == "Dense" and layer.is_keras:
            yield _dense(layer, arrays)
            return
        if self.options.linear and layer.kind == "EinsumDense":
            yield Layer(layer.name, None, None, None, "an EinsumDense, which is not read as a dense layer", linear=True)
            return
        if match is None or not layer.is_keras:
            own = not layer.is_keras and holds_arrays_of_rank(self.file, layer, self.archive, LAYOUTS)
            if "Conv" in layer.kind or own:
                recurrent = layer.is_keras and re.fullmatch(r"ConvLSTM\dD", layer.kind)
                yield Layer(layer.name, None, None, None, RECURRENT if recurrent else OTHER_CLASS.format(layer.kind))
            return
        yield from _convolutions(layer, arrays, match, self._extents(layer, int(match[2])))

    def _extents(self, layer: Configured, rank: int) -> Extents | None:
        """Return the spatial extents of a layer's input: the user's for it, or those that follow, or the file's."""
        last = layer.config.get("data_format") != "channels_first"
        given = self.options.input_shapes
        for shape in (given.get(layer.name), self.shapes.get(layer.name), layer.input_shape):
            if shape is None:
                continue
            spatial = shape if len(shape) == rank else shape[-rank - 1 : -1] if last else shape[-rank:]
            known = tuple(extent for extent in spatial if extent is not None)
            if len(known) == rank:
                return known
        return None

    def _normalisation(self, norm: Configured, layer: Configured, outputs: Layer) -> Normalisation | None:
        """Return what a batch normalisation behind a layer does at inference; None if the file does not surely tell."""
        config = norm.config
        arrays = arrays_of(self.file, norm, self.archive)
        scale = bool(config.get("scale", True))
        if isinstance(arrays, str) or len(arrays.values) != 2 + scale + bool(config.get("center", True)):
            return None
        axis, rank = config.get("axis", -1), 0 if outputs.linear or outputs.conv is None else outputs.conv.ndim
        axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        first = layer.config.get("data_format") == "channels_first"
        if not isinstance(axis, int) or axis % (rank + 2) != (1 if first else rank + 1) or not norm.is_keras:
            return None
        variance = arrays.values[-1]  # gamma, beta, the mean and the variance come in this order
        gamma = arrays.values[0] if scale else np.ones_like(variance)
        return Normalisation.of_statistics(norm.name, gamma, variance, float(config.get("epsilon", EPSILON)))


def _convolutions(
    layer: Configured, arrays: Arrays | str, kind: re.Match[str], extents: Extents | None
) -> Iterator[Layer]:
    """Yield the kernels of a layer of one of Keras's classes of convolutions, whose name `kind` matches."""
    rank = int(kind[2])
    reason = _doubt(layer, arrays, rank, separable=kind[1] == "Separable")
    if isinstance(arrays, str) or reason:
        yield Layer(layer.name, None, None, None, arrays if isinstance(arrays, str) else reason)
        return
    config = layer.config
    letters = SPATIAL_LETTERS[rank]
    kernel, stored = arrays.values[0], arrays.stored[0]
    facts: dict[str, Any] = {
        "stride": per_axis(config.get("strides", 1), rank),
        "dilation": per_axis(config.get("dilation_rate", 1), rank),
        "padding_mode": "zeros",
    }
    note = "" if extents is not None else "extents unknown: give the shape of the layer's input by its name"
    if kind[3]:
        taps, stride, dilation = kernel.shape[:rank], facts["stride"], facts["dilation"]
        signed = transposed_pads(config["padding"], taps, stride, dilation, config.get("output_padding"))
        conv = transposed_conv(f"{letters}OI", taps, signed, stride=stride, dilation=dilation)
        yield Layer(layer.name, kernel, conv, extents, note, stored)
        return
    facts["padding"] = sides(config["padding"], kernel.shape[:rank], facts["stride"], facts["dilation"], extents)
    if kind[1] is None:
        conv = Conv(f"{letters}IO", groups=config.get("groups", 1), **facts)
        yield Layer(layer.name, kernel, conv, extents, note, stored)
        return
    depthwise = kernel.reshape(*kernel.shape[:-2], 1, -1)
    conv = Conv(f"{letters}IO", groups=kernel.shape[-2], **facts)
    if kind[1] == "Depthwise":
        yield Layer(layer.name, depthwise, conv, extents, note, stored)
        return
    yield Layer(f"{layer.name}/depthwise", depthwise, conv, extents, note, stored)
    pads = conv.pads(kernel.shape[:rank])
    outputs = None
    if extents is not None:
        spans = [d * (k - 1) + 1 for k, d in zip(kernel.shape[:rank], conv.dilations, strict=True)]
        axes = zip(extents, pads, spans, conv.strides, strict=True)
        outputs = tuple((n + sum(sides) - span) // s + 1 for n, sides, span, s in axes)
    pointwise = Conv(f"{letters}IO", padding="valid", padding_mode="zeros")
    yield Layer(f"{layer.name}/pointwise", arrays.values[1], pointwise, outputs, note, arrays.stored[1])


def _dense(layer: Configured, arrays: Arrays | str) -> Layer:
    reason = _doubt(layer, arrays, 0, separable=False)
    if isinstance(arrays, str) or reason:
        return Layer(layer.name, None, None, None, arrays if isinstance(arrays, str) else reason, linear=True)
    return dense_layer(layer.name, arrays.values[0], "IO", stored=arrays.stored[0])


def _doubt(layer: Configured, arrays: Arrays | str, rank: int, *, separable: bool) -> str:
    """Return the reason why the arrays of a layer are not its kernels; "" if they are."""
    config = layer.config
    if layer.wrapper not in ("", "TimeDistributed"):
        return ALTERED.format(layer.wrapper)
    if config.get("lora_rank"):
        return ALTERED.format("its low-rank adaptation")
    if config.get("quantization_config") or QUANTISED.search(json.dumps(config.get("dtype"))):
        return ALTERED.format("its quantisation")
    if isinstance(arrays, str):
        return ""
    expected = 1 + separable + bool(config.get("use_bias", True))
    if len(arrays.values) != expected:
        return f"the file holds {len(arrays.values)} arrays for it, and {expected} were expected"
    if any(array.ndim != rank + 2 or array.dtype.kind != "f" for array in arrays.values[: 1 + separable]):
        return "where its kernel is expected, the file holds another array"
    return ""
