"""From named arrays to layers, for formats that store no geometry; and weights that normalisation keeps in parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from convsv_core.conv import SPATIAL_LETTERS, Conv
from convsv_core.layers import Layer, ModelError, ReadOptions, Stored

__all__ = ["LAYOUTS", "HostArray", "is_kernel", "layers_from_arrays", "put_together"]

HostArray: TypeAlias = np.ndarray[Any, Any]

LAYOUTS = {2 + ndim: f"OI{spatial}" for ndim, spatial in SPATIAL_LETTERS.items()}
"""The layout of a kernel by its rank, in PyTorch's and ONNX's order of axes."""

DEFAULT_EXTENT = 32
"""Pixels along each spatial axis where the user gives no input shape: the size of CIFAR-10's images. A guess."""

NOT_A_KERNEL = re.compile(
    r"(^|_)(embed|embeddings?|tokens?|pos|position|bias|mask|anchors?|grid|table|buffer|cache|gamma|beta|scale|"
    r"mean|var|std)(_|$)",
    re.IGNORECASE,
)
"""Words in the last part of a name that say that an array of rank 3 to 5 is no kernel.

The list is a guess: it names what common vision networks store beside their kernels.
"""


def layers_from_arrays(
    arrays: Iterable[tuple[str, HostArray | str]],
    options: ReadOptions,
    path: Path,
    *,
    ordered: bool = True,
    stored: Mapping[str, Stored] | None = None,
) -> list[Layer]:
    """Return the layers of a network of which only the named arrays are known.

    A kernel is a floating-point or complex array of rank 3 to 5, unless the last part of its name has a word of
    `NOT_A_KERNEL`. Its layer is assumed to have stride 1, dilation 1 and padding "same". A kernel with one
    input channel and several output channels is taken as depthwise, unless it is the first of the network.
    Weights that weight or spectral normalisation keeps in parts are put together first (`put_together`).
    The note of each layer lists what was assumed.

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
        An input shape names no kernel, or has too few extents for a kernel.
    """
    given_arrays = dict(arrays)
    named = put_together(given_arrays)
    if not ordered:
        named = dict(sorted(named.items(), key=lambda item: _natural_order(item[0])))
    kernels = {name: array for name, array in named.items() if is_kernel(name, array)}
    unknown = [name for name in options.input_shapes if name and name not in kernels]
    if unknown:
        raise ModelError(f"{path}: no kernel is called {unknown[0]!r} (this format names arrays, not inputs)")
    first_channels = None
    layers: list[Layer] = []
    for name, array in kernels.items():
        if isinstance(array, str):
            layers.append(Layer(name, None, None, None, array))
            continue
        ndim = array.ndim - 2
        layout = _layout(array.ndim, options.layout)
        outputs, inputs = (array.shape[layout.index(letter)] for letter in "OI")
        first_channels = inputs if first_channels is None else first_channels
        is_first = not layers and not _has_many_channels(options.input_shapes.get(""), ndim)
        depthwise = inputs == 1 and outputs > 1 and not is_first
        given = options.input_shapes.get(name, options.input_shapes.get(""))
        extents = _extents(given, ndim, first_channels, path)
        assumptions = {
            "stride 1": True,
            "dilation 1": True,
            "padding same": True,
            f"layout {layout}": not options.layout,
            f"extents {'x'.join(map(str, extents))}": given is None,
            "the given extents at every layer": given is not None and name not in options.input_shapes,
            "depthwise for its one input channel": depthwise,
            "order by name": not ordered,
        }
        note = "assumed " + ", ".join(text for text, was_assumed in assumptions.items() if was_assumed)
        conv = Conv(layout, groups=outputs if depthwise else 1, padding_mode="zeros")
        is_as_stored = given_arrays.get(name) is array
        kept = stored.get(name) if stored is not None and is_as_stored else None
        layers.append(Layer(name, array, conv, extents, note, kept))
    return layers


def is_kernel(name: str, array: HostArray | str) -> bool:
    """Return whether an array is taken for the kernel of a convolution; True for one that could not be read.

    See `layers_from_arrays` for the rule.
    """
    if isinstance(array, str):
        return True
    is_float = array.dtype.kind in "fc"
    last = re.split(r"[./:]", name)[-1]
    return is_float and array.ndim in LAYOUTS and array.size > 0 and not NOT_A_KERNEL.search(last)


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


# ---- weights kept in parts -----------------------------------------------------------------------------


def _weight_normalised(v: HostArray, g: HostArray) -> HostArray:
    """Scale v to the norms g: one norm for each index of the axis along which g has more than one entry."""
    axes = tuple(axis for axis, extent in enumerate(g.shape) if extent == 1)
    norms = np.sqrt(np.sum(np.square(v.astype(np.float64)), axis=axes, keepdims=True))
    return np.asarray(v * (g / norms), dtype=v.dtype)


def _spectrally_normalised(weight: HostArray, u: HostArray, v: HostArray) -> HostArray:
    """Divide W by u . W v, where the rows of W are the first axis, or the second axis in a transposed layer."""
    rows = weight if u.size == weight.shape[0] else np.moveaxis(weight, 1, 0)
    sigma = u.astype(np.float64) @ rows.reshape(u.size, -1) @ v
    return np.asarray(weight / sigma, dtype=weight.dtype)


class _Parts(NamedTuple):
    """The names under which a PyTorch normalisation keeps a weight, and the function that puts it together.

    Attributes
    ----------
    shaped : str
        How the name of the part ends that has the shape of the weight.
    others : tuple of str
        How the names of the other parts end, in the order of `combine`'s arguments.
    combine : callable
    """

    shaped: str
    others: tuple[str, ...]
    combine: Callable[..., HostArray]


PARTS = (
    _Parts("weight_v", ("weight_g",), _weight_normalised),
    _Parts("parametrizations.weight.original1", ("parametrizations.weight.original0",), _weight_normalised),
    _Parts("weight_orig", ("weight_u", "weight_v"), _spectrally_normalised),
    _Parts(
        "parametrizations.weight.original",
        ("parametrizations.weight.0._u", "parametrizations.weight.0._v"),
        _spectrally_normalised,
    ),
)


class _Whole(NamedTuple):
    """A weight that was put together, and its name."""

    name: str
    weight: HostArray


def put_together(named: dict[str, HostArray | str]) -> dict[str, HostArray | str]:
    """Return named arrays with each weight that PyTorch's normalisations keep in parts put together.

    The weight takes the place of the part that has its shape, under the name that ends in ``weight``. The other parts
    are left out. Weight and spectral normalisation are known, as `torch.nn.utils` and as parametrizations.
    """
    weights: dict[str, _Whole] = {}  # by the name of the part that has its shape
    other_parts: set[str] = set()
    for name, array in named.items():
        for shaped, others, combine in PARTS:
            stem = name.removesuffix(shaped)
            parts = [array, *(named.get(stem + other) for other in others)]
            if stem != name and all(isinstance(part, np.ndarray) for part in parts):
                weights[name] = _Whole(f"{stem}weight", combine(*parts))
                other_parts.update(stem + other for other in others)
    result: dict[str, HostArray | str] = {}
    for name, array in named.items():
        if name in weights:
            result[weights[name].name] = weights[name].weight
        elif name not in other_parts:
            result[name] = array
    return result
