"""Reader and writer of safetensors files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convsv_adapters.formats.bfloat16 import from_bfloat16_bits, to_bfloat16_bits
from convsv_adapters.formats.errors import damaged, load_library
from convsv_adapters.formats.files import first_bytes
from convsv_adapters.parameters import HostArray, kernel_ranks, layers_from_arrays, may_be_kernel, not_floating
from convsv_core.layers import Layer, ModelError, ReadOptions, Stored
from convsv_core.plugins import hookimpl

__all__ = ["convsv_read_model", "convsv_write_model", "read_shard"]


class _Numbers(NamedTuple):
    """A dtype of the format that is read and written: its name in `Stored`, and the NumPy dtype of its bytes."""

    name: str
    entries: str


NUMBERS = {  # by the name that the format gives to the dtype
    "F64": _Numbers("float64", "<f8"),
    "F32": _Numbers("float32", "<f4"),
    "F16": _Numbers("float16", "<f2"),
    "BF16": _Numbers("bfloat16", "<u2"),
    "C64": _Numbers("complex64", "<c8"),
}
NOT_FLOATING = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}

LENGTH_BYTES = 8
"""The format begins with an integer of this many bytes: the length of the JSON header, which comes next."""


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the kernels of a safetensors file, sorted by name: the format keeps no order."""
    if not _is_safetensors(path):
        return None
    tensors = _tensors(path)
    ranks = kernel_ranks(options)
    arrays = [(name, array) for name, tensor in tensors if (array := _array(name, tensor, ranks)) is not None]
    dtypes = {name: tensor["dtype"] for name, tensor in tensors}
    stored = {name: Stored(name, NUMBERS[dtype].name) for name, dtype in dtypes.items() if dtype in NUMBERS}
    return layers_from_arrays(arrays, options, path, ordered=False, stored=stored)


def read_shard(path: Path, ranks: Collection[int]) -> dict[str, HostArray | str]:
    """Return the arrays of a file that holds a part of one network, whose weights have so many axes."""
    return {name: array for name, tensor in _tensors(path) if (array := _array(name, tensor, ranks)) is not None}


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write a copy of a safetensors file in which the bytes of `kernels` are replaced."""
    if not _is_safetensors(path):
        return None
    shutil.copyfile(path, target)
    with target.open("r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        for name, kernel in kernels.items():
            numbers, (begin, end) = NUMBERS[header[name]["dtype"]], header[name]["data_offsets"]
            entries = to_bfloat16_bits(kernel) if numbers.name == "bfloat16" else kernel.astype(numbers.entries)
            if entries.nbytes != end - begin:
                raise ModelError(f"{path}: {name} takes {end - begin} bytes, and {entries.nbytes} were to be written")
            file.seek(LENGTH_BYTES + length + begin)
            file.write(entries.tobytes())
    return True


def _is_safetensors(path: Path) -> bool:
    """Return whether the suffix says so, or the file begins with the length of a header in JSON that fits."""
    if path.suffix.lower() == ".safetensors":
        return True
    head = first_bytes(path, LENGTH_BYTES + 1)
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return head[LENGTH_BYTES:] == b"{" and LENGTH_BYTES + length <= path.stat().st_size


def _tensors(path: Path) -> list[tuple[str, dict[str, Any]]]:
    safetensors = load_library("safetensors", path, "cli")
    try:
        return list(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError as error:
        raise damaged(path, "a safetensors file", error) from None


def _array(name: str, tensor: dict[str, Any], ranks: Collection[int]) -> HostArray | str | None:
    """Return the array of a tensor, the reason why it cannot be read, or None if it could not be a kernel."""
    dtype, shape = tensor["dtype"], tuple(tensor["shape"])
    could_be_kernel = len(shape) in ranks and math.prod(shape) > 0
    if dtype == "BOOL" or (dtype in ("I8", "U8") and name.endswith("mask")):
        return np.frombuffer(tensor["data"], np.uint8).reshape(shape)
    if dtype in NOT_FLOATING:
        reason = not_floating(name, {"I8": "int8", "U8": "uint8"}.get(dtype, dtype))
        return reason if reason and could_be_kernel else None
    if dtype not in NUMBERS:
        return f"numbers of type {dtype} are not read" if could_be_kernel and may_be_kernel(name) else None
    numbers = NUMBERS[dtype]
    entries = np.frombuffer(tensor["data"], numbers.entries).reshape(shape)
    return from_bfloat16_bits(entries) if numbers.name == "bfloat16" else entries
