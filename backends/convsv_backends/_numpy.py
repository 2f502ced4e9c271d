"""NumPy: blocks of frequencies are mapped over threads, each with one BLAS thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from convsv_backends._threads import SharedLimit, map_in_threads, usable_processors, worth_threads
from convsv_core.backend import Array, Backend, BlockFunction
from convsv_core.plugins import hookimpl

BATCHED_SIDE = 64
"""Side below which a call of NumPy's costs about as much as a factorisation."""


class NumpyBackend(Backend):
    """NumPy arrays, on the host."""

    name = "numpy"
    module = "numpy"

    def owns(self, array: object) -> bool:
        """Whether `array` is a NumPy array; a bare scalar is not one."""
        return isinstance(array, np.ndarray)

    def library(self) -> ModuleType:
        """NumPy through array-api-compat."""
        import array_api_compat.numpy as xp

        return xp

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """`array` itself, of `dtype` if given; the only device is "cpu"."""
        return self.library().asarray(array, dtype=dtype, device=device)

    def contiguous(self, array: Array) -> Array:
        """In C order."""
        return np.ascontiguousarray(array)

    def has_fast_float64(self, array: Array) -> bool:
        """LAPACK in double precision takes less than twice the time of single."""
        return True

    def is_positive_definite(self, array: Array) -> Array:
        """By Cholesky's factorisation: of small ones together, and where that fails of one after another."""
        if array.shape[-1] < BATCHED_SIDE and _has_cholesky(array):
            return np.ones(array.shape[:-2], bool)
        matrices = array.reshape(-1, *array.shape[-2:])
        return np.asarray([_has_cholesky(matrix) for matrix in matrices]).reshape(array.shape[:-2])

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Map blocks over as many threads as the user's limits and affinity leave, which share `budget`."""
        if len(rows) == 1:  # one large matrix, perhaps: BLAS's own threads are all there is
            return super().map_blocks(function, rows, like, row_bytes=row_bytes, budget=budget)
        with _blas_limit as threads:
            if threads == 1 or not worth_threads(rows, row_bytes):
                return super().map_blocks(function, rows, like, row_bytes=row_bytes, budget=budget)
            return self.concatenate(map_in_threads(function, rows, threads, row_bytes=row_bytes, budget=budget))

    def one_thread(self) -> AbstractContextManager[object]:
        """One BLAS thread, which `map_blocks` takes for the user's limit."""
        return _one_thread


def _has_cholesky(matrices: Array) -> bool:
    try:
        np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        return False
    return True


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _limit_blas() -> tuple[int, Callable[[], object]]:
    # Some other library's BLAS may know one thread only, whatever the limit: the largest number is the user's.
    found = [library["num_threads"] for library in _blas().info()]
    limited = _blas().limit(limits=1)
    return max(found, default=usable_processors()), limited.restore_original_limits


_blas_limit = SharedLimit(_limit_blas)
_one_thread = SharedLimit(_limit_blas)


@hookimpl
def convsv_backend() -> Backend:
    """Hand NumPy over."""
    return NumpyBackend()
