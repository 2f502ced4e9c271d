"""What readers share, above all for formats that store named arrays and nothing of the network's geometry."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from convsv_core.conv import SPATIAL_LETTERS, Conv
from convsv_core.layers import Layer, ModelError, ReadOptions, Stored

HostArray: TypeAlias = np.ndarray[Any, Any]

LAYOUTS = {3: "OIW", 4: "OIHW", 5: "OIDHW"}
DEFAULT_EXTENT = 32

# Arrays of rank 3 to 5 that networks hold beside kernels, by the words in the last part of their names.
NOT_A_KERNEL = re.compile(
    r"(^|_)(embed|embeddings?|tokens?|pos|position|bias|mask|anchors?|grid|table|buffer|cache|gamma|beta|scale|"
    r"mean|var|std)(_|$)",
    re.IGNORECASE,
)


def layers_from_arrays(
    arrays: Iterable[tuple[str, HostArray | str]],
    options: ReadOptions,
    path: Path,
    *,
    ordered: bool = True,
    stored: Mapping[str, Stored] | None = None,
) -> list[Layer]:
    """Layers of a network of which only the named arrays are known.

    A kernel is a floating-point or complex array of rank 3 to 5, unless the last part of its name says
    otherwise (`NOT_A_KERNEL`). It is taken as stride 1, dilation 1 and padding "same". One with a single
    input channel and several outputs is depthwise, unless it is the network's first. Weights that weight
    or spectral normalisation keeps in parts are put together. Each layer's note says what was assumed.

    Parameters
    ----------
    arrays : iterable of (str, array or str)
        A string in place of an array says why it could not be read.
    options : ReadOptions
        The input shape named ``""`` ends in the spatial extents of every layer, or in the channels if
        its last entry alone agrees with the first kernel. One named as a kernel is for that layer only.
    path : Path
        For messages.
    ordered : bool, default True
        Whether the arrays come in the order of the network. If not, they are sorted by name, numbers
        by value, and the notes say so.
    stored : mapping from name to Stored, optional
        Of the arrays that can be replaced in the file.
    """
    given_arrays = dict(arrays)
    named = put_together(given_arrays)
    if not ordered:
        named = dict(sorted(named.items(), key=lambda item: _natural(item[0])))
    kernels = {name: array for name, array in named.items() if is_kernel(name, array)}
    unknown = [name for name in options.input_shapes if name and name not in kernels]
    if unknown:
        raise ModelError(f"{path}: no kernel is called {unknown[0]!r} (this format names arrays, not inputs)")
    channels = None
    layers = []
    for name, array in kernels.items():
        if isinstance(array, str):
            layers.append(Layer(name, None, None, None, array))
            continue
        layout = _layout(array.ndim, options.layout)
        outputs, inputs = (array.shape[layout.index(letter)] for letter in "OI")
        channels = inputs if channels is None else channels
        is_first = not layers and not _contradicts(options.input_shapes.get(""), array.ndim - 2)
        depthwise = inputs == 1 and outputs > 1 and not is_first
        given = options.input_shapes.get(name, options.input_shapes.get(""))
        extents = _extents(given, array.ndim - 2, channels, path)
        assumed = ["stride 1", "dilation 1", "padding same"]
        assumed += [] if options.layout else [f"layout {layout}"]
        assumed += [] if given else [f"extents {'x'.join(map(str, extents))}"]
        assumed += ["the given extents at every layer"] if given and name not in options.input_shapes else []
        assumed += ["depthwise for its one input channel"] if depthwise else []
        assumed += [] if ordered else ["order by name"]
        conv = Conv(layout, groups=outputs if depthwise else 1, padding_mode="zeros")
        kept = (stored or {}).get(name) if given_arrays.get(name) is array else None
        layers.append(Layer(name, array, conv, extents, "assumed " + ", ".join(assumed), kept))
    return layers


def is_kernel(name: str, array: HostArray | str) -> bool:
    """Whether an array is taken for the kernel of a convolution."""
    if isinstance(array, str):
        return True
    is_float = array.dtype.kind in "fc"
    last = re.split(r"[./:]", name)[-1]
    return is_float and array.ndim in LAYOUTS and array.size > 0 and not NOT_A_KERNEL.search(last)


def _layout(rank: int, wanted: str | None) -> str:
    """Give a layout for kernels of `rank`, by the example of the one wanted: HWIO gives WIO and DHWIO."""
    if wanted is None:
        return LAYOUTS[rank]
    spatial = Conv(wanted).spatial
    if spatial not in wanted:  # spatial letters that are not together cannot stand for others
        return wanted if len(wanted) == rank else LAYOUTS[rank]
    return wanted.replace(spatial, SPATIAL_LETTERS[rank - 2])


def _contradicts(given: tuple[int, ...] | None, ndim: int) -> bool:
    """Whether the given input shape says that the network's input has more than one channel."""
    return given is not None and len(given) > ndim and 1 not in (given[-ndim - 1], given[-1])


