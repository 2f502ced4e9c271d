"""Grids that stand for all frequencies, from shapes alone."""

from __future__ import annotations

import functools
import math
import sys
from typing import NamedTuple

from convsv_core._geometry.padding import lattice
from convsv_core._geometry.plan import make_plan
from convsv_core.conv import Conv

__all__ = ["EverySizeGrid", "every_size_grid", "grid_of_points"]


LARGEST_RISE = 1000.0
"""Largest relative rise of the norm between the points of a grid; a user's `rtol` may be larger.

The factor is the reciprocal of a cosine. Were it as large as the reciprocal of eps, rounding would decide whether the
grid has enough points. A guess, far below that.
"""


class EverySizeGrid(NamedTuple):
    """Hold a grid that stands for all frequencies, as the input shape of a circular convolution.

    Attributes
    ----------
    input_shape : tuple of int
    conv : Conv
    factor : float
        The supremum of the norm over all frequencies is at most `factor` times the largest norm on the grid.
    """

    input_shape: tuple[int, ...]
    conv: Conv
    factor: float


@functools.lru_cache(maxsize=256)
def every_size_grid(kernel_shape: tuple[int, ...], conv: Conv, rtol: float) -> EverySizeGrid:
    """Return a grid on which `factor` is at most ``1 + rtol``. Raise ValueError if the sum rounds to 1."""
    if 1 + rtol == 1:
        raise ValueError(f"rtol={rtol}: wanted at least the rounding of float64, {sys.float_info.epsilon}")
    rtol = min(rtol, LARGEST_RISE)
    types = make_plan(kernel_shape, False, None, conv).exponential_types.tolist()
    active = sum(kind > 0 for kind in types)
    largest = math.acos((1 + rtol) ** (-1 / max(active, 1)))
    points = [max(1, math.ceil(kind * math.pi / largest)) for kind in types]
    return grid_of_points(kernel_shape, conv, points)


def grid_of_points(kernel_shape: tuple[int, ...], conv: Conv, points: list[int]) -> EverySizeGrid:
    """Return the grid with these numbers of frequencies along the axes, in a period of the reduced offsets."""
    plan = make_plan(kernel_shape, False, None, conv)
    axes, types = plan.axes, plan.exponential_types.tolist()
    cosines = [math.cos(kind * math.pi / count) for kind, count in zip(types, points, strict=True)]
    strides = (1,) * conv.ndim if conv.transposed else conv.strides
    # `points` count the frequencies of one period, of which the offsets' common divisor makes several.
    extents = tuple(n * axis.step * stride for n, axis, stride in zip(points, axes, strides, strict=True))
    return EverySizeGrid(extents, lattice(conv), 1 / math.prod(cosines))
