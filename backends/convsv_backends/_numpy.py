"""NumPy: blocks of frequencies are mapped over threads, each with one BLAS thread."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from threadpoolctl import ThreadpoolController

from convsv_backends._threads import SharedLimit, map_in_threads, usable_processors, worth_threads
from convsv_core.backend import Array, Backend, BlockFunction
from convsv_core.plugins import hookimpl

BLAS_ENTRIES = 1 << 18
"""Entries of a kernel from which products with it gain from BLAS's own threads.

Those spin for a while after a product, and keep the threads of this backend waiting.
"""

THREADED_SIDE = 48
"""Side of matrices from which products of them gain from threads for blocks."""


class NumpyBackend(Backend):
    """NumPy arrays, on the host."""

    name = "numpy"
    module = "numpy"

    def owns_array(self, array: object) -> bool:
        """Whether `array` is a NumPy array; a bare scalar is not one."""
        return isinstance(array, np.ndarray)

    def library(self) -> ModuleType:
        """NumPy through array-api-compat."""
        return xp

    def namespace(self, array: Array) -> ModuleType:
        """The same: to ask the array takes longer than many a call on small ones."""
        return xp

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """`array` itself, of `dtype` if given; the only device is "cpu"."""
        return self.library().asarray(array, dtype=dtype, device=device)

    def contiguous(self, array: Array) -> Array:
        """In C order."""
        return np.ascontiguousarray(array)

    def complex(self, real: Array, imaginary: Array) -> Array:
        """Without a product by i."""
        parts = np.empty(real.shape, np.result_type(real, np.complex64))
        parts.real, parts.imag = real, imaginary
        return parts

    def has_fast_float64(self, array: Array) -> bool:
        """LAPACK in double precision takes less than twice the time of single."""
        return True

    def computation_context(self, like: Array) -> AbstractContextManager[object]:
        """With one BLAS thread, but for large kernels."""
        return _blas_limit if like.size < BLAS_ENTRIES else contextlib.nullcontext()

    def is_positive_definite(self, array: Array) -> Array:
        """By Cholesky's factorisation of all matrices together."""
        with np.errstate(all="ignore"):
            return np.isfinite(_cholesky(array)[..., -1, -1].real)

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

    def products_context(self, side: int) -> AbstractContextManager[object]:
        """Without threads for blocks of small matrices, each of which would wait for a lock in OpenBLAS."""
        return self.single_threaded() if side < THREADED_SIDE else contextlib.nullcontext()

    def single_threaded(self) -> AbstractContextManager[object]:
        """One BLAS thread, and no threads for blocks within."""
        return _blas_limit.alone()


def _cholesky_one_by_one(array: Array) -> Array:
    """The factors of Hermitian matrices; NaN for those that are not positive definite."""
    factors = np.full(array.shape, np.nan, array.dtype)
    for place in np.ndindex(array.shape[:-2]):
        with contextlib.suppress(np.linalg.LinAlgError):
            factors[place] = np.linalg.cholesky(array[place])
    return factors


# What `numpy.linalg.cholesky` calls. That raises where one of many matrices has no factor, and does not say which. It
# is not public, and may move.
_cholesky = getattr(getattr(np.linalg, "_umath_linalg", None), "cholesky_lo", _cholesky_one_by_one)


def _blas() -> ThreadpoolController:
    """Return the controller of every BLAS that is loaded now.

    A package that is imported later can bring a BLAS of its own, as SciPy does. To search the process for libraries
    takes milliseconds, so the search is repeated only when the number of imported modules has changed.
    """
    return _blas_among(len(sys.modules))


@functools.lru_cache(maxsize=1)
def _blas_among(modules: int) -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _limit_blas() -> tuple[int, Callable[[], object]]:
    """Hold every BLAS to one thread; return how many threads the user's limit left, and a function that restores it."""
    blas = _blas()
    # Some other library's BLAS may know one thread only, whatever the limit: the largest number is the user's.
    found = [library["num_threads"] for library in blas.info()]
    _release_blas(blas)
    limited = blas.limit(limits=1)
    _release_blas(blas)

    def restore() -> None:
        _release_blas(blas)
        limited.restore_original_limits()
        _release_blas(blas)

    return max(found, default=usable_processors()), restore


def _release_blas(blas: ThreadpoolController) -> None:
    """Let any thread set the limit: threadpoolctl ignores all threads, silently, but the first that has set one.

    The limit is the process's. `SharedLimit` sets it once and restores it once.
    """
    for library in blas.lib_controllers:
        if hasattr(library, "clear_controlling_thread"):  # since threadpoolctl 3.8
            library.clear_controlling_thread(force=True)


_blas_limit = SharedLimit(_limit_blas)


@hookimpl
def convsv_backend() -> Backend:
    """Hand NumPy over."""
    return NumpyBackend()
