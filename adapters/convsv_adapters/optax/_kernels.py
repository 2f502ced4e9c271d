"""Projection of one kernel under tracing, so that the stored kernel is within the bound in any dtype, on any mesh."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convsv_adapters._layers import check_bound, check_method
from convsv_core import ProjectionState, norm_upper_bound, project
from convsv_core.conv import as_int
from convsv_core.layers import Operator
from convsv_core.training import ProjectionMethod

__all__ = [
    "ProjectionSettings",
    "bounded",
    "bounded_change",
    "empty_dual",
    "explicit_sharding",
    "make_settings",
    "on_every_device",
]

ROUNDING_MARGIN = 1.05
"""Factor of the margin for rounding errors, for their products and for the rounding of the margin itself.

A guess. It is above the need: such a product is at most 2**-8 of a rounding error, with bfloat16.
"""


STEPS_RTOL = 1e-2
"""The relative gap, as for `convsv_core.project`, at which a projection takes no more steps. A guess."""


class ProjectionSettings(NamedTuple):
    """Arguments of the projection of a kernel: static and hashable."""

    bound: float
    method: ProjectionMethod
    steps: int


def make_settings(bound: float, method: Any, steps: int) -> ProjectionSettings:
    """Return the checked arguments; raise ValueError or TypeError for an impossible one."""
    return ProjectionSettings(check_bound(bound, positive=False), check_method(method), as_int("steps", steps, least=1))


def empty_dual(kernel: Any, operator: Operator, settings: ProjectionSettings) -> jax.Array:
    """Return the zero dual variables of a kernel's projection by "dykstra"."""

    def dual(kernel: jax.Array) -> jax.Array:
        state = project(
            kernel, operator.input_shape, operator.conv, settings.bound, method=settings.method, steps=settings.steps
        ).state
        assert state is not None  # the method is "dykstra"
        return state.dual

    shape = jax.eval_shape(dual, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))
    return jnp.zeros(shape.shape, shape.dtype)


# A function of its own, so that layers of one shape and geometry are compiled once.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _nearest(
    kernel: jax.Array, operators: tuple[Operator, ...], settings: ProjectionSettings, dual: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return a kernel within the bound for each operator, near the given one, and the next dual variables.

    A kernel within the bound is returned itself. The dtype is the one of the results of `convsv_core.project`.
    """
    first, *others = operators
    largest = max(operator.padding_norm for operator in operators)
    upper = norm_upper_bound(kernel, first.conv) * largest

    def inside(kernel: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), None if dual is None else dual * 0

    def outside(kernel: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        options: dict[str, Any] = {"method": settings.method, "steps": settings.steps, "rtol": STEPS_RTOL}
        if dual is not None:
            # Under tracing, a state is over the whole grid, and its frequencies are not read.
            frequencies = jnp.zeros((dual.shape[0], first.conv.ndim), jnp.int32)
            options["state"] = ProjectionState(frequencies, dual)
        found = project(kernel, first.input_shape, first.conv, first.limit(settings.bound), **options)
        nearest = found.kernel
        for operator in others:
            limit = operator.limit(settings.bound)
            nearest = project(nearest, operator.input_shape, operator.conv, limit, method="rescale", steps=1).kernel
        return nearest, None if dual is None or found.state is None else found.state.dual

    return jax.lax.cond(upper <= settings.bound, inside, outside, kernel)


def bounded(kernel: jax.Array, operators: tuple[Operator, ...], settings: ProjectionSettings) -> jax.Array:
    """Return a kernel within the bound, in the dtype of the given one."""
    sharding = explicit_sharding(kernel)
    kernel = on_every_device(kernel, sharding)
    nearest, _ = _nearest(kernel, operators, settings, None)
    error = _eps(kernel.dtype) * _frobenius(nearest) if nearest.dtype != kernel.dtype else 0.0
    stored = _kept_or(kernel, nearest, _share(kernel, operators, settings, error)).astype(kernel.dtype)
    return stored if sharding is None else jax.sharding.reshard(stored, sharding)


def bounded_change(
    kernel: jax.Array,
    change: jax.Array,
    operators: tuple[Operator, ...],
    settings: ProjectionSettings,
    dual: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the change after which the stored kernel is within the bound, and the next dual variables."""
    sharding = explicit_sharding(kernel)
    kernel, change, dual = (on_every_device(array, sharding) for array in (kernel, change, dual))
    updated = (kernel + change).astype(kernel.dtype)
    nearest, dual = _nearest(updated, operators, settings, dual)
    # The stored kernel is fl(kernel + fl(nearest - kernel)). Each of the two sums rounds with the eps of the change's
    # dtype, and the result is rounded to the kernel's dtype.
    size = _frobenius(nearest)
    error = _eps(change.dtype) * (_frobenius(kernel) + 2 * size) + _eps(kernel.dtype) * size
    target = _kept_or(updated, nearest, _share(kernel, operators, settings, error))
    same = jnp.all(nearest == updated)
    change = jnp.where(same, change, (target - kernel).astype(change.dtype))
    return change if sharding is None else jax.sharding.reshard(change, sharding), dual


def explicit_sharding(kernel: jax.Array) -> NamedSharding | None:
    """Return a kernel's sharding over an explicit mesh, or None: not every operation resolves such a sharding."""
    sharding = jax.typeof(kernel).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def on_every_device(array: jax.Array | None, sharding: NamedSharding | None) -> jax.Array | None:
    """Return an array with a whole copy on every device of the mesh of a sharding."""
    if array is None or sharding is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def _kept_or(kernel: jax.Array, nearest: jax.Array, share: jax.Array) -> jax.Array:
    """Return the nearest kernel times `share`, which is at most 1, or the kernel itself if it is the nearest."""
    return jnp.where(jnp.all(nearest == kernel), nearest, nearest * share.astype(nearest.dtype))


def _share(
    kernel: Any, operators: tuple[Operator, ...], settings: ProjectionSettings, error: jax.Array | float
) -> jax.Array:
    """Return a factor for a kernel within the bound, so that it stays within after an error of a Frobenius norm.

    The norm of an operator is at most the sum of the norms of its taps. So it is at most the root of the number of taps
    times the Frobenius norm.
    """
    if settings.bound == 0:
        return jnp.zeros(())
    conv = operators[0].conv
    taps = [kernel.shape[conv.layout.index(letter)] for letter in conv.spatial]
    smallest = float(jnp.finfo(kernel.dtype).smallest_subnormal) * math.sqrt(kernel.size)
    largest = math.sqrt(math.prod(taps)) * max(operator.padding_norm for operator in operators)
    return jnp.clip(1 - ROUNDING_MARGIN * largest * (error + smallest) / settings.bound, 0, 1)


def _eps(dtype: Any) -> float:
    """Return the largest relative error of rounding to a dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def _frobenius(kernel: jax.Array) -> jax.Array:
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.abs(wide) ** 2))
