"""The search for the largest eigenvalue of Gram matrices at given frequencies, for one kernel or several at once.

Two moments of the Gram matrices bound the eigenvalues at every frequency without a matrix. Eigenvalues are computed
where these bounds are largest. All other frequencies are tested against the largest eigenvalue so far, at a fraction of
the cost of their eigenvalues. The search repeats both steps among the frequencies that fail the test.

Many large matrices are tested once, against a level that rises on the way (`convsv_core._norm.sweep`).

On a fine grid a test of every second frequency along each axis, against a lower level, first excludes the frequencies
between those that pass (`Cover`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._norm.cover import Cover
from convsv_core._norm.sweep import is_sweepable, sweep
from convsv_core._symbol.moments import MomentBounds, moment_bounds
from convsv_core._symbol.rows import GramRows, PolynomialRows, ProductRows
from convsv_core._symbol.rows_together import above_each, largest_of_rows

__all__ = ["Largest", "largest_of_each", "moments_of", "parts_of"]

FIRST_PROBES = 1
"""Frequencies whose eigenvalues are computed before the others are tested against the largest of them.

Each further round doubles it. It was chosen by measurement: with 1, most kernels in training need two tests.
"""

COVERED = 64
"""Smallest number of undecided frequencies for which every second frequency is tested first. A guess."""


SAMPLED = 8
"""Number of coarse frequencies whose tests show whether a cover is worthwhile. A guess."""

MOST_FAILING = 0.5
"""Largest share of the sampled coarse frequencies that may fail if all of them are tested.

