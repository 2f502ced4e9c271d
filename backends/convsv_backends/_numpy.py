"""The backend of NumPy, which maps blocks of frequencies over threads with one BLAS thread each."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from threadpoolctl import ThreadpoolController

from convsv_backends._threads import (
    SharedLimit,
    UserLimit,
    map_groups_in_threads,
    map_in_threads,
    usable_processors,
    worth_threads,
)
from convsv_core.backend import Array, ArraySpec, Backend, BlockFunction
from convsv_core.plugins import hookimpl

__all__ = ["NumpyBackend", "convsv_backend"]

BLAS_ENTRIES = 1 << 18
"""Smallest number of entries of a kernel for which products with the kernel use BLAS's own threads.

BLAS's threads spin for a while after a product, and then the threads of this backend wait for a processor. Measured
on ResNet-32 with two cores, but the value itself is a guess.
"""

THREADED_SIDE = 48
"""Smallest side of matrices for which products and factorisations of blocks are given to threads.

OpenBLAS takes a lock for each product, so threads wait for each other at small sides. The value is a guess, after
measurements of ResNet-32 with 16, 32 and 64 channels.
"""


class NumpyBackend(Backend):
    """Describe NumPy to the core."""

    name = "numpy"
    module = "numpy"

    def owns_array(self, array: object) -> bool:
        """Tell whether `array` is a NumPy array.

        A NumPy scalar is not an array. Nor is a masked array, whose masked entries have no values to compute with.
        """
        return isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray)

    def library(self) -> ModuleType:
        """Return NumPy's namespace from array-api-compat."""
        return xp

    def namespace(self, array: Array) -> ModuleType:
        """Return NumPy's namespace from array-api-compat.

        The array is not asked, because the question takes longer than many operations on small arrays.
        """
        return xp

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Return `array` itself, or a copy of `dtype` if that differs. The only device is "cpu"."""
        return self.library().asarray(array, dtype=dtype, device=device)

    def asarray_like(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """Return the host table itself."""
        return array

    def contiguous(self, array: Array) -> Array:
        """Return `array` in C order."""
        return np.ascontiguousarray(array)

    def complex(self, real: Array, imaginary: Array) -> Array:
        """Return complex numbers from their parts by two copies, without a product by i."""
        parts = np.empty(real.shape, np.result_type(real, np.complex64))
        parts.real, parts.imag = real, imaginary
        return parts

    def has_fast_float64(self, array: Array) -> bool:
        """Return True, because LAPACK takes less than twice as long in double precision as in single precision."""
        return True

    def computation_context(self, like: Array) -> AbstractContextManager[object]:
        """Return a context manager that limits BLAS to one thread, unless the kernel is large."""
        return _blas_limit if like.size < BLAS_ENTRIES else contextlib.nullcontext()

    def is_positive_definite(self, array: Array) -> Array:
        """Tell whether each matrix is positive definite, by one call that factorises all matrices.

        LAPACK wants columns in one piece. The transposes of Hermitian matrices are positive definite if and only if
        the matrices are. With them and transposed factors, NumPy copies whole columns to LAPACK and back. That took
        0.28 instead of 0.63 ms a matrix at side 256, and 0.05 instead of 0.11 ms at side 128.
        """
        with np.errstate(all="ignore"):
            factors = _cholesky(np.swapaxes(array, -2, -1), out=np.swapaxes(np.empty_like(array, order="C"), -2, -1))
            return np.isfinite(factors[..., -1, -1].real)

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Map blocks over threads, and share `budget` between them.

        The number of threads is limited by the user's limits of BLAS and by the processors that the process may use.
        """
        if len(rows) == 1:  # The matrix may be large, and only BLAS's own threads can share its work.
            return super().map_blocks(function, rows, like, row_bytes=row_bytes, budget=budget)
        with _blas_limit as threads:
            if threads == 1 or not worth_threads(rows, row_bytes):
                return super().map_blocks(function, rows, like, row_bytes=row_bytes, budget=budget)
            return self.concatenate(map_in_threads(function, rows, threads, row_bytes=row_bytes, budget=budget))

    def map_groups(
        self, function: Callable[[Any], list[Any]], groups: Sequence[Any], costs: Sequence[float], like: Array
    ) -> list[list[Any]]:
        """Share the groups out to threads, each of which has one BLAS thread and maps its blocks alone."""
        found = map_groups_in_threads(function, groups, costs, _blas_limit)
        return super().map_groups(function, groups, costs, like) if found is None else found

    def call_host(
        self,
        function: Callable[..., tuple[Any, ...]],
        arrays: tuple[Array, ...],
        results: tuple[ArraySpec, ...],
        otherwise: Callable[..., tuple[Array, ...]],
        *,
        gradient: Callable[..., tuple[Any, ...]] | None = None,
    ) -> tuple[Array, ...]:
        """Return ``function(*arrays)``, because NumPy is the host and has no gradients."""
        return function(*arrays)

    def products_context(self, side: int) -> AbstractContextManager[object]:
        """Return a context manager that uses no threads for products of small matrices."""
        return self.single_threaded() if side < THREADED_SIDE else contextlib.nullcontext()

    def single_threaded(self) -> AbstractContextManager[object]:
        """Return a context manager that allows one BLAS thread and no threads for blocks."""
        return _blas_limit.alone()


