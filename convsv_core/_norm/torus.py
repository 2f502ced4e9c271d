"""The supremum of the symbol's norm over all frequencies, by branch and bound.

The norm of the symbol cannot change quickly with the frequency. With the taps centred, ``Re(u* A(theta) v)`` is, for
unit u and v, of exponential type ``d_i`` along axis i, half the span of the axis's offsets. Let M be the supremum of
``|A|``. The Bernstein-Szego inequality makes ``arccos(Re(u* A v) / M)`` change no faster than ``sum_i d_i |delta_i|``,
so with ``D = max(sum_i d_i |delta_i|) < pi / 2`` over a cell around c:

- the cell that holds the maximiser of ``|A|`` over the torus has ``|A(c)| >= M cos(D)``;
- everywhere in any cell ``|A| <= M cos(max(0, arccos(|A(c)| / M) - D))``, also with a bound from above for M.

Cells that cannot hold the maximiser are dropped, and the remaining cells are split. A flat symbol drops no cell by this
bound, so there is a second bound. The Gram matrix ``A A* = sum_s G_s exp(i s theta)`` changes by at most
``sum_s |G_s| |exp(i s delta) - 1|``, which is 0 where A A* is constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._norm.ascent import ascend
from convsv_core._norm.cells import Cells, cover, distinct
from convsv_core._norm.transformed import transformed_cover, transforms_pay
from convsv_core._symbol.gram import coefficient_norms, gram_polynomial, sum_rounding
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.rows import PolynomialRows

__all__ = ["TorusNorms", "search_torus"]

COARSEST = 1.3
"""Largest D of the first cells, in radians; the Bernstein-Szego bound needs less than pi / 2. A guess."""

BATCH = 256
"""Number of norms computed before cells are decided again. A guess: enough to keep the threads of two cores busy."""

TESTED_SIDE = 64
"""Side from which a matrix is tested against limits by Cholesky's factorisation before its norm is computed.

