"""Covers of the torus of frequencies by cells that split into thirds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from convsv_core.plan import HostArray

TURN = 2**40
"""Steps of a full turn in which angles are compared, far finer than any cell and than their rounding."""


@dataclass(frozen=True)
class Cells:
    """The shape of the cells that cover the torus at one level: the image of a cube under a linear map.

    In two dimensions the cells are diamonds, the balls of the distance ``sum_i d_i |delta_i|`` themselves,
    which takes half as many of them as rectangles of the same D.

    Attributes
    ----------
    corners : float array, shape (2 ** n, ndim)
        Corners of a cell relative to its centre, for n axes that are not constant.
    children : float array, shape (3 ** n, ndim)
        Centres, relative to its own, of the cells of a third of the size that a cell splits into; the first is 0.
    reach : float
        D.
    """

    corners: HostArray
    children: HostArray
    reach: float

    def split(self, centres: HostArray) -> HostArray:
        """Centres of the cells that those around `centres` split into, without the centres themselves."""
        return np.asarray((centres[:, None, :] + self.children[None, 1:, :]).reshape(-1, centres.shape[1]))

    def third(self) -> Cells:
        """The cells that these split into."""
        return Cells(self.corners / 3, self.children / 3, self.reach / 3)


def cover(types: HostArray, reach: float) -> tuple[HostArray, Cells]:
    """Centres and shape of cells that cover the torus, of D at most `reach`, for the exponential types given."""
    active = np.flatnonzero(types > 0)
    count = len(active)
    diamonds = count == 2
    half = np.asarray([[0.5, 0.5], [0.5, -0.5]]) if diamonds else 0.5 * np.eye(count)
    points = np.ceil(count * np.pi * types[active] / reach).astype(int)
    points += points % 2 if diamonds else 0  # a checkerboard that closes on itself
    spacing = 2 * np.pi / points
    grid = np.indices(tuple(points)).reshape(count, math.prod(points.tolist())).T
    if diamonds:
        grid = grid[grid.sum(axis=1) % 2 == 0]
    centres = np.zeros((len(grid), len(types)))
    centres[:, active] = grid * spacing

    def images(steps: tuple[int, ...]) -> HostArray:
        cube = np.asarray(list(itertools.product(steps, repeat=count)), float).reshape(len(steps) ** count, count)
        found = np.zeros((len(cube), len(types)))
        found[:, active] = cube @ half * spacing
        return found

    corners = images((-1, 1))
    children = images((0, -1, 1)) * 2 / 3
    return centres, Cells(corners, children, float(np.max(np.abs(corners) @ types, initial=0.0)))


def distinct(angles: HostArray, real: bool) -> HostArray:
    """The distinct rows, modulo full turns and, for a real kernel, modulo a change of all signs."""
    turns = np.round(angles / (2 * np.pi) * TURN).astype(np.int64) % TURN
    if real:
        opposite = -turns % TURN
        different = turns != opposite
        first = np.argmax(different, axis=1)[:, None]  # the first place at which the two differ
        smaller = np.take_along_axis(turns, first, 1) <= np.take_along_axis(opposite, first, 1)
        turns = np.where(smaller, turns, opposite)
    return np.asarray(np.unique(turns, axis=0) * (2 * np.pi / TURN))
