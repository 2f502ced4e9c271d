"""Certificates that the norm of a kernel is within a bound, and what there is above it.

A kernel that is far within the bound is shown to be so by few frequencies, one that is near it by those of its grid:
all tested rather than decomposed.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass

import numpy as np

from convsv_core.backend import Array
from convsv_core.bounds import SymbolNorms, search_torus
from convsv_core.fixed_grid import every_size_grid
from convsv_core.gram import GramPolynomial, useful_polynomial
from convsv_core.moments import moment_bounds
from convsv_core.operand import Operand, make_operand
from convsv_core.plan import HostArray, Plan, make_plan
from convsv_core.threshold import Threshold, sum_of_norms

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

    def threshold(self, kernel: Array, places: HostArray | None = None) -> Threshold:
        """Tests of a kernel, at the operand's scale, at the visited frequencies, or those of the given places."""
        frequencies = self.frequencies if places is None else self.frequencies[places]
        operand = dataclasses.replace(self.operand, kernel=kernel)
        return Threshold(operand, operand.backend.constant(frequencies, kernel))


def frequencies_above(problem: Problem, kernel: Array, limit: float) -> tuple[HostArray, float, float]:
    """Places, among the visited frequencies, of those with a norm above `limit`; the largest norm; its rounding.

    The norms are those of a kernel at the problem's scale, with rounding counted in, which is given in squares. The
    largest is an upper bound, which is at most `limit` if no place is returned.
    """
    if len(problem.frequencies) > TESTED_FREQUENCIES:
        return _search_above(problem, kernel, limit)
    threshold = problem.threshold(kernel)
    above = threshold.rows_above(limit)
    assert above is not None
    return (above, *threshold.largest(above)) if len(above) else (above, limit, 0.0)


def _search_above(problem: Problem, kernel: Array, limit: float) -> tuple[HostArray, float, float]:
    """The same on a large grid.

    Frequencies near one of a coarser grid are left out where the Bernstein-Szego bound shows them to be below.
    """
    norms = SymbolNorms(dataclasses.replace(problem.operand, kernel=kernel), sys.maxsize, tested_side=TESTED_SIDE)
    if norms.ceiling <= limit:
        return np.zeros(0, int), norms.ceiling, norms.rounding
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
            ladder = np.broadcast_to(np.asarray(limits)[:, None], (len(limits), len(wanted)))
            values[wanted] = norms.upper(2 * np.pi * frequencies[wanted] / periods, ladder)
        if spacing == 1:
            break
        if supremum == math.inf:  # the first of these grids, which lies everywhere
            supremum = float(values.max()) / math.cos(far)
        distance = np.arccos(np.minimum(values[coarse] / max(supremum, sys.float_info.min), 1.0))
        left = left[supremum * np.cos(np.maximum(distance - near, 0.0)) > limit]
    largest = float(values.max())
    if largest <= limit:
        largest = max(largest, min(limit, supremum))
    return np.flatnonzero(values > limit), largest, norms.rounding


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
        extents, conv, factor = every_size_grid(shape, plan.conv, rtol)
        grids.append((make_plan(shape, plan.real, extents, conv), limit / factor))
    own = not problem.every_size and len(plan.frequencies) <= TESTED_FREQUENCIES
    finest, least = (plan, limit) if own else grids[-1]
    gram = useful_polynomial(dataclasses.replace(operand, plan=finest))
    left = _left_by_moments(finest, gram, least)
    threshold: Threshold | None = None
    rows = np.zeros(0, int)
    for (grid, level), share in zip(grids, TESTED.values(), strict=True):
        if not len(left):
            return left
        if len(grid.frequencies) > share * len(left):
            continue
        if threshold is not None and len(_rows_above(threshold, level, rows[:RETESTED])):
            continue
        threshold = _on_grid(operand, grid, gram)
        rows = _rows_above(threshold, level)
        left = left if len(rows) else rows
    if len(left):
        left = _rows_above(_on_grid(operand, finest, gram), least, left)
    return left if own or not len(left) else None


def _left_by_moments(grid: Plan, gram: GramPolynomial | None, level: float) -> HostArray:
    """Places of a grid whose norms are not shown to be within `level` by the moments of the Gram matrices."""
    bounds = None if gram is None else moment_bounds(gram)
    if gram is None or bounds is None:
        return np.arange(len(grid.frequencies))
    return np.flatnonzero((bounds[0] + gram.roundings()).max(axis=1) > level**2)


def _on_grid(operand: Operand, grid: Plan, gram: GramPolynomial | None) -> Threshold:
    """Tests of an operand on some grid, by its Gram matrices on another, if they are known and do."""
    frequencies = operand.backend.constant(grid.frequencies, operand.kernel)
    known = None if gram is None else gram.on_grid(grid)
    return Threshold(dataclasses.replace(operand, plan=grid), frequencies, gram=known)


def _rows_above(threshold: Threshold, level: float, rows: HostArray | None = None) -> HostArray:
    above = threshold.rows_above(level, rows)
    assert above is not None
    return above


def _slack(operand: Operand, rounding: float, limit: float) -> float:
    """How far, relative, a certified norm may be above the bound: by no more than its own rounding explains."""
    eps = operand.answer_eps
    return min(SLACK - eps, SLACK_EPS * eps + rounding / max(limit**2, sys.float_info.min))


def certify_original(problem: Problem) -> tuple[float, bool]:
    """An upper bound of the norm of the problem's own kernel, and whether it is within the bound, but for rounding."""
    left = left_above(problem)
    if left is not None and not len(left):
        return float(problem.bound), True
    if left is None:
        return certify(problem, problem.operand.kernel, slack=True)
    limit = float(problem.bound)
    upper, rounding = problem.threshold(problem.operand.kernel, left).largest(np.arange(len(left)))
    return max(limit, upper), upper <= limit * (1 + _slack(problem.operand, rounding, limit))


def certify(problem: Problem, kernel: Array, *, slack: bool = False) -> tuple[float, bool]:
    """An upper bound of the norm of a kernel, at the problem's scale, and whether it is within the bound.

    It is improved no further than to that. With `slack` it may be above by what rounding explains.
    """
    operand, limit = problem.operand, float(problem.bound)
    if not problem.every_size:
        _, upper, rounding = frequencies_above(problem, kernel, limit)
        return upper, upper <= limit * (1 + (_slack(operand, rounding, limit) if slack else 0.0))
    operand = make_operand(kernel, None, operand.plan.conv).widen()
    scale = float(operand.scale)
    norms = SymbolNorms(operand, MOST_EVALUATIONS, tested_side=TESTED_SIDE)
    limit = limit / scale
    if slack:
        limit *= 1 + _slack(problem.operand, norms.rounding, limit)
    if norms.ceiling <= limit:
        return norms.ceiling * scale, True
    upper = search_torus(norms, CERTIFICATE_RTOL, limit)
    if upper > limit >= norms.best:  # left open by this gap
        norms.budget = norms.evaluations + CLOSEST_EVALUATIONS
        upper = min(upper, search_torus(norms, CLOSEST_RTOL, limit))
    return upper * scale, upper <= limit


def rescaled(problem: Problem, kernel: Array, upper: float) -> tuple[Array, float]:
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
            return answer, certified
        target *= 1 - min(1.0, eps * 16.0**attempt)
    return operand.answer(kernel * 0), 0.0
