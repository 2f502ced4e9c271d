"""Certificates that the norm of a kernel is within a bound, and what there is above it.

A kernel that is far within the bound is shown to be so by few frequencies, one that is near it by those of its grid:
all tested rather than decomposed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray, Plan, make_plan
from convsv_core._norm.fixed_grid import every_size_grid
from convsv_core._norm.tap_bounds import sum_of_norms
from convsv_core._norm.torus import TorusNorms, search_torus
from convsv_core._symbol.gram import GramPolynomial, useful_polynomial
from convsv_core._symbol.moments import moment_bounds
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core._symbol.rows import Eigenvalues, GramRows, PolynomialRows, grid_rows
from convsv_core.backend import Array

COARSER = (8, 4, 2, 1)
"""Spacings, in frequencies, of the grids that the search for those above the bound goes through."""

TESTED = {0.53: 0.25, 0.072: 0.6, 0.0098: 0.6}
"""How far the norm can rise between the frequencies of the grids that a kernel is tested on, and how many of them there
may be at most, as a share of those that are left on its own grid, for one to be tried."""

TESTED_FREQUENCIES = 1024
"""Most frequencies of such a grid; beyond it, searches that leave out most of a grid are cheaper."""

RETESTED = 4
"""Frequencies of one such grid that tell whether a finer one may do."""

CERTIFICATE_RTOL = 1e-3
"""Gap of the certificate for every input size."""

CLOSEST_RTOL, CLOSEST_EVALUATIONS = 1e-7, 2000
"""A second look at a norm that this gap leaves on both sides of the bound, and what it may cost."""

MOST_EVALUATIONS = 20_000
"""Of the symbol, in one certificate."""

RESCALINGS = 8
"""One will do but for numbers too small to be normal; each other gives up more than the last, up to everything."""

SLACK = 1e-6
"""Largest relative excess of a certified norm that counts as within the bound."""

SLACK_EPS = 4
"""That excess, in eps of the answer, beside the certificate's own rounding."""

TESTED_SIDE = 12
"""Side from which Cholesky's factorisation is cheaper than eigenvalues where one limit decides."""


@dataclass(frozen=True)
class Problem:
    """A kernel and a bound of its norm, in the computing dtype and on a grid.

    Attributes
    ----------
    operand : Operand
    narrow : Operand
        The same in the answer's own dtype.
    bound : 0-d array
        At the operand's scale.
    known : bool
        Whether values can be looked at: not under tracing.
    every_size : bool
        Whether the grid stands for all frequencies.
    factor : float
        How far the norm can rise between those of the grid.
    method : str
    rtol : float
        Of the projection.
    """

    operand: Operand
    narrow: Operand
    bound: Array
    known: bool
    every_size: bool
    factor: float
    method: str
    rtol: float

    @property
    def frequencies(self) -> HostArray:
        """Indices of the visited frequencies."""
        return self.operand.plan.frequencies

    def rows(self, kernel: Array) -> GramRows:
        """Return the Gram matrices of a kernel, given at the operand's scale, at the visited frequencies."""
        return grid_rows(dataclasses.replace(self.operand, kernel=kernel))


class Above(NamedTuple):
    """The frequencies of a grid whose norms are not shown to be within a limit.

    Attributes
    ----------
    places : int array
        Places among the visited frequencies.
    upper : float
        An upper bound of the largest norm, which is at most the limit if there are no such frequencies.
    rounding : float
        How much of the square of `upper` is for rounding.
    norms : float array
        An upper bound of the norm at each of the places.
    """

    places: HostArray
    upper: float
    rounding: float
    norms: HostArray

    @property
    def computed(self) -> float:
        """The largest norm as computed: `upper` without what is for rounding."""
        return math.sqrt(max(self.upper**2 - self.rounding, sys.float_info.min))


def frequencies_above(problem: Problem, kernel: Array, limit: float, among: HostArray | None = None) -> Above:
    """Find the visited frequencies, or the places `among` them, at which a kernel's norm may be above a limit.

    The kernel is given at the problem's scale.
    """
    if among is None and len(problem.frequencies) > TESTED_FREQUENCIES:
        return _search_above(problem, kernel, limit)
    rows = problem.rows(kernel)
    places = np.arange(len(problem.frequencies)) if among is None else among
    places = places[rows.above(places, limit**2)]
    if not len(places):
        return Above(places, limit, 0.0, np.zeros(0))
    found = rows.largest(places)
    return Above(places, *_upper_of(found), np.sqrt(np.maximum(found.uppers, 0.0)))