Measured with NumPy: a test takes 72 us and eigenvalues 251 us at side 64. For smaller sides, tests against several
limits cost as much as they save.
"""

CHUNK_ENTRIES = 1 << 20
"""Entries of the table of phases from which norms are computed in parts: 8 MiB, of which a few are held. A guess."""

STARTS = 8
"""Number of frequencies from which the search climbs to a local maximum. A guess."""


class TorusNorms:
    """Compute norms of the symbol at any angles within a budget, and keep the best lower bound of the supremum.

    Angles are those of the reduced offsets: `Axis.step` times the angles of the grid.

    Attributes
    ----------
    operand : Operand
    types : float array, shape (ndim,)
        Exponential type along each axis.
    best : float
        The largest norm so far less its rounding error bound: a lower bound of the supremum.
    best_square : float
        The square of the norm behind `best`, as computed.
    best_angles : float array, shape (ndim,)
        The angles at which `best` was found.
    evaluations, budget : int
        The number of norms that were asked for, and the largest number allowed.
    tests : bool
        Whether matrices are tested against limits before their norm is computed. This is so if their side is at least
        `tested_side`, which is `TESTED_SIDE` unless given.
    relative_rounding : float
        Rounding error bound of a sum over taps and channels, relative to the sum of moduli.
    ceiling : float
        A crude upper bound of the norm at all angles, from the sum of moduli.
    """

    def __init__(self, operand: Operand, budget: int, spent: int = 0, tested_side: int | None = None) -> None:
        gram = gram_polynomial(operand)
        self.operand, self.budget, self.evaluations = operand, budget, spent
        self.types = operand.plan.exponential_types
        self.best, self.best_square, self.best_angles = -1.0, 0.0, np.zeros(len(self.types))
        self.tests = min(operand.plan.block) >= (TESTED_SIDE if tested_side is None else tested_side)
        self.relative_rounding = sum_rounding(operand.plan) * operand.eps
        self._rows = PolynomialRows(gram, by_angle=True)
        self._differences = gram.differences.astype(float)
        self._moduli = operand.backend.to_numpy(coefficient_norms(operand, gram.coefficients)).astype(float).max(axis=1)
        self.ceiling = math.sqrt(float(self._moduli.sum()) + self.rounding)

    @property
    def rounding(self) -> float:
        """Return the rounding error bound of a squared norm."""
        return self._rows.rounding

    def affords(self, count: int) -> bool:
        """Tell whether `count` more evaluations are within the budget."""
        return self.evaluations + count <= self.budget

    def upper(self, angles: HostArray, limits: Sequence[float] = ()) -> HostArray:
        """Return an upper bound of the norm at each row of `angles`: the norm and its rounding error bound.

        Where the norm is not above one of the `limits`, the first such limit may be returned instead: a test costs a
        fraction of the norm.
        """
        self.evaluations += len(angles)
        found = np.zeros(len(angles))
        left = np.arange(len(angles))
        for limit in limits if self.tests else ():
            if len(left):
                above = self._rows.above(angles[left], limit**2)
                found[left[~above]] = limit
                left = left[above]
        if len(left):
            found[left] = self._computed(angles[left])
        return found

    def transformed(self, finest: float) -> tuple[HostArray, HostArray, Cells]:
        """Return the centres of the finest affordable cover, upper bounds of the norms there, and the cells' shape.

        The cover is beyond the budget.
        """
        found = transformed_cover(self._rows.gram, self.types, finest, COARSEST)
        count = len(found.squares)
        self.evaluations, self.budget = self.evaluations + count, self.budget + count
        rounding = self.rounding + found.rounding
        first = int(np.argmax(found.squares))
        self.best_square = float(found.squares[first])
        self.best = math.sqrt(max(0.0, self.best_square - rounding))
        self.best_angles = found.cover.centres[first]
        return found.cover.centres, np.sqrt(np.maximum(found.squares, 0.0) + rounding), found.cover.cells

    def _computed(self, angles: HostArray) -> HostArray:
        part = max(1, CHUNK_ENTRIES // len(self._differences))
        if len(angles) > part:
            parts = [self._computed(angles[start : start + part]) for start in range(0, len(angles), part)]
            return np.concatenate(parts)
        found = self._rows.largest(angles)
        first = int(np.argmax(found.values))
        square = float(found.values[first])
        attained = math.sqrt(max(0.0, square - self.rounding))
        if attained > self.best:
            self.best, self.best_square, self.best_angles = attained, square, angles[first]
        return np.asarray(np.sqrt(np.maximum(found.uppers, self.rounding)))

    def variation(self, reach: HostArray) -> HostArray:
        """Return a bound of the change of the squared norm where ``|s . delta| <= reach`` for each difference s."""
        return np.asarray(np.sum(self._moduli * 2 * np.sin(np.minimum(reach, np.pi) / 2), axis=-1))

    def reach(self, corners: HostArray) -> HostArray:
        """Return the largest ``|s . delta|`` among `corners`, shape (..., corners, ndim), for each difference s."""
        return np.asarray(np.max(np.abs(corners @ self._differences.T), axis=-2))


@dataclass(frozen=True)
class Open:
    """Hold cells that are not decided yet; each has one row, or entry, of every array.

    Attributes
    ----------
    centres : float array, shape (cells, ndim)
    values : float array
        Upper bound of the norm at the centre.
    divisors : int array
        The edge of a first cell, in units of the cell's own edge.
    parts : int array
        The number of parts along each axis into which the cell is split if it is not decided.
    bounds : float array
        Upper bound of the supremum, for the cell that holds its maximiser.
    """

    centres: HostArray
    values: HostArray
    divisors: HostArray
    parts: HostArray
    bounds: HostArray

    def take(self, chosen: HostArray) -> Open:
        """Return the cells with the given indices or flags."""
        return Open(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def join(cells: list[Open]) -> Open:
        """Return the cells of a list as one object."""
        return Open(*(np.concatenate([getattr(one, field.name) for one in cells]) for field in fields(Open)))


class Levels:
    """Derive bounds for cells of one size from the norms at their centres.

    Parameters
    ----------
    norms : TorusNorms
    cells : Cells
        The shape of the first cells.
    rtol, sufficient : float
        Cells are decided where they show the supremum to be at most ``(1 + rtol) * norms.best``, or `sufficient`.
    """

    def __init__(self, norms: TorusNorms, cells: Cells, rtol: float, sufficient: float) -> None:
        self.norms, self.cells, self.rtol, self.sufficient = norms, cells, rtol, sufficient
        self._known: dict[int, tuple[float, float]] = {}

    @property
    def enough(self) -> float:
        """Return the largest bound with which a cell is decided."""
        return max((1 + self.rtol) * self.norms.best, self.sufficient)

    def limit(self, divisor: int) -> float:
        """Return the largest norm at its centre with which a cell is decided."""
        cosine, change = self._growth(divisor)
        by_change = math.sqrt(max(self.enough**2 - change, 0.0))
        # A unit in the last place less, so that the bound that follows from the limit decides.
        return max(self.enough * cosine, by_change) * (1 - 1e-15)

    def visit(self, centres: HostArray, divisor: int) -> Open:
        """Return cells around new centres, with norms computed no more closely than the next decision needs."""
        best = self.norms.best
        if self.norms.tests:
            limits = [*(self.limit(parts * divisor) for parts in (1, 2, 3)), self.enough]
            values = self.norms.upper(centres, limits)
        else:
            values = self.norms.upper(centres)
        if self.norms.best > best:
            self.climb(self.norms.best_angles[None, :])
        return self.bounded(centres, values, divisor)

    def climb(self, starts: HostArray) -> None:
        """Raise `norms.best` to a local maximum if matrices are large enough to be tested."""
        if self.norms.tests:
            self.norms.upper(ascend(self.norms.operand, starts, self.norms.types)[None, :])

    def bounded(self, centres: HostArray, values: HostArray, divisor: int) -> Open:
        """Return cells whose values are known."""
        cosine, change = self._growth(divisor)
        # Two parts are enough if the norms at their centres are no larger than at this centre.
        parts = np.where(values <= self.limit(2 * divisor), 2, 3)
        bounds = np.minimum(values / cosine, np.sqrt(values**2 + change))
        return Open(centres, values, np.full(len(centres), divisor), parts, bounds)

    def split(self, cells: Open, real: bool) -> list[Open]:
        """Return the parts of cells, with their norms."""
        found = []
        for divisor, parts in np.unique(np.stack([cells.divisors, cells.parts], axis=1), axis=0).tolist():
            chosen = cells.take((cells.divisors == divisor) & (cells.parts == parts))
            fresh = self.cells.part(divisor).split(chosen.centres, parts)
            if parts % 2:  # A middle part has the centre of its whole cell.
                known = (
                    chosen.values <= self.limit(divisor * parts)
                    if self.norms.tests
                    else np.ones(len(chosen.values), bool)
                )
                found.append(self.bounded(chosen.centres[known], chosen.values[known], divisor * parts))
                fresh = np.concatenate([fresh, chosen.centres[~known]])
            found.append(self.visit(distinct(fresh, real), divisor * parts))
        return found

    def _growth(self, divisor: int) -> tuple[float, float]:
        """Return the cosine of D, and a bound of the squared norm's change within a cell."""
        if divisor not in self._known:
            cells = self.cells.part(divisor)
            change = float(self.norms.variation(self.norms.reach(cells.corners)))
            self._known[divisor] = math.cos(cells.reach), change
        return self._known[divisor]


