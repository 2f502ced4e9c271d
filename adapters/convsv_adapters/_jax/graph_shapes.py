"""Primitives of JAX that rearrange, copy, pad or leave out elements, as kinds of maps."""

from __future__ import annotations

import numpy as np

from convsv_adapters._jax.calls import Call, Result, Rule
from convsv_adapters._jax.index_maps import as_padding, index_map
from convsv_adapters._networks import Undescribed, describe_gather, describe_stack
from convsv_core.networks import Concatenate, Expand, Gather, Pad, Permute, Reshape, Slice

__all__ = ["SHAPE_RULES"]


def _reshape(call: Call) -> Result:
    if call.equation.primitive == "reshape" and call.params["dimensions"] is not None:
        raise Undescribed("a reshape of a permuted array")
    return call.result(Reshape(), call.x)


def _transpose(call: Call) -> Result:
    return call.result(Permute(tuple(int(axis) for axis in call.params["permutation"])), call.x)


def _broadcast(call: Call) -> Result:
    places = call.params["broadcast_dimensions"]
    x = call.x
    lined = [x.shape[places.index(axis)] if axis in places else 1 for axis in range(len(call.shape))]
    if tuple(lined) == call.shape:
        return call.result(Reshape(), x)
    return call.result(Expand(), x if tuple(lined) == x.shape else call.step(Reshape(), x, shape=lined))


def _slice(call: Call) -> Result:
    params = call.params
    strides = params["strides"] or (1,) * len(call.shape)
    limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return call.result(Slice(tuple(slice(int(a), int(b), int(step)) for a, b, step in limits)), call.x)


def _dynamic_slice(call: Call) -> Result:
    starts = [int(call.constant(place)) for place in range(1, len(call.equation.operands))]
    shape = call.x.shape
    first = [min(max(start, 0), n - k) for start, n, k in zip(starts, shape, call.shape, strict=True)]
    return call.result(Slice(tuple(slice(a, a + k) for a, k in zip(first, call.shape, strict=True))), call.x)


def _split(call: Call) -> Result:
    axis, found, start = call.params["axis"], [], 0
    for one in call.equation.results:
        part = slice(start, start + one.shape[axis])
        slices = tuple(part if place == axis else slice(None) for place in range(len(one.shape)))
        found.append(call.result(Slice(slices), call.x, shape=one.shape))
        start += one.shape[axis]
    return tuple(found)


def _reverse(call: Call) -> Result:
    axes = call.params["dimensions"]
    return call.result(
        Slice(tuple(slice(None, None, -1 if axis in axes else 1) for axis in range(len(call.shape)))), call.x
    )


def _pad(call: Call) -> Result:
    value = call.constant(1)
    around = tuple((int(low), int(high)) for low, high, _ in call.params["padding_config"])
    between = tuple(int(interior) for _, _, interior in call.params["padding_config"])
    if any(between) and min(min(pair) for pair in around) < 0:
        # A `Pad` crops before it spreads the elements, JAX afterwards.
        none = ((0, 0),) * len(around)
        spread = [n + max(n - 1, 0) * gap for n, gap in zip(call.x.shape, between, strict=True)]
        x = call.step(Pad(none, value=float(value), interior=between), call.x, shape=spread)
        return call.result(Pad(around, value=float(value)), x)
    return call.result(Pad(around, value=float(value), interior=between if any(between) else None), call.x)


def _concatenate(call: Call) -> Result:
    found = index_map(call.equation.results[0])
    if found.source is not call.equation.results[0]:
        x = call.known[found.source]
        if (padding := as_padding(found)) is not None:
            return call.result(padding, x, op="pad")
        if all(np.all(indices >= 0) for indices in found.axes):
            return describe_gather(call, x, dict(enumerate(found.axes)))
    axis = int(call.params["dimension"])
    return call.result(Concatenate(axis), *(call.as_traced(one) for one in call.operands))


def _stack(call: Call) -> Result:
    return describe_stack(call, call.operands, int(call.params["axis"]))


def _tile(call: Call) -> Result:
    x, times = call.x, call.params["reps"]
    return describe_gather(call, x, {axis: np.tile(np.arange(n), times[axis]) for axis, n in enumerate(x.shape)})


def _gather(call: Call) -> Result:
    """Describe a choice along one axis by constant indices, as `jax.numpy.take` makes it."""
    numbers, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    x, indices = call.x, call.constant(1)
    if len(numbers.start_index_map) != 1 or indices.shape[-1] != 1 or getattr(numbers, "operand_batching_dims", ()):
        raise Undescribed("indices along several axes at once")
    (axis,) = numbers.start_index_map
    whole = all(size == (1 if place == axis else n) for place, (size, n) in enumerate(zip(sizes, x.shape, strict=True)))
    chosen = indices[..., 0]
    if not whole or not (chosen.min(initial=0) >= 0 and chosen.max(initial=0) < x.shape[axis]):
        raise Undescribed("a gather of blocks, or with indices outside of the array")
    kept = numbers.collapsed_slice_dims == (axis,)
    added = range(axis, axis + chosen.ndim)
    rank = len(x.shape) - kept + chosen.ndim
    if not kept or tuple(numbers.offset_dims) != tuple(place for place in range(rank) if place not in added):
        raise Undescribed("a gather whose result has its axes in another order")
    return call.result(Gather(chosen.astype(np.int64), int(axis)), x)


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "rev": _reverse,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "tile": _tile,
    "gather": _gather,
}
"""The rules of primitives that move elements, by their names in JAX."""
