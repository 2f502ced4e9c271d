"""Reader and writer of PyTorch checkpoints that hold a state dict. Pickled code is never run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convsv_adapters.parameters import HostArray, layers_from_arrays, missing, one_line, zip_members
from convsv_core.layers import Layer, ModelError, ReadOptions, Stored
from convsv_core.plugins import hookimpl

SUFFIXES = {".pt", ".pth", ".ckpt"}
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "params")
STORED_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the kernels of a PyTorch checkpoint, in the order of its state dict."""
    loaded = _load(path)
    if loaded is None:
        return None
    torch, _, tensors = loaded
    arrays = [(name, _array(tensor, torch)) for name, tensor in tensors.items() if _is_number(tensor)]
    return layers_from_arrays(arrays, options, path, stored=_stored(tensors, torch))


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write a PyTorch checkpoint with other kernels.

    They are copied into the tensors loaded, so these stay what they are: parameters, and views of storages that
    they share. The checkpoint is saved from the CPU's memory, in the archive or the older format, as it was.
    """
    loaded = _load(path)
    if loaded is None:
        return None
    torch, checkpoint, tensors = loaded
    with torch.no_grad():
        for name, kernel in kernels.items():
            tensors[name].copy_(torch.from_numpy(kernel))
    with target.open("wb") as file:
        torch.save(checkpoint, file, _use_new_zipfile_serialization=zipfile.is_zipfile(path))
    return True


def _load(path: Path) -> tuple[Any, Any, dict[str, Any]] | None:
    """PyTorch, what a checkpoint holds, and the tensors in it by name; None if the format is another."""
    members = zip_members(path)
    if path.suffix.lower() not in SUFFIXES and not _holds_a_pickle(path, members):
        return None
    if any(name.endswith("/constants.pkl") for name in members):
        raise ModelError(f"{path}: a TorchScript archive, which holds code: save its state_dict() instead")
    try:
        import torch
    except ModuleNotFoundError as error:
        raise missing(path, error, "torch") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the storage classes of old files
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {found[1]}" if found else "is no checkpoint, or holds more than tensors"
        raise ModelError(f"{path}: {what}: objects and code are never loaded; save a state_dict()") from None
    except Exception as error:  # damaged bytes make an unpickler fail in any way, with IndexError for one
        raise ModelError(f"{path}: not a PyTorch checkpoint, or a damaged one: {one_line(error)}") from None
    tensors = _state_dict(checkpoint, torch.Tensor)
    if not tensors:
        raise ModelError(f"{path}: holds no state dict")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return torch, checkpoint, tensors


def _stored(tensors: Mapping[str, Any], torch: Any) -> dict[str, Stored]:
    """Where the tensors are that a kernel can be copied into: tied ones under the name of the first."""
    first: dict[Any, str] = {}
    stored = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout == torch.strided and dtype in STORED_DTYPES:
            memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype)
            stored[name] = Stored(first.setdefault(memory, name), dtype)
    return stored


def _holds_a_pickle(path: Path, members: list[str]) -> bool:
    if members:
        return any(name.endswith("/data.pkl") for name in members)
    with path.open("rb") as file:
        head = file.read(2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= pickle.HIGHEST_PROTOCOL


def _state_dict(checkpoint: object, tensor: type) -> dict[str, Any]:
    """Find the mapping of names to tensors in a checkpoint, which may hold optimisers and epochs too."""
    if not isinstance(checkpoint, Mapping):
        return {}
    direct = {str(name): value for name, value in checkpoint.items() if isinstance(value, tensor)}
    if direct:
        return direct
    known = [checkpoint[name] for name in CONTAINERS if name in checkpoint]
    for inner in (*known, *checkpoint.values()):
        if found := _state_dict(inner, tensor):
            return found
    return {}


def _is_number(tensor: Any) -> bool:
    return bool(tensor.is_floating_point() or tensor.is_complex())


def _array(tensor: Any, torch: Any) -> Any:
    tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    if tensor.dtype not in (torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128):
        tensor = tensor.float()  # bfloat16 and smaller: float32 holds them exactly
    return tensor.numpy()
