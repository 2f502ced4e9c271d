"""Pooling, reductions and resizing of PyTorch programs as kinds of maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from convsv_adapters._networks import Traced, Undescribed, adaptive_matrix
from convsv_adapters.torch._calls import Call, Result, Rule
from convsv_core.conv import Pads, per_axis
from convsv_core.networks import AveragePool, AxisMaps, MaxPool, Reduce, Scale

__all__ = ["POOL_RULES"]


# ---- pooling with windows ----------------------------------------------------------------------------------


def _average_pool(call: Call) -> Result:
    x = call.traced("self")
    window, strides, padding, _ = _windows(call, x)
    included = call["count_include_pad"]
    counted = tuple((p, p) if included else (0, 0) for p in padding)
    ones = (1,) * len(x.shape)
    kind = AveragePool(window, strides, ones, _rounded(call, x, window, strides, ones, padding), counted)
    divisor = call.get("divisor_override")
    if divisor is None:
        return call.result(kind, x)
    # A window that the rounding up moves over the edge has fewer elements, so all that is added has to count.
    kind = AveragePool(window, strides, ones, kind.padding, kind.padding)
    average = call.step(kind, x, shape=call.shape)
    return call.result(Scale(np.asarray(float(np.prod(window)) / divisor)), average)


def _max_pool(call: Call) -> Result:
    x = call.traced("self")
    window, strides, padding, ndim = _windows(call, x)
    dilations = (1,) * (len(x.shape) - ndim) + per_axis("dilation", _one(call["dilation"]), ndim, least=1)
    pads = _rounded(call, x, window, strides, dilations, padding)
    return call.result(MaxPool(window, strides, dilations, pads), x)


def _windows(call: Call, x: Traced) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Return window, strides and padding with one entry for each axis, and the number of spatial axes."""
    ndim = next(n for n in (1, 2, 3) if f"pool{n}d" in call.op)
    before = len(x.shape) - ndim
    size = per_axis("kernel_size", _one(call["kernel_size"]), ndim, least=1)
    step = per_axis("stride", _one(call["stride"]) or size, ndim, least=1)
    pad = per_axis("padding", _one(call["padding"]), ndim, least=0)
    return (1,) * before + size, (1,) * before + step, (0,) * before + pad, ndim


