"""Gram matrices of several kernels, each at rows of its own, computed and tested by few calls of the library.

The kernels are the groups of one operand. A small kernel has few rows, and a call for each kernel would cost more time
than the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.rows import TABLE_BYTES, Eigenvalues, GramRows
from convsv_core._symbol.small_matrices import largest_eigenvalues
from convsv_core.backend import Array

__all__ = ["above_each", "largest_of_rows"]


def above_each(members: Sequence[GramRows], where: Sequence[HostArray], levels: Sequence[float]) -> list[HostArray]:
    """Tell for each kernel what `GramRows.above` tells: which of its rows are not shown to be at most its level.

    Parameters
    ----------
    members : sequence of GramRows
        The rows of each kernel, all of one shape and dtype, and on one device.
    where : sequence of arrays, shapes (rows,) or (rows, ndim)
        The rows of each kernel that are tested.
    levels : sequence of float
        The level of each kernel: the square of a norm.

    Returns
    -------
    list of bool arrays, shapes (rows,)
    """
    if not _worthwhile(members, where):
        return [member.above(rows, level) for member, rows, level in zip(members, where, levels, strict=True)]
    backend, xp = members[0].operand.backend, members[0].operand.xp
    lowered = [member.lowered(level) for member, level in zip(members, levels, strict=True)]
    tables = [member.table_at(rows, level) for member, rows, level in zip(members, where, lowered, strict=True)]

    def are_below(blocks: list[tuple[int, Array]]) -> Array:
        remainders = [members[index].remainders(block, lowered[index]) for index, block in blocks]
        return xp.all(backend.is_positive_definite(backend.concatenate(remainders)), axis=-1)

    with backend.products_context(min(members[0].operand.plan.block)):
        return [~below for below in _map_together(members, tables, are_below)]


def largest_of_rows(members: Sequence[GramRows], where: Sequence[HostArray]) -> list[Eigenvalues]:
    """Return for each kernel what `GramRows.largest` returns. The arguments are as for `above_each`."""
    if not _worthwhile(members, where):
        return [member.largest(rows) for member, rows in zip(members, where, strict=True)]
    backend, xp = members[0].operand.backend, members[0].operand.xp

    def of_blocks(blocks: list[tuple[int, Array]]) -> Array:
        grams = [members[index].matrices(block) for index, block in blocks]
        values = largest_eigenvalues(backend, backend.concatenate(grams))
        counts = np.cumsum([len(one) for one in grams])
        uppers = [
            values[stop - len(one) : stop, ...] + members[index].roundings(one)
            for (index, _), one, stop in zip(blocks, grams, counts, strict=True)
        ]
        return xp.stack([xp.max(values, axis=-1), xp.max(backend.concatenate(uppers), axis=-1)], axis=-1)

    tables = [member.table(rows) for member, rows in zip(members, where, strict=True)]
    found = _map_together(members, tables, of_blocks)
    return [Eigenvalues(*one.astype(float).T) for one in found]


def _worthwhile(members: Sequence[GramRows], where: Sequence[HostArray]) -> bool:
    """Tell whether several kernels have rows, and one table may hold them all.

    A library that compiles would compile for each combination of the kernels' numbers of rows.
    """
    counts = [len(rows) for rows in where if len(rows)]
    first = members[0]
    small = sum(counts) * first.row_bytes <= TABLE_BYTES
    return len(counts) > 1 and small and not first.operand.backend.compiles


def _map_together(
    members: Sequence[GramRows], tables: Sequence[HostArray], function: Callable[[list[tuple[int, Array]]], Array]
) -> list[HostArray]:
    """Return on the host, for each member, the results of a function of blocks of its table.

    The function gets a list of members' numbers, each with a block of this member's table on the device.
    """
    first = members[0]
    backend, kernel = first.operand.backend, first.operand.kernel
    bounds = [0, *itertools.accumulate(map(len, tables))]

    def of_places(places: Array) -> Array:
        chosen = backend.to_numpy(places)
        start, stop = int(chosen[0]), int(chosen[-1]) + 1
        blocks = []
        for index, table in enumerate(tables):
            low, high = max(start, bounds[index]), min(stop, bounds[index + 1])
            if low < high:
                part = table[low - bounds[index] : high - bounds[index]]
                blocks.append((index, backend.asarray_like(part, kernel)))
        return function(blocks)

    found: Any = backend.map_blocks(
        of_places, np.arange(bounds[-1]), kernel, row_bytes=first.row_bytes, budget=first.budget
    )
    return np.split(backend.to_numpy(found), bounds[1:-1])
