"""``python -m benchmarks certify``: look for a random layer on which certified bounds do not hold."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from convsv_conformance.random_layers import random_layer, refined_supremum, symbol_norm

import convsv_core as convsv
from benchmarks.command import json_option, progress, write_json
from benchmarks.comparison import group_by
from benchmarks.shapes import HostArray
from benchmarks.tables import Column, duration, figures, integers, say, show_table, words

__all__ = [
    "BoundCheck",
    "BoundSummary",
    "certify",
    "check_grid",
    "check_layer",
    "check_torus",
    "summarise",
]

RTOL = {1: 1e-3, 2: 1e-3, 3: 1e-2}
"""Gap asked for on the torus, by the number of spatial axes: a guess, for speed. On a grid it is the default."""

LARGEST_GRID = {1: 24, 2: 10, 3: 5}
"""Frequencies along an axis are fewer than this, by the number of spatial axes: a guess, for speed."""

EPS = float(np.finfo(np.float64).eps)
TOLD_EVERY = 100
"""Layers from one message to the next: a guess."""

QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
"""Quantiles of the evaluations, by name."""

EXPLANATION = (
    "upper above, lower below: least relative distance of a bound from the truth, which itself is rounded; median to "
    "max: evaluations of a block of the symbol."
)


@dataclass(frozen=True)
class BoundCheck:
    """Record the bounds of one layer beside the truth: an entry of ``violations`` or ``not_converged`` in the JSON.

    Attributes
    ----------
    number : int
        Number of the layer in the sweep.
    question : str
        "torus" or "grid".
    layer : str
        Kernel shape, dtype and geometry.
    ndim : int
        Spatial axes.
    lower, truth, upper : float
        On the torus the truth is the result of a refined search in float64; on a grid it is the largest of all
        singular values.
    noise : float
        Relative rounding error of the truth.
    evaluations : int
    converged : bool
    """

    number: int
    question: str
    layer: str
    ndim: int
    lower: float
    truth: float
    upper: float
    noise: float
    evaluations: int
    converged: bool

    @property
    def holds(self) -> bool:
        """Return whether the truth lies between the bounds, up to its own rounding."""
        slack = self.noise * self.truth
        return self.lower <= self.truth + slack and self.truth <= self.upper + slack

    @property
    def gap(self) -> float:
        """Return the relative gap between the bounds; 0 for a kernel of zeros."""
        return self.upper / self.lower - 1 if self.lower > 0 else 0.0


@dataclass(frozen=True)
class BoundSummary:
    """Sum up the checks of one question and number of spatial axes: an entry of ``summary`` in the JSON.

    Attributes
    ----------
    violations : int
        Checks that failed.
    upper_margin, lower_margin : float
        The least of ``upper / truth - 1`` and of ``1 - lower / truth``. Without a violation they are below 0 by no
        more than the rounding of the truth.
    worst_gap : float
        Largest gap of the bounds that converged.
    evaluations : dict of str to int
        The `QUANTILES`.
    """

    question: str
    ndim: int
    count: int
    violations: int
    converged: int
    worst_gap: float
    upper_margin: float
    lower_margin: float
    evaluations: dict[str, int]


def _short(heading: str, attribute: str) -> Column:
    return figures(heading, lambda one: f"{getattr(one, attribute):.2g}")


def _evaluations(quantile: str) -> Column:
    return figures(quantile, lambda one: f"{one.evaluations[quantile]:,}")


COLUMNS = (
    words("bounds on the", lambda one: f"{one.question}, {one.ndim}-D"),
    integers("layers", "count"),
    integers("violated", "violations"),
    integers("converged"),
    _short("worst gap", "worst_gap"),
    _short("upper above", "upper_margin"),
    _short("lower below", "lower_margin"),
    *map(_evaluations, QUANTILES),
)


def check_torus(number: int, kernel: HostArray, conv: convsv.Conv) -> BoundCheck:
    """Bound the supremum over all frequencies, and search for it."""
    bounds = convsv.norm_bounds(kernel, conv, rtol=RTOL[conv.ndim])
    truth = refined_supremum(lambda at: symbol_norm(kernel, conv, at), conv.ndim, np.asarray(bounds.frequency))
    return _check(number, "torus", kernel, conv, bounds, truth)


def check_grid(number: int, kernel: HostArray, conv: convsv.Conv, shape: tuple[int, ...]) -> BoundCheck:
    """Bound the norm for one input shape, and compute every singular value."""
    bounds = convsv.norm_bounds(kernel, conv, input_shape=shape)
    truth = float(convsv.singular_values(kernel.astype(np.result_type(kernel, np.float64)), shape, conv)[0])
    return _check(number, "grid", kernel, conv, bounds, truth)


def _check(
    number: int, question: str, kernel: HostArray, conv: convsv.Conv, bounds: convsv.NormBounds, truth: float
) -> BoundCheck:
    return BoundCheck(
        number=number,
        question=question,
        layer=f"{kernel.shape} {kernel.dtype} {conv}",
        ndim=conv.ndim,
        lower=float(bounds.lower),
        truth=truth,
        upper=float(bounds.upper),
        noise=64 * EPS * max(kernel.shape),
        evaluations=bounds.evaluations,
        converged=bounds.converged,
    )


def check_layer(seed: int, number: int) -> list[BoundCheck]:
    """Make one layer, which depends on `seed` and `number` alone, and check its bounds on the torus and on a grid."""
    rng = np.random.default_rng([seed, number])
    kernel, conv = random_layer(rng)
    extents = rng.integers(1, LARGEST_GRID[conv.ndim], conv.ndim)
    shape = tuple(int(n) * (1 if conv.transposed else stride) for n, stride in zip(extents, conv.strides, strict=True))
    return [check_torus(number, kernel, conv), check_grid(number, kernel, conv, shape)]


def summarise(checks: Sequence[BoundCheck]) -> list[BoundSummary]:
    """Return one summary for each question and number of axes."""
    groups = group_by(checks, "question", "ndim")
    return [_summarise(groups[key]) for key in sorted(groups, reverse=True)]


def _summarise(members: Sequence[BoundCheck]) -> BoundSummary:
    spent = np.asarray([one.evaluations for one in members])
    held = [one for one in members if one.truth > 0]
    return BoundSummary(
        question=members[0].question,
        ndim=members[0].ndim,
        count=len(members),
        violations=sum(not one.holds for one in members),
        converged=sum(one.converged for one in members),
        worst_gap=max((one.gap for one in members if one.converged), default=math.nan),
        upper_margin=min((one.upper / one.truth - 1 for one in held), default=math.nan),
        lower_margin=min((1 - one.lower / one.truth for one in held), default=math.nan),
        evaluations={name: int(np.quantile(spent, at, method="higher")) for name, at in QUANTILES.items()},
    )


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=10_000, show_default=True, help="Random layers.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@json_option("the summary, and every bound that is violated or did not converge,")
def certify(count: int, seed: int, json_path: Path | None) -> None:
    """Look for a layer on which the bounds of norm_bounds do not hold.

    The kernels are Gaussian, low-rank, smooth, decaying, sparse, constant, badly scaled or of one tap, in float32,
    float64 and complex dtypes, 1-D to 3-D, with strides, dilation, groups and even extents, transposed or not. The
    truth is a refined search in float64 over all frequencies; for one input shape it is the largest of all singular
    values. The command ends with an error where a bound is violated.
    """
    start = time.perf_counter()
    checks: list[BoundCheck] = []
    with progress() as tell:
        for number in range(count):
            checks.extend(check_layer(seed, number))
            if (number + 1) % TOLD_EVERY == 0:
                violated = sum(not one.holds for one in checks)
                tell(f"{number + 1}/{count} layers, {violated} violations")
    summaries = summarise(checks)
    violations = [one for one in checks if not one.holds]
    show_table(summaries, COLUMNS)
    seconds = duration(time.perf_counter() - start)
    say(f"\n{len(checks):,} certificates, {len(violations)} violated; {seconds}.")
    say(EXPLANATION)
    write_json(
        json_path,
        "certify",
        {"count": count, "seed": seed},
        summary=summaries,
        violations=violations,
        not_converged=[one for one in checks if not one.converged],
    )
    if violations:
        worst = "\n".join(
            f"{one.layer} {one.question}: {one.lower} <= {one.truth} <= {one.upper}" for one in violations
        )
        raise click.ClickException(f"{len(violations)} bounds are violated:\n{worst}")
