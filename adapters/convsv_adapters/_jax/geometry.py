"""The geometry of convolutions of JAX's frameworks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import numpy as np

from convsv_adapters._operators import Extents
from convsv_core import Conv

__all__ = ["BEYOND_REACH", "LAYOUTS", "USERS_CLASS", "Sides", "make_conv", "make_transposed_conv", "per_axis"]

Sides: TypeAlias = tuple[tuple[int, int], ...]

LAYOUTS = {1: "W", 2: "HW", 3: "DHW"}
"""Spatial letters, by how many there are."""

BEYOND_REACH = "its padding goes beyond the reach of the kernel"
USERS_CLASS = "of a class of the user's: what it does to kernel and padding is not known"


def make_conv(
    layout: str,
    taps: Extents,
    *,
    stride: Extents,
    dilation: Extents,
    groups: int,
    padding: str | Sides,
    padding_mode: str,
    input_shapes: Iterable[Extents],
) -> tuple[Conv, str]:
    """Geometry of a convolution whose padding JAX resolves, and a note.

    "SAME" and "SAME_LOWER" depend on the extents: without any, those are meant that the stride divides.
    """
    plain = Conv(layout, stride=stride, dilation=dilation, groups=groups, padding_mode=padding_mode)
    resolved: dict[Sides, None] = {}
    spans = tuple(d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True))
    for extents in list(input_shapes) or [stride]:
        resolved[_sides(padding, extents, spans, stride)] = None
    first, *others = resolved
    note = f"its padding depends on the extents; that of the first is used, {first}" if others else ""
    if isinstance(padding, str) and first == plain.pads(taps):
        return plain, note
    return Conv(layout, stride=stride, dilation=dilation, groups=groups, padding=first, padding_mode=padding_mode), note


def _sides(padding: str | Sides, extents: Extents, spans: Extents, stride: Extents) -> Sides:
    """Elements added before and after each axis."""
    if not isinstance(padding, str):
        return padding
    return tuple((int(a), int(b)) for a, b in jax.lax.padtype_to_pads(extents, spans, stride, padding))


def make_transposed_conv(
    layout: str, taps: Extents, *, stride: Extents, dilation: Extents, groups: int, sides: Sides, adjoint: bool = False
) -> tuple[Conv, str]:
    """Geometry of a convolution over an input with zeros between its elements, and a note.

    Parameters
    ----------
    layout : str
        O and I as the layer has them: I of its input.
    taps, stride, dilation, groups
        `stride` is the dilation of the input.
    sides : tuple of pairs
        Elements added before and after each axis of the dilated input.
    adjoint : bool, default False
        Whether the taps are flipped first, which makes the layer the transpose of a convolution. Otherwise it is that
        of one with the taps in reverse, which has the singular values of the reflected one with the sides exchanged.

    Returns
    -------
    Conv, str
    """
    pairs = []
    for k, d, (before, after) in zip(taps, dilation, sides, strict=True):
        reach = d * (k - 1)
        pairs.append((reach - before, reach - after) if adjoint else (reach - after, reach - before))
    note = BEYOND_REACH if min(min(pair) for pair in pairs) < 0 else ""
    padding = tuple((max(before, 0), max(after, 0)) for before, after in pairs)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "transposed": True}
    return Conv(layout, padding=padding, padding_mode="zeros", **options), note


def per_axis(value: Any, ndim: int) -> Extents:
    """An int, None (for 1) or ints, as one an axis."""
    if value is None:
        return (1,) * ndim
    if isinstance(value, int | np.integer):
        return (int(value),) * ndim
    return tuple(int(one) for one in value)
