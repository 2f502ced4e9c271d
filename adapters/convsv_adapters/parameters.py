"""From named arrays to layers, for formats that store no geometry."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from convsv_adapters.formats.companions import Companions, look_around, shown_names
from convsv_adapters.formats.dense import Matrix, look_at_matrix, normalisation_behind
from convsv_adapters.formats.parts import HostArray, Named, put_together
from convsv_core.conv import SPATIAL_LETTERS, Conv
from convsv_core.layers import (
    Geometry,
    Layer,
    LayerList,
    LeftOut,
    ModelError,
    ReadOptions,
    Stored,
    dense_layer,
)

__all__ = [
    "LAYOUTS",
    "HostArray",
    "NetworkArrays",
    "in_natural_order",
    "is_kernel",
    "kernel_ranks",
    "layers_from_arrays",
    "layers_from_networks",
    "may_be_kernel",
    "not_floating",
    "put_together",
    "refuse_geometry",
]

LAYOUTS = {2 + ndim: f"OI{spatial}" for ndim, spatial in SPATIAL_LETTERS.items()}
"""The layout of a kernel by its rank, in PyTorch's and ONNX's order of axes."""

DEFAULT_EXTENT = 32
"""Pixels along each spatial axis where the user gives no input shape: the size of CIFAR-10's images. A guess."""

NOT_A_KERNEL = re.compile(
    r"(^|_)(embed|embeddings?|tokens?|pos|position|bias|mask|anchors?|grid|table|buffer|cache|gamma|beta|scale|"
    r"mean|var|std|kv|mem|latents?|queries|prompts?)(_|$)",
    re.IGNORECASE,
)
"""Words in the last part of a name that say that an array of rank 3 to 5 is no kernel.

The list is a guess: it names what common vision networks store beside their kernels.
"""

SCALE = re.compile(
    r"(^|[._/])([^._/]*norm\w*|rms|ls\d*|scale|layer_?scale)[._/][^._/]+$|"
    r"(^|[._/])(alpha|slope|gain|g|ia3_l\.\w+|magnitude)$|magnitude_vector",
    re.IGNORECASE,
)
"""Names that say that an array with a number for each channel is a scale, and not the kernel of one tap. A guess."""

OPTIMIZER_STATE = re.compile(
    r"((?:.*?[./])??(?:opt_state|optimi[sz]er\w*|exp_avg|exp_avg_sq|momentum_buffer))(?:[./].*)?$", re.IGNORECASE
)
"""Names of arrays that are the state of an optimizer, in files that hold a flat list of arrays. A guess."""


class NetworkArrays(NamedTuple):
    """The arrays of one network.

    Attributes
    ----------
    path : str
        The place of the network in its file, which the names of its layers begin with; "" for the only network.
    arrays : dict of str to (array or str)
        The arrays by name. A string in place of an array says why the array could not be read.
    stored : mapping from str to Stored
        Where the file stores each array that can be replaced.
    told : mapping from str to Companions
        What the format says of arrays, in place of what other arrays say.
    """

    path: str
    arrays: Named
    stored: Mapping[str, Stored]
    told: Mapping[str, Companions] = MappingProxyType({})


def layers_from_arrays(
    arrays: Iterable[tuple[str, HostArray | str]],
    options: ReadOptions,
    path: Path,
    *,
    ordered: bool = True,
    stored: Mapping[str, Stored] | None = None,
) -> LayerList:
    """Return the layers of a network of which only the named arrays are known.

    A kernel is a floating-point or complex array of rank 3 to 5, unless the last part of its name has a word of
    `NOT_A_KERNEL`, or a bias beside it has its shape. A kernel of rank 3 is one only where its name, a bias, a
    normalisation or the user says so. Weights that are kept in parts are put together first (`put_together`). Where
    other arrays say that an array is not the weight of a convolution, its layer has the reason and no kernel.

    A layer is assumed to have stride 1, dilation 1, one group and padding "same", unless `options` says otherwise. A
    kernel with one input channel and several output channels is taken as depthwise, unless it is the first of the
    network. A bias tells which axis holds the outputs. The note of each layer lists what was assumed.

    Parameters
    ----------
    arrays : iterable of (str, array or str)
        Names and arrays. A string in place of an array says why the array could not be read.
    options : ReadOptions
        The input shape named ``""`` holds for every layer. It ends in the spatial extents; if only its last
        entry agrees with the input channels of the first kernel, the channels come last. An input shape named
        as a kernel holds for that layer only.
    path : Path
        The file, for messages.
    ordered : bool, default True
        Whether the arrays come in the order of the network. If not, they are sorted by name, with numbers sorted
        by value, and the notes say so.
    stored : mapping from name to Stored, optional
        Where the file stores each array that can be replaced.

    Raises
    ------
    ModelError
        An input shape or a geometry names no kernel, or does not fit a kernel.
    """
    if options.network is not None:
        raise ModelError(f"{path}: holds one network, and none that is called {options.network!r}")
    return layers_from_networks([NetworkArrays("", dict(arrays), stored or {})], options, path, ordered=ordered)


