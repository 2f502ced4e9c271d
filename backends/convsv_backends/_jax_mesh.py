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

from convsv_core.backend import Array, BlockFunction


def on_mesh_of(arrays: Sequence[Array]) -> AbstractContextManager[object]:
    """Enter the mesh that one of `arrays` lies on, unless the user has entered one."""
    import jax

    if not _has_meshes() or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    for array in arrays:
        # A tracer shows its mesh where the axes are explicit.
        sharding = jax.typeof(array).sharding if isinstance(array, jax.core.Tracer) else array.sharding
        if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1:
            return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
    return contextlib.nullcontext()


def with_automatic_axes(function: Callable[..., Any], arrays: tuple[Any, ...], static: tuple[Any, ...]) -> Any:
    """Call ``function(*arrays, *static)`` where XLA chooses how arrays lie on the mesh, but for the first, the operand.

    All devices get that one, which is small and of which each makes its own matrices. On explicit axes, which are
    what `jax.make_mesh` makes, each operation would have to be told how, and all devices get the results.
    """
    import jax

    if not _has_meshes() or jax.sharding.get_abstract_mesh().empty:
        return function(*arrays, *static)
    everywhere = jax.sharding.PartitionSpec()

    def call(operand: Any, *others: Any) -> Any:
        if devices_of_mesh() > 1:
            operand = jax.lax.with_sharding_constraint(operand, everywhere)
        return function(operand, *others, *static)

    explicit = _axes(jax.sharding.AxisType.Explicit)
    if explicit:
        call = jax.sharding.auto_axes(call, axes=explicit, out_sharding=everywhere)
    return call(*arrays)


def devices_of_mesh() -> int:
    """Devices among which rows can be shared out: 1 where there is no mesh."""
    import jax

    if not _has_meshes():
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    axes = _axes(jax.sharding.AxisType.Auto)
    return math.prod(mesh.shape[axis] for axis in axes) if len(axes) == len(mesh.axis_names) else 1


def share_out(function: BlockFunction) -> BlockFunction:
    """`function` of rows, each device with its share of them; their results in the order of the rows."""
    import jax

    if devices_of_mesh() == 1:
        return function
    rows = jax.sharding.PartitionSpec(_axes(jax.sharding.AxisType.Auto))
    return jax.shard_map(function, in_specs=rows, out_specs=rows)


def in_loops(function: BlockFunction, rows: Array, size: int) -> list[Any]:
    """Results of `function` on blocks of `size` rows, in one loop of the program, and on those left over."""
    import jax

    count = rows.shape[0]
    size = min(size, count)
    whole = count // size * size
    if whole == size:
        results = [function(rows[:size])]
    else:
        stacked = jax.lax.map(function, rows[:whole].reshape(-1, size, *rows.shape[1:]))
        results = [jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), stacked)]
    return results + ([function(rows[whole:])] if whole < count else [])


def _has_meshes() -> bool:
    import jax

    return hasattr(jax, "set_mesh") and hasattr(jax, "shard_map")  # since JAX 0.8


def _axes(kind: Any) -> tuple[str, ...]:
    import jax

    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, one in zip(mesh.axis_names, mesh.axis_types, strict=True) if one == kind)
