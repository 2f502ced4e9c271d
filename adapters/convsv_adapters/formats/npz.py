"""Reader and writer of NumPy's .npz archives of kernels."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from convsv_adapters.formats.errors import damaged
from convsv_adapters.formats.files import DAMAGED_ZIP, zip_members
from convsv_adapters.parameters import (
    HostArray,
    in_natural_order,
    kernel_ranks,
    layers_from_arrays,
    not_floating,
)
from convsv_core.layers import Layer, ModelError, ReadOptions, Stored
from convsv_core.plugins import hookimpl

__all__ = ["convsv_read_model", "convsv_write_model"]


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the kernels among the arrays of an .npz archive.

    They come in the archive's order. If that is the alphabetical order of their names, numbers in the names are sorted
    by value.
    """
    if not _is_npz(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ModelError(f"{path}: not an .npz archive")
            arrays = [(name, archive[name]) for name in archive.files]
    except DAMAGED_ZIP as error:
        if "allow_pickle" in str(error):  # NumPy refuses pickled objects by a ValueError that only its text tells apart
            reason = "is no archive, or holds pickled objects, which are never loaded"
            raise ModelError(f"{path}: {reason}") from None
        raise damaged(path, "an .npz archive", error) from None
    named = [(name, array) for name, array in arrays if isinstance(array, np.ndarray)]
    stored = {name: Stored(name, array.dtype.name) for name, array in named if array.dtype.itemsize <= 16}
    ranks = kernel_ranks(options)
    quantised = {name: not_floating(name, array.dtype.name) for name, array in named if array.ndim in ranks}
    readable: list[tuple[str, HostArray | str]] = [(name, quantised.get(name) or array) for name, array in named]
    ordered = in_natural_order(name for name, _ in named)
    return layers_from_arrays(readable, options, path, ordered=ordered, stored=stored)


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write an .npz archive with other kernels; members, their order and their compression stay the same."""
    if not _is_npz(path):
        return None
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as written:
        for member in archive.infolist():
            content = archive.read(member)
            name = member.filename.removesuffix(".npy")
            if name in kernels:
                content = _with_entries(content, kernels[name])
            written.writestr(member, content)
    return True


def _is_npz(path: Path) -> bool:
    members = zip_members(path)
    return path.suffix.lower() == ".npz" or bool(members and all(name.endswith(".npy") for name in members))


def _with_entries(content: bytes, kernel: HostArray) -> bytes:
    """Return an .npy file with the entries of `kernel`; header, byte order and order of axes stay the same."""
    file = io.BytesIO(content)
    stored = np.lib.format.read_array(file, allow_pickle=False)
    order: Literal["F", "C"] = "F" if stored.flags.f_contiguous and not stored.flags.c_contiguous else "C"
    entries = kernel.astype(stored.dtype).tobytes(order)
    begin = file.tell() - len(entries)
    return content[:begin] + entries + content[file.tell() :]
