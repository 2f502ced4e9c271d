"""Bounds of the norms between the frequencies of a coarse grid, to leave out most frequencies of a finer one.

The coarse grid is every second frequency of the fine grid along each axis. Let S be the largest norm over all
frequencies, ``d_i`` the symbol's exponential type along axis i, and ``h_i`` the distance between neighbours of the fine
grid. At any frequency the norm is ``Re u* A v`` for unit vectors u and v. With the taps centred, this function of the
frequency is at most S everywhere. By Bernstein's inequality its second derivative along axis i is at most ``d_i^2 S``.
So linear interpolation along every axis, between frequencies ``2 h_i`` apart, has an error of at most
``S sum_i (d_i h_i)^2 / 2``, and the largest norm in a cell of the coarse grid is at most

    the largest norm at the corners of the cell + S rise,    rise = sum_i (d_i h_i)^2 / 2.

A frequency of the fine grid lies between coarse ones along some of the axes. Its norm is bounded from these alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import IntArray, Plan, make_plan
from convsv_core._norm.every_size import EverySizeGrid, every_size_grid, grid_of_points
from convsv_core.conv import Conv

__all__ = ["Cover", "CoveredGrid", "covered_grid", "grid_cover"]

LEAST_SHARE = 0.9
"""Smallest share of the largest norm that the coarse frequencies are tested against.

With a smaller share most tests fail, unless few frequencies have a large norm. Moments then exclude the others. A guess
after measurements of ResNet-32 in training.
"""

COARSE_RISE = 3.9
"""The `rise` of the coarse grid of `covered_grid`, in units of the tolerance. At most 4 is possible. A guess."""

ROUNDING = 1e-12
"""Bound of the relative rounding errors, in float64, of the share. A guess, far above the errors."""


class Cover(NamedTuple):
    """Hold the coarse frequencies of a grid, and what they exclude.

    If the norms at all coarse frequencies that are parents of a frequency are at most ``share`` times a level, the
    frequency has a norm of at most the level. This holds if the level is at least the norm at every frequency that is
    not excluded.

    Attributes
    ----------
    coarse : int array
        The places of the coarse frequencies among the visited ones.
    parents : int array, shape (visited, 2 ** axes)
        The places of the coarse frequencies around each visited one, with repetitions.
    share : float
    """

    coarse: IntArray
    parents: IntArray
    share: float


@functools.lru_cache(maxsize=64)
def grid_cover(plan: Plan) -> Cover | None:
    """Return the cover of a plan's grid, or None if a coarse grid would exclude too little.

    Notes
    -----
    Let L be a level that is at least every norm not excluded. Let X be the largest norm on the grid, and suppose that X
    is excluded and greater than L. With the factor F of `_rise_between`, S is at most F X. So X is at most ``share L +
    F X rise``. With ``share = 1 - F rise`` this is less than X, a contradiction.
    """
    halved = [axis.period % 2 == 0 for axis in plan.axes]
    if not any(halved):
        return None
    types = plan.exponential_types
    steps = types * 2 * math.pi / np.asarray(plan.periods)  # d_i h_i
    if np.any(steps >= math.pi / 2):
        return None
    share = 1 - _rise_between(plan) * float(np.sum(steps[halved] ** 2)) / 2 * (1 + ROUNDING) - ROUNDING
    return Cover(*_neighbours(plan, halved), share) if share >= LEAST_SHARE else None


def _rise_between(plan: Plan) -> float:
    """Return a factor F: the norm over all frequencies is at most F times the largest norm on the plan's grid.

    See `norm_upper_bound`.
    """
    angles = plan.exponential_types * math.pi / np.asarray(plan.periods)
    return 1 / float(np.prod(np.cos(angles)))


def _neighbours(plan: Plan, halved: list[bool]) -> tuple[IntArray, IntArray]:
    """Return `Cover.coarse` and `Cover.parents`."""
    frequencies, periods = plan.frequencies, plan.periods
    odd = frequencies % 2 * np.asarray(halved)
    parents = [
        plan.visit[np.ravel_multi_index(tuple(((frequencies + odd * signs) % periods).T), periods)]
        for signs in itertools.product((-1, 1), repeat=len(periods))
    ]
    return np.flatnonzero(~odd.any(axis=1)), np.stack(parents, axis=1)


class CoveredGrid(NamedTuple):
    """Hold a grid that stands for all frequencies, with its cover; None where all of the grid has to be tested."""

    grid: EverySizeGrid
    cover: Cover | None


@functools.lru_cache(maxsize=64)
def covered_grid(kernel_shape: tuple[int, ...], conv: Conv, rtol: float, real: bool) -> CoveredGrid:
    """Return a grid whose `factor` is at most ``1 + rtol``, with few frequencies to test.

    Notes
    -----
    Let L be a level that is at least every norm not excluded, and let S be greater than ``(1 + rtol) L``. It lies in a
    cell of the coarse grid. If all corners of the cell have passed the test, S is at most ``share L + S rise``. With
    ``share = (1 + rtol) (1 - rise)`` that contradicts the assumption.

    If a corner has not passed, the middle of the cell is not excluded. S lies in a cell of the fine grid, where
    interpolation has an error of at most ``S rise / 4``. A corner of this cell has a norm of at most L. Or it is excluded
    and lies on a coarse grid line along some axis. Its norm is then at most ``share L + S (rise - least)``, where `least`
    is the smallest term of the sum `rise`. With ``least >= rise / 4`` and ``(1 + rtol) (1 - rise / 4) >= 1`` both
    contradict the assumption.
    """
    whole = CoveredGrid(every_size_grid(kernel_shape, conv, rtol), None)
    types = make_plan(kernel_shape, False, None, conv).exponential_types
    active = types > 0
    if not active.any():
        return whole
    wanted = COARSE_RISE * rtol / (1 + rtol) / int(active.sum())
    points = [2 * math.ceil(kind * math.pi / math.sqrt(2 * wanted)) if kind > 0 else 1 for kind in types.tolist()]
    rises = (types * 2 * math.pi / np.asarray(points))[active] ** 2 / 2
    rise, least = float(rises.sum()) * (1 + ROUNDING), float(rises.min())
    share = (1 + rtol) * (1 - rise) * (1 - ROUNDING)
    grid = grid_of_points(kernel_shape, conv, points)
    holds = least >= rise / 4 and (1 + rtol) * (1 - rise / 4) >= 1 and grid.factor <= 1 + rtol
    if not holds or share < LEAST_SHARE:
        return whole
    plan = make_plan(kernel_shape, real, grid.input_shape, grid.conv)
    return CoveredGrid(grid._replace(factor=1 + rtol), Cover(*_neighbours(plan, active.tolist()), share))
