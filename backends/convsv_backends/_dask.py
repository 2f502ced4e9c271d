"""The backend of Dask: lazy results from one task for each block of frequencies.

A task takes the kernel and the indices of a block of frequencies. It computes the symbol there, decomposes it and
returns the values, in the library of the kernel's own chunks. The kernel and most results are small, while the symbol
is large. No task returns an array of the symbol's size, unless the user asked for the symbol or for singular vectors.
Their chunks are then the blocks.

The user chooses the scheduler: threads, processes, or a cluster of `dask.distributed`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from convsv_core.backend import Array, Backend, BlockFunction, BlockWork, Prepare, split_rows
from convsv_core.dtypes import answer_dtype
from convsv_core.plugins import backend_of, get_backend, hookimpl

__all__ = ["DaskBackend", "convsv_backend"]


class DaskBackend(Backend):
    """Describe Dask to the core. The chunks of a Dask array are arrays of another backend's library."""

    name = "dask"
    module = "dask"
    lazy = True

    def owns_array(self, array: object) -> bool:
        """Tell whether `array` is a Dask array."""
        return bool(array_api_compat.is_dask_array(array))

    def library(self) -> ModuleType:
        """Return the namespace of `dask.array` from array-api-compat."""
        import array_api_compat.dask.array as xp

        return xp

    def dtypes(self, device: str | None = None) -> tuple[str, ...]:
        """Return the names of NumPy's dtypes, because `asarray` makes chunks of NumPy arrays."""
        return get_backend("numpy").dtypes()

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Return a NumPy array as a Dask array of one chunk."""
        import dask.array as da

        return da.from_array(np.asarray(array, dtype=dtype), chunks=-1)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Compute `array` with the user's scheduler, and return it on the host."""
        return _chunk_backend(array).to_numpy(array.compute())

    def in_one_piece(self, kernel: Array) -> Array:
        """Return `kernel` as one chunk, because every task gets the whole kernel."""
        return kernel.rechunk(-1)

    def asarray_like(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """Return a host table as one chunk, in the library of the chunks of `like`."""
        import dask.array as da

        return da.from_array(_chunk_backend(like).asarray_like(array, like._meta), chunks=-1)

    def take(self, array: Array, places: np.ndarray[Any, Any], axis: int) -> Array:
        """Return the entries at the indices in `places`.

        The indices are known when the graph is made. So each chunk of the result needs only the chunks that hold its
        entries.
        """
        import dask.array as da

        return da.take(array, places, axis=axis)

    def truth(self, condition: Array) -> bool | None:
        """Return None, because no array has a value before the user computes it."""
        return None

    def has_fast_float64(self, array: Array) -> bool:
        """Tell whether float64 is fast in the library of the chunks."""
        return _chunk_backend(array).has_fast_float64(array._meta)

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Raise NotImplementedError: a task must make its function itself, which `map_prepared` arranges."""
        raise NotImplementedError("Dask arrays are lazy: call map_prepared, where the task makes its own function")

    def map_prepared(
        self,
        prepare: Prepare,
        rows: np.ndarray[Any, Any],
        arrays: tuple[Array, ...],
        static: tuple[Any, ...],
        budget: int,
    ) -> Array | tuple[Array, ...]:
        """Return a lazy result, from one task that prepares and one task for each block of at most `budget` bytes."""
        import dask
        import dask.array as da

        lazy = [self.in_one_piece(array) for array in arrays]
        bind = functools.partial(_bind, prepare, static)
        row_bytes, samples, several = _look_ahead(bind, lazy, rows)

        blocks = [len(block) for block in split_rows(rows, max(1, budget // max(1, row_bytes)))]
        table = da.from_array(rows, chunks=(tuple(blocks), *rows.shape[1:]))
        bound = dask.delayed(bind, pure=True)(*(array.to_delayed(optimize_graph=False).item() for array in lazy))
        # If two rows gave one result, `function` sums over its block, and each block gives one row.
        lengths = tuple(blocks) if len(samples[0]) == min(len(rows), 2) else (1,) * len(blocks)
        if not several:
            return _of_blocks(da, _apply, table, samples[0], lengths, bound, None)
        together = da.blockwise(
            _apply,
            "i",
            table,
            "ij"[: table.ndim],
            bound,
            None,
            concatenate=True,
            dtype=object,
            meta=np.empty(0, object),
        )
        return tuple(
            _of_blocks(da, _pick, together, sample, lengths, index, None) for index, sample in enumerate(samples)
        )

    def run_on_values(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        """Compute now, as one task in the library of the chunks, and return arrays of one chunk each."""
        import dask

        return _wrapped(dask.delayed(function, pure=False)(*arguments, **options).compute())

    def run_to_number(self, function: Callable[..., Any], kernel: Array, *static: Any) -> Array:
        """Return a lazy number, which one task computes in the library of the chunks."""
        import dask
        import dask.array as da

        name = answer_dtype(kernel)
        dtype = np.empty(0, name).real.dtype
        task = dask.delayed(functools.partial(_number, function, static), pure=True)(kernel)
        return da.from_delayed(task, (), dtype, meta=kernel._meta.reshape(-1)[:0].real.astype(dtype))


# ---- functions that tasks call ----------------------------------------------------------------------


class _Bound(NamedTuple):
    """Hold the work on blocks, and a kernel in the library of the chunks with that library's backend."""

    work: BlockWork
    backend: Backend
    kernel: Array


def _bind(prepare: Prepare, static: tuple[Any, ...], kernel: Array, *others: Array) -> _Bound:
    """Make the work on blocks, in the library of the chunks."""
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    arrays = (kernel, *(xp.asarray(array) for array in others))  # A reduction may have left a scalar.
    return _Bound(prepare(*arrays, *static), backend, kernel)


def _apply(rows: np.ndarray[Any, Any], bound: _Bound) -> Any:
    """Return the results of a block, computed by one thread: the scheduler runs many blocks at a time."""
    with bound.backend.single_threaded():
        return bound.work.function(bound.backend.asarray_like(rows, bound.kernel))


def _pick(results: tuple[Array, ...], index: int) -> Array:
    """Return one of the results of a block."""
    return results[index]


def _number(function: Callable[..., Array], static: tuple[Any, ...], kernel: Array) -> Array:
    """Return ``function(kernel, *static)``, or NaN if the kernel is not finite, as under tracing."""
    xp = array_api_compat.array_namespace(kernel)
    if xp.all(xp.isfinite(kernel)):
        return function(kernel, *static)
    return xp.sum(kernel * math.nan, dtype=getattr(xp, answer_dtype(kernel))).real


# ---- the graph --------------------------------------------------------------------------------------


def _chunk_backend(array: Array) -> Backend:
    """Return the backend of the chunks of a Dask array."""
    return backend_of(array._meta, "a chunk of the Dask array")


class _Foresight(NamedTuple):
    """Describe in advance what a task will return.

    Attributes
    ----------
    row_bytes : int
        Bytes of working memory of one row.
    samples : tuple of arrays
        Results for at most two rows, whose shapes and dtypes the tasks' results share, but for the first extent.
    several : bool
        Whether the result is a tuple of arrays.
    """

    row_bytes: int
    samples: tuple[Array, ...]
    several: bool


def _look_ahead(bind: Callable[..., _Bound], lazy: list[Array], rows: np.ndarray[Any, Any]) -> _Foresight:
    """Run the work of a task on the first two rows, with arrays of ones, to learn what tasks return."""
    backend = _chunk_backend(lazy[0])
    bound = bind(*(backend.asarray_like(np.ones(array.shape, array.dtype), array._meta) for array in lazy))
    results = _apply(rows[:2], bound)
    several = isinstance(results, tuple)
    return _Foresight(bound.work.row_bytes, results if several else (results,), several)


def _of_blocks(
    da: ModuleType,
    function: Callable[..., Array],
    table: Array,
    sample: Array,
    lengths: tuple[int, ...],
    *constant: Any,
) -> Array:
    """Return a Dask array whose chunks `function` makes from the chunks of `table`.

    It has the dtype and the shape of `sample`, but `lengths` are the lengths of its chunks along the first axis.
    """
    new = {axis + table.ndim: extent for axis, extent in enumerate(sample.shape[1:])}
    return da.blockwise(
        function,
        (0, *new),
        table,
        tuple(range(table.ndim)),
        *constant,
        new_axes=new,
        adjust_chunks={0: lengths},
        concatenate=True,
        dtype=sample.dtype,
        meta=sample[(slice(0, 0),) * sample.ndim],
    )


def _wrapped(result: Any) -> Any:
    """Return a result with its arrays as Dask arrays of one chunk. The result may be a named tuple of results."""
    import dask.array as da

    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return type(result)(*map(_wrapped, result))
    return da.from_array(result, chunks=-1) if array_api_compat.is_array_api_obj(result) else result


@hookimpl
def convsv_backend() -> Backend:
    """Return the backend of Dask."""
    return DaskBackend()
