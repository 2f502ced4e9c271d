"""Keras files that hold weights alone: the class of each layer by its names and the forms of its arrays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from convsv_adapters.formats.companions import Companions
from convsv_adapters.formats.keras_arrays import Arrays, is_archive_group, read_arrays
from convsv_adapters.formats.parts import HostArray, Named
from convsv_adapters.parameters import LAYOUTS, NetworkArrays
from convsv_core.layers import ModelError, Stored

__all__ = ["is_of_older_format", "weights_alone"]

CONVOLUTION = re.compile(r"(?P<kind>depthwise_|separable_)?conv(?P<rank>[123])d(?P<up>_transpose)?(_\d+)?")
"""The name that Keras gives to a convolution without one of its own, and to its group: its class, and a number."""

DENSE = re.compile(r"dense(_\d+)?")
"""The name that Keras gives to a dense layer without one of its own, and to its group."""

NO_CONVOLUTION = re.compile(
    r"(^|/)(multi_head_attention|grouped_query_attention|einsum_dense|embedding|_?(query|key|value|output)_dense)(_\d+)?"
    r"(/|$)"
)
"""Names of groups that hold arrays of three axes or more which are no kernels of convolutions. The list is a guess."""

KERNEL_OF_KERAS_2 = "kernel"
"""The kind of a layer whose kernel Keras 2 named so, as it did for Conv, transposed Conv and Dense alone."""

OPTIMIZER = "optimizer"
"""The group in which Keras 3 keeps the variables of an optimizer, from its source."""

UNKNOWN_CLASS = (
    "nothing in the file says whether it is a Conv, a transposed or a depthwise one: save the whole model as .keras, "
    "or name it with --layer '{}:stride=1' if it is a Conv"
)
QUANTISED = "its arrays are not a kernel and a bias: it is quantised, or no dense layer of Keras"
NOT_OF_ITS_CLASS = "its names say {}, and its arrays have other forms"


class _Group(NamedTuple):
    """The arrays of one layer: where they are, the layer's own name, its class's name or "", and its arrays."""

    place: str
    name: str
    kind: str
    arrays: Arrays


def is_of_older_format(file: Any) -> bool:
    """Return whether a file has a group for each layer, in the order of the model, which lists its variables."""
    return any("weight_names" in group.attrs for group in file.values())


def weights_alone(file: Any, path: Path, ranks: Collection[int]) -> NetworkArrays:
    """Return the arrays of a file without a configuration, with what the names of its groups and variables say.

    Keras 3 names the group of a layer of a functional or sequential model after its class, and the layer too if the
    user gives no name. Files of the older format name layers and variables. Depthwise kernels come as those of a
    convolution with one input channel for each group, a view of the same entries.

    Parameters
    ----------
    file : h5py.File
    path : Path
        The file, for messages.
    ranks : collection of int
        The numbers of axes that the weights of the layers to list can have.
    """
    groups = list(_older_groups(file) if is_of_older_format(file) else _groups(file))
    if not groups:
        raise ModelError(f"{path}: holds no weights where Keras keeps them")
    counts = Counter(group.name for group in groups)
    arrays: Named = {}
    stored: dict[str, Stored] = {}
    told: dict[str, Companions] = {}
    for group in groups:
        is_named = group.name and counts[group.name] == 1 and group.place != OPTIMIZER
        names = group.arrays.names or _names(group)
        is_dense = group.kind == KERNEL_OF_KERAS_2 or DENSE.fullmatch(group.kind) is not None
        for index, (name, array) in enumerate(zip(names, group.arrays.values, strict=True)):
            full, place = f"{group.name if is_named else group.place}/{name}", group.arrays.stored[index]
            if array.ndim in LAYOUTS:
                told[full] = _told(full, group, index)
                arrays[full] = _as_convolution(array, told[full])
            elif array.ndim == 2 and index == 0 and is_dense and array.ndim in ranks:
                fits = len(names) <= 2 and array.dtype.kind == "f"
                told[full], arrays[full] = Companions(layout="last"), array if fits else QUANTISED
            if place is not None and full in arrays:
                stored[full] = place
    return NetworkArrays("", arrays, stored, told)


def _groups(file: Any) -> Iterator[_Group]:
    """Yield the layers of a file of Keras 3."""
    found: list[str] = []
    file.visit(lambda name: found.append(name) if name.rpartition("/")[2] == "vars" else None)
    for name in found:
        place, group = name.removesuffix("vars").removesuffix("/"), file[name]
        if not is_archive_group(group) or NO_CONVOLUTION.search(place):
            continue
        own = str(group.attrs.get("name", ""))
        *above, last = ("", *place.split("/"))
        is_wrapped = last == "layer" and not re.fullmatch(r"time_distributed(_\d+)?", above[-1])
        kind = "" if is_wrapped else last if above[-1] == "layers" else own
        yield _Group(place, own, kind, read_arrays(group, sorted(group, key=int)))


def _older_groups(file: Any) -> Iterator[_Group]:
    """Yield the layers of a file with a group for each layer of the outermost model, in the order of the model."""
    sure = not str(file.attrs.get("keras_version", "")).startswith("3")
    order = [name.decode() if isinstance(name, bytes) else str(name) for name in file.attrs.get("layer_names", file)]
    for outer in order:
        group = file[outer]
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in group.attrs["weight_names"]]
        by_layer: dict[str, list[str]] = {}
        for name in names:
            by_layer.setdefault(name.rpartition("/")[0], []).append(name)
        for layer, mine in by_layer.items():
            own = layer.rpartition("/")[2] or outer
            last = [name.rpartition("/")[2].partition(":")[0] for name in mine]
            label = outer if len(by_layer) == 1 else f"{outer}/{own}"
            kind = KERNEL_OF_KERAS_2 if sure and last[0] == "kernel" and set(last) <= {"kernel", "bias"} else own
            yield _Group(f"{outer}/{layer}", label, kind, read_arrays(group, mine, last))


def _names(group: _Group) -> list[str]:
    """Return the names of the variables of a layer, which files of Keras 3 number."""
    match = CONVOLUTION.fullmatch(group.kind)
    names = ["kernel", "bias"]
    if match is not None and match["kind"] == "separable_":
        names = ["depthwise_kernel", "pointwise_kernel", "bias"]
    rest = [str(index) for index in range(len(names), len(group.arrays.values))]
    return [*names, *rest][: len(group.arrays.values)]


def _told(name: str, group: _Group, index: int) -> Companions:
    """Return what is known of an array with the rank of a kernel: of which layer it is, and its layout."""
    values, names = group.arrays.values, group.arrays.names
    kernel = values[index]
    match = CONVOLUTION.fullmatch(group.kind)
    kind = "" if match is None else match["kind"] or ""
    if names and names[index] in ("depthwise_kernel", "pointwise_kernel"):  # in the older format the name is sure
        kind = "separable_" if "pointwise_kernel" in names else "depthwise_"
        match = CONVOLUTION.fullmatch(f"{kind}conv{kernel.ndim - 2}d")
    if group.kind == KERNEL_OF_KERAS_2:
        return _told_by_bias(name, kernel, values[1:])
    if match is None:
        return Companions(doubt=UNKNOWN_CLASS.format(name), layout="last", source="")
    if not _fits(kind, bool(match["up"]), int(match["rank"]), values):
        return Companions(doubt=NOT_OF_ITS_CLASS.format(group.kind))
    if kind and index == 0:
        return Companions(layout="last", groups=kernel.shape[-2], source="class", fixed=True)
    if kind:
        return Companions(layout="last", groups=1, source="class", fixed=True)
    return Companions(layout="last transposed" if match["up"] else "last", source="class", fixed=bool(match["up"]))


def _told_by_bias(name: str, kernel: HostArray, biases: list[HostArray]) -> Companions:
    """Return the layout of the kernel of a convolution that may be a transposed one."""
    sizes = {bias.size for bias in biases}
    if not sizes:
        return Companions(layout="last", source="")
    if sizes <= {kernel.shape[-1]}:
        return Companions(layout="last")
    return (
        Companions(layout="last transposed")
        if sizes <= {kernel.shape[-2]}
        else Companions(doubt=UNKNOWN_CLASS.format(name))
    )


def _fits(kind: str, up: bool, rank: int, values: list[HostArray]) -> bool:
    """Return whether arrays have the forms of those of a class: one or two kernels, and perhaps a bias."""
    kernels, biases = (values[:2], values[2:]) if kind == "separable_" else (values[:1], values[1:])
    if any(kernel.ndim != rank + 2 or kernel.dtype.kind != "f" for kernel in kernels) or len(biases) > 1:
        return False
    first = kernels[0].shape
    outputs = first[-2] if up else first[-1]
    if kind:
        outputs = first[-2] * first[-1]
    if kind == "separable_":
        if len(kernels) != 2 or set(kernels[1].shape[:-2]) != {1} or kernels[1].shape[-2] != outputs:
            return False
        outputs = kernels[1].shape[-1]
    return all(bias.shape == (outputs,) for bias in biases)


def _as_convolution(array: HostArray, told: Companions) -> HostArray:
    """Return the kernel of a depthwise layer with one input channel for each of its groups."""
    is_depthwise = told.fixed and told.groups == array.shape[-2] and told.layout == "last"
    return array.reshape(*array.shape[:-2], 1, -1) if is_depthwise else array
