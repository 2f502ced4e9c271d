"""Keras's rules for padding, as integers, for live layers and for stored configurations; it imports no framework."""

from __future__ import annotations

from typing import Any

from convsv_core.layers import Extents

__all__ = ["per_axis", "sides", "transposed_pads"]


def per_axis(value: Any, rank: int) -> Extents:
    """Return one int for each axis, from one int or several."""
    return (int(value),) * rank if isinstance(value, int) else tuple(int(one) for one in value)


def sides(padding: str, taps: Extents, strides: Extents, dilation: Extents, extents: Extents | None) -> Any:
    """Return the padding of a convolution, as a `Conv` takes it; "same" depends on the extents."""
    spans = [d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True)]
    if padding == "causal":
        return tuple((span - 1, 0) for span in spans)
    if padding != "same" or extents is None:
        return padding
    totals = [max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in zip(extents, strides, spans, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def transposed_pads(
    padding: str, taps: Extents, strides: Extents, dilation: Extents, output_padding: Any
) -> list[tuple[int, int]]:
    """Return the padding of a transposed layer for each axis, less the outputs that the layer adds."""
    rank, pads = len(strides), []
    stated = (None,) * rank if output_padding is None else per_axis(output_padding, rank)
    for k, d, stride, extra in zip(taps, dilation, strides, stated, strict=True):
        span = d * (k - 1) + 1
        if padding == "valid":
            pads.append((0, -(max(span, stride) - span if extra is None else extra)))
            continue
        total = span - stride if extra is None else span - span % 2 - extra
        before = max(total // 2, 0)
        pads.append((before, total - before))
    return pads
