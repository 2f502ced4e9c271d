"""Reader of models in several files, which an index in JSON lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from convsv_adapters.formats import safetensors, state_dict
from convsv_adapters.formats.errors import damaged
from convsv_adapters.formats.files import first_bytes
from convsv_adapters.parameters import HostArray, kernel_ranks, layers_from_arrays
from convsv_core.layers import Layer, ModelError, ReadOptions
from convsv_core.plugins import hookimpl

__all__ = ["convsv_read_model", "convsv_write_model"]

IN_SEVERAL_FILES = "its weights are in other files, which are not written: project the files of its index one by one"


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the kernels of a model whose index is `path`, sorted by name, as one network."""
    if not _is_index(path):
        return None
    arrays: dict[str, HostArray | str] = {}
    for name in dict.fromkeys(_shards(path)):
        shard = path.parent / name
        if not shard.is_file():
            raise ModelError(f"{path}: the file {name} of its index is missing")
        reader = safetensors if shard.suffix.lower() == ".safetensors" else state_dict
        arrays |= reader.read_shard(shard, kernel_ranks(options))
    return layers_from_arrays(arrays.items(), options, path, ordered=False)


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Refuse to write a model in several files."""
    if not _is_index(path):
        return None
    raise ModelError(f"{path}: {IN_SEVERAL_FILES}")


def _is_index(path: Path) -> bool:
    return path.suffix.lower() == ".json" and first_bytes(path, 1) == b"{"


def _shards(path: Path) -> list[str]:
    """Return the file that the index names for each array."""
    try:
        shards = json.loads(path.read_text())["weight_map"]
        names = [str(name) for name in shards.values()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, "an index of the files of a model", error) from None
    if lost := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{path}: its index names {lost[0]!r}, which is no file beside it")
    return names
