"""Reshaping, slicing, padding and gathering of ONNX as kinds of maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convsv_adapters._networks import Undescribed
from convsv_adapters.formats.onnx.graph import Node
from convsv_adapters.formats.onnx.layers import read_pad
from convsv_adapters.formats.onnx.operators import Reading, operator
from convsv_core.networks import Concatenate, Expand, Gather, Identity, Pad, Permute, Reshape, Slice

__all__: list[str] = []

PAD_KINDS = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
"""The mode of the core for each mode of a Pad node."""


@operator("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    reading.add(node, Reshape(), node.input[:1])


@operator("Transpose")
def _transpose(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    rank = len(reading.shape(node.input[0]))
    reading.add(node, Permute(tuple(values.get("perm", reversed(range(rank))))), node.input[:1])


@operator("Expand")
def _expand(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    reading.add(node, Expand(), node.input[:1])


@operator("Concat")
def _concatenate(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    rank = len(reading.shape(node.output[0]))
    if len(node.input) == 1:
        reading.add(node, Identity(), node.input)
    else:
        reading.add(node, Concatenate(values.get("axis", 1) % rank), node.input)


@operator("Slice")
def _slice(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape = reading.shape(node.input[0])
    lists = [values.get("starts"), values.get("ends"), values.get("axes"), None]
    for index in range(1, len(node.input)):
        given = reading.optional(node, index)
        lists[index - 1] = None if given is None else [int(number) for number in given.reshape(-1)]
    starts, ends, axes, steps = lists
    if starts is None or ends is None:
        raise ValueError("it has no starts or ends")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    slices = [slice(None)] * len(shape)
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        extent = shape[axis % len(shape)]
        # Python reads a stop of -1 as the last element, and ONNX's clamped one as before the first.
        low, high = (start + extent if start < 0 else start), (stop + extent if stop < 0 else stop)
        if step > 0:
            slices[axis % len(shape)] = slice(min(max(low, 0), extent), min(max(high, 0), extent), step)
        else:
            high = min(max(high, -1), extent - 1)
            slices[axis % len(shape)] = slice(min(max(low, 0), extent - 1), None if high < 0 else high, step)
    reading.add(node, Slice(tuple(slices)), node.input[:1])


@operator("Split")
def _split(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape = reading.shape(node.input[0])
    axis = values.get("axis", 0) % len(shape)
    start = 0
    for index, name in enumerate(node.output):
        if not name:
            raise Undescribed("one of its parts has no name, so that the extents of the next are open")
        stop = start + reading.shape(name)[axis]
        part = tuple(slice(start, stop) if place == axis else slice(None) for place in range(len(shape)))
        reading.add(node, Slice(part), node.input[:1], output=index)
        start = stop


@operator("Gather")
def _gather(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    if not reading.is_constant(node.input[1]):
        raise Undescribed("which elements it takes depends on the input")
    rank = len(reading.shape(node.input[0]))
    reading.add(
        node, Gather(reading.constant(node.input[1]).astype(np.int64), values.get("axis", 0) % rank), node.input[:1]
    )


@operator("Tile")
def _tile(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape = reading.shape(node.input[0])
    repeats = [int(count) for count in reading.constant(node.input[1]).reshape(-1)]
    name = node.input[0]
    for axis, count in enumerate(repeats):
        if count != 1:
            shape = tuple(extent * count if place == axis else extent for place, extent in enumerate(shape))
            indices = np.tile(np.arange(shape[axis] // count), count)
            name = reading.step(node, f"axis-{axis}", Gather(indices, axis), [name], shape)
    reading.add(node, Identity(), [name])


@operator("Pad")
def _pad(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    pad = read_pad(reading.scope, node, len(reading.shape(node.input[0])))
    reading.add(node, Pad(pad.sides, PAD_KINDS[pad.mode], pad.value), node.input[:1])  # type: ignore[arg-type]


@operator("DepthToSpace", "SpaceToDepth")
def _blocks(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    batch, channels, height, width = reading.shape(node.input[0])
    size = int(values["blocksize"])
    if node.op_type == "SpaceToDepth":
        split = (batch, channels, height // size, size, width // size, size)
        order = (0, 3, 5, 1, 2, 4)
    elif values.get("mode", "DCR") == "DCR":
        split = (batch, size, size, channels // size**2, height, width)
        order = (0, 3, 4, 1, 5, 2)
    else:
        split = (batch, channels // size**2, size, size, height, width)
        order = (0, 1, 4, 2, 5, 3)
    assert math.prod(split) == batch * channels * height * width
    name = reading.step(node, "split", Reshape(), node.input[:1], split)
    name = reading.step(node, "permuted", Permute(order), [name], tuple(split[axis] for axis in order))
    reading.add(node, Reshape(), [name])
