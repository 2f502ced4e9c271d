"""Frequencies shared out over the devices of a JAX mesh; only results are gathered.

To XLA's partitioner a decomposition is an opaque call of a library, which it cannot split. So `jax.shard_map`
splits the rows of frequencies. Every device has the whole kernel, and computes and decomposes the symbol at its
own frequencies.

The mesh is the mesh on which the kernel lies, or the mesh of `jax.set_mesh`. If an axis of the mesh is manual,
the call is inside a `shard_map` of the user. Then each device works for itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from convsv_core.backend import Array

__all__ = ["devices_of_mesh", "on_every_device", "on_mesh_of", "share_out", "with_automatic_axes"]


def on_mesh_of(arrays: Sequence[Array]) -> AbstractContextManager[object]:
    """Return a context manager that enters the mesh of one of `arrays`, unless the user has entered a mesh."""
    import jax

    if not _has_meshes() or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    meshes = [sharding.mesh.abstract_mesh for sharding in map(_known_sharding, arrays) if sharding is not None]
    return jax.sharding.use_abstract_mesh(meshes[0]) if meshes else contextlib.nullcontext()


def on_every_device(array: Array) -> Array:
    """Return `array` with a whole copy on every device of its mesh.

    This gathers the array once. Otherwise every use of it would gather it again.
    """
    import jax

    if not _has_meshes():
        return array
    everywhere = jax.sharding.PartitionSpec()
    sharding = _known_sharding(array)
    if sharding is not None:
        if all(axes is None for axes in sharding.spec):
            return array
        move = jax.sharding.reshard if isinstance(array, jax.core.Tracer) else jax.device_put
        return move(array, jax.sharding.NamedSharding(sharding.mesh, everywhere))
    if isinstance(array, jax.core.Tracer) and devices_of_mesh() > 1:
        # The call is compiled, because the tracer of a gradient may stand for an array on one device.
        return jax.jit(jax.lax.with_sharding_constraint, static_argnums=1)(array, everywhere)
    return array


def _known_sharding(array: Array) -> Any | None:
    """Return the sharding of `array` on a mesh of several devices, or None if there is none or it is unknown.

    The sharding of a tracer is known where the axes of the mesh are explicit.
    """
    import jax

    sharding = jax.typeof(array).sharding if isinstance(array, jax.core.Tracer) else array.sharding
    several = isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1
    return sharding if several and not _is_manual(sharding.mesh) else None


def with_automatic_axes(function: Callable[..., Any], arrays: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
    """Call ``function(*arrays, *static)`` and let XLA choose how arrays lie on the mesh.

    Every device gets the whole results. On explicit axes, which `jax.make_mesh` makes, every operation would
    have to state the sharding of its result.
    """
    import jax

    if not _has_meshes():
        return function(*arrays, *static)

    def call(*arrays: Any) -> Any:
        return function(*arrays, *static)

    mesh = jax.sharding.get_abstract_mesh()
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    ]
    if explicit:
        call = jax.sharding.auto_axes(call, axes=tuple(explicit), out_sharding=jax.sharding.PartitionSpec())
    return call(*arrays)


def devices_of_mesh() -> int:
    """Return the number of devices over which rows can be shared out.

    It is 1 without a mesh, and inside a `shard_map` of the user.
    """
    import jax

    if not _has_meshes():
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if _is_manual(mesh) else math.prod(mesh.axis_sizes)


def share_out(function: Callable[[Array, Any], Any], rows: np.ndarray[Any, Any], arrays: Any) -> Any:
    """Return ``function(rows, arrays)``, with equal shares of the rows computed by the devices of the mesh.

    If the number of devices does not divide the number of rows, some devices compute the last row again. If there
    are fewer rows than devices, every device computes all rows.
    """
    import jax

    count = len(rows)
    if count < devices_of_mesh():
        return function(jax.numpy.asarray(rows), arrays)
    everywhere = jax.sharding.PartitionSpec()
    over_rows = jax.sharding.PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)
    filled = rows[np.minimum(np.arange(-(-count // devices_of_mesh()) * devices_of_mesh()), count - 1)]
    results = jax.shard_map(function, in_specs=(over_rows, everywhere), out_specs=over_rows)(filled, arrays)
    return jax.tree.map(lambda part: part[:count], results)


def _is_manual(mesh: Any) -> bool:
    """Return whether a `shard_map` of the user is using the mesh."""
    import jax

    return jax.sharding.AxisType.Manual in mesh.axis_types


def _has_meshes() -> bool:
    """Return whether this version of JAX has the functions that are used here: JAX 0.8 and later have them."""
    import jax

    return hasattr(jax, "set_mesh") and hasattr(jax, "shard_map")
