"""Check certified bounds of the norm.

The bounds must hold, be attained at the frequency that they name, and hold for kernels that mislead a search too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import convsv_core as convsv
from convsv_conformance.cases import Case, make_case
from convsv_conformance.checks.spectrum import VALUE_FACTOR
from convsv_conformance.dense import Array
from convsv_conformance.symbols import climb, frequency_grid, symbol_at, symbol_norms
from convsv_conformance.target import UNITS_IN_LAST_PLACE, Ledger, Target

__all__ = [
    "PEAKS",
    "Peak",
    "gradients_of_a_fixed_grid",
    "of_a_fixed_grid",
    "of_a_fixed_grid_compiled",
    "of_every_size",
    "of_flat_symbols",
    "of_one_size",
    "of_peaks",
]

ATTAINED_FACTOR = 300.0
"""Largest distance of `lower` below the norm at the frequency that it names, in units of eps times that norm.

The library takes a bound of the rounding error off `lower`: some units of eps for each of the sums that make the
squared norm, relative to the sum of the moduli of their terms. The number is a guess that covers the cases here.
"""

RTOL = 1e-3
"""Relative gap of the bounds that is asked for on the cases of the table; the library's own default."""

FIXED_RTOL = 0.05
"""Relative gap that is asked of a fixed grid; a guess, at which the grids stay small."""

GRADIENT_FACTOR = 200.0
"""Error allowed to the derivative along the kernel, in units of eps times the sum of the moduli; a guess."""

TIGHT = {"float32": 1e-6, "float64": 1e-8}
"""Relative gap that is asked for where a wider gap would hide rounding errors, by dtype of the answer; a guess."""

TIGHT_EVALUATIONS = 4000
"""Number of evaluations allowed for a gap of `TIGHT`; a guess.

In 32 bits the gap may be out of reach. The answer must then say that it has not converged.
"""

POINTS = 24
"""Points on each axis of the grid on which the reference begins its search for a supremum; a guess."""

STARTS = 8
"""Number of the grid's best points from which the reference searches; a guess."""


def of_one_size(target: Target, case: Case, ledger: Ledger) -> None:
    """Check that the dense matrix's norm lies between the bounds that are given with an input shape."""
    kernel, truth = target.kernel(case)
    bounds = convsv.norm_bounds(kernel, case.conv, input_shape=case.input_shape, rtol=RTOL)
    lower, upper = _consistent(target, case, truth.values, bounds, RTOL, ledger)
    ledger.not_above(f"norm_bounds: the upper bound {upper} is violated", truth.norm, upper)
    ledger.not_above("norm_bounds: the lower bound is violated", lower, truth.norm)
    turns = np.asarray(bounds.frequency) * case.grid / (2 * math.pi)
    on_grid = np.abs(turns - np.rint(turns)) <= 2 * UNITS_IN_LAST_PLACE["float64"] * np.maximum(turns, 1)
    ledger.true(f"norm_bounds: frequency={bounds.frequency} is not on the grid {case.grid}", bool(on_grid.all()))
    ledger.true("norm_bounds did not converge", bounds.converged)


def of_every_size(target: Target, case: Case, ledger: Ledger) -> None:
    """Check bounds without an input shape: `upper` holds for circular and zero padding, and `lower` is attained."""
    kernel, truth = target.kernel(case)
    bounds = convsv.norm_bounds(kernel, case.conv, rtol=RTOL)
    _, upper = _consistent(target, case, truth.values, bounds, RTOL, ledger)
    ledger.not_above(f"norm_bounds: the circular layer's norm is beyond {upper}", truth.norm, upper)
    ledger.not_above(f"norm_bounds: the zero-padded layer's norm is beyond {upper}", truth.zero_padded_norm, upper)
    ledger.true("norm_bounds did not converge", bounds.converged)


def of_flat_symbols(target: Target, case: Case, ledger: Ledger) -> None:
    """Check bounds of symbols whose norm is equal at every frequency, with a gap that hides no rounding error."""
    kernel, truth = target.kernel(case)
    rtol = TIGHT[target.answer]
    bounds = convsv.norm_bounds(kernel, case.conv, rtol=rtol, max_evaluations=TIGHT_EVALUATIONS)
    _, upper = _consistent(target, case, truth.values, bounds, rtol, ledger)
    ledger.not_above(f"norm_bounds: the circular layer's norm is beyond {upper}", truth.norm, upper)
    ledger.true("norm_bounds did not converge", bounds.converged or target.answer == "float32")