def layers_from_networks(
    networks: Sequence[NetworkArrays], options: ReadOptions, path: Path, *, ordered: bool = True
) -> LayerList:
    """Return the layers of several networks, one network after the other: see `layers_from_arrays`.

    Arrays whose names say that they are the state of an optimizer are left out.

    A name, or a pattern of one, in the options is the name of a layer here or the name of its array in the file.
    """
    layers: list[Layer] = []
    used: set[str] = set()
    left_out: dict[str, LeftOut] = {}
    for network in networks:
        states = {name: found[1] for name in network.arrays if (found := OPTIMIZER_STATE.match(name))}
        for state in states.values():
            place = "/".join(filter(None, (network.path, state)))
            left_out[place] = LeftOut(place, "the state of an optimizer")
        kept = {name: array for name, array in network.arrays.items() if name not in states}
        layers += _Reading(network._replace(arrays=kept), options, path, used).layers(ordered)
    unknown = [name for name in options.input_shapes if name and name not in used]
    if unknown:
        raise ModelError(f"{path}: no kernel is called {unknown[0]!r} (this format names arrays, not inputs)")
    unknown = [name for name in options.layers if name not in used]
    if unknown:
        raise ModelError(f"{path}: no kernel is called {unknown[0]!r}")
    return LayerList(layers, networks=[network.path for network in networks], left_out=left_out.values())


def kernel_ranks(options: ReadOptions) -> set[int]:
    """Return the numbers of axes that the weights of the layers to list can have."""
    return {*LAYOUTS, *((2,) if options.linear else ())}


def refuse_geometry(options: ReadOptions, path: Path) -> None:
    """Raise `ModelError` if the options say what a format stores itself: the network, or the geometry of layers."""
    if options.network is not None:
        raise ModelError(f"{path}: holds one network, and none that is called {options.network!r}")
    if options.layers:
        raise ModelError(f"{path}: holds the geometry of its layers; drop {next(iter(options.layers))!r}")


def in_natural_order(names: Iterable[str]) -> bool:
    """Return whether names are in an order of their own, or in an alphabetical one that puts numbers by value too."""
    found = list(names)
    return found != sorted(found) or found == sorted(found, key=_natural_order)


