"""Covers of the torus of frequencies by cells that split."""

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
    edges : float array, shape (n, ndim)
        Halves of a cell's edges, for n axes that are not constant.
    reach : float
        D.
    """

    edges: HostArray
    reach: float

    @property
    def corners(self) -> HostArray:
        """Corners relative to the centre: shape (2 ** n, ndim)."""
        return self._images((-1.0, 1.0))

    def split(self, centres: HostArray, parts: int) -> HostArray:
        """Centres of the cells that those around `centres` split into, `parts` an axis, without their own."""
        steps = tuple((2 * index + 1 - parts) / parts for index in range(parts))
        children = self._images(steps)
        if parts % 2:
            children = np.delete(children, len(children) // 2, axis=0)
        return np.asarray((centres[:, None, :] + children[None, :, :]).reshape(-1, centres.shape[1]))

    def part(self, parts: int) -> Cells:
        """The cells that these split into."""
        return Cells(self.edges / parts, self.reach / parts)

    def _images(self, steps: tuple[float, ...]) -> HostArray:
        count = len(self.edges)
        cube = np.asarray(list(itertools.product(steps, repeat=count)), float).reshape(len(steps) ** count, count)
        return np.asarray(cube @ self.edges)


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

    edges = np.zeros((count, len(types)))
    edges[:, active] = half * spacing
    cells = Cells(edges, 0.0)
    return centres, Cells(edges, float(np.max(np.abs(cells.corners) @ types, initial=0.0)))


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
