"""Frequencies over the devices of a mesh: each decomposes its share, and what is gathered are results.

XLA's partitioner does not know how to split a decomposition, which to it is a call of a library. So the rows of
frequencies are split by `jax.shard_map`, in which each device makes and decomposes the symbol at its own, from a
kernel that all of them have.

The mesh is the one that the kernel lies on, or that of `jax.set_mesh`. A mesh of which an axis is manual belongs to a
`shard_map` of the user's: there each device works for itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from convsv_core.backend import Array


def on_mesh_of(arrays: Sequence[Array]) -> AbstractContextManager[object]:
    """Enter the mesh that one of `arrays` lies on, unless the user has entered one."""
    import jax

    if not _has_meshes() or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    meshes = [sharding.mesh.abstract_mesh for sharding in map(_known_sharding, arrays) if sharding is not None]
    return jax.sharding.use_abstract_mesh(meshes[0]) if meshes else contextlib.nullcontext()


def on_every_device(array: Array) -> Array:
    """A copy of the whole of `array` on every device of its mesh: one gathering, where each use of it would be one."""
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
        # Compiled, since the tracer of a gradient alone may stand for an array on one device.
        return jax.jit(jax.lax.with_sharding_constraint, static_argnums=1)(array, everywhere)
    return array


def _known_sharding(array: Array) -> Any | None:
    """How `array` lies on a mesh of several devices. A tracer tells where the axes are explicit."""
    import jax

    sharding = jax.typeof(array).sharding if isinstance(array, jax.core.Tracer) else array.sharding
    several = isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1
    return sharding if several and not _is_manual(sharding.mesh) else None


def with_automatic_axes(function: Callable[..., Any], arrays: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
    """Call ``function(*arrays, *static)`` where XLA chooses how arrays lie on the mesh; every device gets the results.

    On explicit axes, which are what `jax.make_mesh` makes, each operation would have to be told.
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
    """Devices among which rows can be shared out: 1 where there is no mesh, or one that is in use otherwise."""
    import jax

    if not _has_meshes():
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if _is_manual(mesh) else math.prod(mesh.axis_sizes)


def share_out(function: Callable[[Array, Any], Any], rows: np.ndarray[Any, Any], arrays: Any) -> Any:
    """Results of ``function(rows, arrays)`` for each row, of which the devices of the mesh compute equal shares.

    Some rows are computed twice where the devices do not divide their number, and all of them by every device where
    there are fewer rows than devices.
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
    import jax

    return jax.sharding.AxisType.Manual in mesh.axis_types


def _has_meshes() -> bool:
    import jax

    return hasattr(jax, "set_mesh") and hasattr(jax, "shard_map")  # since JAX 0.8