def search_torus(norms: TorusNorms, rtol: float, sufficient: float = 0.0) -> float:
    """Raise `norms.best` towards the supremum over all frequencies, and return an upper bound of the supremum.

    The search ends once the upper bound is at most `sufficient`.
    """
    real = norms.operand.plan.real
    # The first size is chosen so that cells of the last size are just fine enough.
    finest = math.acos(1 / (1 + rtol))
    if transforms_pay(norms.operand):
        centres, values, cells = norms.transformed(finest)
        levels = Levels(norms, cells, rtol, sufficient)
        left = levels.bounded(centres, values, 1)
    else:
        first_cover = cover(norms.types, finest * 3 ** max(0, math.floor(math.log(COARSEST / finest, 3))))
        levels = Levels(norms, first_cover.cells, rtol, sufficient)
        centres = distinct(first_cover.centres, real)
        levels.climb(centres[:: -(-len(centres) // STARTS)])
        left = levels.visit(centres, 1)
        cells = first_cover.cells
    most = 3 ** len(cells.edges) if len(cells.edges) else 0
    settled = 0.0
    while True:
        undecided = left.bounds > levels.enough
        settled = max(settled, float(np.max(left.bounds, where=~undecided, initial=0.0)))
        left = left.take(undecided)
        count = len(left.bounds)
        # A constant symbol has one cell, which nothing can split.
        batch = min(max(BATCH // most, count // 2), (norms.budget - norms.evaluations) // most) if most else 0
        if not count or batch < 1:
            return max(settled, float(np.max(left.bounds, initial=0.0)))
        # Cells with the highest bounds are split first, because a higher `best` may decide the remaining cells.
        order = np.argsort(-left.bounds)
        first, rest = left.take(order[:batch]), left.take(order[batch:])
        left = Open.join([rest, *levels.split(first, real)])