def _extents(given: tuple[int, ...] | None, ndim: int, channels: int, path: Path) -> tuple[int, ...]:
    if given is None:
        return (DEFAULT_EXTENT,) * ndim
    if len(given) == 1:
        return given * ndim
    if len(given) < ndim:
        raise ModelError(f"{path}: the input shape {','.join(map(str, given))} has no {ndim} spatial extents")
    if len(given) > ndim and given[-1] == channels != given[-ndim - 1]:
        return given[-ndim - 1 : -1]
    return given[-ndim:]


def _natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts ``layer.10`` behind ``layer.2``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# ---- weights kept in parts -----------------------------------------------------------------------------


def _weight_normalised(v: HostArray, g: HostArray) -> HostArray:
    """Scale v to the norms g, one for each index of the axis along which g is not 1."""
    axes = tuple(axis for axis, extent in enumerate(g.shape) if extent == 1)
    norms = np.sqrt(np.sum(np.square(v.astype(np.float64)), axis=axes, keepdims=True))
    return np.asarray(v * (g / norms), dtype=v.dtype)


def _spectrally_normalised(weight: HostArray, u: HostArray, v: HostArray) -> HostArray:
    """Divide by u . W v, where the rows of W are the first axis, or the second in a transposed layer."""
    rows = weight if u.size == weight.shape[0] else np.moveaxis(weight, 1, 0)
    sigma = u.astype(np.float64) @ rows.reshape(u.size, -1) @ v
    return np.asarray(weight / sigma, dtype=weight.dtype)


PARTS: tuple[tuple[str, tuple[str, ...], Callable[..., HostArray]], ...] = (
    ("weight_v", ("weight_g",), _weight_normalised),
    ("parametrizations.weight.original1", ("parametrizations.weight.original0",), _weight_normalised),
    ("weight_orig", ("weight_u", "weight_v"), _spectrally_normalised),
    (
        "parametrizations.weight.original",
        ("parametrizations.weight.0._u", "parametrizations.weight.0._v"),
        _spectrally_normalised,
    ),
)


def put_together(named: dict[str, HostArray | str]) -> dict[str, HostArray | str]:
    """Replace the parts in which PyTorch's normalisations keep a weight by the weight that they make."""
    weights: dict[str, tuple[str, HostArray]] = {}  # by the name of the part that has its shape
    parts_seen: set[str] = set()
    for name, array in named.items():
        for suffix, others, combine in PARTS:
            stem = name.removesuffix(suffix)
            parts = [array, *(named.get(stem + other) for other in others)]
            if stem != name and all(isinstance(part, np.ndarray) for part in parts):
                weights[name] = (f"{stem}weight", combine(*parts))
                parts_seen.update(stem + other for other in others)
    result: dict[str, HostArray | str] = {}
    for name, array in named.items():
        if name in weights:
            whole, value = weights[name]
            result[whole] = value
        elif name not in parts_seen:
            result[name] = array
    return result


# ---- numbers and files ---------------------------------------------------------------------------------------------


def bfloat16_bits(array: HostArray) -> HostArray:
    """Bit patterns of numbers that bfloat16 holds exactly: the upper halves of float32's."""
    return (array.astype("<f4").view("<u4") >> 16).astype("<u2")


def zip_members(path: Path) -> list[str]:
    """Names in a zip archive; of a truncated one the first; [] if the file is none."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.namelist()
        except zipfile.BadZipFile:
            pass
    with path.open("rb") as file:
        header = file.read(30)  # local file header: signature, ..., length of the name at 26
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            return []
        return [file.read(int.from_bytes(header[26:28], "little")).decode(errors="replace")]


def missing(path: Path, error: ModuleNotFoundError, extra: str) -> ModelError:
    """Error for a file whose format needs a library that is not installed."""
    return ModelError(f"{path}: reading it needs {error.name}: pip install 'convsv[{extra}]'")


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line."""
    return " ".join(str(error).split()) or type(error).__name__