class _Reading:
    """The arrays of a network on their way to becoming layers."""

    def __init__(self, network: NetworkArrays, options: ReadOptions, path: Path, used: set[str]) -> None:
        self.network, self.options, self.path, self.used = network, options, path, used
        self.named = put_together(network.arrays, least_rank=2 if options.linear else 3)
        self.shown = shown_names(self.named)

    def layers(self, ordered: bool) -> list[Layer]:
        """Return the layers. The names and patterns of the options that fit one are added to `used`."""
        names = list(self.named)
        if not ordered:
            names.sort(key=lambda name: _natural_order(self.shown[name]))
        layers: list[Layer] = []
        first_channels: int | None = None
        for name in names:
            array = self.named[name]
            wanted = self._wanted(name)
            if isinstance(array, str):
                layers.append(Layer(self._label(name), None, None, None, array))
            elif is_kernel(name, array):
                told = self._told(name, array, wanted)
                if not told.is_kernel:
                    continue
                if told.doubt:
                    layers.append(Layer(self._label(name), None, None, None, told.doubt))
                    continue
                layer, channels = self._layer(name, array, told, wanted or Geometry(), first_channels, ordered)
                first_channels = channels if first_channels is None else first_channels
                layers.append(layer)
            elif self.options.linear and array.ndim == 2 and (dense := self._dense(name, array)) is not None:
                layers.append(dense)
        return layers

    def _told(self, name: str, array: HostArray, wanted: Geometry | None) -> Companions:
        """Return what the format, or what the arrays beside it, say of an array that could be a kernel."""
        told = self.network.told.get(name)
        if told is None:
            return look_around(name, array, self.named, name not in self.network.arrays, wanted is not None)
        if wanted is not None and told.contradicts(wanted):
            raise ModelError(
                f"{self.path}: the class of {self._label(name)!r} has another geometry than is stated for it"
            )
        return told._replace(doubt="") if wanted is not None and told.layout is not None else told

    def _dense(self, name: str, array: HostArray) -> Layer | None:
        """Return the dense layer whose matrix an array is; None if nothing says that it is one."""
        told = look_at_matrix(name, array, self.named) if array.dtype.kind in "fc" and array.size else None
        told = Matrix("IO") if name in self.network.told else told
        if told is None:
            return None
        if told.doubt:
            return Layer(self._label(name), None, None, None, told.doubt, linear=True)
        normalisation = normalisation_behind(name, array.shape[told.layout.index("O")], self.named)
        stored, note = self._stored(name, array), ""
        if others := [other for other in self._sharing(name) if look_at_matrix(other, array, self.named) is None]:
            stored, note = None, f"its numbers are those of {others[0]} too, so they are not replaced"
        return dense_layer(self._label(name), array, told.layout, note, stored=stored, normalisation=normalisation)

    def _sharing(self, name: str) -> list[str]:
        """Return the names of arrays that the file stores in the place of this one."""
        stored = self.network.stored
        return [other for other, place in stored.items() if other != name and place == stored.get(name)]

    def _stored(self, name: str, array: HostArray) -> Stored | None:
        """Return where the file stores an array entry for entry; None if it was put together from parts."""
        return self.network.stored.get(name) if self.network.arrays.get(name) is array else None

    def _label(self, name: str) -> str:
        return f"{self.network.path}/{self.shown[name]}" if self.network.path else self.shown[name]

    def _names(self, name: str) -> tuple[str, ...]:
        """Return the names by which options may call an array."""
        return self._label(name), self.shown[name], name

    def _wanted(self, name: str) -> Geometry | None:
        """Return the geometry that the user states for an array; None if the user states none."""
        array = self.named[name]
        if not isinstance(array, str) and not is_kernel(name, array):
            return None
        self.used.update(key for key in self.options.input_shapes if key in self._names(name))
        found = None
        for pattern, geometry in self.options.layers.items():
            if any(fnmatch.fnmatchcase(known, pattern) for known in self._names(name)):
                self.used.add(pattern)
                stated = {key: value for key, value in dataclasses.asdict(geometry).items() if value is not None}
                found = dataclasses.replace(found or Geometry(), **stated)
        return found

    def _layer(
        self,
        name: str,
        array: HostArray,
        told: Companions,
        wanted: Geometry,
        first_channels: int | None,
        ordered: bool,
    ) -> tuple[Layer, int]:
        """Return the layer of a kernel, and the number of its input channels."""
        options, ndim = self.options, array.ndim - 2
        by_default = told.layout in ("transposed", "last transposed") and options.layout is None
        transposed = by_default if wanted.transposed is None else wanted.transposed
        told_groups = told.groups if transposed == by_default else None
        layout = _layout(array.ndim, options.layout)
        if options.layout is None and told.layout in ("last", "last transposed"):
            layout = f"{SPATIAL_LETTERS[ndim]}{'OI' if transposed else 'IO'}"
        elif options.layout is None and transposed:
            layout = f"IO{SPATIAL_LETTERS[ndim]}"
        outputs, inputs = (array.shape[layout.index(letter)] for letter in "OI")
        known = told.layout is not None and bool(told.source)
        is_first = first_channels is None and not _has_many_channels(options.input_shapes.get(""), ndim)
        guessed = wanted.groups is None and not told_groups
        depthwise = guessed and inputs == 1 and outputs > 1 and not is_first and not transposed
        groups = wanted.groups or told_groups or (outputs if depthwise else 1)
        given = next((options.input_shapes[key] for key in self._names(name) if key in options.input_shapes), None)
        shape = given if given is not None else options.input_shapes.get("")
        extents = _extents(shape, ndim, inputs if first_channels is None else first_channels, self.path)
        assumptions = {
            "stride 1": wanted.stride is None,
            "dilation 1": wanted.dilation is None,
            "groups 1": guessed and not depthwise,
            "padding same": wanted.padding is None,
            f"layout {layout}": not options.layout and not known,
            f"layout {layout} for its {told.source}": not options.layout and known,
            f"extents {'x'.join(map(str, extents))}": shape is None,
            "the given extents at every layer": shape is not None and given is None,
            "depthwise for its one input channel": depthwise,
            "order by name": not ordered,
        }
        texts = [text for text, was_assumed in assumptions.items() if was_assumed]
        try:
            conv = Conv(
                layout,
                stride=1 if wanted.stride is None else wanted.stride,
                dilation=1 if wanted.dilation is None else wanted.dilation,
                groups=groups,
                padding="same" if wanted.padding is None else wanted.padding,
                padding_mode="zeros",
                transposed=transposed,
            )
        except (TypeError, ValueError) as error:
            raise ModelError(f"{self.path}: the geometry stated for {self._label(name)!r}: {error}") from None
        split = inputs if transposed else outputs
        if split % groups:
            raise ModelError(
                f"{self.path}: {self._label(name)!r} has {split} channels, which {groups} groups do not divide"
            )
        note = f"assumed {', '.join(texts)}" if texts else ""
        open_facts = {
            **{field: getattr(wanted, field) is None for field in ("stride", "dilation", "groups", "padding")},
            "transposed": wanted.transposed is None and told.layout is None,
            "layout": options.layout is None and not known,
        }
        layer = Layer(
            self._label(name),
            array,
            conv,
            extents,
            note,
            self._stored(name, array),
            assumed_extents=shape is None,
            normalisation=normalisation_behind(name, outputs * (groups if transposed else 1), self.named),
            assumed=tuple(field for field, is_open in open_facts.items() if is_open),
        )
        return layer, inputs * (1 if transposed else groups)


