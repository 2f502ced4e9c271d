"""Reader and writer of safetensors files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convsv_adapters.parameters import LAYOUTS, HostArray, bfloat16_bits, layers_from_arrays, missing, one_line
from convsv_core.layers import Layer, ModelError, ReadOptions, Stored
from convsv_core.plugins import hookimpl

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8"}
WRITTEN = {*DTYPES, "BF16"}
NOT_FLOATING = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the kernels of a safetensors file, sorted by name: the format keeps no order."""
    if not _is_safetensors(path):
        return None
    try:
        import safetensors
    except ModuleNotFoundError as error:
        raise missing(path, error, "cli") from None
    try:
        tensors = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path}: not a safetensors file, or a damaged one: {one_line(error)}") from None
    arrays = [(name, _array(stored)) for name, stored in tensors if stored["dtype"] not in NOT_FLOATING]
    kernels = [(name, array) for name, array in arrays if array is not None]
    stored = {name: Stored(name, _dtype_name(kept["dtype"])) for name, kept in tensors if kept["dtype"] in WRITTEN}
    return layers_from_arrays(kernels, options, path, ordered=False, stored=stored)


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write a safetensors file with other kernels: a copy, with their bytes replaced."""
    if not _is_safetensors(path):
        return None
    shutil.copyfile(path, target)
    with target.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, kernel in kernels.items():
            dtype, (begin, end) = header[name]["dtype"], header[name]["data_offsets"]
            entries = bfloat16_bits(kernel) if dtype == "BF16" else kernel.astype(DTYPES[dtype])
            if entries.nbytes != end - begin:
                raise ModelError(f"{path}: {name} takes {end - begin} bytes, and {entries.nbytes} were to be written")
            file.seek(8 + length + begin)
            file.write(entries.tobytes())
    return True


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors" or _looks_like_safetensors(path)


def _looks_like_safetensors(path: Path) -> bool:
    """Whether the file begins with the length of a header that fits, and the header is JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return head[8:] == b"{" and 8 + length <= path.stat().st_size


def _dtype_name(dtype: str) -> str:
    return "bfloat16" if dtype == "BF16" else np.dtype(DTYPES[dtype]).name


def _array(stored: dict[str, Any]) -> HostArray | str | None:
    """Make an array, or say why a tensor of a kernel's rank cannot be one."""
    dtype, shape = stored["dtype"], tuple(stored["shape"])
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(stored["data"], "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    if dtype in DTYPES:
        return np.frombuffer(stored["data"], DTYPES[dtype]).reshape(shape)
    is_candidate = len(shape) in LAYOUTS and math.prod(shape) > 0
    return f"numbers of type {dtype} are not read" if is_candidate else None
