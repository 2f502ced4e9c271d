"""The arrays in an HDF5 file of Keras: the datasets of a layer, and new entries for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convsv_adapters.formats.bfloat16 import from_bfloat16_bits, to_bfloat16_bits
from convsv_adapters.formats.keras_config import Configured
from convsv_adapters.formats.parts import HostArray
from convsv_core.layers import ModelError, Stored

__all__ = ["Arrays", "arrays_of", "holds_arrays_of_rank", "is_archive_group", "read_arrays", "replace_entries"]

STORED_DTYPES = ("float16", "float32", "float64")
"""The dtypes of NumPy whose datasets are written. The names of Keras's dtypes are the same."""


class Arrays(NamedTuple):
    """The arrays of a layer, in the order of its variables.

    Attributes
    ----------
    values : list of array
    names : list of str
        The names of the variables, where the file has them.
    stored : list of (Stored or None)
        Where the file stores each array; None for an array that cannot be replaced.
    """

    values: list[HostArray]
    names: list[str]
    stored: list[Stored | None]


def arrays_of(file: Any, layer: Configured, archive: bool) -> Arrays | str:
    """Return the arrays of a layer of a configuration, or the reason why they are not found."""
    return _in_archive(file, layer) if archive else _in_groups(file, layer)


def is_archive_group(group: Any) -> bool:
    """Return whether a group is one of those in which Keras 3 keeps the variables of one layer, by number."""
    return bool(len(group)) and all(key.isdecimal() and hasattr(item, "shape") for key, item in group.items())


def read_arrays(group: Any, keys: Iterable[str], names: Iterable[str] = ()) -> Arrays:
    """Read datasets of a group.

    Raises ValueError for a dataset whose numbers lie in another file: that file is neither read nor written.
    """
    values: list[HostArray] = []
    stored: list[Stored | None] = []
    for key in keys:
        dataset = group[key]
        if dataset.file != group.file or dataset.external or dataset.is_virtual:
            raise ValueError(f"the numbers of {key} lie in another file")
        brain = _is_brain(dataset)
        array = np.asarray(dataset)
        values.append(from_bfloat16_bits(array.view("<u2")) if brain else array)
        dtype = "bfloat16" if brain else dataset.dtype.name
        stored.append(Stored(dataset.name, dtype) if brain or dtype in STORED_DTYPES else None)
    return Arrays(values, list(names), stored)


def replace_entries(file: Any, kernels: Mapping[str, HostArray], path: Path) -> None:
    """Replace the entries of datasets. Their dtype, form, chunks, filters and attributes stay.

    Parameters
    ----------
    file : h5py.File
        Open for writing.
    kernels : mapping from str to array
        New entries by the name of the dataset, whose number they have in the same order.
    path : Path
        The file, for messages.
    """
    for name, kernel in kernels.items():
        dataset = file[name]
        if dataset.size != kernel.size:
            raise ModelError(f"{path}: {name} has {dataset.size} entries, and {kernel.size} were to be written")
        entries = to_bfloat16_bits(kernel).view("V2") if _is_brain(dataset) else kernel.astype(dataset.dtype)
        dataset[...] = entries.reshape(dataset.shape)


def holds_arrays_of_rank(file: Any, layer: Configured, archive: bool, ranks: Iterable[int]) -> bool:
    """Return whether the file holds arrays of one of these ranks for a layer, whatever its class."""
    weights = file.get("model_weights", file)
    place = "/".join(layer.keys) if archive else layer.name.partition("/")[0]
    group = weights.get(place) if place else weights
    found: list[int] = []
    if group is not None:
        group.visititems(lambda name, item: found.append(getattr(item, "ndim", 0)))
    return any(rank in ranks for rank in found)


def _is_brain(dataset: Any) -> bool:
    """Return whether a dataset holds numbers of bfloat16, which HDF5 lacks: Keras keeps their bytes and says so."""
    return dataset.dtype.kind == "V" and dataset.dtype.itemsize == 2 and dataset.attrs.get("dtype") == "bfloat16"


def _in_archive(file: Any, layer: Configured) -> Arrays | str:
    group = file.get("/".join((*layer.keys, "vars")))
    if group is None:
        return "the file holds no arrays for it where Keras keeps them"
    known = group.attrs.get("name")
    if known is not None and str(known) != layer.config.get("name"):
        return f"where Keras keeps its arrays, the file holds those of {known}"
    return read_arrays(group, sorted(group, key=int))


def _in_groups(file: Any, layer: Configured) -> Arrays | str:
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
    return read_arrays(group, mine, last)