With two axes, two thirds of the other frequencies lie between two coarse ones, and a third between four. If half of the
tests failed independently, a fifth of these frequencies would be excluded. The tests of the coarse ones cost a third
of theirs. Failures lie together, so more are excluded. For flat spectra nearly all fail.
"""


class Largest(NamedTuple):
    """Hold the largest eigenvalue of the Gram matrices of a grid, which is the square of the largest norm.

    Attributes
    ----------
    value : float
        The eigenvalue as computed. It is 0 if no eigenvalue exceeds the level, because none was computed then.
    upper : float
        An upper bound of all eigenvalues, or the level if the level is larger. It counts the rounding error bound of
        `value` twice, so that eigenvalues equal to `value` up to rounding pass a test against it.
    place : int or None
        The place of `value` among the visited frequencies.
    """

    value: float
    upper: float
    place: int | None

    @property
    def lower(self) -> float:
        """Return a lower bound of the largest eigenvalue: `value` less its rounding error bound."""
        return max(self.value - (self.upper - self.value) / 2, 0.0) if self.place is not None else 0.0


def largest_of_each(
    members: Sequence[GramRows],
    bounds: Sequence[MomentBounds | None],
    levels: Sequence[float],
    fine: Sequence[GramRows] | None = None,
    cover: Cover | None = None,
) -> list[Largest]:
    """Return the largest eigenvalue of each kernel at all visited frequencies, if it may be above the kernel's level.

    Parameters
    ----------
    members : sequence of GramRows
        The rows of each kernel, which are named by place.
    bounds : sequence of MomentBounds or None
        Bounds of the same matrices. The search begins where they are largest.
    levels : sequence of float
        The search ignores eigenvalues up to the kernel's level. Level 0 asks for the largest one.
    fine : sequence of GramRows, optional
        The same matrices in a wider dtype. If given, the eigenvalues are computed from them, and they are tested where
        a test of `members` fails.
    cover : Cover, optional
        The frequencies that are tested first.
    """
    searches = [
        _Search(rows, fine[index] if fine else None, own, level)
        for index, (rows, own, level) in enumerate(zip(members, bounds, levels, strict=True))
    ]
    if cover is not None:
        _probe([one for one in searches if one.undecided() and not one.tested])  # They need a level to test against.
        _exclude_between([one for one in searches if one.undecided() >= COVERED], cover)
    _finish(searches)
    return [one.found for one in searches]


def parts_of(rows: PolynomialRows | ProductRows, count: int) -> list[GramRows]:
    """Return the rows of each of `count` kernels, which are the groups of one operand."""
    if count == 1:
        return [rows]
    whole = rows.with_roundings() if isinstance(rows, PolynomialRows) else rows
    return [whole.part(groups) for groups in _groups_of(rows, count)]


def moments_of(rows: GramRows, count: int) -> list[MomentBounds | None]:
    """Return bounds from moments for each of `count` kernels, or None where rows have no polynomial."""
    bounds = moment_bounds(rows.gram) if isinstance(rows, PolynomialRows) else None
    if bounds is None or count == 1:
        return [bounds] * count
    return [MomentBounds(bounds.uppers[:, part], bounds.estimates[:, part]) for part in _groups_of(rows, count)]


def _groups_of(rows: GramRows, count: int) -> list[slice]:
    """Return the groups of each of `count` kernels."""
    each = rows.operand.plan.groups // count
    return [slice(index * each, (index + 1) * each) for index in range(count)]


@dataclass
class _Search:
    """Hold the state of the search for one kernel.

    Attributes
    ----------
    rows, fine, level
        As for `largest_of_each`.
    uppers : array, shape (visited,)
        Upper bounds of the eigenvalues at each place.
    left : int array
        The places that may hold a larger eigenvalue than `found`, with the largest upper bound first.
    tested : bool
        Whether the places left are tested before their eigenvalues are computed.
    probes : int
        Number of places whose eigenvalues are computed next.
    swept : bool
        Whether a sweep has tested the places.
    found : Largest
    """

    rows: GramRows
    fine: GramRows | None
    bounds: MomentBounds | None
    level: float

    def __post_init__(self) -> None:
        self.tested, self.probes, self.found = self.level > 0, FIRST_PROBES, Largest(0.0, self.level, None)
        self.swept = False
        self.uppers = np.full(len(self.rows.operand.plan.frequencies), np.inf)
        if self.bounds is not None:
            assert isinstance(self.rows, PolynomialRows)
            self.uppers = self.bounds.uppers.max(axis=1) + self.rows.rounding
            self.tested = float(self.bounds.estimates.max()) <= self.level  # Otherwise an eigenvalue exceeds the level.
        self.left = np.argsort(-self.uppers, kind="stable")

    def undecided(self) -> int:
        """Leave out the places whose upper bounds exclude them, and return the number of the others."""
        self.left = self.left[self.uppers[self.left] > self.found.upper]
        return len(self.left)

    def sweep(self) -> None:
        """Test the places left once, if that is worthwhile, and put those with the largest estimates first.

        The eigenvalue is computed at the first of them. Most of the others then have a smaller upper bound.
        """
        if self.swept or not is_sweepable(self.rows, len(self.left)):
            return
        self.uppers[self.left], estimates = sweep(self.rows, self.left, self.uppers[self.left], self.found.upper)
        self.left = self.left[np.lexsort((-self.uppers[self.left], -estimates))]
        self.swept, self.tested = True, False


def _finish(searches: Sequence[_Search]) -> None:
    """Raise the largest eigenvalue of each search until no place left may hold a larger one."""
    while active := [one for one in searches if one.undecided()]:
        for one in active:
            one.sweep()
        tested = [one for one in active if one.tested]
        _keep(tested, lambda one: one.rows)
        # Where many fail, most of them exceed the level, and a higher level spares their tests in double precision.
        # After a sweep the level is the largest estimate, and hardly any matrix exceeds it.
        few = [one for one in tested if one.fine is not None and (one.swept or len(one.left) <= one.probes)]
        _keep(few, lambda one: one.fine or one.rows)
        _probe([one for one in active if one.undecided()])


def _keep(searches: Sequence[_Search], rows_of: Callable[[_Search], GramRows]) -> None:
    """Test the places left, and keep those that fail."""
    if searches:
        wheres, levels = [one.left for one in searches], [one.found.upper for one in searches]
        above = above_each([rows_of(one) for one in searches], wheres, levels)
        for one, fails in zip(searches, above, strict=True):
            one.left = one.left[fails]


def _probe(searches: Sequence[_Search]) -> None:
    """Compute the eigenvalues at the next places of each search."""
    if not searches:
        return
    members = [one.fine or one.rows for one in searches]
    computed = largest_of_rows(members, [one.left[: one.probes] for one in searches])
    for one, (values, uppers) in zip(searches, computed, strict=True):
        best = int(np.argmax(values))
        upper = max(one.found.upper, float((2 * uppers - values).max()))
        if one.found.place is None or values[best] > one.found.value:
            one.found = Largest(float(values[best]), upper, int(one.left[best]))
        else:
            one.found = one.found._replace(upper=upper)
        one.left, one.tested, one.probes = one.left[one.probes :], True, 2 * one.probes


def _exclude_between(searches: Sequence[_Search], cover: Cover) -> None:
    """Find the largest eigenvalue at the coarse places, and exclude the places between those well below it.

    The coarse places come first, because they show where the norms are large. Fewer other places are then left.
    """
    searches = [one for one in searches if _is_excluding(one, cover)]
    if not searches:
        return
    failing = _above_share(searches, [cover.coarse] * len(searches), cover)
    others, levels = [one.left for one in searches], [one.found.upper for one in searches]
    for one, places in zip(searches, failing, strict=True):
        one.left = one.left[np.isin(one.left, places)]
    _finish(searches)
    higher = [index for index, one in enumerate(searches) if one.found.upper > levels[index]]
    again = _above_share([searches[index] for index in higher], [failing[index] for index in higher], cover)
    for index, places in zip(higher, again, strict=True):
        failing[index] = places
    for one, left, places in zip(searches, others, failing, strict=True):
        fails = np.zeros(len(one.uppers), bool)
        fails[places] = True
        between = left[np.isin(left, cover.coarse, invert=True)]
        one.left, one.swept = between[fails[cover.parents[between]].any(axis=1)], False


def _is_excluding(one: _Search, cover: Cover) -> bool:
    """Tell by a sample of the coarse frequencies whether a test of all of them is worthwhile.

    Small matrices are not sampled, because a sample would take as long as the other tests.
    """
    if not is_sweepable(one.rows, len(cover.coarse)):
        return True
    sample = cover.coarse[:: -(-len(cover.coarse) // SAMPLED)]
    (failing,) = _above_share([one], [sample], cover)
    return len(failing) <= MOST_FAILING * len(sample)


def _above_share(searches: Sequence[_Search], where: Sequence[HostArray], cover: Cover) -> list[HostArray]:
    """Return the places where a test against the cover's share of the level fails."""
    if not searches:
        return []
    levels = [one.found.upper * cover.share**2 for one in searches]
    where = [places[one.uppers[places] > level] for one, places, level in zip(searches, where, levels, strict=True)]
    above = above_each([one.rows for one in searches], where, levels)
    return [places[fails] for places, fails in zip(where, above, strict=True)]
