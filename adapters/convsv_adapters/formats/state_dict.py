"""Reader and writer of PyTorch checkpoints that hold a state dict. Pickled code is never run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from convsv_adapters.formats.errors import damaged, load_library
from convsv_adapters.formats.files import first_bytes, zip_members
from convsv_adapters.parameters import HostArray, layers_from_arrays
from convsv_core.layers import Layer, ModelError, ReadOptions, Stored
from convsv_core.plugins import hookimpl

__all__ = ["convsv_read_model", "convsv_write_model"]

SUFFIXES = {".pt", ".pth", ".ckpt"}

CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "params")
"""Keys under which checkpoints keep a state dict, the most usual first. The list is a guess."""

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that `DataParallel` and `torch.compile` put before every name."""

NUMPY_DTYPES = ("float16", "float32", "float64", "complex64", "complex128")
STORED_DTYPES = (*NUMPY_DTYPES, "bfloat16")


class _Checkpoint(NamedTuple):
    """A loaded checkpoint.

    Attributes
    ----------
    torch : module
    content : object
        Everything that the file holds.
    tensors : dict of str to torch.Tensor
        The state dict in `content`, without the prefixes of `WRAPPERS`.
    """

    torch: Any
    content: Any
    tensors: dict[str, Any]


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> list[Layer] | None:
    """Read the kernels of a PyTorch checkpoint, in the order of its state dict."""
    loaded = _load(path)
    if loaded is None:
        return None
    numbers = {name: t for name, t in loaded.tensors.items() if t.is_floating_point() or t.is_complex()}
    arrays = [(name, _array(tensor, loaded.torch)) for name, tensor in numbers.items()]
    return layers_from_arrays(arrays, options, path, stored=_stored(loaded))


@hookimpl
def convsv_write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> bool | None:
    """Write a PyTorch checkpoint with other kernels.

    The kernels are copied into the loaded tensors, so that parameters stay parameters and views of a shared storage
    stay views of it. All tensors are saved as CPU tensors. The file is an archive or of the older format, as
    `path` is.
    """
    loaded = _load(path)
    if loaded is None:
        return None
    with loaded.torch.no_grad():
        for name, kernel in kernels.items():
            loaded.tensors[name].copy_(loaded.torch.from_numpy(kernel))
    with target.open("wb") as file:
        loaded.torch.save(loaded.content, file, _use_new_zipfile_serialization=zipfile.is_zipfile(path))
    return True


def _load(path: Path) -> _Checkpoint | None:
    """Load a checkpoint onto the CPU, or return None if the file is of another format."""
    members = zip_members(path)
    if path.suffix.lower() not in SUFFIXES and not _holds_a_pickle(path, members):
        return None
    if any(name.endswith("/constants.pkl") for name in members):
        raise ModelError(f"{path}: a TorchScript archive, which holds code: save its state_dict() instead")
    torch = load_library("torch", path, "torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about the storage classes of old files
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # only the text of the error has the name of the class
        what = f"holds {found[1]}" if found else "is no checkpoint, or holds more than tensors"
        raise ModelError(f"{path}: {what}: objects and code are never loaded; save a state_dict()") from None
    except Exception as error:  # damaged bytes can make an unpickler fail with any exception, such as IndexError
        raise damaged(path, "a PyTorch checkpoint", error) from None
    tensors = _state_dict(content, torch.Tensor)
    if not tensors:
        raise ModelError(f"{path}: holds no state dict")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return _Checkpoint(torch, content, tensors)


def _stored(loaded: _Checkpoint) -> dict[str, Stored]:
    """Return where each tensor is stored that a kernel can be copied into.

    Tensors that share their memory are stored under the name of the first of them.
    """
    first: dict[Any, str] = {}
    stored = {}
    for name, tensor in loaded.tensors.items():
        dtype = _dtype_name(tensor)
        if tensor.layout == loaded.torch.strided and dtype in STORED_DTYPES:
            memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype)
            stored[name] = Stored(first.setdefault(memory, name), dtype)
    return stored


def _holds_a_pickle(path: Path, members: list[str]) -> bool:
    if members:
        return any(name.endswith("/data.pkl") for name in members)
    head = first_bytes(path, 2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= pickle.HIGHEST_PROTOCOL


def _state_dict(content: object, tensor_type: type) -> dict[str, Any]:
    """Return the mapping of names to tensors in a checkpoint, which may hold optimisers and epochs too."""
    if not isinstance(content, Mapping):
        return {}
    direct = {str(name): value for name, value in content.items() if isinstance(value, tensor_type)}
    if direct:
        return direct
    known = [content[name] for name in CONTAINERS if name in content]
    for inner in (*known, *content.values()):
        if found := _state_dict(inner, tensor_type):
            return found
    return {}


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _array(tensor: Any, torch: Any) -> HostArray:
    """Return a tensor's numbers; a dtype that NumPy lacks comes as float32 or complex64, which hold it exactly."""
    tensor = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    if _dtype_name(tensor) not in NUMPY_DTYPES:
        tensor = tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)
    return tensor.numpy()
