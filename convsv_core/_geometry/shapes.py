"""The extents of a layer's images and the shape of its kernel, checked and resolved to integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from convsv_core.conv import Conv, per_axis

__all__ = ["Channels", "channel_letters", "check_input_shape", "forward_extents", "resolve_channels"]


def check_input_shape(input_shape: object, conv: Conv) -> tuple[int, ...]:
    """Return `input_shape` as one positive int for each axis; a single int stands for every axis."""
    if input_shape is None:
        raise TypeError(
            f"input_shape=None: wanted the extents of one image along {conv.spatial}, such as {(32,) * conv.ndim}; "
            f"norm_bounds, project and steepest_direction take None for every input size"
        )
    if isinstance(input_shape, Sequence) and not isinstance(input_shape, str) and len(input_shape) > conv.ndim:
        raise ValueError(
            f"input_shape={tuple(input_shape)}: {len(input_shape)} values, wanted one for each of the {conv.ndim} "
            f"spatial axes, without the channels and the batch"
        )
    return per_axis("input_shape", input_shape, conv.ndim, least=1)


def forward_extents(taps: tuple[int, ...], input_shape: tuple[int, ...], conv: Conv) -> tuple[int, ...]:
    """Return the input extents of the forward convolution; they are the output's if `conv` is transposed.

    Raises ValueError for padding that leaves a transposed layer without outputs.
    """
    if not conv.transposed:
        return input_shape
    if conv.output_padding is None:
        return tuple(extent * stride for extent, stride in zip(input_shape, conv.strides, strict=True))
    assert isinstance(conv.output_padding, tuple)
    extents = tuple(
        (extent - 1) * stride + dilation * (k - 1) + 1 - before - after + extra
        for extent, stride, k, dilation, (before, after), extra in zip(
            input_shape, conv.strides, taps, conv.dilations, conv.pads(taps), conv.output_padding, strict=True
        )
    )
    if min(extents) < 1:
        raise ValueError(
            f"the transposed layer has {extents} outputs (input_shape={input_shape}, {taps} taps, "
            f"padding={conv.padding!r}, output_padding={conv.output_padding}): wanted a larger input or less padding"
        )
    return extents


class Channels(NamedTuple):
    """Hold the shape of a kernel as the forward convolution reads it.

    Attributes
    ----------
    taps : tuple of int
        Number of taps along each spatial axis.
    groups : int
    rows, columns : int
        Output channels and input channels of one group.
    """

    taps: tuple[int, ...]
    groups: int
    rows: int
    columns: int


def channel_letters(conv: Conv) -> tuple[str, str]:
    """Return the letters of the kernel's axes of rows, for all groups together, and of columns of one group.

    Rows and columns are the outputs and the inputs of the forward convolution.
    """
    return ("I", "O") if conv.transposed else ("O", "I")


def resolve_channels(kernel_shape: tuple[int, ...], conv: Conv) -> Channels:
    """Return the taps, groups and channels of a kernel; raise ValueError if its shape does not fit `conv`."""
    if len(kernel_shape) != len(conv.layout):
        raise ValueError(
            f"kernel has shape {kernel_shape} but layout={conv.layout!r} names {len(conv.layout)} axes: "
            f"wanted one letter for each axis of the kernel"
        )
    extents = dict(zip(conv.layout, kernel_shape, strict=True))
    for letter, extent in extents.items():
        if extent < 1:
            raise ValueError(
                f"kernel has shape {kernel_shape}: the axis {letter} is empty, wanted an extent of at least 1"
            )
    whole, grouped = channel_letters(conv)
    if extents[whole] % conv.groups:
        raise ValueError(
            f"groups={conv.groups} does not divide the {extents[whole]} channels of axis {whole} "
            f"(kernel shape {kernel_shape}, layout={conv.layout!r}); axis {grouped} holds the channels of one group"
        )
    taps = tuple(extents[letter] for letter in conv.spatial)
    return Channels(taps, conv.groups, extents[whole] // conv.groups, extents[grouped])
