"""JAX, eagerly and under its transformations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat
import numpy as np

from convsv_backends._jax_mesh import devices_of_mesh, on_every_device, on_mesh_of, share_out, with_automatic_axes
from convsv_core.backend import Array, Backend, BlockFunction, Prepare
from convsv_core.plugins import hookimpl


class JaxBackend(Backend):
    """JAX arrays and tracers."""

    name = "jax"
    module = "jax"
    compiles = True

    def owns_array(self, array: object) -> bool:
        """Whether `array` is a JAX array or a tracer."""
        return bool(array_api_compat.is_jax_array(array))

    def library(self) -> ModuleType:
        """`jax.numpy`, which keeps to the standard itself."""
        import jax.numpy as jnp

        return jnp

    def devices(self) -> tuple[str, ...]:
        """Every device that JAX sees, as ``platform:index``."""
        import jax

        return tuple(f"{device.platform}:{device.id}" for device in jax.devices())

    def dtypes(self, device: str | None = None) -> tuple[str, ...]:
        """Double precision is there only where the user has enabled ``jax_enable_x64``."""
        import jax

        names = super().dtypes(device)
        return names if jax.config.jax_enable_x64 else tuple(n for n in names if n not in ("float64", "complex128"))

    def asarray(self, array: Any, *, dtype: str | None = None, device: str | None = None) -> Array:
        """Copy a NumPy array to a device."""
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
        """Copy to the host."""
        import jax.numpy as jnp

        return np.array(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array)

    def in_one_piece(self, kernel: Array) -> Array:
        """On every device of its mesh."""
        return on_every_device(kernel)

    def asarray_like(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """Let JAX place the table beside the arrays it meets, which under tracing have no device yet."""
        import jax.numpy as jnp

        if not _traced(like):
            return jnp.asarray(array, device=like.sharding if len(like.devices()) == 1 else None)
        return jnp.asarray(array)

    def has_values(self, array: Array) -> bool:
        """Not for a tracer."""
        return not _traced(array)

    def truth(self, condition: Array) -> bool | None:
        """None for a tracer without a concrete value."""
        import jax

        try:
            return bool(condition)
        except jax.errors.ConcretizationTypeError:
            return None

    def stop_gradient(self, array: Array) -> Array:
        """By `jax.lax.stop_gradient`."""
        import jax

        return jax.lax.stop_gradient(array)

    def run(self, function: Callable[..., Any], arrays: tuple[Array, ...], static: tuple[Any, ...]) -> Any:
        """Compile, unless a transformation of the user's is under way: eager JAX compiles each operation alone."""
        with on_mesh_of(arrays):
            if devices_of_mesh() == 1 and any(map(_traced, arrays)):
                return function(*arrays, *static)
            return _compiled(function, len(arrays), len(static))(*arrays, *static)

    def batch_size(self, count: int) -> int:
        """A power of two: JAX compiles each operation anew for each shape."""
        return 1 << max(count - 1, 0).bit_length()

    def complex(self, real: Array, imaginary: Array) -> Array:
        """By `jax.lax.complex`."""
        import jax

        return jax.lax.complex(real, imaginary)

    def is_positive_definite(self, array: Array) -> Array:
        """By Cholesky's factorisation, which JAX fills with NaN where there is none."""
        import jax.numpy as jnp

        return jnp.all(jnp.isfinite(jnp.linalg.cholesky(array, symmetrize_input=False)), axis=(-2, -1))

    def map_blocks(
        self, function: BlockFunction, rows: np.ndarray[Any, Any], like: Array, *, row_bytes: int, budget: int
    ) -> Array | tuple[Array, ...]:
        """Use JAX's own loop when traced, so that the program's size does not grow with the grid."""
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
        """Share the rows out over the devices of a mesh, each of which prepares for itself and has its own budget."""
        like = arrays[0]
        if devices_of_mesh() == 1 or not _traced(like):
            return super().map_prepared(prepare, rows, arrays, static, budget)

        def share(rows: Array, arrays: tuple[Any, ...]) -> Array | tuple[Array, ...]:
            work = prepare(*arrays, *static)
            return self._loop(work.function, rows, max(1, budget // max(1, work.row_bytes)))

        return share_out(share, rows, arrays)

    def _loop(self, function: BlockFunction, rows: Array, size: int) -> Array | tuple[Array, ...]:
        """Map `function` over blocks of `size` rows in one loop of the program, and over those left over."""
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
        """JAX's own loop when traced."""
        import jax

        if not _traced(like):
            return super().repeat(function, state, count, like)
        return jax.lax.fori_loop(0, count, lambda _, carried: function(*carried), state)

    def computation_context(self, like: Array) -> AbstractContextManager[object]:
        """The default of some accelerators keeps 10 bits or fewer."""
        import jax

        return jax.default_matmul_precision("highest")

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """By `jax.jit`."""
        import jax

        return jax.jit(function)

    def grad(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """By `jax.grad`."""
        import jax

        return jax.grad(function)

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """By `jax.vmap`."""
        import jax

        return jax.vmap(function)


@functools.cache
def _compiled(function: Callable[..., Any], arrays: int, static: int) -> Callable[..., Any]:
    import jax

    def call(*arguments: Any) -> Any:
        return with_automatic_axes(function, arguments[:arrays], arguments[arrays:])

    return jax.jit(call, static_argnums=tuple(range(arrays, arrays + static)))


def _traced(array: Array) -> bool:
    import jax

    return isinstance(array, jax.core.Tracer)


@hookimpl
def convsv_backend() -> Backend:
    """Hand JAX over."""
    return JaxBackend()
