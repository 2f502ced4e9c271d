"""``python -m benchmarks certify``: whether the certified bounds hold, on random layers of every kind."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from convsv_conformance.random_layers import random_layer, refined_supremum, symbol_norm

import convsv_core as convsv
from benchmarks import tables
from benchmarks.command import check_output, progress

RTOL = {1: 1e-3, 2: 1e-3, 3: 1e-2}
"""Gap asked for on the torus, by the number of spatial axes; on a grid it is the default."""

LARGEST_GRID = {1: 24, 2: 10, 3: 5}
EPS = float(np.finfo(np.float64).eps)
TOLD_EVERY = 100


@dataclass(frozen=True)
class Certificate:
    """Bounds of one layer beside the truth: an entry of ``violations`` and of ``not_converged`` in the JSON.

    Attributes
    ----------
    number : int
        Which layer of the sweep.
    question : str
        "torus" or "grid".
    layer : str
        Kernel shape, dtype and geometry.
    ndim : int
        Spatial axes.
    lower, truth, upper : float
        The truth is the best of a refined search in float64 on the torus, and all singular values on a grid.
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
        """Whether the truth, but for its own rounding, lies between the bounds."""
        slack = self.noise * self.truth
        return self.lower <= self.truth + slack and self.truth <= self.upper + slack

    @property
    def gap(self) -> float:
        """Relative gap between the bounds; 0 for a kernel of zeros."""
        return self.upper / self.lower - 1 if self.lower > 0 else 0.0


@dataclass(frozen=True)
class Summary:
    """All certificates of one question and number of spatial axes: an entry of ``summary`` in the JSON.

    Attributes
    ----------
    violations : int
        Certificates that do not hold.
    upper_margin, lower_margin : float
        The least of ``upper / truth - 1`` and of ``1 - lower / truth``; below 0 by no more than the truth's rounding
        where there is no violation.
    worst_gap : float
        Of those that converged.
    evaluations : dict of str to int
        Median, and other quantiles.
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


def certify_torus(number: int, kernel: np.ndarray[Any, Any], conv: convsv.Conv) -> Certificate:
    """Bound the supremum over all frequencies, and search for it."""
    bounds = convsv.norm_bounds(kernel, conv, rtol=RTOL[conv.ndim])
    truth = refined_supremum(lambda at: symbol_norm(kernel, conv, at), conv.ndim, np.asarray(bounds.frequency))
    return _certificate(number, "torus", kernel, conv, bounds, truth)


def certify_grid(number: int, kernel: np.ndarray[Any, Any], conv: convsv.Conv, shape: tuple[int, ...]) -> Certificate:
    """Bound the norm for one input shape, and compute every singular value."""
    bounds = convsv.norm_bounds(kernel, conv, input_shape=shape)
    truth = float(convsv.singular_values(kernel.astype(np.result_type(kernel, np.float64)), shape, conv)[0])
    return _certificate(number, "grid", kernel, conv, bounds, truth)


def _certificate(
    number: int,
    question: str,
    kernel: np.ndarray[Any, Any],
    conv: convsv.Conv,
    bounds: convsv.NormBounds,
    truth: float,
) -> Certificate:
    return Certificate(
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


def certify_layer(seed: int, number: int) -> tuple[Certificate, Certificate]:
    """Make and certify one layer, which depends on `seed` and `number` alone."""
    rng = np.random.default_rng([seed, number])
    kernel, conv = random_layer(rng)
    extents = rng.integers(1, LARGEST_GRID[conv.ndim], conv.ndim)
    shape = tuple(int(n) * (1 if conv.transposed else stride) for n, stride in zip(extents, conv.strides, strict=True))
    return certify_torus(number, kernel, conv), certify_grid(number, kernel, conv, shape)


def summarise(certificates: list[Certificate]) -> list[Summary]:
    """One summary for each question and number of axes."""
    groups: dict[tuple[str, int], list[Certificate]] = defaultdict(list)
    for one in certificates:
        groups[one.question, one.ndim].append(one)
    return [_summarise(question, ndim, members) for (question, ndim), members in sorted(groups.items(), reverse=True)]


def _summarise(question: str, ndim: int, members: list[Certificate]) -> Summary:
    spent = np.asarray([one.evaluations for one in members])
    held = [one for one in members if one.truth > 0]
    return Summary(
        question=question,
        ndim=ndim,
        count=len(members),
        violations=sum(not one.holds for one in members),
        converged=sum(one.converged for one in members),
        worst_gap=max((one.gap for one in members if one.converged), default=math.nan),
        upper_margin=min((one.upper / one.truth - 1 for one in held), default=math.nan),
        lower_margin=min((1 - one.lower / one.truth for one in held), default=math.nan),
        evaluations={
            name: int(np.quantile(spent, at, method="higher"))
            for name, at in (("median", 0.5), ("90%", 0.9), ("99%", 0.99), ("max", 1.0))
        },
    )


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=10_000, show_default=True, help="Random layers.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    callback=check_output,
    help="Write the summary, and every certificate that is violated or did not converge, to this file.",
)
def certify(count: int, seed: int, json_path: Path | None) -> None:
    """Look for a layer on which the bounds of norm_bounds do not hold.

    Gaussian, low-rank, smooth, decaying, sparse, one-tap, constant and badly scaled kernels, float32, float64 and
    complex, 1-D to 3-D, with strides, dilation, groups, even extents and transposed. The truth is a refined
    search in float64 over all frequencies; for one input shape it is every singular value. Ends with an error
    where a bound is violated.
    """
    start = time.perf_counter()
    certificates: list[Certificate] = []
    with progress() as tell:
        for number in range(count):
            certificates.extend(certify_layer(seed, number))
            if (number + 1) % TOLD_EVERY == 0:
                violated = sum(not one.holds for one in certificates)
                tell(f"{number + 1}/{count} layers, {violated} violations")
    summaries = summarise(certificates)
    violations = [one for one in certificates if not one.holds]
    tables.show_certificates(summaries, seconds=time.perf_counter() - start)
    if json_path is not None:
        content = {
            "benchmark": "certify",
            "arguments": {"count": count, "seed": seed},
            "summary": [asdict(one) for one in summaries],
            "violations": [asdict(one) for one in violations],
            "not_converged": [asdict(one) for one in certificates if not one.converged],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    if violations:
        worst = "\n".join(
            f"{one.layer} {one.question}: {one.lower} <= {one.truth} <= {one.upper}" for one in violations
        )
        raise click.ClickException(f"{len(violations)} bounds are violated:\n{worst}")
