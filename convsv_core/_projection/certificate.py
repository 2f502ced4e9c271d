"""Certificates that the norm of a kernel is within a bound, and the frequencies where the norm is above it.

A few frequencies show that a kernel far within the bound is within it. A kernel near the bound needs the frequencies
of its own grid. Matrices are tested against the bound, which costs less than a decomposition.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray, Plan, make_plan
from convsv_core._norm.every_size import every_size_grid
from convsv_core._norm.torus import TorusNorms, search_torus
from convsv_core._symbol.gram import GramPolynomial, useful_polynomial
from convsv_core._symbol.moments import moment_bounds
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core._symbol.rows import GramRows, PolynomialRows, grid_rows
from convsv_core.backend import Array

__all__ = [
    "CERTIFICATE_RTOL",
    "SLACK_EPS",
    "Above",
    "Certificate",
    "Problem",
    "certify",
    "certify_original",
    "frequencies_above",
    "places_above",
    "upper_of",
]

COARSER = (8, 4, 2, 1)
"""Spacings, in frequencies of the full grid, of the grids that `_search_above` goes through. A guess."""


class CoarseGrid(NamedTuple):
    """A grid that stands for all frequencies, on which a kernel is tested.

    Attributes
    ----------
    rise : float
        Relative rise of the norm between its frequencies.
    share : float
        The grid is tried if it has at most this share of the frequencies that are left on the kernel's own grid.
    """

    rise: float
    share: float


TESTED = (CoarseGrid(0.53, 0.25), CoarseGrid(0.072, 0.6), CoarseGrid(0.0098, 0.6))
"""Grids on which a kernel is tested, coarsest first.

Each rise is about a seventh of the one before. The shares up to 0.6 were chosen by measurements of ResNet-32's layers
at half and 0.9 of the bound; the rises are a guess.
"""

TESTED_FREQUENCIES = 1024
"""Largest number of frequencies of a grid of which each one is tested. A guess.

On larger grids a search that leaves out most frequencies is cheaper.
"""

RETESTED = 4
"""Number of frequencies above the level, from one grid, that are tested against the level of the next grid. A guess.

If one of them is above that level too, the next grid cannot show that the kernel is within the bound.
"""

CERTIFICATE_RTOL = 1e-3
"""Relative gap between the bounds of the norm in a certificate for every input size.

It is the default gap of `norm_bounds`, so that `norm_bounds` finds a projected kernel within the bound too.
"""

CLOSEST_RTOL, CLOSEST_EVALUATIONS = 1e-7, 2000
"""When the bounds of the norm straddle the limit, search again with this relative gap and number of evaluations.

Both values are guesses.
"""

MOST_EVALUATIONS = 20_000
"""Largest number of evaluations of the symbol in one certificate. A guess."""

SLACK = 1e-6
"""Largest relative excess of a certified norm over the bound that counts as within the bound. A guess.

`project` documents it as a limit of the certified norm.
"""

SLACK_EPS = 4
"""Relative excess that is allowed beside the certificate's own rounding error, in units of the answer's eps.

A guess.
"""

TESTED_SIDE = 12
"""Smallest side of matrices for which one Cholesky factorisation is cheaper than eigenvalues, for one limit.

It was chosen by measurements of ResNet-32's layers.
"""


@dataclass(frozen=True)
class Problem:
    """Hold a kernel and a bound of its norm, in the dtype of the computation and on a grid.

    Attributes
    ----------
    operand : Operand
        The kernel, wider than `narrow` if the library has fast float64.
    narrow : Operand
        The kernel in the dtype of the answer.
    bound : 0-d array
        The bound at the operand's scale.
    known : bool
        Whether values can be read, which is not so under tracing.
    every_size : bool
        Whether the grid stands for every input size.
    factor : float
        Upper bound of the norm at all frequencies over the largest norm on the grid. It is 1 for one input size.
    method : str
        One of the methods of `project`.
    rtol : float
        The tolerance of the projection.
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
        """Return the indices of the visited frequencies."""
        return self.operand.plan.frequencies

    def rows(self, kernel: Array) -> GramRows:
        """Return the Gram matrices of a kernel, given at the operand's scale, at the visited frequencies."""
        return grid_rows(self.operand.of(kernel))


class Above(NamedTuple):
    """Hold the frequencies of a grid whose norms are not shown to be within a limit.

    Attributes
    ----------
    places : int array
        Places among the visited frequencies.
    upper : float
        An upper bound of the largest norm. It is at most the limit if there are no such frequencies.
    rounding : float
        The part of ``upper**2`` that allows for rounding errors.
    norms : float array
        An upper bound of the norm at each of the places.
    """

    places: HostArray
    upper: float
    rounding: float
    norms: HostArray

    @property
    def computed(self) -> float:
        """Return the largest norm as computed, without the allowance for rounding errors."""
        return math.sqrt(max(self.upper**2 - self.rounding, sys.float_info.min))


