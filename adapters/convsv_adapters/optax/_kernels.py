"""One kernel within a bound, as it is stored: under tracing, in any dtype, on any mesh."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convsv_adapters._jax.trees import ConvLayer
from convsv_adapters._operators import Operator, layer_operators
from convsv_core import ProjectionState, norm_upper_bound, project
from convsv_core.conv import as_int
from convsv_core.plan import resolve_channels

__all__ = ["Settings", "bounded", "bounded_change", "empty_dual", "operators_of", "settings_of"]

ROUNDING_MARGIN = 1.05
"""For the rounding errors of the margin itself, and products of two rounding errors, of 16 bits among them."""


class Settings(NamedTuple):
    """How a kernel is projected."""

    bound: float
    method: Any
    steps: int


def settings_of(bound: float, method: str, steps: int) -> Settings:
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 <= bound < math.inf:
        raise ValueError(f"bound={bound!r}: wanted a finite number that is not negative")
    return Settings(float(bound), method, as_int("steps", steps, least=1))


def operators_of(layer: ConvLayer, circular: bool) -> tuple[Operator, ...]:
    assert layer.conv is not None  # check_layers has refused it
    return layer_operators(layer.name, layer.kernel_shape, layer.conv, layer.input_shapes, circular)


def empty_dual(kernel: Any, operator: Operator, settings: Settings) -> jax.Array:
    def dual(kernel: jax.Array) -> jax.Array:
        state = project(
            kernel, operator.input_shape, operator.conv, settings.bound, method=settings.method, steps=settings.steps
        ).state
        assert state is not None  # the method is Dykstra's
        return state.dual

    shape = jax.eval_shape(dual, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))
    return jnp.zeros(shape.shape, shape.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))  # so that layers of one shape and geometry are compiled once
def _nearest(
    kernel: jax.Array, operators: tuple[Operator, ...], settings: Settings, dual: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """A kernel near the given one and within the bound for each operator, which is itself if it is within; the dual.

    It is of the dtype that `convsv_core.project` answers in.
    """
    first, *others = operators
    upper = norm_upper_bound(kernel, first.conv) * max(operator.padding_norm for operator in operators)

    def inside(kernel: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), None if dual is None else dual * 0

    def outside(kernel: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        options: dict[str, Any] = {"method": settings.method, "steps": settings.steps}
        if dual is not None:
            frequencies = jnp.zeros((dual.shape[0], first.conv.ndim), jnp.int32)  # traced, `steps` mean all of the grid
            options["state"] = ProjectionState(frequencies, dual)
        found = project(kernel, first.input_shape, first.conv, settings.bound / first.padding_norm, **options)
        nearest = found.kernel
        for operator in others:
            limit = settings.bound / operator.padding_norm
            nearest = project(nearest, operator.input_shape, operator.conv, limit, method="rescale", steps=1).kernel
        return nearest, None if dual is None or found.state is None else found.state.dual

    return jax.lax.cond(upper <= settings.bound, inside, outside, kernel)


def bounded(kernel: jax.Array, operators: tuple[Operator, ...], settings: Settings) -> jax.Array:
    """A kernel that is within the bound in the dtype of the one given."""
    sharding = _explicit_sharding(kernel)
    kernel = _whole(kernel, sharding)
    nearest, _ = _nearest(kernel, operators, settings, None)
    error = _eps(kernel.dtype) * _frobenius(nearest) if nearest.dtype != kernel.dtype else 0.0
    stored = _kept_or(kernel, nearest, _share(kernel, operators, settings, error)).astype(kernel.dtype)
    return stored if sharding is None else jax.sharding.reshard(stored, sharding)


def bounded_change(
    kernel: jax.Array, change: jax.Array, operators: tuple[Operator, ...], settings: Settings, dual: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The change after which the kernel, as it is stored then, is within the bound; and the dual."""
    sharding = _explicit_sharding(kernel)
    kernel, change, dual = (_whole(array, sharding) for array in (kernel, change, dual))
    updated = (kernel + change).astype(kernel.dtype)
    nearest, dual = _nearest(updated, operators, settings, dual)
    # Stored is fl(kernel + fl(nearest - kernel)), off by an eps of either sum, and by that of the kernel's own dtype.
    size = _frobenius(nearest)
    error = _eps(change.dtype) * (_frobenius(kernel) + 2 * size) + _eps(kernel.dtype) * size
    target = _kept_or(updated, nearest, _share(kernel, operators, settings, error))
    same = jnp.all(nearest == updated)
    change = jnp.where(same, change, (target - kernel).astype(change.dtype))
    return change if sharding is None else jax.sharding.reshard(change, sharding), dual


def _explicit_sharding(kernel: jax.Array) -> NamedSharding | None:
    """How a kernel is sharded over a mesh whose shardings are part of types, which not every operation resolves."""
    sharding = jax.typeof(kernel).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _whole(array: jax.Array | None, sharding: NamedSharding | None) -> jax.Array | None:
    """An array on every device of a mesh."""
    if array is None or sharding is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def _kept_or(kernel: jax.Array, nearest: jax.Array, share: jax.Array) -> jax.Array:
    """The nearest kernel, smaller by what rounding can add; or the kernel itself, if that is the nearest."""
    return jnp.where(jnp.all(nearest == kernel), nearest, nearest * share.astype(nearest.dtype))


def _share(kernel: Any, operators: tuple[Operator, ...], settings: Settings, error: jax.Array | float) -> jax.Array:
    """By how much to multiply a kernel within the bound, that it still is after an error of that Frobenius norm.

    The operator's norm is at most the sum of the norms of its taps, so at most the root of their number times the
    Frobenius norm.
    """
    if settings.bound == 0:
        return jnp.zeros(())
    taps, *_ = resolve_channels(tuple(kernel.shape), operators[0].conv)
    smallest = float(jnp.finfo(kernel.dtype).smallest_subnormal) * math.sqrt(kernel.size)
    largest = math.sqrt(math.prod(taps)) * max(operator.padding_norm for operator in operators)
    return jnp.clip(1 - ROUNDING_MARGIN * largest * (error + smallest) / settings.bound, 0, 1)


def _eps(dtype: Any) -> float:
    """Largest relative error of rounding to a dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def _frobenius(kernel: jax.Array) -> jax.Array:
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.abs(wide) ** 2))
