"""The geometry of flax's convolutions, of nnx and linen."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen, nnx

from convsv_adapters._jax.geometry import FoundConv, make_conv, make_transposed_conv, per_axis
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS
from convsv_core.layers import Extents

__all__ = ["flax_geometry", "kernel_size_of"]


def kernel_size_of(module: Any) -> Extents:
    """Return the number of taps of a convolution along each axis."""
    return per_axis(module.kernel_size, 1) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)


def flax_geometry(module: Any, shape: tuple[int, ...], extents: tuple[Extents, ...]) -> FoundConv:
    """Return the geometry of a convolution whose kernel has this shape, for inputs of these extents."""
    taps = kernel_size_of(module)
    ndim = len(taps)
    if isinstance(module, linen.ConvLocal):
        return FoundConv(None, "its kernel differs from place to place")
    if ndim not in SPATIAL_LETTERS:
        return FoundConv(None, f"it has {ndim} spatial axes: wanted 1 to 3")
    if len(shape) != ndim + 2:
        return FoundConv(
            None, f"its kernel has the shape {shape}: wanted {ndim + 2} axes; nn.scan and nn.vmap stack kernels"
        )
    if module.mask is not None:
        return FoundConv(None, "a mask multiplies its kernel in the forward pass")
    stride, dilation = per_axis(module.strides, ndim), per_axis(module.kernel_dilation, ndim)
    if isinstance(module, linen.ConvTranspose | nnx.ConvTranspose):
        return _transposed(module, taps, stride, dilation)
    own = getattr(module, "conv_general_dilated", None)
    if (own is not None and own is not jax.lax.conv_general_dilated) or getattr(
        module, "conv_general_dilated_cls", None
    ):
        return FoundConv(None, "its convolution is a function of the user's")
    if set(per_axis(module.input_dilation, ndim)) != {1}:
        return FoundConv(None, f"its input is dilated by {per_axis(module.input_dilation, ndim)}")
    mode = "zeros"
    padding: Any = module.padding
    spans = [d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        mode = padding.lower()
        padding = tuple(((span - 1) // 2, span // 2) for span in spans)
    elif padding == "CAUSAL":
        padding = tuple((span - 1, 0) for span in spans)
    elif not isinstance(padding, str):
        padding = _pairs(padding, ndim)
    return make_conv(
        f"{SPATIAL_LETTERS[ndim]}IO",
        taps,
        stride=stride,
        dilation=dilation,
        groups=module.feature_group_count,
        padding=padding,
        padding_mode=mode,
        input_shapes=extents,
    )


def _transposed(module: Any, taps: Extents, stride: Extents, dilation: Extents) -> FoundConv:
    ndim = len(taps)
    adjoint = module.transpose_kernel
    layout = f"{SPATIAL_LETTERS[ndim]}{'OI' if adjoint else 'IO'}"
    if module.padding == "CIRCULAR":
        return FoundConv(Conv(layout, stride=stride, dilation=dilation, transposed=True))
    sides: Any = module.padding
    if isinstance(sides, str):
        sides = tuple(
            _transposed_sides(d * (k - 1) + 1, s, sides) for k, d, s in zip(taps, dilation, stride, strict=True)
        )
    else:
        sides = _pairs(sides, ndim)
    return make_transposed_conv(layout, taps, stride=stride, dilation=dilation, groups=1, sides=sides, adjoint=adjoint)


def _transposed_sides(span: int, stride: int, padding: str) -> tuple[int, int]:
    """Return the elements that `jax.lax.conv_transpose` adds before and after, for "SAME" and "VALID"."""
    if padding.upper() == "SAME":
        total = span + stride - 2
        before = span - 1 if stride > span - 1 else -(-total // 2)
    else:
        total = span + stride - 2 + max(span - stride, 0)
        before = span - 1
    return before, total - before


def _pairs(padding: Any, ndim: int) -> tuple[tuple[int, int], ...]:
    """Return flax's padding, which is ints or pairs, as one pair for each axis."""
    sides = (padding,) * ndim if isinstance(padding, int) else tuple(padding)
    return tuple((int(side), int(side)) if isinstance(side, int) else (int(side[0]), int(side[1])) for side in sides)
