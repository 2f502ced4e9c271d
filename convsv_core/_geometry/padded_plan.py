"""Tables of integers with which a layer of any padding is applied pixel by pixel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convsv_core._geometry.padding import padding_sources, tap_reads
from convsv_core._geometry.plan import HostArray, IntArray
from convsv_core.conv import Conv

__all__ = ["PaddedPlan", "make_padded_plan", "readers"]


@dataclass(frozen=True, eq=False)
class PaddedPlan:
    """The geometry of a padded convolution, resolved to integers.

    Attributes
    ----------
    gather : int array, shape (pixels out, taps)
        The input pixel, in row-major order, that each tap reads for each output pixel; ``pixels in`` where it
        reads a zero.
    scatter : int array, shape (pixels in, most readers)
        For each input pixel, its places in the flattened `gather`, filled up with ``pixels out * taps``.
    """

    gather: IntArray
    scatter: IntArray


@functools.lru_cache(maxsize=16)
def make_padded_plan(taps: tuple[int, ...], input_shape: tuple[int, ...], conv: Conv) -> PaddedPlan:
    """Resolve a padded convolution. Raises ValueError for a geometry that is impossible."""
    reads = tap_reads(taps, input_shape, conv)
    pixels = math.prod(axis.extent for axis in reads)
    gather = np.zeros((1, 1), np.int64)
    inside = np.ones((1, 1), np.bool_)
    for axis in reads:
        source = padding_sources(axis.places(), axis.extent, conv.padding_mode)
        gather = _with_axis(np.add, gather * axis.extent, source)
        inside = _with_axis(np.logical_and, inside, source >= 0)
    gather = np.where(inside, gather, pixels)
    return PaddedPlan(gather, readers(gather.reshape(-1), pixels))


def _with_axis(combine: Callable[[HostArray, HostArray], HostArray], table: HostArray, axis: HostArray) -> HostArray:
    """Return a table of (outputs, taps) that covers one axis more, with entries ``combine(table, axis)``."""
    combined = combine(table[:, None, :, None], axis[None, :, None, :])
    return combined.reshape(len(table) * len(axis), -1)


def readers(sources: IntArray, count: int) -> IntArray:
    """Return, for each of `count` elements, its places in `sources`, filled up with ``len(sources)``."""
    order = np.argsort(sources, kind="stable")
    counts = np.bincount(sources, minlength=count)[:count]
    element = np.repeat(np.arange(count), counts)
    rank = np.arange(len(element)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.full((count, max(1, int(counts.max()))), len(sources))
    places[element, rank] = order[: len(element)]
    return places
