"""Chains of slices, flips, paddings and concatenations of one array, as one choice of elements along each axis.

JAX has no primitive for circular, reflected and replicated padding: `jax.numpy.pad` and flax concatenate slices.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from convsv_adapters._jax.equations import Constant, Operand, Value
from convsv_core.networks import Pad

__all__ = ["IndexMap", "as_padding", "index_map"]

Indices: TypeAlias = npt.NDArray[np.int64]

MODES = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}
"""NumPy's words for the modes of a `Pad`."""


class IndexMap(NamedTuple):
    """An array whose element ``[i, j, ...]`` is ``source[axes[0][i], axes[1][j], ...]``, or 0 where an index is -1."""

    source: Value
    axes: tuple[Indices, ...]


def index_map(value: Value) -> IndexMap:
    """Return the array as elements of the earliest array that it is a choice of elements of, axis by axis."""
    equation = value.equation
    name = equation.primitive if equation is not None else ""
    if equation is None or name not in ("slice", "rev", "pad", "concatenate", "copy", "reshape"):
        return _own(value)
    if name == "concatenate":
        return _joined(value, equation.operands, equation.params["dimension"])
    x = equation.operands[0]
    if not isinstance(x, Value) or (name == "pad" and not _is_zero(equation.operands[1])):
        return _own(value)
    if name == "reshape":
        return _repeated(value, x)
    source, axes = index_map(x)
    params = equation.params
    if name == "slice":
        strides = params["strides"] or (1,) * len(axes)
        limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        axes = tuple(one[start:stop:step] for one, (start, stop, step) in zip(axes, limits, strict=True))
    elif name == "rev":
        axes = tuple(one[::-1] if axis in params["dimensions"] else one for axis, one in enumerate(axes))
    elif name == "pad":
        axes = tuple(_padded(one, *config) for one, config in zip(axes, params["padding_config"], strict=True))
    return IndexMap(source, axes)


def _own(value: Value) -> IndexMap:
    return IndexMap(value, tuple(np.arange(extent) for extent in value.shape))


def _repeated(value: Value, wide: Value) -> IndexMap:
    """Return a reshape as the repetition of each element along an axis, as `jax.numpy.repeat` does it."""
    equation = wide.equation
    if equation is None or equation.primitive != "broadcast_in_dim" or not isinstance(x := equation.operands[0], Value):
        return _own(value)
    new = [axis for axis in range(len(wide.shape)) if axis not in equation.params["broadcast_dimensions"]]
    if len(new) != 1 or new[0] == 0 or wide.shape[: new[0]] + wide.shape[new[0] + 1 :] != x.shape:
        return _own(value)
    axis, count = new[0] - 1, wide.shape[new[0]]
    if value.shape != (*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 1 :]):
        return _own(value)
    source, axes = index_map(x)
    return IndexMap(source, (*axes[:axis], np.repeat(axes[axis], count), *axes[axis + 1 :]))


def _joined(value: Value, parts: tuple[Operand, ...], axis: int) -> IndexMap:
    """Return a concatenation of parts of one array, or the concatenation itself where they are of several."""
    own = _own(value)
    if not all(isinstance(one, Value) for one in parts):
        return own
    first, *others = [index_map(one) for one in parts if isinstance(one, Value)]
    for other in others:
        if other.source is not first.source:
            return own
        pairs = enumerate(zip(first.axes, other.axes, strict=True))
        if any(place != axis and not np.array_equal(*pair) for place, pair in pairs):
            return own
    joined = np.concatenate([one.axes[axis] for one in (first, *others)])
    return IndexMap(first.source, (*first.axes[:axis], joined, *first.axes[axis + 1 :]))


def _padded(indices: Indices, low: int, high: int, interior: int) -> Indices:
    """Return indices with -1 between and around them; negative numbers take away."""
    spread = np.full(max(len(indices) * (interior + 1) - interior, 0), -1)
    spread[:: interior + 1] = indices
    spread = np.pad(spread, (max(low, 0), max(high, 0)), constant_values=-1)
    return spread[max(-low, 0) : len(spread) - max(-high, 0)]


def _is_zero(value: Operand) -> bool:
    return isinstance(value, Constant) and not np.any(value.array)


def as_padding(found: IndexMap) -> Pad | None:
    """Return the choice of elements as a padding in one mode, or None if it is none."""
    sides = [_around(indices, extent) for indices, extent in zip(found.axes, found.source.shape, strict=True)]
    pads = [side for side in sides if side is not None]
    if len(pads) < len(sides) or not any(sum(pad) for pad in pads):
        return None
    for mode, word in MODES.items():
        rows: list[Any] = []
        for (low, high), extent in zip(pads, found.source.shape, strict=True):
            rows.append(np.pad(np.arange(extent), (low, high), mode=word))  # type: ignore[call-overload]
        if all(np.array_equal(row, indices) for row, indices in zip(rows, found.axes, strict=True)):
            return Pad(tuple(pads), mode)  # type: ignore[arg-type]
    return None


def _around(indices: Indices, extent: int) -> tuple[int, int] | None:
    """Return the numbers of elements before and after one whole run of an axis, of which there is one in a padding."""
    for low in np.flatnonzero(indices == 0):
        if np.array_equal(indices[low : low + extent], np.arange(extent)):
            return int(low), len(indices) - int(low) - extent
    return None