def frequencies_above(problem: Problem, kernel: Array, limit: float, among: HostArray | None = None) -> Above:
    """Return the visited frequencies at which the norm of a kernel may be above a limit.

    Parameters
    ----------
    problem : Problem
    kernel : array
        A kernel at the problem's scale.
    limit : float
        A limit at the problem's scale.
    among : int array, optional
        Places of the frequencies to look at. All visited frequencies if not given.
    """
    if among is None and len(problem.frequencies) > TESTED_FREQUENCIES:
        return _search_above(problem, kernel, limit)
    rows = problem.rows(kernel)
    places = np.arange(len(problem.frequencies)) if among is None else among
    places = places[rows.above(places, limit**2)]
    if not len(places):
        return Above(places, limit, 0.0, np.zeros(0))
    return upper_of(rows, places)


def places_above(problem: Problem, kernel: Array, limit: float) -> HostArray:
    """Return the places of the frequencies that `frequencies_above` finds."""
    if len(problem.frequencies) > TESTED_FREQUENCIES:
        return _search_above(problem, kernel, limit).places
    return np.flatnonzero(problem.rows(kernel).above(np.arange(len(problem.frequencies)), limit**2))


def upper_of(rows: GramRows, places: HostArray) -> Above:
    """Return some places with upper bounds of their norms."""
    found = rows.largest(places)
    upper = max(float(found.uppers.max()), 0.0)
    rounding = upper - max(float(found.values.max()), 0.0)
    return Above(places, math.sqrt(upper), rounding, np.sqrt(np.maximum(found.uppers, 0.0)))


def _search_above(problem: Problem, kernel: Array, limit: float) -> Above:
    """Return the frequencies above a limit on a large grid.

    Near a frequency of a coarser grid, the Bernstein-Szego bound shows that frequencies are below the limit. The
    search leaves these out.
    """
    norms = TorusNorms(problem.operand.of(kernel), sys.maxsize, tested_side=TESTED_SIDE)
    if norms.ceiling <= limit:
        return Above(np.zeros(0, int), norms.ceiling, norms.rounding, np.zeros(0))
    frequencies, periods = problem.frequencies, np.asarray(problem.operand.plan.periods)
    visit = problem.operand.plan.visit.reshape(tuple(periods))
    values = np.full(len(frequencies), -1.0)
    left = np.arange(len(frequencies))
    supremum = math.inf
    for spacing in COARSER:
        # Each frequency of the grid is within `near` of a coarse frequency, and each angle within `far` of one.
        # Distances are in radians, weighted by the type of the polynomial along each axis.
        near, far = (
            float(np.sum(norms.types * np.minimum(steps, periods) * 2 * np.pi / periods))
            for steps in (spacing / 2, (spacing + 1) / 2)
        )
        if spacing > 1 and far > 1:
            continue
        coarse = visit[tuple((np.rint(frequencies[left] / spacing).astype(int) * spacing % periods).T)]
        wanted = np.unique(coarse)
        wanted = wanted[values[wanted] < 0]
        # If no coarse norm is above the first limit, no norm between coarse frequencies is above the second.
        limits = [limit * math.cos(far) * (1 - 1e-15), limit] if spacing > 1 else [limit]
        if len(wanted):
            values[wanted] = norms.upper(2 * np.pi * frequencies[wanted] / periods, limits)
        if spacing == 1:
            break
        if supremum == math.inf:  # Only the first grid has frequencies everywhere, none left out.
            supremum = float(values.max()) / math.cos(far)
        distance = np.arccos(np.minimum(values[coarse] / max(supremum, sys.float_info.min), 1.0))
        left = left[supremum * np.cos(np.maximum(distance - near, 0.0)) > limit]
    largest = float(values.max())
    if largest <= limit:
        largest = max(largest, min(limit, supremum))
    places = np.flatnonzero(values > limit)
    return Above(places, largest, norms.rounding, values[places])


class Undecided(NamedTuple):
    """The frequencies that a few quick tests do not show to be within the bound.

    Attributes
    ----------
    places : int array
        Places among the visited frequencies of the problem, if `on_own_grid`. Otherwise only their number tells: the
        whole kernel is within the bound if there are none.
    on_own_grid : bool
    """

    places: HostArray
    on_own_grid: bool