def is_kernel(name: str, array: HostArray | str) -> bool:
    """Return whether an array is taken for the kernel of a convolution; True for one that could not be read.

    See `layers_from_arrays` for the rule.
    """
    if isinstance(array, str):
        return True
    if array.dtype.kind not in "fc" or array.ndim not in LAYOUTS or not array.size or not may_be_kernel(name):
        return False
    return not (array.size == max(array.shape) and SCALE.search(name))


def may_be_kernel(name: str) -> bool:
    """Return whether an array of this name can be a kernel."""
    return not NOT_A_KERNEL.search(re.split(r"[./:]", name)[-1])


def not_floating(name: str, dtype: str) -> str:
    """Return why an array of integers is no kernel that can be read; "" unless its name says that it is a weight."""
    last = re.split(r"[./:]", name)[-1]
    is_weight = dtype in ("int8", "uint8") and re.search(r"weight|kernel", last) and not last.endswith("_mask")
    return f"integers ({dtype}), of which the file does not say what they stand for" if is_weight else ""


def _layout(rank: int, wanted: str | None) -> str:
    """Return the layout of kernels of `rank` that orders its axes as the layout `wanted`.

    For HWIO it is WIO at rank 3 and DHWIO at rank 5.
    """
    if wanted is None:
        return LAYOUTS[rank]
    spatial = Conv(wanted).spatial
    if spatial not in wanted:  # spatial letters apart from one another say nothing about kernels of another rank
        return wanted if len(wanted) == rank else LAYOUTS[rank]
    return wanted.replace(spatial, SPATIAL_LETTERS[rank - 2])


def _has_many_channels(input_shape: tuple[int, ...] | None, ndim: int) -> bool:
    """Return whether the given input shape says that the network's input has more than one channel."""
    return input_shape is not None and len(input_shape) > ndim and 1 not in (input_shape[-ndim - 1], input_shape[-1])


def _extents(input_shape: tuple[int, ...] | None, ndim: int, channels: int, path: Path) -> tuple[int, ...]:
    """Return the spatial extents in an input shape, whose channels come first, come last or are left out."""
    if input_shape is None:
        return (DEFAULT_EXTENT,) * ndim
    if len(input_shape) == 1:
        return input_shape * ndim
    if len(input_shape) < ndim:
        raise ModelError(f"{path}: the input shape {','.join(map(str, input_shape))} has no {ndim} spatial extents")
    if len(input_shape) > ndim and input_shape[-1] == channels != input_shape[-ndim - 1]:
        return input_shape[-ndim - 1 : -1]
    return input_shape[-ndim:]


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts ``layer.10`` behind ``layer.2``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
