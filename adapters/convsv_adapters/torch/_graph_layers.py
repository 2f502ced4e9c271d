"""Convolutions, linear layers, normalisations and attention of PyTorch programs as kinds of maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from convsv_adapters._networks import Traced, Undescribed, stored_normalization
from convsv_adapters.torch._calls import Call, Result, Rule, host
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS, per_axis, transposed_conv
from convsv_core.networks import BranchMatmul, Convolution, Matmul, Normalize, Permute, Reshape, Scale, Softmax

__all__ = ["LAYER_RULES"]


# ---- convolutions ------------------------------------------------------------------------------------------


def _convolution(call: Call) -> Result:
    kernel = call.constant("weight")
    ndim = kernel.ndim - 2
    transposed = call.get("transposed", "output_padding" in call)
    stride, padding, dilation = (_axes(call[name], ndim) for name in ("stride", "padding", "dilation"))
    letters, geometry = SPATIAL_LETTERS[ndim], {"stride": stride, "dilation": dilation, "groups": call["groups"]}
    if transposed:
        extra = _axes(call["output_padding"], ndim)
        pads = [(p, p - e) for p, e in zip(padding, extra, strict=True)]
        conv = transposed_conv(f"IO{letters}", kernel.shape[2:], pads, **geometry)
    else:
        conv = Conv(f"OI{letters}", padding=padding, padding_mode="zeros", **geometry)
    x = call.traced("input")
    kind = Convolution(kernel, conv, call.constant("bias"))
    if len(x.shape) == ndim + 2:
        return call.result(kind, x)
    batched = call.step(Reshape(), x, shape=(1, *x.shape))
    made = call.step(kind, batched, shape=(1, *call.shape))
    return call.result(Reshape(), made)


def _axes(value: Any, ndim: int) -> Any:
    """Return one integer for each spatial axis, or the word for a padding."""
    if isinstance(value, str):
        return value
    value = tuple(value) if isinstance(value, list | tuple) else value
    return per_axis("value", value[0] if isinstance(value, tuple) and len(value) == 1 else value, ndim, least=None)


# ---- linear layers -------------------------------------------------------------------------------------------


def _linear(call: Call) -> Result:
    return call.result(Matmul(call.constant("weight").T, bias=call.constant("bias")), call.traced("input"))


def _matmul(call: Call) -> Result:
    x, y = call.arguments[:2]
    if isinstance(x, Traced) and isinstance(y, Traced):
        return call.result(BranchMatmul(), x, y)
    if isinstance(x, Traced):
        return call.result(Matmul(host(y)), x)
    return call.result(Matmul(host(x), side="left"), y)


def _addmm(call: Call) -> Result:
    """Describe ``beta * bias + alpha * (x @ y)``, with one of x and y a constant."""
    pairs = (("mat1", "mat2"), ("mat", "vec"), ("batch1", "batch2"))
    x, y = next((call[one], call[two]) for one, two in pairs if one in call)
    if isinstance(x, Traced) == isinstance(y, Traced):
        raise Undescribed("it adds a product of two tensors that depend on the input")
    left = not isinstance(x, Traced)
    matrix = np.asarray(host(x if left else y)) * float(call["alpha"])
    bias = call.constant("self") * float(call["beta"])
    return call.result(Matmul(matrix, "left" if left else "right", bias), y if left else x)


# ---- normalisations --------------------------------------------------------------------------------------------


def _batch_norm(call: Call) -> Result:
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    if mean is None or variance is None:
        raise Undescribed("it normalises by the mean and the variance of its batch, which is no fixed map")
    return _stored_norm(call, mean, variance)


def _stored_norm(call: Call, mean: Any, variance: Any) -> Traced:
    """Describe a normalisation by stored statistics, one for each channel of axis 1."""
    x = call.traced("input")
    weight, bias = call.constant("weight"), call.constant("bias")
    return call.result(stored_normalization(len(x.shape), mean, variance, call["eps"], weight, bias), x)


def _per_channel(x: Traced, *arrays: Any) -> list[Any]:
    """Return arrays of one number for each channel of axis 1 such that they broadcast against x."""
    return [array.reshape(-1, *(1,) * (len(x.shape) - 2)) for array in arrays]


def _layer_norm(call: Call) -> Result:
    x = call.traced("input")
    axes = tuple(range(len(x.shape) - len(call["normalized_shape"]), len(x.shape)))
    return _normalized(call, x, axes, call["eps"], call.constant("weight"), call.constant("bias"))


def _rms_norm(call: Call) -> Result:
    x = call.traced("input")
    axes = tuple(range(len(x.shape) - len(call["normalized_shape"]), len(x.shape)))
    # PyTorch takes the machine epsilon of the dtype in place of None.
    epsilon = torch.finfo(call.dtype).eps if call["eps"] is None else call["eps"]
    return _normalized(call, x, axes, epsilon, call.constant("weight"), None, centred=False)


def _instance_norm(call: Call) -> Result:
    if not call["use_input_stats"]:
        return _stored_norm(call, call.constant("running_mean"), call.constant("running_var"))
    x = call.traced("input")
    weight, bias = (None if one is None else _per_channel(x, one)[0] for one in map(call.constant, ("weight", "bias")))
    return _normalized(call, x, tuple(range(2, len(x.shape))), call["eps"], weight, bias)


def _group_norm(call: Call) -> Result:
    x = call.traced("input")
    batch, channels, *extents = x.shape
    groups = call["num_groups"]
    grouped = call.step(Reshape(), x, shape=(batch, groups, channels // groups, *extents))
    axes = tuple(range(2, len(grouped.shape)))
    normal = call.step(Normalize(axes, call["eps"]), grouped, shape=grouped.shape)
    weight, bias = call.constant("weight"), call.constant("bias")
    if weight is None and bias is None:
        return call.result(Reshape(), normal)
    flat = call.step(Reshape(), normal, shape=x.shape)
    scale, shift = _per_channel(x, np.ones(channels) if weight is None else weight, _or_zeros(bias, channels))
    return call.result(Scale(scale, shift), flat)


def _or_zeros(bias: Any, channels: int) -> Any:
    return np.zeros(channels) if bias is None else bias


def _normalized(
    call: Call, x: Traced, axes: tuple[int, ...], epsilon: float, weight: Any, bias: Any, *, centred: bool = True
) -> Result:
    """Describe a normalisation along axes, with an array to multiply by and an array to add, where there are."""
    kind = Normalize(axes, epsilon, centred)
    if weight is None and bias is None:
        return call.result(kind, x)
    normal = call.step(kind, x, shape=x.shape)
    scale, shift = np.ones(()) if weight is None else weight, np.zeros(()) if bias is None else bias
    return call.result(Scale(scale, shift), normal)


# ---- attention and recurrent cells -------------------------------------------------------------------------


def _recurrent(call: Call) -> Result:
    raise Undescribed("a recurrent cell, whose output comes back as an input")


def _attention(call: Call) -> Result:
    """Describe ``softmax(scale * query @ key^T + mask) @ value``."""
    if call["is_causal"] or call["enable_gqa"] or isinstance(call["attn_mask"], Traced):
        raise Undescribed("attention with a causal mask, a mask that depends on the input, or shared heads")
    query, key, value = (call.as_traced(call[name]) for name in ("query", "key", "value"))
    mask = call.constant("attn_mask")
    if mask is not None and not (mask.dtype.kind == "f" and np.all(np.isfinite(mask))):
        raise Undescribed("attention with a mask that leaves elements out")
    scale = call["scale"] if call["scale"] is not None else 1 / math.sqrt(query.shape[-1])
    order = (*range(len(key.shape) - 2), len(key.shape) - 1, len(key.shape) - 2)
    turned = call.step(Permute(order), key, shape=[key.shape[axis] for axis in order])
    scores = call.step(BranchMatmul(), query, turned, shape=(*query.shape[:-1], key.shape[-2]))
    shift = np.zeros(()) if mask is None else mask
    scaled = call.step(Scale(np.asarray(float(scale)), shift), scores, shape=scores.shape)
    weights = call.step(Softmax((len(scores.shape) - 1,)), scaled, shape=scores.shape)
    return call.result(BranchMatmul(), weights, value)


LAYER_RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), _matmul),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), _addmm),
    **dict.fromkeys(("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "scaled_dot_product_attention": _attention,
}
"""The rules of operators with weights, and of operators that multiply activations, by the operators' names in ATen."""