def quick_tests(problem: Problem) -> Undecided:
    """Test a problem's own kernel in its narrow dtype, on few frequencies.

    The tests are, in this order:

    1. The moments of the Gram matrices on the problem's own grid or the finest test grid.
    2. Grids that stand for all frequencies, coarsest first. A grid is tried if it has few frequencies
       beside the places that are left; see `TESTED`. It is left out if a coarser grid shows that it would fail.
    3. The places that are left on the grid of the first test.
    """
    operand, plan = problem.narrow, problem.operand.plan
    limit = float(problem.bound) * (1 - 4 * operand.eps)
    if limit == math.inf:
        return Undecided(np.zeros(0, int), False)
    shape = tuple(int(extent) for extent in operand.kernel.shape)
    grids = []
    for tested in TESTED:
        grid = every_size_grid(shape, plan.conv, tested.rise)
        grids.append((make_plan(shape, plan.real, grid.input_shape, grid.conv), limit / grid.factor))
    own = not problem.every_size and len(plan.frequencies) <= TESTED_FREQUENCIES
    finest, least = (plan, limit) if own else grids[-1]
    gram = useful_polynomial(dataclasses.replace(operand, plan=finest))
    left = _left_by_moments(finest, gram, least)
    rows: GramRows | None = None
    places = np.zeros(0, int)
    for (plan_of_grid, level), tested in zip(grids, TESTED, strict=True):
        if not len(left):
            break
        if len(plan_of_grid.frequencies) > tested.share * len(left):
            continue
        if rows is not None and rows.above(places[:RETESTED], level**2).any():
            continue
        rows = _on_grid(operand, plan_of_grid, gram)
        places = np.flatnonzero(rows.above(np.arange(len(plan_of_grid.frequencies)), level**2))
        left = left if len(places) else places
    if len(left):
        left = left[_on_grid(operand, finest, gram).above(left, least**2)]
    return Undecided(left, own)


def _left_by_moments(grid: Plan, gram: GramPolynomial | None, level: float) -> HostArray:
    """Return the places of a grid whose norms two moments do not show to be within `level`."""
    bounds = None if gram is None else moment_bounds(gram)
    if gram is None or bounds is None:
        return np.arange(len(grid.frequencies))
    return np.flatnonzero((bounds.uppers + gram.roundings()).max(axis=1) > level**2)


def _on_grid(operand: Operand, grid: Plan, gram: GramPolynomial | None) -> GramRows:
    """Return the Gram matrices on a grid, from the polynomial `gram` of another grid if its offsets are equal."""
    known = None if gram is None else gram.on_grid(grid)
    return grid_rows(dataclasses.replace(operand, plan=grid)) if known is None else PolynomialRows(known)


def _slack(operand: Operand, rounding: float, limit: float) -> float:
    """Return the relative excess over the bound that a certified norm may have because of rounding errors alone."""
    eps = operand.answer_eps
    return min(SLACK - eps, SLACK_EPS * eps + rounding / max(limit**2, sys.float_info.min))


class Certificate(NamedTuple):
    """Hold an upper bound of a norm, and whether the norm is within the bound of the problem."""

    upper: float
    within: bool


def certify_original(problem: Problem) -> Certificate:
    """Certify the norm of the problem's own kernel, and allow an excess over the bound that rounding errors explain."""
    left = quick_tests(problem)
    if not len(left.places):
        return Certificate(float(problem.bound), True)
    if not left.on_own_grid:
        return certify(problem, problem.operand.kernel, slack=True)
    limit = float(problem.bound)
    found = upper_of(problem.rows(problem.operand.kernel), left.places)
    allowed = limit * (1 + _slack(problem.operand, found.rounding, limit))
    return Certificate(max(limit, found.upper), found.upper <= allowed)


def certify(problem: Problem, kernel: Array, *, slack: bool = False) -> Certificate:
    """Certify the norm of a kernel, given at the problem's scale.

    The upper bound is improved only until it is within the problem's bound. With `slack`, the norm may exceed the
    bound by as much as rounding errors explain.
    """
    operand, limit = problem.operand, float(problem.bound)
    if not problem.every_size:
        above = frequencies_above(problem, kernel, limit)
        allowed = limit * (1 + (_slack(operand, above.rounding, limit) if slack else 0.0))
        return Certificate(above.upper, above.upper <= allowed)
    operand = make_operand(kernel, None, operand.plan.conv, lattice=True).widen()
    scale = float(operand.scale)
    norms = TorusNorms(operand, MOST_EVALUATIONS, tested_side=TESTED_SIDE)
    limit = limit / scale
    if slack:
        limit *= 1 + _slack(problem.operand, norms.rounding, limit)
    if norms.ceiling <= limit:
        return Certificate(norms.ceiling * scale, True)
    upper = search_torus(norms, CERTIFICATE_RTOL, limit)
    if upper > limit >= norms.best:  # The first search has not decided.
        norms.budget = norms.evaluations + CLOSEST_EVALUATIONS
        upper = min(upper, search_torus(norms, CLOSEST_RTOL, limit))
    return Certificate(upper * scale, upper <= limit)
