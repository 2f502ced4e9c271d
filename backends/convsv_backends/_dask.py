"""Dask: lazy results, from one task for each block of frequencies, in the library of the kernel's own chunks.

A kernel is small and so are the results; what is large lies between. So a task takes the kernel and the indices of a
block of frequencies, makes the symbol there, decomposes it and returns the values: no task's result is of the
symbol's size unless the symbol or its singular vectors are what the user asked for, which then lie in as many chunks.
The scheduler is the user's: threads, processes or a cluster of `dask.distributed`.
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


class DaskBackend(Backend):
    """Dask arrays, whose chunks are arrays of another backend's library."""

    name = "dask"
    module = "dask"
    lazy = True

    def owns_array(self, array: object) -> bool:
        """Whether `array` is a Dask array."""
        return bool(array_api_compat.is_dask_array(array))

    def library(self) -> ModuleType:
        """`dask.array` through array-api-compat."""
        import array_api_compat.dask.array as xp

        return xp

    def dtypes(self, device: str | None = None) -> tuple[str, ...]:
        """Those of NumPy, of which `asarray` makes chunks."""
        return get_backend("numpy").dtypes()

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Make a NumPy array a Dask array of one chunk."""
        import dask.array as da

        return da.from_array(np.asarray(array, dtype=dtype), chunks=-1)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Compute, with the scheduler in effect, and copy to the host."""
        return _chunk_backend(array).to_numpy(array.compute())

    def in_one_piece(self, kernel: Array) -> Array:
        """As one chunk, which every task gets."""
        return kernel.rechunk(-1)

    def asarray_like(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """Make a host table one chunk, in the library of the chunks of `like`."""
        import dask.array as da

        return da.from_array(_chunk_backend(like).asarray_like(array, like._meta), chunks=-1)

    def take(self, array: Array, places: np.ndarray[Any, Any], axis: int) -> Array:
        """By a table that is known when the graph is made, so that each chunk is made from the few that it needs."""
        import dask.array as da

        return da.take(array, places, axis=axis)

    def truth(self, condition: Array) -> bool | None:
        """None: the value is not there until the user computes it."""
        return None

    def has_fast_float64(self, array: Array) -> bool:
        """As the library of the chunks."""
        return _chunk_backend(array).has_fast_float64(array._meta)

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Refuse: a task needs a function that it can make itself, which is what `map_prepared` takes."""
        raise NotImplementedError("lazy arrays: wanted map_prepared, whose function is made by the task that needs it")

    def map_prepared(
        self,
        prepare: Prepare,
        rows: np.ndarray[Any, Any],
        arrays: tuple[Array, ...],
        static: tuple[Any, ...],
        budget: int,
    ) -> Array | tuple[Array, ...]:
        """One task that prepares, and one for each block, of at most `budget` bytes."""
        import dask
        import dask.array as da

        lazy = [self.in_one_piece(array) for array in arrays]
        bind = functools.partial(_bind, prepare, static)
        row_bytes, samples, several = _look_ahead(bind, lazy, rows)

        blocks = [len(block) for block in split_rows(rows, max(1, budget // max(1, row_bytes)))]
        table = da.from_array(rows, chunks=(tuple(blocks), *rows.shape[1:]))
        bound = dask.delayed(bind, pure=True)(*(array.to_delayed(optimize_graph=False).item() for array in lazy))
        # Two rows made one: `function` sums over its block, and each block gives one row.
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
        """Compute now, as one task, in the library of the chunks; the arrays of the answer have one chunk each."""
        import dask

        return _wrapped(dask.delayed(function, pure=False)(*arguments, **options).compute())

    def run_to_number(self, function: Callable[..., Any], kernel: Array, *static: Any) -> Array:
        """As one task, in the library of the chunks, when the user asks for it."""
        import dask
        import dask.array as da

        name = answer_dtype(kernel)
        dtype = np.empty(0, name).real.dtype
        task = dask.delayed(functools.partial(_number, function, static), pure=True)(kernel)
        return da.from_delayed(task, (), dtype, meta=kernel._meta.reshape(-1)[:0].real.astype(dtype))


# ---- what tasks do ----------------------------------------------------------------------------------


class _Bound(NamedTuple):
    """A function of blocks and its `row_bytes`, and a kernel in the library of the chunks with its backend."""

    work: BlockWork
    backend: Backend
    kernel: Array


def _bind(prepare: Prepare, static: tuple[Any, ...], kernel: Array, *others: Array) -> _Bound:
    """Make the function of blocks, in the library of the chunks."""
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    arrays = (kernel, *(xp.asarray(array) for array in others))  # a reduction may have left a scalar
    return _Bound(prepare(*arrays, *static), backend, kernel)


def _apply(rows: np.ndarray[Any, Any], bound: _Bound) -> Any:
    """Return the results of a block, without threads of its own: the scheduler runs many blocks at a time."""
    with bound.backend.single_threaded():
        return bound.work.function(bound.backend.asarray_like(rows, bound.kernel))


def _pick(results: tuple[Array, ...], index: int) -> Array:
    return results[index]


def _number(function: Callable[..., Array], static: tuple[Any, ...], kernel: Array) -> Array:
    """`function` of a kernel that is there; NaN where it is not finite, as under tracing."""
    xp = array_api_compat.array_namespace(kernel)
    if xp.all(xp.isfinite(kernel)):
        return function(kernel, *static)
    return xp.sum(kernel * math.nan, dtype=getattr(xp, answer_dtype(kernel))).real


# ---- the graph --------------------------------------------------------------------------------------


def _chunk_backend(array: Array) -> Backend:
    return backend_of(array._meta, "a chunk of the Dask array")


class _Foresight(NamedTuple):
    """What a task will give: its `row_bytes`, results like those of two rows, and whether they were a tuple."""

    row_bytes: int
    samples: tuple[Array, ...]
    several: bool


def _look_ahead(bind: Callable[..., _Bound], lazy: list[Array], rows: np.ndarray[Any, Any]) -> _Foresight:
    """Find out what tasks will give, by one with arrays of ones."""
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
    """A Dask array whose chunks `function` makes from those of `table`; like `sample`, but for its first extent."""
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
    """The arrays in a result, which may be in named tuples, as Dask arrays of one chunk."""
    import dask.array as da

    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return type(result)(*map(_wrapped, result))
    return da.from_array(result, chunks=-1) if array_api_compat.is_array_api_obj(result) else result


@hookimpl
def convsv_backend() -> Backend:
    """Hand Dask over."""
    return DaskBackend()
