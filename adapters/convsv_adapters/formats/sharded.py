"""Reader and writer of models in several files, which an index in JSON lists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from convsv_adapters.formats import safetensors, state_dict
from convsv_adapters.formats.errors import damaged
from convsv_adapters.formats.files import first_bytes
from convsv_adapters.formats.parts import HostArray, Named
from convsv_adapters.parameters import kernel_ranks, layers_from_arrays
from convsv_core.layers import LayerList, LeftOut, ModelError, ReadOptions, Stored
from convsv_core.plugins import hookimpl

__all__ = ["convsv_model_files", "convsv_read_model", "convsv_write_model"]

NOT_THERE = "the index names it in {}, which does not hold it"


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> LayerList | None:
    """Read the kernels of a model whose index is `path`, sorted by name, as one network.

    One file after the other is read, and only the arrays whose numbers matter stay in memory.
    """
    if not _is_index(path):
        return None
    shard_of = _shard_of(path)
    arrays: Named = {}
    stored: dict[str, Stored] = {}
    holder: dict[str, str] = {}
    for shard in dict.fromkeys(shard_of.values()):
        if not (path.parent / shard).is_file():
            raise ModelError(f"{path}: the file {shard} of its index is missing")
        part = _format_of(shard).read_shard(path.parent / shard, kernel_ranks(options))
        if twice := [name for name in part.names if name in holder]:
            raise ModelError(f"{path}: {twice[0]} is in two of its files, {holder[twice[0]]} and {shard}")
        holder |= dict.fromkeys(part.names, shard)
        arrays |= part.arrays
        stored |= {name: replace(place, key=f"{shard}/{place.key}") for name, place in part.stored.items()}
    layers = layers_from_arrays(arrays.items(), options, path, ordered=False, stored=stored)
    lost = [LeftOut(name, NOT_THERE.format(shard)) for name, shard in shard_of.items() if holder.get(name) != shard]
    return LayerList(layers, networks=layers.networks, left_out=[*layers.left_out, *lost])


@hookimpl
def convsv_model_files(path: Path) -> list[Path] | None:
    """Return the index and the files that it lists."""
    if not _is_index(path):
        return None
    return [path, *(path.parent / shard for shard in dict.fromkeys(_shard_of(path).values()))]


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write an index, and beside it the files that it lists, with other kernels.

    One file after the other is written. A file without a kernel that changes is copied.
    """
    if not _is_index(path):
        return None
    by_shard: dict[str, dict[str, HostArray]] = {shard: {} for shard in _shard_of(path).values()}
    for key, kernel in kernels.items():
        shard, _, name = key.partition("/")
        by_shard[shard][name] = kernel
    for shard, changed in by_shard.items():
        old, new = path.parent / shard, target.parent / shard
        if changed:
            _format_of(shard).convsv_write_model(old, changed, new)
        else:
            shutil.copyfile(old, new)
    shutil.copyfile(path, target)
    return True


def _is_index(path: Path) -> bool:
    return path.suffix.lower() == ".json" and first_bytes(path, 1) == b"{"


def _format_of(shard: str) -> Any:
    """Return the module that reads and writes a file of the index."""
    return safetensors if Path(shard).suffix.lower() == ".safetensors" else state_dict


def _shard_of(path: Path) -> dict[str, str]:
    """Return the file that the index names for each array."""
    try:
        shard_of = json.loads(path.read_text())["weight_map"]
        found = {str(name): str(shard) for name, shard in shard_of.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, "an index of the files of a model", error) from None
    if lost := [shard for shard in found.values() if Path(shard).name != shard or shard == path.name]:
        raise ModelError(f"{path}: its index names {lost[0]!r}, which is no file beside it")
    return found