def _one(value: Any) -> Any:
    """Return the entry of a sequence of one, and None for an empty sequence."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 else tuple(value) or None
    return value


def _rounded(call: Call, x: Traced, window: Any, strides: Any, dilations: Any, padding: tuple[int, ...]) -> Pads:
    """Return the padding before and after each axis, with what `ceil_mode` needs at the end."""
    pairs = []
    for n, k, s, d, p, out in zip(x.shape, window, strides, dilations, padding, call.shape, strict=True):
        needed = (out - 1) * s + d * (k - 1) + 1
        pairs.append((p, max(p, needed - n - p)))
    return tuple(pairs)


# ---- adaptive pooling ------------------------------------------------------------------------------------------


def _adaptive_average(call: Call) -> Result:
    x, axes = _spatial(call)
    if all(call.shape[axis] == 1 for axis in axes):
        return call.result(Reduce("mean", axes), x)
    if (window := _divided(call, x)) is not None:
        none = ((0, 0),) * len(x.shape)
        return call.result(AveragePool(window, window, (1,) * len(x.shape), none, none), x)
    matrices = {axis: adaptive_matrix(call.shape[axis], x.shape[axis]) for axis in axes}
    return call.result(AxisMaps(matrices), x)


def _adaptive_max(call: Call) -> Result:
    x, axes = _spatial(call)
    if all(call.shape[axis] == 1 for axis in axes):
        return call.result(Reduce("max", axes), x)
    if (window := _divided(call, x)) is None:
        raise Undescribed("adaptive max pooling with windows that overlap")
    none = ((0, 0),) * len(x.shape)
    return call.result(MaxPool(window, window, (1,) * len(x.shape), none), x)


def _spatial(call: Call) -> tuple[Traced, tuple[int, ...]]:
    """Return the input of a pooling, and its spatial axes."""
    x = call.traced("self")
    ndim = next(n for n in (1, 2, 3) if f"pool{n}d" in call.op)
    return x, tuple(range(len(x.shape) - ndim, len(x.shape)))


def _divided(call: Call, x: Traced) -> tuple[int, ...] | None:
    """Return the windows of an adaptive pooling if they are disjoint and of one size, else None."""
    if any(n % out for n, out in zip(x.shape, call.shape, strict=True)):
        return None
    return tuple(n // out for n, out in zip(x.shape, call.shape, strict=True))


# ---- reductions ------------------------------------------------------------------------------------------------

Function: TypeAlias = Literal["sum", "mean", "max", "min", "l1", "l2", "logsumexp"]


def _reduction(function: Function) -> Rule:
    """Return the rule of a reduction along the axes that the operator names, or along all."""

    def rule(call: Call) -> Result:
        x = call.traced("self")
        return call.result(Reduce(function, _axes(call, x)), x)

    return rule


def _axes(call: Call, x: Traced) -> tuple[int, ...]:
    given = call.get("dim")
    if given is None or given == []:
        return tuple(range(len(x.shape)))
    axes = given if isinstance(given, list | tuple) else (given,)
    return tuple(sorted(int(axis) % max(len(x.shape), 1) for axis in axes))


def _norm(call: Call) -> Result:
    x = call.traced("self")
    functions: dict[float, Function] = {1.0: "l1", 2.0: "l2"}
    if (order := call["ord" if "ord" in call else "p"]) not in functions:
        raise Undescribed(f"a norm of order {order}")
    return call.result(Reduce(functions[order], _axes(call, x)), x)


def _cumulative_sum(call: Call) -> Result:
    x = call.traced("self")
    axis = int(call["dim"]) % len(x.shape)
    return call.result(AxisMaps({axis: np.tril(np.ones((x.shape[axis],) * 2))}), x)


# ---- resizing --------------------------------------------------------------------------------------------------


def _resizing(resize: Callable[[torch.Tensor, int, Call, int], torch.Tensor]) -> Rule:
    """Return the rule of an interpolation that is one matrix an axis, found by resizing the identity matrix."""

    def rule(call: Call) -> Result:
        x = call.traced("input" if "input" in call else "self")
        matrices = {}
        for axis in range(2, len(x.shape)):
            identity = torch.eye(x.shape[axis], dtype=torch.float64)[:, None, :]
            # Row j of the result is the image of the j-th unit vector.
            resized = resize(identity, call.shape[axis], call, axis - 2)
            matrices[axis] = resized[:, 0, :].T.numpy().copy()
        return call.result(AxisMaps(matrices), x)

    return rule


def _scale_factor(call: Call, axis: int) -> float | None:
    """Return the factor that the caller gave for a spatial axis; None where the extents decide."""
    if "scale_factors" in call:
        return float(call["scale_factors"][axis]) if call["scale_factors"] else None
    names = ("scales_d", "scales_h", "scales_w")
    held = [call[name] for name in names if name in call] or [call["scales"]]
    return held[axis]


def _nearest(x: torch.Tensor, extent: int, call: Call, axis: int) -> torch.Tensor:
    return torch.ops.aten.upsample_nearest1d.default(x, [extent], _scale_factor(call, axis))


def _nearest_exact(x: torch.Tensor, extent: int, call: Call, axis: int) -> torch.Tensor:
    return torch.ops.aten._upsample_nearest_exact1d.default(x, [extent], _scale_factor(call, axis))


def _linear(x: torch.Tensor, extent: int, call: Call, axis: int) -> torch.Tensor:
    return torch.ops.aten.upsample_linear1d.default(x, [extent], call["align_corners"], _scale_factor(call, axis))


def _cubic(x: torch.Tensor, extent: int, call: Call, axis: int) -> torch.Tensor:
    # There is no cubic interpolation of one axis. Along an axis of one element the weights add up to 1.
    image = x[:, :, None, :]
    factor = _scale_factor(call, axis)
    resized = torch.ops.aten.upsample_bicubic2d.default(image, [1, extent], call["align_corners"], None, factor)
    return resized[:, :, 0, :]


POOL_RULES: dict[str, Rule] = {
    **{f"avg_pool{n}d": _average_pool for n in (1, 2, 3)},
    **{f"max_pool{n}d{suffix}": _max_pool for n in (1, 2, 3) for suffix in ("", "_with_indices")},
    **{f"{name}adaptive_avg_pool{n}d": _adaptive_average for n in (1, 2, 3) for name in ("", "_")},
    **{f"adaptive_max_pool{n}d": _adaptive_max for n in (1, 2, 3)},
    "sum": _reduction("sum"),
    "mean": _reduction("mean"),
    **dict.fromkeys(("amax", "max"), _reduction("max")),
    **dict.fromkeys(("amin", "min"), _reduction("min")),
    "logsumexp": _reduction("logsumexp"),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm),
    "cumsum": _cumulative_sum,
    **{f"upsample_nearest{n}d": _resizing(_nearest) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _resizing(_nearest_exact) for n in (1, 2, 3)},
    **{name: _resizing(_linear) for name in ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")},
    "upsample_bicubic2d": _resizing(_cubic),
}
"""The rules of pooling, reductions and resizing, by the operators' names in ATen."""