def of_a_fixed_grid(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the bound from a fixed grid: it holds for circular and zero padding, and is as tight as it promises."""
    _fixed_grid(target, case, ledger, lambda kernel: convsv.norm_upper_bound(kernel, case.conv, rtol=FIXED_RTOL))


def of_a_fixed_grid_compiled(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the bound from a fixed grid as one function under the library's compiler."""
    run = target.backend.jit(lambda kernel: convsv.norm_upper_bound(kernel, case.conv, rtol=FIXED_RTOL))
    assert run is not None  # only libraries that have it are asked
    _fixed_grid(target, case, ledger, run)


def _fixed_grid(target: Target, case: Case, ledger: Ledger, bound: Callable[[Any], Any]) -> None:
    kernel, truth = target.kernel(case)
    upper = float(target.fetch("norm_upper_bound", bound(kernel), ()))
    ledger.not_above(f"norm_upper_bound: the circular layer's norm is beyond {upper}", truth.norm, upper)
    padded = truth.zero_padded_norm
    ledger.not_above(f"norm_upper_bound: the zero-padded layer's norm is beyond {upper}", padded, upper)
    supremum = float(target.exact(convsv.norm_bounds(kernel, case.conv, rtol=RTOL).upper))
    # The bound may exceed the supremum by the grid's share, and by what the bound of the rounding error adds.
    room = (1 + FIXED_RTOL) * (1 + ATTAINED_FACTOR * target.eps)
    ledger.true(f"norm_upper_bound: {upper} is far above {supremum}", upper <= room * supremum)


def gradients_of_a_fixed_grid(target: Target, case: Case, ledger: Ledger) -> None:
    """Check that gradients are finite, and that the derivative along the kernel is the value, which is homogeneous."""
    kernel, _ = target.kernel(case)

    def bound(kernel: Any) -> Any:
        return convsv.norm_upper_bound(kernel, case.conv, rtol=FIXED_RTOL)

    gradient = target.backend.grad(bound)
    assert gradient is not None  # only libraries that have it are asked
    found = (target.backend.jit(gradient) or gradient)(kernel)
    slopes = target.fetch("gradient of norm_upper_bound", found, tuple(kernel.shape), target.dtype)
    ledger.true("norm_upper_bound: the gradient is not finite", bool(np.isfinite(slopes).all()))
    upper = float(target.fetch("norm_upper_bound", bound(kernel), ()))
    slope = float(np.sum(slopes * target.exact(kernel)))
    scale = max(float(np.sum(np.abs(slopes * target.exact(kernel)))), upper) * target.kernel_eps / target.eps
    ledger.close("norm_upper_bound: the derivative along the kernel", slope, upper, scale=scale, factor=GRADIENT_FACTOR)


# ---- kernels that mislead a search -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Peak:
    """A kernel whose norm is attained at a frequency that a usual search misses.

    Parameters
    ----------
    case : Case
        The geometry of the kernel.
    kernel : array, float64
    mistake : str
        A mistake that other programs make.
    mistaken : callable
        The norm by that mistake. It must be less than the right norm by more than a twentieth, or the kernel would
        not tell the two apart.
    norm : float or None
        The supremum, if the construction gives it. Otherwise the reference searches for it.
    """

    case: Case
    kernel: Array
    mistake: str
    mistaken: Callable[[Case, Array], float]
    norm: float | None = None

    @property
    def name(self) -> str:
        """Return the name of the case."""
        return self.case.name


def of_peaks(target: Target, peak: Peak, ledger: Ledger) -> None:
    """Check that `upper` is above the supremum, which a search from many starts finds and a usual search misses."""
    kernel, case = target.array(peak.kernel), peak.case
    values = target.exact(kernel)
    rtol = TIGHT[target.answer]
    bounds = convsv.norm_bounds(kernel, case.conv, rtol=rtol, max_evaluations=TIGHT_EVALUATIONS)
    lower, upper = _consistent(target, case, values, bounds, rtol, ledger)
    truth = _climbed_from(case, values, POINTS, STARTS)
    wrong = peak.mistaken(case, values)
    ledger.true(f"{peak.mistake}: the kernel does not tell, {wrong} for {truth}", wrong < 0.95 * truth)
    if peak.norm is not None:
        ledger.close("the reference's own search", truth, peak.norm, scale=peak.norm, factor=VALUE_FACTOR)
    ledger.not_above(f"norm_bounds: the supremum is beyond {upper}", truth, upper)
    ledger.not_above("norm_bounds: the lower bound is violated", lower, truth)
    ledger.true("norm_bounds did not converge", bounds.converged or target.answer == "float32")


def _climbed_from(case: Case, values: Array, points: int, starts: int) -> float:
    """Return the highest local maximum near the best `starts` points of a grid with `points` points on each axis."""
    places = frequency_grid(points, len(case.taps))
    best = np.argsort(symbol_norms(case, values, places))[-starts:]
    return climb(lambda angles: symbol_norms(case, values, angles), places[best], step=0.2)


def _climbed(case: Case, values: Array) -> float:
    """Return the result of one local search, which starts at the best point of a grid with as many points as taps."""
    return _climbed_from(case, values, max(case.taps), 1)


def _sampled(case: Case, values: Array) -> float:
    """Return the largest norm on the grid of the case."""
    return float(symbol_norms(case, values, frequency_grid(case.grid[0], len(case.taps))).max())


def _reshaped(case: Case, values: Array) -> float:
    return float(np.linalg.norm(values.reshape(values.shape[0], -1), 2))


def _gaussian(seed: int) -> Peak:
    case = make_case(f"local-optimum-{seed}", (2, 2), (3, 3), (8, 8))
    kernel = np.random.default_rng(seed).standard_normal((2, 2, 3, 3))
    return Peak(case, kernel, "a search that stops at a local optimum", _climbed)


def _wave(taps: int, angles: tuple[float, ...], height: float) -> Array:
    """Return a real kernel that rotates two channels; its norm is `height` at plus and minus `angles`, else less.

    Rotations by t commute and have the eigenvalues ``exp(+-i t)``, so the symbol is normal and its singular values
    are two Dirichlet kernels.
    """
    turns: Array = np.zeros((taps,) * len(angles))
    for place in np.ndindex(turns.shape):
        turns[place] = sum(angle * t for angle, t in zip(angles, place, strict=True))
    rotations = np.array([[np.cos(turns), -np.sin(turns)], [np.sin(turns), np.cos(turns)]])
    return rotations * (height / turns.size)


def _two_blocks() -> Peak:
    """Return a kernel with two peaks: the higher one lies between the points of a search, the lower one on a point."""
    kernel: Array = np.zeros((4, 4, 3, 3))
    kernel[:2, :2] = _wave(3, (2 * math.pi / 3, 0.0), 1.0)
    kernel[2:, 2:] = _wave(3, (math.pi / 3, math.pi), 1.2)
    case = make_case("two-blocks", (4, 4), (3, 3), (8, 8))
    return Peak(case, kernel, "a search that stops at a local optimum", _climbed, 1.2)


PEAKS = (
    *map(_gaussian, (5, 54, 63, 90)),  # seeds whose kernels mislead a local search, out of 150 seeds
    _two_blocks(),
    Peak(
        make_case("between-grid-points", (2, 2), (5,), (8,)),
        _wave(5, (3 * math.pi / 8,), 5.0),
        "the symbol sampled",
        _sampled,
        5.0,
    ),
    Peak(
        make_case("ones", (4, 3), (3, 3), (8, 8)),
        np.ones((4, 3, 3, 3)),
        "the kernel reshaped to a matrix",
        _reshaped,
        9 * math.sqrt(12),
    ),
)


# ---- checks of any bounds ----------------------------------------------------------------------------


def _consistent(
    target: Target, case: Case, values: Array, bounds: convsv.NormBounds, rtol: float, ledger: Ledger
) -> tuple[float, float]:
    """Return the lower and upper bound, after a check of their kind, order, frequency and singular vectors."""
    lower = float(target.fetch("norm_bounds: lower", bounds.lower, ()))
    upper = float(target.fetch("norm_bounds: upper", bounds.upper, ()))
    ledger.true(f"norm_bounds: lower={lower}, upper={upper}", 0 <= lower <= upper < math.inf)
    ledger.true(
        f"norm_bounds: converged={bounds.converged} with lower={lower}, upper={upper}, rtol={rtol}",
        bounds.converged is (upper <= (1 + rtol) * lower),
    )
    ledger.true(f"norm_bounds: evaluations={bounds.evaluations}", bounds.evaluations >= 1)
    ledger.true(
        f"norm_bounds: frequency={bounds.frequency}",
        len(bounds.frequency) == len(case.taps) and all(type(angle) is float for angle in bounds.frequency),
    )
    matrices = symbol_at(case, values, np.asarray([bounds.frequency]))[0]
    norm = float(np.linalg.norm(matrices, 2, axis=(-2, -1)).max())
    ledger.not_above(f"norm_bounds: at the frequency {bounds.frequency} the lower bound is not attained", lower, norm)
    ledger.close("norm_bounds: lower", lower, norm, scale=norm, factor=ATTAINED_FACTOR)
    rows, columns = case.block
    left = target.fetch("norm_bounds: left", bounds.left, (case.groups, rows), target.complex_answer)
    right = target.fetch("norm_bounds: right", bounds.right, (case.groups, columns), target.complex_answer)
    factor = VALUE_FACTOR * min(case.block)
    attained = np.linalg.norm(left, axis=-1)  # 1 for the group that attains the norm, 0 for other groups
    ledger.true("norm_bounds: left is not a vector of one group", int(np.rint(attained).sum()) == 1)
    for what, got, expected, scale in (
        ("A right = norm left", np.einsum("grc,gc->gr", matrices, right), norm * left, norm),
        ("A* left = norm right", np.einsum("grc,gr->gc", matrices.conj(), left), norm * right, norm),
        ("left* left", attained, np.rint(attained) > 0, 1.0),
        ("right* right", np.linalg.norm(right, axis=-1), np.rint(attained) > 0, 1.0),
    ):
        ledger.close(f"norm_bounds: {what}", got, expected, scale=scale, factor=factor)
    return lower, upper