def _cholesky_one_by_one(array: Array, *, out: Array | None = None) -> Array:
    """Return the lower Cholesky factors of Hermitian matrices, with NaN for a matrix that is not positive definite."""
    out = np.empty(array.shape, array.dtype) if out is None else out
    out[...] = np.nan
    for place in np.ndindex(array.shape[:-2]):
        with contextlib.suppress(np.linalg.LinAlgError):
            out[place] = np.linalg.cholesky(array[place])
    return out


# `numpy.linalg.cholesky` raises an error if one of many matrices has no factor, and does not say which matrix. The
# function that it calls fills that factor with NaN. The function is not public and may move, hence the fallback.
_cholesky = getattr(getattr(np.linalg, "_umath_linalg", None), "cholesky_lo", _cholesky_one_by_one)


def _blas() -> ThreadpoolController:
    """Return the controller of every BLAS library that is loaded now.

    A package that is imported later can bring a BLAS of its own, as SciPy does. A search of the process for libraries
    takes milliseconds. So the search is repeated only when the number of imported modules has changed.
    """
    return _blas_among(len(sys.modules))


@functools.lru_cache(maxsize=1)
def _blas_among(modules: int) -> ThreadpoolController:
    """Return the controller of every BLAS library, found once for each number of imported modules."""
    return ThreadpoolController().select(user_api="blas")


def _limit_blas() -> UserLimit:
    """Limit every BLAS of the process to one thread and return the user's limit."""
    blas = _blas()
    # A BLAS of another library may have one thread only, whatever the limit. So the largest number is the user's.
    found = [library["num_threads"] for library in blas.info()]
    _release_blas(blas)
    limited = blas.limit(limits=1)
    _release_blas(blas)

    def restore() -> None:
        _release_blas(blas)
        limited.restore_original_limits()
        _release_blas(blas)

    return UserLimit(max(found, default=usable_processors()), restore)


def _release_blas(blas: ThreadpoolController) -> None:
    """Allow any thread to set BLAS's limit.

    threadpoolctl ignores every thread but the first one that has set a limit, and does not report it. The limit
    belongs to the process. `SharedLimit` sets it once and restores it once.
    """
    for library in blas.lib_controllers:
        if hasattr(library, "clear_controlling_thread"):  # threadpoolctl 3.8 introduced this method.
            library.clear_controlling_thread(force=True)


_blas_limit = SharedLimit(_limit_blas)


@hookimpl
def convsv_backend() -> Backend:
    """Return the backend of NumPy."""
    return NumpyBackend()
