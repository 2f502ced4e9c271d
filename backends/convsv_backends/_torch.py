"""The backend of PyTorch, for the CPU and CUDA devices."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from convsv_backends._threads import (
    SharedLimit,
    UserLimit,
    map_groups_in_threads,
    map_in_threads,
    worth_threads,
)
from convsv_core.backend import Array, ArraySpec, Backend, BlockFunction
from convsv_core.plugins import get_backend, hookimpl

__all__ = ["TorchBackend", "convsv_backend"]

SMALL_BYTES = 1 << 26
"""Smallest work, in bytes of working memory, for which blocks are given to threads.

Less work is left to PyTorch's own threads, which share products of small matrices well. Measured in training steps of
ResNet-32 on two cores; the measurement has no more detail.
"""


ALONE_ENTRIES = 1 << 18
"""Number of entries of a kernel below which NumPy computes for PyTorch in the caller's thread alone.

PyTorch's threads wait actively for a while after each operation, and other threads then wait for a processor. Measured
on two cores: the bound of a kernel of 64 channels took 8 ms with two threads and 4 ms with one. The value is a guess.
"""


class TorchBackend(Backend):
    """Describe PyTorch to the core. Parameters are tensors too."""

    name = "torch"
    module = "torch"

    def owns_array(self, array: object) -> bool:
        """Tell whether `array` is a tensor."""
        return bool(array_api_compat.is_torch_array(array))

    def library(self) -> ModuleType:
        """Return PyTorch's namespace from array-api-compat."""
        import array_api_compat.torch as xp

        return xp

    def devices(self) -> tuple[str, ...]:
        """Return "cpu" and the name of each CUDA device that PyTorch sees."""
        import torch

        return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Return a copy of a NumPy array as a tensor."""
        import torch

        tensor = torch.tensor(np.asarray(array), device=device)
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy of a tensor on the host, without its gradient."""
        import torch

        host = array.detach().cpu().resolve_conj().resolve_neg()
        return np.asarray((host.float() if host.dtype == torch.bfloat16 else host).numpy()).copy()

    def contiguous(self, array: Array) -> Array:
        """Return `array` in C order."""
        return array.contiguous()

    def has_values(self, array: Array) -> bool:
        """Tell whether the numbers of a tensor can be read now.

        They cannot be read while `torch.compile` traces, in a tensor that `torch.func` transforms, and on the meta
        device.
        """
        import torch

        return not torch.compiler.is_compiling() and array.device.type != "meta" and _has_memory(array)

    def truth(self, condition: Array) -> bool | None:
        """Return a 0-d tensor as a bool, or None while `torch.compile` traces or `torch.func.vmap` maps."""
        import torch

        if torch.compiler.is_compiling():
            return None
        try:
            return bool(condition)
        except RuntimeError:  # `vmap` raises it for a value that differs over the mapped axis.
            return None

    def stop_gradient(self, array: Array) -> Array:
        """Return `array` detached from the graph of gradients."""
        return array.detach()

    def has_fast_float64(self, array: Array) -> bool:
        """Tell whether `array` is on the CPU. On most CUDA devices float64 is many times slower than float32."""
        return bool(array.device.type == "cpu")

    def conj(self, array: Array) -> Array:
        """Return the complex conjugate.

        A tensor that `torch.func` transforms does not use `torch.conj`, because `torch.func.vmap` resolves its lazy
        result one matrix at a time.
        """
        import torch

        if not array.is_complex():
            return array
        return array.conj() if _has_memory(array) else torch.complex(array.real, -array.imag)

    def complex(self, real: Array, imaginary: Array) -> Array:
        """Return complex numbers from their parts by `torch.complex`."""
        import torch

        return torch.complex(real, imaginary)

    def is_positive_definite(self, array: Array) -> Array:
        """Tell whether each matrix is positive definite, by Cholesky factorisation."""
        import torch

        return torch.linalg.cholesky_ex(array).info == 0

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Map blocks over threads on the CPU, unless the call is differentiated or transformed.

        Each thread has its own modes of autograd and its own transformations of `torch.func`. So a call in another
        thread would not be recorded or transformed.
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

    def map_groups(
        self, function: Callable[[Any], list[Any]], groups: Sequence[Any], costs: Sequence[float], like: Array
    ) -> list[list[Any]]:
        """Share the groups out to threads on the CPU, unless the call is differentiated or transformed.

        A decomposition of many small matrices uses one thread of PyTorch. Each thread has one BLAS thread, and so
        all processors are used.
        """
        import torch

        def detached(group: Any) -> list[Any]:
            with torch.no_grad(), get_backend("numpy").single_threaded():
                return function(group)

        found = None
        if _is_plain(like):
            found = map_groups_in_threads(detached, groups, costs, _torch_limit, initializer=_one_thread)
        return super().map_groups(function, groups, costs, like) if found is None else found

    def prefers_host(self, arguments: Any, *, search: bool = False) -> bool:
        """Tell whether a search is among tensors on the CPU.

        NumPy takes two thirds of PyTorch's time for the norms of ResNet-32 in training. For Gaussian 3 x 3 kernels of
        16, 64 and 128 channels at 32, 16 and 14 pixels it takes 0.65 to 0.8 of the time of `project`, 0.5 to 0.75 of
        that of `nearest_orthogonal`, and 0.75 to 0.85 of that of `steepest_direction`.
        """
        import torch

        if not search:
            return False
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        return all(self._on_host(tensor) and tensor.dtype != torch.bfloat16 for tensor in tensors)  # NumPy has none.

    def run_on_host(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        """Call the function with NumPy arrays that share the memory of the tensors."""
        import torch

        def on_host(leaf: Any) -> Any:
            return leaf.detach().resolve_conj().numpy() if isinstance(leaf, torch.Tensor) else leaf

        def back(leaf: Any) -> Any:
            return torch.from_numpy(np.asarray(leaf)) if isinstance(leaf, np.ndarray | np.generic) else leaf

        given, named = torch.utils._pytree.tree_map(on_host, (arguments, options))
        return torch.utils._pytree.tree_map(back, function(*given, **named))

    def call_host(
        self,
        function: Callable[..., tuple[Any, ...]],
        arrays: tuple[Array, ...],
        results: tuple[ArraySpec, ...],
        otherwise: Callable[..., tuple[Array, ...]],
        *,
        gradient: Callable[..., tuple[Any, ...]] | None = None,
    ) -> tuple[Array, ...]:
        """Let NumPy compute a number with a derivative, for tensors on the CPU, in the same memory.

        A second derivative comes from `otherwise`. Tensors that `torch.func` transforms or `torch.compile` traces are
        left to `otherwise`.
        """
        import torch

        first = arrays[0]
        if gradient is None or not self._on_host(first):
            return otherwise(*arrays)
        host = [array.detach().resolve_conj().numpy() for array in arrays]
        differentiated = first.requires_grad and torch.is_grad_enabled()
        alone = get_backend("numpy").single_threaded() if first.numel() < ALONE_ENTRIES else contextlib.nullcontext()
        with alone:
            computed = (gradient if differentiated else function)(*host)
        found = [torch.from_numpy(np.asarray(one, order="C")) for one in computed]
        if not differentiated:
            return tuple(found)
        *found, slope = found
        number = _with_slope()(first, found[0], slope, lambda again: otherwise(again, *arrays[1:])[0])
        return number, *found[1:]

    def _on_host(self, array: Array) -> bool:
        """Tell whether NumPy can read a tensor in place: it is on the CPU, and no subclass wraps other tensors."""
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass

        wrapped = is_traceable_wrapper_subclass(array)
        return array.device.type == "cpu" and not wrapped and self.has_values(array)

    def single_threaded(self) -> AbstractContextManager[object]:
        """Return a context manager that limits PyTorch to one thread, a limit that `map_blocks` keeps to."""
        return _torch_alone

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return None: users of PyTorch run eagerly, and `torch.compile` needs a C++ compiler."""
        return None

    def grad(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return the gradient of `function` by autograd."""

        def gradient(array: Array) -> Array:
            import torch

            leaf = array.detach().clone().requires_grad_(True)
            (result,) = torch.autograd.grad(function(leaf), leaf)
            return result

        return gradient

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return `function` mapped by `torch.func.vmap`."""
        import torch

        return torch.func.vmap(function)


@functools.cache
def _with_slope() -> Callable[..., Array]:
    """Return a function whose value and derivative are known; its class needs PyTorch, which is imported late."""
    import torch

    class WithSlope(torch.autograd.Function):  # type: ignore[misc]
        """Return a number whose derivative is a known slope; see `Backend.call_host`."""

        @staticmethod
        def forward(context: Any, kernel: Array, number: Array, slope: Array, again: Callable[..., Array]) -> Array:
            """Return the number."""
            context.save_for_backward(kernel, slope)
            context.again = again
            return number

        @staticmethod
        def backward(context: Any, gradient: Array) -> tuple[Array, None, None, None]:
            """Return the slope times the gradient of the number."""
            kernel, slope = context.saved_tensors
            if torch.is_grad_enabled():  # A second derivative is wanted.
                (slope,) = torch.autograd.grad(context.again(kernel), kernel, create_graph=True)
                return gradient * slope, None, None, None
            return gradient * slope.conj(), None, None, None

    return WithSlope.apply


def _is_plain(array: Array) -> bool:
    """Tell whether `array` is in host memory, and nothing records or transforms the operations on it."""
    import torch

    if array.device.type != "cpu" or (array.requires_grad and torch.is_grad_enabled()):
        return False
    if torch.compiler.is_compiling():
        return False
    return _has_memory(array)


def _has_memory(array: Array) -> bool:
    """Tell whether `array` is a tensor itself: the wrappers of `torch.func` have no memory of their own."""
    try:
        array.data_ptr()
    except RuntimeError:
        return False
    return True


def _limit_torch() -> UserLimit:
    """Return the user's limit, and set none.

    Each thread that computes blocks sets its own limit to 1. A thread that starts later would inherit a limit that is
    set here.
    """
    import torch

    threads = torch.get_num_threads()
    return UserLimit(threads, functools.partial(torch.set_num_threads, threads))


def _one_thread() -> None:
    """Limit PyTorch to one thread in the calling thread."""
    import torch

    torch.set_num_threads(1)


def _limit_to_one() -> UserLimit:
    """Limit PyTorch to one thread and return the user's limit."""
    found = _limit_torch()
    _one_thread()
    return found


_torch_limit = SharedLimit(_limit_torch)
_torch_alone = SharedLimit(_limit_to_one)


@hookimpl
def convsv_backend() -> Backend:
    """Return the backend of PyTorch."""
    return TorchBackend()
