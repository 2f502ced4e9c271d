"""Convolutions, pooling, normalisations and resizing of ONNX as kinds of maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convsv_adapters._networks import Undescribed
from convsv_adapters.formats.onnx.graph import Node
from convsv_adapters.formats.onnx.layers import declared_geometry
from convsv_adapters.formats.onnx.operators import Reading, operator
from convsv_adapters.formats.onnx.pads import forward_pads
from convsv_adapters.formats.onnx.resizing import resize_matrix
from convsv_core.networks import (
    AveragePool,
    AxisMaps,
    Convolution,
    LocalResponse,
    MaxPool,
    Normalize,
    Reshape,
    Scale,
)

__all__: list[str] = []


@operator("Conv", "ConvTranspose")
def _convolution(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    kernel = reading.constant(node.input[1])
    if not 3 <= kernel.ndim <= 5:
        raise Undescribed(f"a kernel of rank {kernel.ndim} is not supported")
    conv = declared_geometry(reading.scope, node, kernel, reading.shape(node.input[0]))
    reading.add(node, Convolution(kernel, conv, reading.optional(node, 2)), node.input[:1])


@operator("AveragePool", "MaxPool")
def _pool(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    if len(node.output) > 1 and node.output[1]:
        raise Undescribed("the places of its largest elements are used")
    shape, out = reading.shape(node.input[0]), reading.shape(node.output[0])
    window = tuple(values["kernel_shape"])
    ones = (1,) * len(window)
    strides, dilations = tuple(values.get("strides", ones)), tuple(values.get("dilations", ones))
    reach = [d * (w - 1) + 1 for w, d in zip(window, dilations, strict=True)]
    pads = tuple(forward_pads(values, shape[2:], strides, reach))
    # Rounding up the number of windows adds padding at the end, which the node does not declare.
    ends = zip(shape[2:], out[2:], strides, reach, pads, strict=True)
    whole = tuple((before, s * (m - 1) + r - n - before) for n, m, s, r, (before, _) in ends)
    none = ((0, 0), (0, 0))
    geometry = ((1, 1, *window), (1, 1, *strides), (1, 1, *dilations), (*none, *whole))
    if node.op_type == "MaxPool":
        reading.add(node, MaxPool(*geometry), node.input[:1])
        return
    counted = pads if values.get("count_include_pad", 0) else tuple((0, 0) for _ in pads)
    reading.add(node, AveragePool(*geometry, (*none, *counted)), node.input[:1])


# ---- normalisations ----------------------------------------------------------------


@operator("InstanceNormalization")
def _instance(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape = reading.shape(node.input[0])
    kind = Normalize(tuple(range(2, len(shape))), values.get("epsilon", 1e-5))
    inner = reading.step(node, "normalize", kind, node.input[:1], shape)
    reading.add(node, _per_channel(reading, node, len(shape)), [inner])


def _per_channel(reading: Reading, node: Node, rank: int) -> Scale:
    scale, shift = (np.asarray(reading.constant(name), np.float64) for name in node.input[1:3])
    per_channel = (-1, *(1,) * (rank - 2))
    return Scale(scale.reshape(per_channel), shift.reshape(per_channel))


@operator("GroupNormalization")
def _group(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape, groups = reading.shape(node.input[0]), int(values["num_groups"])
    split = (shape[0], groups, math.prod(shape[1:]) // groups)
    inner = reading.step(node, "groups", Reshape(), node.input[:1], split)
    inner = reading.step(node, "normalize", Normalize((2,), values.get("epsilon", 1e-5)), [inner], split)
    inner = reading.step(node, "joined", Reshape(), [inner], shape)
    scale, shift = (np.asarray(reading.constant(name), np.float64) for name in node.input[1:3])
    if reading.opset < 21 and len(scale) == groups:  # one number for each group
        scale, shift = (np.repeat(array, shape[1] // groups) for array in (scale, shift))
    per_channel = (-1, *(1,) * (len(shape) - 2))
    reading.add(node, Scale(scale.reshape(per_channel), shift.reshape(per_channel)), [inner])


@operator("LayerNormalization", "RMSNormalization")
def _layer(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    if any(node.output[1:]):
        raise Undescribed("its mean or spread is used elsewhere")
    shape = reading.shape(node.input[0])
    axes = tuple(range(values.get("axis", -1) % len(shape), len(shape)))
    kind = Normalize(axes, values.get("epsilon", 1e-5), node.op_type == "LayerNormalization")
    inner = reading.step(node, "normalize", kind, node.input[:1], shape)
    scale, shift = reading.optional(node, 1), reading.optional(node, 2)
    reading.add(
        node,
        Scale(np.ones(()) if scale is None else scale, np.zeros(()) if shift is None else shift),
        [inner],
    )


@operator("LRN")
def _local_response(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    kind = LocalResponse(
        1, values["size"], values.get("alpha", 1e-4), values.get("beta", 0.75), values.get("bias", 1.0)
    )
    reading.add(node, kind, node.input[:1])


# ---- resizing ----------------------------------------------------------------


@operator("Resize", "Upsample")
def _resize(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    shape, out = reading.shape(node.input[0]), reading.shape(node.output[0])
    if values.get("antialias", 0) or values.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Undescribed("resizing with antialiasing, or that keeps an aspect ratio, has no rule")
    early = node.op_type == "Upsample" or reading.opset < 11
    scales = values.get("scales") if reading.opset < 9 and node.op_type == "Upsample" else None
    if scales is None:
        given = reading.optional(node, 1 if early else 2)
        scales = None if given is None or not given.size else [float(scale) for scale in given]
    axes = [axis % len(shape) for axis in values.get("axes", range(len(shape)))]
    by_axis = {} if scales is None else dict(zip(axes, scales, strict=True))
    mode = "asymmetric" if early else values.get("coordinate_transformation_mode", "half_pixel")
    nearest = "floor" if early else values.get("nearest_mode", "round_prefer_floor")
    matrices = {}
    for axis, (n, m) in enumerate(zip(shape, out, strict=True)):
        scale = by_axis.get(axis, m / n)
        if n != m or scale != 1:
            matrices[axis] = resize_matrix(
                n,
                m,
                scale,
                method=values.get("mode", "nearest"),
                coordinates=mode,
                nearest=nearest,
                cubic=values.get("cubic_coeff_a", -0.75),
                inside=bool(values.get("exclude_outside", 0)),
            )
    reading.add(node, AxisMaps(matrices), node.input[:1])
