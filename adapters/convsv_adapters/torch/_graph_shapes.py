"""Operators of PyTorch programs that rearrange, copy, pad or leave out elements, as kinds of maps."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from convsv_adapters._networks import Traced, Undescribed, describe_gather, describe_stack
from convsv_adapters.torch._calls import Call, Result, Rule, host
from convsv_core.networks import Concatenate, Expand, Pad, Permute, Reshape, Slice

__all__ = ["SHAPE_RULES"]


def _reshape(call: Call) -> Result:
    return call.result(Reshape(), call.tensors[0])


def _permute(call: Call) -> Result:
    x = call.traced("self")
    return call.result(Permute(tuple(int(axis) % len(x.shape) for axis in call["dims"])), x)


def _transpose(call: Call) -> Result:
    """Exchange two axes: the two that the operator names, or the last two of a matrix."""
    x = call.traced("self")
    order = list(range(len(x.shape)))
    if len(order) > 1:
        one, two = (int(call[name]) % len(order) if name in call else at for name, at in (("dim0", -2), ("dim1", -1)))
        order[one], order[two] = order[two], order[one]
    return call.result(Permute(tuple(order)), x)


def _expand(call: Call) -> Result:
    return call.result(Expand(), call.traced("self"))


# ---- parts of a tensor -------------------------------------------------------------------------------------


def _sliced(call: Call, x: Traced, axis: int, part: slice, *, shape: Any = None, final: bool = True) -> Traced:
    """Describe a slice along one axis."""
    kind = Slice(tuple(part if place == axis else slice(None) for place in range(len(x.shape))))
    extents = list(x.shape)
    extents[axis] = len(range(*part.indices(x.shape[axis])))
    return call.result(kind, x, shape=extents) if final else call.step(kind, x, shape=extents)


def _slice(call: Call) -> Result:
    x = call.traced("self")
    axis = int(call["dim"]) % len(x.shape)
    return _sliced(call, x, axis, slice(*slice(call["start"], call["end"], call["step"]).indices(x.shape[axis])))


def _select(call: Call) -> Result:
    x = call.traced("self")
    axis = int(call["dim"]) % len(x.shape)
    place = int(call["index"]) % x.shape[axis]
    part = _sliced(call, x, axis, slice(place, place + 1), final=False)
    return call.result(Reshape(), part)


def _parts(call: Call) -> Result:
    """Describe the parts of a split along an axis, from the shapes that it returns."""
    x = call.traced("self")
    axis = int(call["dim"]) % len(x.shape)
    found, start = [], 0
    for shape in call.shapes:
        found.append(_sliced(call, x, axis, slice(start, start + shape[axis])))
        start += shape[axis]
    return tuple(found)


def _unbind(call: Call) -> Result:
    x = call.traced("self")
    axis = int(call["dim"]) % len(x.shape)
    parts = [_sliced(call, x, axis, slice(place, place + 1), final=False) for place in range(x.shape[axis])]
    return tuple(call.result(Reshape(), part) for part in parts)


def _flip(call: Call) -> Result:
    x = call.traced("self")
    axes = {int(axis) % len(x.shape) for axis in call["dims"]}
    slices = (slice(None, None, -1 if axis in axes else 1) for axis in range(len(x.shape)))
    return call.result(Slice(tuple(slices)), x)


# ---- elements by constant indices ------------------------------------------------------------------------------


def _roll(call: Call) -> Result:
    x = call.traced("self")
    if not call["dims"]:
        raise Undescribed("a roll of all elements in a row")
    indices: dict[int, Any] = {}
    for shift, axis in zip(call["shifts"], call["dims"], strict=True):
        at = int(axis) % len(x.shape)
        indices[at] = np.roll(indices.get(at, np.arange(x.shape[at])), int(shift))
    return describe_gather(call, x, indices)


def _repeat(call: Call) -> Result:
    x = call.traced("self")
    times = [int(one) for one in call["repeats"]]
    new = len(times) - len(x.shape)
    if new:
        x = call.step(Reshape(), x, shape=(*(1,) * new, *x.shape))
    chosen = {axis: np.tile(np.arange(x.shape[axis]), count) for axis, count in enumerate(times) if count != 1}
    return describe_gather(call, x, chosen)


def _repeat_interleave(call: Call) -> Result:
    x = call.traced("self")
    if not isinstance(call["repeats"], int) or call["dim"] is None:
        raise Undescribed("a repetition whose counts are not one number")
    axis = int(call["dim"]) % len(x.shape)
    return describe_gather(call, x, {axis: np.repeat(np.arange(x.shape[axis]), call["repeats"])})


def _index_select(call: Call) -> Result:
    x = call.traced("self")
    return describe_gather(call, x, {int(call["dim"]) % len(x.shape): _indices(call["index"])})


def _index(call: Call) -> Result:
    x = call.traced("self")
    given = {axis: one for axis, one in enumerate(call["indices"]) if one is not None}
    if len(given) != 1:
        raise Undescribed("indices along several axes at once")
    ((axis, index),) = given.items()
    return describe_gather(call, x, {axis: _indices(index) % x.shape[axis]})


def _indices(value: Any) -> Any:
    """Return an index tensor as an array; raise Undescribed if it depends on the network's input or is a mask."""
    if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
        raise Undescribed("an index that is a mask or depends on the input of the network")
    return host(value).astype(np.int64)


