"""Dask: lazy results, from one task for each block of frequencies, in the library of the kernel's own chunks.

A kernel is small and so are the results; what is large lies between. So a task takes the kernel and the indices of a
block of frequencies, makes the symbol there, decomposes it and returns the values: no task's result is of the
symbol's size unless the symbol or its singular vectors are what the user asked for, which then lie in as many chunks.
The scheduler is the user's: threads, processes or a cluster of `dask.distributed`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from convsv_core.backend import Array, Backend, BlockFunction, Prepare, split_rows
from convsv_core.operand import Operand, check_dtype
from convsv_core.plugins import backend_of, get_backend, hookimpl


class DaskBackend(Backend):
    """Dask arrays, whose chunks are arrays of another backend's library."""

    name = "dask"
    module = "dask"
    lazy = True

    def owns(self, array: object) -> bool:
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

    def whole(self, kernel: Array) -> Array:
        """As one chunk, which every task gets."""
        return kernel.rechunk(-1)

    def constant(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """Make a host table one chunk, in the library of the chunks of `like`."""
        import dask.array as da

        return da.from_array(_chunk_backend(like).constant(array, like._meta), chunks=-1)

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
        arrays: tuple[Any, ...],
        static: tuple[Any, ...],
        budget: int,
    ) -> Array | tuple[Array, ...]:
        """One task that prepares, and one for each block, of at most `budget` bytes."""
        import dask
        import dask.array as da

        operand, *others = arrays
        lazy = [self.whole(array) for array in (operand.kernel, operand.scale, *others)]
        bind = functools.partial(_bind, prepare, _without_arrays(operand), static)
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

        name = check_dtype(kernel)
        dtype = np.empty(0, name).real.dtype
        task = dask.delayed(functools.partial(_number, function, static), pure=True)(kernel)
        return da.from_delayed(task, (), dtype, meta=kernel._meta.reshape(-1)[:0].real.astype(dtype))


# ---- what tasks do ----------------------------------------------------------------------------------


def _bind(
    prepare: Prepare, operand: Operand, static: tuple[Any, ...], kernel: Array, scale: Array, *others: Array
) -> tuple[BlockFunction, int, Backend, Array]:
    """The function of blocks and its `row_bytes`, in the library of a chunk, which comes last with its backend."""
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    scale, *rest = (xp.asarray(array) for array in (scale, *others))  # a reduction may have left a scalar
    operand = dataclasses.replace(operand, backend=backend, xp=xp, kernel=kernel, scale=scale)
    function, row_bytes = prepare(operand, *rest, *static)
    return function, row_bytes, backend, kernel


def _apply(rows: np.ndarray[Any, Any], bound: tuple[BlockFunction, int, Backend, Array]) -> Any:
    """The results of a block. The scheduler runs many at a time, so that none is to start threads of its own."""
    function, _, backend, kernel = bound
    with backend.single_threaded():
        return function(backend.constant(rows, kernel))


def _pick(results: tuple[Array, ...], index: int) -> Array:
    return results[index]


def _number(function: Callable[..., Array], static: tuple[Any, ...], kernel: Array) -> Array:
    """`function` of a kernel that is there; NaN where it is not finite, as under tracing."""
    xp = array_api_compat.array_namespace(kernel)
    if xp.all(xp.isfinite(kernel)):
        return function(kernel, *static)
    return xp.sum(kernel * math.nan, dtype=getattr(xp, check_dtype(kernel))).real


# ---- the graph --------------------------------------------------------------------------------------


def _chunk_backend(array: Array) -> Backend:
    return backend_of(array._meta, "a chunk of the Dask array")


def _without_arrays(operand: Operand) -> Any:
    """What of an operand a task is to be told beside its arrays: the plan and the dtypes."""
    return dataclasses.replace(operand, **dict.fromkeys(("backend", "xp", "kernel", "scale", "finite")))  # type: ignore[arg-type]


def _look_ahead(
    bind: Callable[..., tuple[BlockFunction, int, Backend, Array]], lazy: list[Array], rows: np.ndarray[Any, Any]
) -> tuple[int, tuple[Array, ...], bool]:
    """`row_bytes`, results like those of two rows, and whether they were a tuple: found out with arrays of zeros."""
    backend = _chunk_backend(lazy[0])
    zeros = [backend.constant(np.zeros(array.shape, array.dtype), array._meta) for array in lazy]
    zeros[1] = zeros[1] + 1  # the scale
    bound = bind(*zeros)
    results = _apply(rows[:2], bound)
    several = isinstance(results, tuple)
    return bound[1], results if several else (results,), several


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
