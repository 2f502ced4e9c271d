"""The backend of JAX, for eager calls and under JAX's transformations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from convsv_backends._jax_host import call_host, from_host, on_host, to_host
from convsv_backends._jax_mesh import devices_of_mesh, on_every_device, on_mesh_of, share_out, with_automatic_axes
from convsv_core.backend import Array, ArraySpec, Backend, BlockFunction, Prepare
from convsv_core.plugins import hookimpl

__all__ = ["JaxBackend", "convsv_backend"]


class JaxBackend(Backend):
    """Describe JAX to the core."""

    name = "jax"
    module = "jax"
    compiles = True

    def owns_array(self, array: object) -> bool:
        """Tell whether `array` is a JAX array or a tracer."""
        return bool(array_api_compat.is_jax_array(array))

    def library(self) -> ModuleType:
        """Return `jax.numpy`, which implements the array API standard."""
        import jax.numpy as jnp

        return jnp

    def devices(self) -> tuple[str, ...]:
        """Return the name of every device that JAX sees, as ``platform:index``."""
        import jax

        return tuple(f"{device.platform}:{device.id}" for device in jax.devices())

    def dtypes(self, device: str | None = None) -> tuple[str, ...]:
        """Return the names of the dtypes, with double precision only if the user has enabled ``jax_enable_x64``."""
        import jax

        names = super().dtypes(device)
        return names if jax.config.jax_enable_x64 else tuple(n for n in names if n not in ("float64", "complex128"))

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Return a copy of a NumPy array on a device."""
        import jax
        import jax.numpy as jnp

        where = None
        if device is not None:
            named = {f"{one.platform}:{one.id}": one for one in jax.devices()}
            platform, _, index = device.partition(":")
            where = named.get(device if index else f"{platform}:0")
            if where is None:
                raise ValueError(f"device={device!r}: wanted one of {', '.join(named)}")
        return jnp.asarray(array, dtype=dtype, device=where)

    def to_numpy(self, array: Array) -> np.ndarray[Any, Any]:
        """Return a copy of `array` on the host."""
        import jax.numpy as jnp

        return np.array(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array)

    def in_one_piece(self, kernel: Array) -> Array:
        """Return `kernel` with a whole copy on every device of its mesh."""
        return on_every_device(kernel)

    def asarray_like(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """Return a host table as an array.

        JAX itself chooses the device if `like` is a tracer, which has no device yet, or lies on several devices.
        """
        import jax.numpy as jnp

        if not _traced(like):
            return jnp.asarray(array, device=like.sharding if len(like.devices()) == 1 else None)
        return jnp.asarray(array)

    def has_values(self, array: Array) -> bool:
        """Tell whether `array` is not a tracer."""
        return not _traced(array)

    def truth(self, condition: Array) -> bool | None:
        """Return a 0-d array as a bool, or None for a tracer without a concrete value."""
        import jax

        try:
            return bool(condition)
        except jax.errors.ConcretizationTypeError:
            return None

    def stop_gradient(self, array: Array) -> Array:
        """Return `array` as a constant for gradients, by `jax.lax.stop_gradient`."""
        import jax

        return jax.lax.stop_gradient(array)

    def run(self, function: Callable[..., Any], arrays: tuple[Array, ...], static: tuple[Any, ...]) -> Any:
        """Return the result of the compiled function, or of `function` itself inside a transformation of the user.

        Without compilation, eager JAX would compile each operation alone.
        """
        with on_mesh_of(arrays):
            if devices_of_mesh() == 1 and any(map(_traced, arrays)):
                return function(*arrays, *static)
            return _compiled(function, len(arrays), len(static))(*arrays, *static)

    def prefers_host(self, arguments: Any, *, search: bool = False) -> bool:
        """Tell whether the arrays among the arguments have values on one device of a CPU: NumPy compiles nothing."""
        return bool(on_host(arguments))

    def run_on_host(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        """Call the function with NumPy arrays that share the memory of JAX's, and return JAX arrays."""
        owned = on_host((arguments, options))
        assert owned, "the caller asks `prefers_host` first"
        given, named = to_host((arguments, options))
        return from_host(function(*given, **named), owned[0])

    def call_host(
        self,
        function: Callable[..., tuple[Any, ...]],
        arrays: tuple[Array, ...],
        results: tuple[ArraySpec, ...],
        otherwise: Callable[..., tuple[Array, ...]],
        *,
        gradient: Callable[..., tuple[Any, ...]] | None = None,
    ) -> tuple[Array, ...]:
        """Call `function` back from a program for one device of a CPU. Other programs contain `otherwise`."""
        if devices_of_mesh() > 1:
            return otherwise(*arrays)
        return call_host(function, arrays, results, otherwise, gradient)

    def batch_size(self, count: int) -> int:
        """Return the next power of two, because JAX compiles each operation anew for each shape."""
        return 1 << max(count - 1, 0).bit_length()

    def complex(self, real: Array, imaginary: Array) -> Array:
        """Return complex numbers from their parts by `jax.lax.complex`."""
        import jax

        return jax.lax.complex(real, imaginary)

    def is_positive_definite(self, array: Array) -> Array:
        """Tell whether each matrix is positive definite: otherwise JAX fills its Cholesky factor with NaN."""
        import jax.numpy as jnp

        return jnp.all(jnp.isfinite(jnp.linalg.cholesky(array, symmetrize_input=False)), axis=(-2, -1))

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Apply `function` to blocks of `rows`, under tracing by one loop of the program.

        So the size of the traced program does not grow with the grid.
        """
        if not _traced(like):
            return super().map_blocks(function, rows, like, row_bytes=row_bytes, budget=budget)
        return self._loop(function, self.asarray_like(rows, like), max(1, budget // max(1, row_bytes)))

    def map_prepared(
        self,
        prepare: Prepare,
        rows: np.ndarray[Any, Any],
        arrays: tuple[Array, ...],
        static: tuple[Any, ...],
        budget: int,
    ) -> Array | tuple[Array, ...]:
        """Share the rows out over the devices of a mesh. Each device calls `prepare` and has its own budget."""
        like = arrays[0]
        if devices_of_mesh() == 1 or not _traced(like):
            return super().map_prepared(prepare, rows, arrays, static, budget)

        def share(rows: Array, arrays: tuple[Any, ...]) -> Array | tuple[Array, ...]:
            work = prepare(*arrays, *static)
            return self._loop(work.function, rows, max(1, budget // max(1, work.row_bytes)))

        return share_out(share, rows, arrays)

    def _loop(self, function: BlockFunction, rows: Array, size: int) -> Array | tuple[Array, ...]:
        """Map `function` over blocks of `size` rows in one loop of the program, and over the remaining rows."""
        import jax

        count = rows.shape[0]
        size = min(size, count)
        whole = count // size * size
        if whole == size:
            results = [function(rows[:size])]
        else:
            stacked = jax.lax.map(function, rows[:whole].reshape(-1, size, *rows.shape[1:]))
            results = [jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), stacked)]
        return self.concatenate(results + ([function(rows[whole:])] if whole < count else []))

    def repeat(
        self, function: Callable[..., tuple[Array, ...]], state: tuple[Array, ...], count: int, like: Array
    ) -> tuple[Array, ...]:
        """Apply `function` `count` times, under tracing by one loop of the program."""
        import jax

        if not _traced(like):
            return super().repeat(function, state, count, like)
        return jax.lax.fori_loop(0, count, lambda _, carried: function(*carried), state)

    def computation_context(self, like: Array) -> AbstractContextManager[object]:
        """Return a context manager for products of full precision.

        By default some accelerators keep 10 bits or fewer.
        """
        import jax

        return jax.default_matmul_precision("highest")

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return `function` compiled by `jax.jit`."""
        import jax

        return jax.jit(function)

    def grad(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return the gradient of `function` by `jax.grad`."""
        import jax

        return jax.grad(function)

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return `function` mapped by `jax.vmap`."""
        import jax

        return jax.vmap(function)


@functools.cache
def _compiled(function: Callable[..., Any], arrays: int, static: int) -> Callable[..., Any]:
    """Return a compiled function.

    `arrays` and `static` are the numbers of its arguments: arrays come first, and then static arguments.
    """
    import jax

    def call(*arguments: Any) -> Any:
        return with_automatic_axes(function, arguments[:arrays], arguments[arrays:])

    return jax.jit(call, static_argnums=tuple(range(arrays, arrays + static)))


def _traced(array: Array) -> bool:
    """Tell whether `array` is a tracer."""
    import jax

    return isinstance(array, jax.core.Tracer)


@hookimpl
def convsv_backend() -> Backend:
    """Return the backend of JAX."""
    return JaxBackend()
