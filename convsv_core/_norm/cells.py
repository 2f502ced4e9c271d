"""Covers of the torus of frequencies by cells, which can be split into smaller cells."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray, IntArray
from convsv_core._symbol.transform import fast_length

__all__ = ["Cells", "Cover", "cover", "distinct"]

TURN = 2**40
"""Number of steps of a full turn to which angles are rounded before they are compared.

A step is 6e-12 radians. That is far above the rounding errors of angles, about 1e-15, and far below the size of
cells: at a relative gap of 1e-12 their reach is about 1e-6.
"""


@dataclass(frozen=True)
class Cells:
    """Hold the shape of the cells that cover the torus at one level: the image of a cube under a linear map.

    The distance of two angles is ``sum_i d_i |delta_i|``, with the exponential type d_i along axis i. In two
    dimensions the cells are diamonds, the balls of this distance. A cover by rectangles of the same reach needs
    twice as many cells.

    Attributes
    ----------
    edges : float array, shape (n, ndim)
        Half of each edge of a cell, for the n axes of positive exponential type.
    reach : float
        Largest distance of a point of a cell from the cell's centre.
    """

    edges: HostArray
    reach: float

    @property
    def corners(self) -> HostArray:
        """Return the corners relative to the centre: shape (2 ** n, ndim)."""
        return self._images((-1.0, 1.0))

    def split(self, centres: HostArray, parts: int) -> HostArray:
        """Return the centres of the parts of the cells around `centres`, each split into `parts` along each edge.

        If `parts` is odd, the middle part has the cell's own centre, which is left out.
        """
        steps = tuple((2 * index + 1 - parts) / parts for index in range(parts))
        children = self._images(steps)
        if parts % 2:
            children = np.delete(children, len(children) // 2, axis=0)
        return np.asarray((centres[:, None, :] + children[None, :, :]).reshape(-1, centres.shape[1]))

    def part(self, parts: int) -> Cells:
        """Return the shape of the parts into which `split` splits a cell."""
        return Cells(self.edges / parts, self.reach / parts)

    def _images(self, steps: tuple[float, ...]) -> HostArray:
        """Return the images of all points of the cube whose coordinates are among `steps`."""
        count = len(self.edges)
        cube = np.asarray(list(itertools.product(steps, repeat=count)), float).reshape(len(steps) ** count, count)
        return np.asarray(cube @ self.edges)


class Cover(NamedTuple):
    """Hold cells that cover the torus.

    Attributes
    ----------
    centres : float array, shape (cells, ndim)
        Angles in radians.
    cells : Cells
        Their shape.
    points : tuple of int
        Number of points of a uniform grid along each axis of positive exponential type. Each centre is such a point.
    places : int array, shape (cells, n)
        The index of each centre along these axes.
    """

    centres: HostArray
    cells: Cells
    points: tuple[int, ...]
    places: IntArray


def cover(types: HostArray, reach: float, *, fast: bool = False) -> Cover:
    """Return cells of at most the given reach that cover the torus.

    Parameters
    ----------
    types : float array, shape (ndim,)
        Exponential type along each axis.
    reach : float
        Largest allowed distance of a point from its cell's centre.
    fast : bool, default False
        Whether to round the numbers of points up to lengths whose Fourier transform is fast.
    """
    active = np.flatnonzero(types > 0)
    count = len(active)
    diamonds = count == 2
    half = np.asarray([[0.5, 0.5], [0.5, -0.5]]) if diamonds else 0.5 * np.eye(count)
    points = np.ceil(count * np.pi * types[active] / reach).astype(int)
    points += points % 2 if diamonds else 0  # An even number lets the checkerboard of diamonds close on itself.
    if fast:
        points = np.asarray([fast_length(int(n), even=diamonds) for n in points])
    spacing = 2 * np.pi / points
    grid = np.indices(tuple(points)).reshape(count, math.prod(points.tolist())).T
    if diamonds:
        grid = grid[grid.sum(axis=1) % 2 == 0]
    centres = np.zeros((len(grid), len(types)))
    centres[:, active] = grid * spacing

    edges = np.zeros((count, len(types)))
    edges[:, active] = half * spacing
    cells = Cells(edges, 0.0)
    cells = Cells(edges, float(np.max(np.abs(cells.corners) @ types, initial=0.0)))
    return Cover(centres, cells, tuple(points.tolist()), grid)


def distinct(angles: HostArray, real: bool) -> HostArray:
    """Return the distinct rows of `angles`, modulo full turns; for a real kernel also modulo a change of all signs."""
    turns = np.round(angles / (2 * np.pi) * TURN).astype(np.int64) % TURN
    if real:
        opposite = -turns % TURN
        different = turns != opposite
        first = np.argmax(different, axis=1)[:, None]  # The first differing entry decides.
        smaller = np.take_along_axis(turns, first, 1) <= np.take_along_axis(opposite, first, 1)
        turns = np.where(smaller, turns, opposite)
    return np.asarray(np.unique(turns, axis=0) * (2 * np.pi / TURN))