# ---- padding and joining ---------------------------------------------------------------------------------------


Mode: TypeAlias = Literal["constant", "reflect", "replicate", "circular"]


def _pad(call: Call) -> Result:
    words: dict[str, Mode] = {"reflect": "reflect", "replicat": "replicate", "circular": "circular"}
    # Where the mode is no argument, the operator's name says it, as in reflection_pad2d.
    named = call.get("mode", call.op)
    mode: Mode = next((mode for word, mode in words.items() if word in named), "constant")
    value = call.get("value")
    x = call.traced("self")
    sides = [int(one) for one in call["pad" if "pad" in call else "padding"]]
    pairs = list(zip(sides[::2], sides[1::2], strict=True))[::-1]
    pads = ((0, 0),) * (len(x.shape) - len(pairs)) + tuple(pairs)
    return call.result(Pad(pads, mode, 0.0 if value is None else float(value)), x)


def _concatenate(call: Call) -> Result:
    tensors = call["tensors"]
    axis = int(call["dim"]) % len(call.shape)
    # PyTorch lets one join an empty tensor of one axis to anything.
    kept = [call.as_traced(one) for one in tensors if isinstance(one, Traced) or tuple(one.shape) != (0,)]
    return call.result(Concatenate(axis), *kept)


def _stack(call: Call) -> Result:
    return describe_stack(call, call["tensors"], int(call["dim"]) % len(call.shape))


# ---- channels and pixels ---------------------------------------------------------------------------------------


def _pixel_shuffle(call: Call) -> Result:
    """Move blocks of channels to the pixels: (C r r, H, W) to (C, H r, W r)."""
    x, r = call.traced("self"), int(call["upscale_factor"])
    *batch, channels, height, width = x.shape
    n = len(batch)
    return _rearranged(
        call, (*batch, channels // r**2, r, r, height, width), (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    )


def _pixel_unshuffle(call: Call) -> Result:
    """Move blocks of pixels to the channels: (C, H r, W r) to (C r r, H, W)."""
    x, r = call.traced("self"), int(call["downscale_factor"])
    *batch, channels, height, width = x.shape
    n = len(batch)
    return _rearranged(
        call, (*batch, channels, height // r, r, width // r, r), (*range(n), n, n + 2, n + 4, n + 1, n + 3)
    )


def _channel_shuffle(call: Call) -> Result:
    x, groups = call.traced("self"), int(call["groups"])
    batch, channels, *extents = x.shape
    order = (0, 2, 1, *range(3, 3 + len(extents)))
    return _rearranged(call, (batch, groups, channels // groups, *extents), order)


def _rearranged(call: Call, shape: tuple[int, ...], order: tuple[int, ...]) -> Result:
    """Describe a reshape, a permutation, and a reshape to the shape that the operator returns."""
    split = call.step(Reshape(), call.traced("self"), shape=shape)
    moved = call.step(Permute(order), split, shape=[shape[axis] for axis in order])
    return call.result(Reshape(), moved)


SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshape),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t", "numpy_T", "mT", "swapaxes"), _transpose),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _parts),
    "unbind": _unbind,
    "flip": _flip,
    "roll": _roll,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "index_select": _index_select,
    "index": _index,
    **dict.fromkeys(("pad", "constant_pad_nd", "_pad_circular"), _pad),
    **{f"{kind}_pad{n}d": _pad for kind in ("reflection", "replication") for n in (1, 2, 3)},
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenate),
    "stack": _stack,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
}
"""The rules of operators that move elements, by the operators' names in ATen."""
