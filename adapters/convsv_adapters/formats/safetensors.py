"""Reader and writer of safetensors files."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from convsv_adapters.formats.bfloat16 import from_bfloat16_bits, to_bfloat16_bits
from convsv_adapters.formats.errors import damaged, load_library
from convsv_adapters.formats.files import first_bytes
from convsv_adapters.formats.parts import HostArray, Named, Shard, form_of, needs_numbers
from convsv_adapters.parameters import kernel_ranks, layers_from_arrays, may_be_kernel, not_floating
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
    part = read_shard(path, kernel_ranks(options))
    return layers_from_arrays(part.arrays.items(), options, path, ordered=False, stored=part.stored)


def read_shard(path: Path, ranks: Collection[int]) -> Shard:
    """Return the arrays of a file that holds a network or a part of one, whose weights have so many axes.

    One array after the other is read, and only those whose numbers matter.
    """
    _check(path)
    arrays: Named = {}
    stored: dict[str, Stored] = {}
    with path.open("rb") as file:
        begin, tensors = _header(file)
        for name, tensor in tensors.items():
            array = _array(name, tensor, ranks, functools.partial(_entries, file, begin, tensor))
            if array is not None:
                arrays[name] = array
            if tensor["dtype"] in NUMBERS:
                stored[name] = Stored(name, NUMBERS[tensor["dtype"]].name)
    return Shard(arrays, stored, tuple(tensors))


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write a copy of a safetensors file in which the bytes of `kernels` are replaced."""
    if not _is_safetensors(path):
        return None
    shutil.copyfile(path, target)
    with target.open("r+b") as file:
        begin, tensors = _header(file)
        for name, kernel in kernels.items():
            numbers, (first, last) = NUMBERS[tensors[name]["dtype"]], tensors[name]["data_offsets"]
            entries = to_bfloat16_bits(kernel) if numbers.name == "bfloat16" else kernel.astype(numbers.entries)
            if entries.nbytes != last - first:
                raise ModelError(f"{path}: {name} takes {last - first} bytes, and {entries.nbytes} were to be written")
            file.seek(begin + first)
            file.write(entries.tobytes())
    return True


def _is_safetensors(path: Path) -> bool:
    """Return whether the suffix says so, or the file begins with the length of a header in JSON that fits."""
    if path.suffix.lower() == ".safetensors":
        return True
    head = first_bytes(path, LENGTH_BYTES + 1)
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return head[LENGTH_BYTES:] == b"{" and LENGTH_BYTES + length <= path.stat().st_size


def _check(path: Path) -> None:
    """Raise `ModelError` unless the file is a whole one with a header that fits it."""
    safetensors = load_library("safetensors", path, "cli")
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise damaged(path, "a safetensors file", error) from None


def _header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Return where the numbers begin in a file, and what its header says of each tensor."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    tensors = json.loads(file.read(length))
    return LENGTH_BYTES + length, {name: tensor for name, tensor in tensors.items() if name != "__metadata__"}


def _entries(file: BinaryIO, begin: int, tensor: Mapping[str, Any], dtype: Any) -> HostArray:
    """Read the entries of a tensor as numbers of a dtype."""
    first, last = tensor["data_offsets"]
    file.seek(begin + first)
    return np.frombuffer(file.read(last - first), dtype).reshape(tensor["shape"])


def _array(
    name: str, tensor: Mapping[str, Any], ranks: Collection[int], entries: Callable[[Any], HostArray]
) -> HostArray | str | None:
    """Return the array of a tensor, the reason why it cannot be read, or None if it could not be a kernel."""
    dtype, shape = tensor["dtype"], tuple(tensor["shape"])
    could_be_kernel = len(shape) in ranks and math.prod(shape) > 0
    if dtype == "BOOL" or (dtype in ("I8", "U8") and name.endswith("mask")):
        return entries(np.uint8)
    if dtype in NOT_FLOATING:
        reason = not_floating(name, {"I8": "int8", "U8": "uint8"}.get(dtype, dtype))
        return reason if reason and could_be_kernel else None
    if dtype not in NUMBERS:
        return f"numbers of type {dtype} are not read" if could_be_kernel and may_be_kernel(name) else None
    is_brain = NUMBERS[dtype].name == "bfloat16"
    if not needs_numbers(name, len(shape), ranks):
        return form_of(shape, np.float32 if is_brain else NUMBERS[dtype].entries)
    numbers = entries(NUMBERS[dtype].entries)
    return from_bfloat16_bits(numbers) if is_brain else numbers
