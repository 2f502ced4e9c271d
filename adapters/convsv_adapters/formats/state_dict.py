"""Reader and writer of PyTorch checkpoints that hold a state dict. Pickled code is never run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convsv_adapters.formats.errors import damaged, load_library
from convsv_adapters.formats.files import first_bytes, zip_members
from convsv_adapters.formats.parts import Shard, form_of, needs_numbers
from convsv_adapters.formats.tree import Tree, find_networks
from convsv_adapters.parameters import (
    HostArray,
    NetworkArrays,
    kernel_ranks,
    layers_from_networks,
    may_be_kernel,
    not_floating,
)
from convsv_core.layers import LayerList, LeftOut, ModelError, ReadOptions, Stored
from convsv_core.plugins import hookimpl

__all__ = ["convsv_read_model", "convsv_write_model", "read_shard"]

SUFFIXES = {".pt", ".pth", ".ckpt"}

NUMPY_DTYPES = ("float16", "float32", "float64", "complex64", "complex128")
STORED_DTYPES = (*NUMPY_DTYPES, "bfloat16")


class _Checkpoint(NamedTuple):
    """A loaded checkpoint.

    Attributes
    ----------
    torch : module
    content : object
        Everything that the file holds.
    tree : Tree
        The state dicts in `content`.
    """

    torch: Any
    content: Any
    tree: Tree

    def keyed(self) -> dict[str, Any]:
        """Return the tensors of every network by their keys in `Stored`."""
        return {
            _key(path, name): tensor for path, tensors in self.tree.networks.items() for name, tensor in tensors.items()
        }


@hookimpl
def convsv_read_model(path: Path, options: ReadOptions) -> LayerList | None:
    """Read the kernels of every network in a PyTorch checkpoint, in the order of its state dicts."""
    loaded = _load(path)
    if loaded is None:
        return None
    stored = _stored(loaded)
    networks, left_out = loaded.tree.networks, list(loaded.tree.left_out)
    ranks = kernel_ranks(options)
    with_kernels = [name for name, tensors in networks.items() if any(t.ndim in ranks for t in tensors.values())]
    chosen = options.network
    if chosen is not None:
        if chosen not in networks:
            known = ", ".join(filter(None, with_kernels)) or "none with a name"
            raise ModelError(f"{path}: no network is called {chosen!r}; its networks are {known}")
        left_out += [LeftOut(name, "another network") for name in with_kernels if name != chosen]
        with_kernels = [chosen]
    several = len(with_kernels) > 1
    found = [
        NetworkArrays(
            name if several else "",
            _arrays(networks[name], loaded.torch, ranks),
            {key: stored[full] for key in networks[name] if (full := _key(name, key)) in stored},
        )
        for name in with_kernels
    ]
    layers = layers_from_networks(found, options, path)
    return LayerList(layers, networks=with_kernels, left_out=[*left_out, *layers.left_out])


def read_shard(path: Path, ranks: Collection[int]) -> Shard:
    """Return the arrays of a file that holds a part of one state dict, whose weights have so many axes."""
    loaded = _load(path)
    if loaded is None:
        raise ModelError(f"{path}: not a PyTorch checkpoint")
    if len(loaded.tree.networks) > 1:
        raise ModelError(f"{path}: holds several networks ({', '.join(loaded.tree.networks)}), and not a part of one")
    (prefix, tensors), *_ = [*loaded.tree.networks.items(), ("", {})]
    stored = _stored(loaded)
    return Shard(
        _arrays(tensors, loaded.torch, ranks),
        {name: stored[key] for name in tensors if (key := _key(prefix, name)) in stored},
        tuple(tensors),
    )


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
        tensors = loaded.keyed()
        for name, kernel in kernels.items():
            tensors[name].copy_(loaded.torch.from_numpy(kernel).reshape(tensors[name].shape))
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
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numbers()):
            warnings.simplefilter("ignore")  # PyTorch warns about the storage classes of old files
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # only the text of the error has the name of the class
        what = f"holds {found[1]}" if found else "is no checkpoint, or holds more than tensors"
        raise ModelError(f"{path}: {what}: objects and code are never loaded; save a state_dict()") from None
    except Exception as error:  # damaged bytes can make an unpickler fail with any exception, such as IndexError
        raise damaged(path, "a PyTorch checkpoint", error) from None
    tree = find_networks(content, lambda value: isinstance(value, torch.Tensor), _memory)
    if not tree.networks and not tree.left_out:
        raise ModelError(f"{path}: holds no state dict")
    return _Checkpoint(torch, content, tree)


def _numbers() -> list[Any]:
    """Return what the pickle of a NumPy number calls: checkpoints keep metrics so. None of it runs code of the file."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64")}
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def _key(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _memory(tensor: Any) -> object:
    """Return what two tensors that are the same numbers in memory have in common."""
    if tensor.is_meta or tensor.layout != tensor.new_empty(0).layout or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), _dtype_name(tensor)


def _stored(loaded: _Checkpoint) -> dict[str, Stored]:
    """Return where each tensor is stored that a kernel can be copied into.

    Tensors that share their memory are stored under the name of the first of them.
    """
    first: dict[Any, str] = {}
    stored = {}
    for name, tensor in loaded.keyed().items():
        dtype = _dtype_name(tensor)
        if tensor.layout == loaded.torch.strided and dtype in STORED_DTYPES and not tensor.is_meta:
            stored[name] = Stored(first.setdefault(_memory(tensor), name), dtype)
    return stored


def _holds_a_pickle(path: Path, members: list[str]) -> bool:
    if members:
        return any(name.endswith("/data.pkl") for name in members)
    head = first_bytes(path, 2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= pickle.HIGHEST_PROTOCOL


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _arrays(tensors: Mapping[str, Any], torch: Any, ranks: Collection[int]) -> dict[str, HostArray | str]:
    """Return the numbers of tensors by name, or the reasons why they cannot be read: see `_array`."""
    arrays = {name: _array(name, tensor, torch, ranks) for name, tensor in tensors.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def _array(name: str, tensor: Any, torch: Any, ranks: Collection[int]) -> HostArray | str | None:
    """Return a tensor's numbers, the reason why they cannot be read, or None for such a tensor that is no kernel.

    A dtype that NumPy lacks comes as float32 or complex64, which hold it exactly.
    """
    is_number = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    reason = ""
    if tensor.is_quantized:
        reason = f"quantised to {_dtype_name(tensor)}: numbers of this type are not read"
    elif tensor.is_meta:
        reason = "on the meta device: the file holds its shape and no numbers"
    elif not is_number:
        reason = not_floating(name, _dtype_name(tensor))
    if reason:
        return reason if tensor.ndim in ranks and tensor.numel() and may_be_kernel(name) else None
    if not is_number:
        return tensor.numpy() if name.endswith("mask") and not tensor.is_meta else None
    if not needs_numbers(name, tensor.ndim, ranks):
        dtype = _dtype_name(tensor)
        return form_of(tuple(tensor.shape), dtype if dtype in NUMPY_DTYPES else np.float32)
    tensor = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    if tensor.dtype != torch.bool and _dtype_name(tensor) not in NUMPY_DTYPES:
        tensor = tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)
    return tensor.numpy()
