"""The padding of ONNX's windows: as a node states it, or as its `auto_pad` computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["explicit_pads", "forward_pads", "halves", "pads_by_axis"]


def forward_pads(
    values: Mapping[str, Any], extents: Sequence[int], strides: Sequence[int], reach: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the padding of a convolution or a pooling for each spatial axis.

    Parameters
    ----------
    values : mapping
        The attributes of the node by name.
    extents : sequence of int
        Of the input. They are used for SAME_UPPER and SAME_LOWER alone.
    strides : sequence of int
    reach : sequence of int
        The elements from the first one of a dilated window to its last one.
    """
    auto_pad = values.get("auto_pad", "NOTSET")
    if not auto_pad.startswith("SAME"):
        return explicit_pads(values, auto_pad, len(reach))
    axes = zip(extents, strides, reach, strict=True)
    return halves([max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in axes], auto_pad)


def explicit_pads(values: Mapping[str, Any], auto_pad: str, ndim: int) -> list[tuple[int, int]]:
    """Return the padding that a node's attributes state; VALID means none."""
    return [(0, 0)] * ndim if auto_pad == "VALID" else pads_by_axis(values.get("pads", (0,) * 2 * ndim))


def pads_by_axis(flat: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the padding of each axis, from ONNX's list: all entries before the axes, then all entries after them."""
    half = len(flat) // 2
    return list(zip(flat[:half], flat[half:], strict=True))


def halves(totals: list[int], auto_pad: str) -> list[tuple[int, int]]:
    """Split the padding of each axis; of an odd number SAME_UPPER adds the larger part at the end."""
    split = [(total // 2, total - total // 2) for total in totals]
    return split if auto_pad == "SAME_UPPER" else [(after, before) for before, after in split]