def upper_of(rows: GramRows, places: HostArray) -> tuple[float, float]:
    """Return an upper bound of the norms at some places, and how much of its square is for rounding."""
    return _upper_of(rows.largest(places))


def _upper_of(found: Eigenvalues) -> tuple[float, float]:
    upper = max(float(found.uppers.max()), 0.0)
    return math.sqrt(upper), upper - max(float(found.values.max()), 0.0)


def _search_above(problem: Problem, kernel: Array, limit: float) -> Above:
    """Find them on a large grid.

    Frequencies near one of a coarser grid are left out where the Bernstein-Szego bound shows them to be below.
    """
    norms = TorusNorms(dataclasses.replace(problem.operand, kernel=kernel), sys.maxsize, tested_side=TESTED_SIDE)
    if norms.ceiling <= limit:
        return Above(np.zeros(0, int), norms.ceiling, norms.rounding, np.zeros(0))
    frequencies, periods = problem.frequencies, np.asarray(problem.operand.plan.periods)
    visit = problem.operand.plan.visit.reshape(tuple(periods))
    values = np.full(len(frequencies), -1.0)
    left = np.arange(len(frequencies))
    supremum = math.inf
    for spacing in COARSER:
        # A frequency is within `near` of its coarse one, and any angle, by way of a frequency, within `far` of some.
        near, far = (
            float(np.sum(norms.types * np.minimum(steps, periods) * 2 * np.pi / periods))
            for steps in (spacing / 2, (spacing + 1) / 2)
        )
        if spacing > 1 and far > 1:
            continue
        coarse = visit[tuple((np.rint(frequencies[left] / spacing).astype(int) * spacing % periods).T)]
        wanted = np.unique(coarse)
        wanted = wanted[values[wanted] < 0]
        # Where no norm is above the first of two limits, nothing between them is above the second.
        limits = [limit * math.cos(far) * (1 - 1e-15), limit] if spacing > 1 else [limit]
        if len(wanted):
            values[wanted] = norms.upper(2 * np.pi * frequencies[wanted] / periods, limits)
        if spacing == 1:
            break
        if supremum == math.inf:  # the first of these grids, which lies everywhere
            supremum = float(values.max()) / math.cos(far)
        distance = np.arccos(np.minimum(values[coarse] / max(supremum, sys.float_info.min), 1.0))
        left = left[supremum * np.cos(np.maximum(distance - near, 0.0)) > limit]
    largest = float(values.max())
    if largest <= limit:
        largest = max(largest, min(limit, supremum))
    places = np.flatnonzero(values > limit)
    return Above(places, largest, norms.rounding, values[places])


def left_above(problem: Problem) -> HostArray | None:
    """Places that a few quick tests do not show to be within the bound: none if the whole kernel is; None if unknown.

    By the moments of the Gram matrices, then on grids that stand for all frequencies, ever finer ones, as long as these
    are fewer than what the moments have left; then on the problem's own grid. A grid is left out where a coarser one's
    frequencies show that it would not do.
    """
    operand, plan = problem.narrow, problem.operand.plan
    limit = float(problem.bound) * (1 - 4 * operand.eps)
    shape = tuple(int(extent) for extent in operand.kernel.shape)
    grids = []
    for rtol in TESTED:
        grid = every_size_grid(shape, plan.conv, rtol)
        grids.append((make_plan(shape, plan.real, grid.input_shape, grid.conv), limit / grid.factor))
    own = not problem.every_size and len(plan.frequencies) <= TESTED_FREQUENCIES
    finest, least = (plan, limit) if own else grids[-1]
    gram = useful_polynomial(dataclasses.replace(operand, plan=finest))
    left = _left_by_moments(finest, gram, least)
    rows: GramRows | None = None
    places = np.zeros(0, int)
    for (plan_of_grid, level), share in zip(grids, TESTED.values(), strict=True):
        if not len(left):
            return left
        if len(plan_of_grid.frequencies) > share * len(left):
            continue
        if rows is not None and rows.above(places[:RETESTED], level**2).any():
            continue
        rows = _on_grid(operand, plan_of_grid, gram)
        places = np.flatnonzero(rows.above(np.arange(len(plan_of_grid.frequencies)), level**2))
        left = left if len(places) else places
    if len(left):
        left = left[_on_grid(operand, finest, gram).above(left, least**2)]
    return left if own or not len(left) else None


