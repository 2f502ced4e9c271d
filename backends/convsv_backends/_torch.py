"""PyTorch, on the CPU and on CUDA devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from convsv_backends._threads import SharedLimit, UserLimit, map_in_threads, worth_threads
from convsv_core.backend import Array, Backend, BlockFunction
from convsv_core.plugins import hookimpl

SMALL_BYTES = 1 << 26
"""Work of fewer bytes than this is left to PyTorch's own threads, which products of small matrices use well."""


class TorchBackend(Backend):
    """PyTorch tensors, parameters among them."""

    name = "torch"
    module = "torch"

    def owns_array(self, array: object) -> bool:
        """Whether `array` is a tensor."""
        return bool(array_api_compat.is_torch_array(array))

    def library(self) -> ModuleType:
        """PyTorch through array-api-compat."""
        import array_api_compat.torch as xp

        return xp

    def devices(self) -> tuple[str, ...]:
        """The CPU, and each CUDA device that PyTorch sees."""
        import torch

        return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Copy a NumPy array into a tensor."""
        import torch

        tensor = torch.tensor(np.asarray(array), device=device)
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Copy a tensor, without its gradient, to the host."""
        import torch

        host = array.detach().cpu().resolve_conj().resolve_neg()
        return np.asarray((host.float() if host.dtype == torch.bfloat16 else host).numpy()).copy()

    def contiguous(self, array: Array) -> Array:
        """In C order."""
        return array.contiguous()

    def has_values(self, array: Array) -> bool:
        """Not while `torch.compile` traces, for tensors that `torch.func` transforms, or on the meta device."""
        import torch

        return not torch.compiler.is_compiling() and array.device.type != "meta" and _has_memory(array)

    def truth(self, condition: Array) -> bool | None:
        """None while `torch.compile` traces or `torch.func.vmap` maps."""
        import torch

        if torch.compiler.is_compiling():
            return None
        try:
            return bool(condition)
        except RuntimeError:  # what vmap raises for a value that differs over the mapped axis
            return None

    def stop_gradient(self, array: Array) -> Array:
        """Detached."""
        return array.detach()

    def has_fast_float64(self, array: Array) -> bool:
        """On the CPU, as for NumPy; on most CUDA devices it is many times slower."""
        return bool(array.device.type == "cpu")

    def conj(self, array: Array) -> Array:
        """Without `torch.conj`, whose lazy result `torch.func.vmap` resolves one matrix at a time."""
        import torch

        if not array.is_complex():
            return array
        return array.conj() if _has_memory(array) else torch.complex(array.real, -array.imag)

    def complex(self, real: Array, imaginary: Array) -> Array:
        """By `torch.complex`."""
        import torch

        return torch.complex(real, imaginary)

    def is_positive_definite(self, array: Array) -> Array:
        """By Cholesky's factorisation."""
        import torch

        return torch.linalg.cholesky_ex(array).info == 0

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """On the CPU, map blocks over threads, as for NumPy; one thread where the result is differentiated.

        Threads have autograd's modes and `torch.func`'s transformations of their own, so a call that is
        recorded or transformed stays in the caller's.
        """
        import torch

        def detached(block: Array) -> Array | tuple[Array, ...]:
            with torch.no_grad():
                return function(self.asarray_like(block, like))

        if worth_threads(rows, row_bytes, SMALL_BYTES) and _is_plain(like):
            with _torch_limit as threads:
                if threads > 1:
                    return self.concatenate(
                        map_in_threads(
                            detached,
                            rows,
                            threads,
                            row_bytes=row_bytes,
                            budget=budget,
                            initializer=_one_thread,
                        )
                    )
        return super().map_blocks(function, rows, like, row_bytes=row_bytes, budget=budget)

    def single_threaded(self) -> AbstractContextManager[object]:
        """One thread of PyTorch's, which `map_blocks` takes for the user's limit."""
        return _torch_alone

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """None: eager execution is what PyTorch's users trace; `torch.compile` needs a C++ compiler."""
        return None

    def grad(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """By autograd."""

        def gradient(array: Array) -> Array:
            import torch

            leaf = array.detach().clone().requires_grad_(True)
            (result,) = torch.autograd.grad(function(leaf), leaf)
            return result

        return gradient

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """By `torch.func.vmap`."""
        import torch

        return torch.func.vmap(function)


def _is_plain(array: Array) -> bool:
    """Whether `array` lies in host memory, and nothing records or transforms what is done with it."""
    import torch

    if array.device.type != "cpu" or (array.requires_grad and torch.is_grad_enabled()):
        return False
    if torch.compiler.is_compiling():
        return False
    return _has_memory(array)


def _has_memory(array: Array) -> bool:
    """Whether `array` is a tensor itself; the wrappers of `torch.func` have no memory of their own."""
    try:
        array.data_ptr()
    except RuntimeError:
        return False
    return True


def _limit_torch() -> UserLimit:
    # Each thread of ours sets its own number to 1, which is also what threads started later would inherit.
    import torch

    threads = torch.get_num_threads()
    return UserLimit(threads, functools.partial(torch.set_num_threads, threads))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _limit_to_one() -> UserLimit:
    found = _limit_torch()
    _one_thread()
    return found


_torch_limit = SharedLimit(_limit_torch)
_torch_alone = SharedLimit(_limit_to_one)


@hookimpl
def convsv_backend() -> Backend:
    """Hand PyTorch over."""
    return TorchBackend()