def _left_by_moments(grid: Plan, gram: GramPolynomial | None, level: float) -> HostArray:
    """Return the places of a grid whose norms are not shown to be within `level` by two moments."""
    bounds = None if gram is None else moment_bounds(gram)
    if gram is None or bounds is None:
        return np.arange(len(grid.frequencies))
    return np.flatnonzero((bounds.uppers + gram.roundings()).max(axis=1) > level**2)


def _on_grid(operand: Operand, grid: Plan, gram: GramPolynomial | None) -> GramRows:
    """Return the Gram matrices on some grid, from their polynomial on another one if that has the same offsets."""
    known = None if gram is None else gram.on_grid(grid)
    return grid_rows(dataclasses.replace(operand, plan=grid)) if known is None else PolynomialRows(known)


def _slack(operand: Operand, rounding: float, limit: float) -> float:
    """How far, relative, a certified norm may be above the bound: by no more than its own rounding explains."""
    eps = operand.answer_eps
    return min(SLACK - eps, SLACK_EPS * eps + rounding / max(limit**2, sys.float_info.min))


class Certificate(NamedTuple):
    """An upper bound of a norm, and whether it is within the bound that was asked for."""

    upper: float
    within: bool


def certify_original(problem: Problem) -> Certificate:
    """Certify the norm of the problem's own kernel, which may be above the bound by what rounding explains."""
    left = left_above(problem)
    if left is not None and not len(left):
        return Certificate(float(problem.bound), True)
    if left is None:
        return certify(problem, problem.operand.kernel, slack=True)
    limit = float(problem.bound)
    upper, rounding = upper_of(problem.rows(problem.operand.kernel), left)
    return Certificate(max(limit, upper), upper <= limit * (1 + _slack(problem.operand, rounding, limit)))


def certify(problem: Problem, kernel: Array, *, slack: bool = False) -> Certificate:
    """Certify the norm of a kernel, given at the problem's scale; with `slack`, allow what rounding explains.

    The upper bound is improved no further than to the problem's bound.
    """
    operand, limit = problem.operand, float(problem.bound)
    if not problem.every_size:
        above = frequencies_above(problem, kernel, limit)
        allowed = limit * (1 + (_slack(operand, above.rounding, limit) if slack else 0.0))
        return Certificate(above.upper, above.upper <= allowed)
    operand = make_operand(kernel, None, operand.plan.conv).widen()
    scale = float(operand.scale)
    norms = TorusNorms(operand, MOST_EVALUATIONS, tested_side=TESTED_SIDE)
    limit = limit / scale
    if slack:
        limit *= 1 + _slack(problem.operand, norms.rounding, limit)
    if norms.ceiling <= limit:
        return Certificate(norms.ceiling * scale, True)
    upper = search_torus(norms, CERTIFICATE_RTOL, limit)
    if upper > limit >= norms.best:  # left open by this gap
        norms.budget = norms.evaluations + CLOSEST_EVALUATIONS
        upper = min(upper, search_torus(norms, CLOSEST_RTOL, limit))
    return Certificate(upper * scale, upper <= limit)


class Rescaled(NamedTuple):
    """A kernel in the answer's dtype and scale, and a certified upper bound of its norm at the problem's scale."""

    kernel: Array
    upper: float


def rescaled(problem: Problem, kernel: Array, upper: float) -> Rescaled:
    """A kernel multiplied by what brings it within the bound, at the answer's scale, and its certified norm.

    `upper` is that of the kernel, before.
    """
    operand, bound = problem.operand, float(problem.bound)
    xp = operand.xp
    eps = operand.answer_eps
    # For every input size so far below the bound that any certificate with the usual gap finds it so.
    gap = CERTIFICATE_RTOL if problem.every_size and len(problem.frequencies) > 1 else 0.0
    target = bound * (1 - 2 * eps) / (1 + gap)
    # What rounding to the answer's dtype, or the product itself, adds to the norm is at most its taps' norms: of normal
    # numbers, no more than this share of their own.
    size = eps * sum_of_norms(dataclasses.replace(operand, kernel=kernel))
    for attempt in range(RESCALINGS):
        share = min(1.0, target / (upper + size))
        exact = kernel * share
        answer = operand.answer(exact)
        stored = xp.astype(answer, exact.dtype) / operand.scale
        rounding = stored - exact if operand.widened else eps * exact
        certified = (share * upper + sum_of_norms(dataclasses.replace(operand, kernel=rounding))) * (1 + eps)
        if certified <= bound:
            return Rescaled(answer, certified)
        target *= 1 - min(1.0, eps * 16.0**attempt)
    return Rescaled(operand.answer(kernel * 0), 0.0)
