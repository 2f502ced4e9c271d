"""The experiment on certified accuracy: the share of images whose label no small change of the image can alter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from convsv_core import lipschitz
from examples.paper.data import Images, load
from examples.paper.results import experiment_options, mean_and_deviation, write
from examples.paper.training import Recipe, train

__all__ = ["Run", "certified", "certified_radii", "draw"]

LEARNING_RATE, LOGIT_SCALE = 0.015, 8.0
"""The learning rate, and the factor of the logits in the loss, of every kind of run.

They are the best of four pairs (rates of 0.004 and 0.015, factors of 8 and 32) by the test error of one seed, for the
bound of 1 on every layer without batch normalisation. For the other kinds nothing was tuned.
"""

KINDS: dict[str, dict[str, Any]] = {
    "no bound": {},
    "bound 1, convolutions": {"bound": 1.0},
    "bound 1, every layer": {"bound": 1.0, "everywhere": True},
    "network bound 1": {"network_bound": 1.0},
}
"""The fields of `Recipe` for each choice of what is bounded."""

RADII = tuple(np.linspace(0, 0.5, 51).tolist())
"""Radii, in Euclidean norm of images whose pixels lie between 0 and 1, for which the accuracy is stated. A guess."""

SHOWN = (0.0, 0.05, 0.1)
"""The ones of `RADII` in the table. A guess."""


@dataclass(frozen=True)
class Run:
    """One training run: an entry of ``runs`` in the JSON.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    upper, lower : float
        The certified Lipschitz constant of the network in evaluation mode, and the norm of a Jacobian.
    accuracy : list of float
        For each of the radii, the share of test images that get the right label, and for which the constant proves that
        no image within that radius gets another.
    """

    kind: str
    batch_norm: bool
    seed: int
    diverged: bool
    upper: float
    lower: float
    accuracy: list[float]


@click.command()
@experiment_options
@click.option("--every", type=click.IntRange(min=1), default=10, show_default=True, help="Steps between projections.")
def certified(
    quick: bool, cifar10: Path | None, seeds: int, epochs: int | None, output: Path, threads: int, every: int
) -> None:
    """Keep the convolutions, every layer or the whole network within a bound of 1: certified accuracy by radius."""
    images = load(cifar10, 128 if quick else None)
    recipe = Recipe(widths=(4, 8), epochs=1) if quick else Recipe(epochs=24)
    recipe = replace(
        recipe,
        epochs=epochs or recipe.epochs,
        learning_rate=LEARNING_RATE,
        logit_scale=LOGIT_SCALE,
        every=every,
    )
    runs = []
    for batch_norm, (kind, bounds), seed in itertools.product((False, True), KINDS.items(), range(seeds)):
        run = _run(images, replace(recipe, batch_norm=batch_norm, seed=seed, **bounds), kind)
        click.echo(
            f"{_label(batch_norm)}, {kind}, seed {seed}: test error {1 - run.accuracy[0]:.2%}, "
            f"constant at most {run.upper:.3g}, at least {run.lower:.3g}",
            err=True,
        )
        runs.append(run)
    _show(runs)
    arguments = {"cifar10": cifar10, "quick": quick} | asdict(recipe) | {"kinds": KINDS, "radii": RADII}
    write("certified", output, draw(runs), arguments, {"runs": [asdict(run) for run in runs]})


def _run(images: Images, recipe: Recipe, kind: str) -> Run:
    trained = train(images, recipe)
    if trained.diverged:
        return Run(kind, recipe.batch_norm, recipe.seed, True, math.inf, math.inf, [0.0] * len(RADII))
    found = lipschitz(trained.model, images.train_images[:1])
    radii = certified_radii(trained.model, images.test_images, images.test_labels, found.upper)
    accuracy = [float((radii >= radius).double().mean()) for radius in RADII]
    assert found.lower is not None
    return Run(kind, recipe.batch_norm, recipe.seed, False, found.upper, found.lower, accuracy)


def certified_radii(model: nn.Module, images: Tensor, labels: Tensor, constant: float) -> Tensor:
    """Return for each image a radius within which the label is proved to stay right; minus infinity for a wrong label.

    No change of the image smaller than the margin between the best two logits, over the root of 2 times the Lipschitz
    constant, alters the label. The margin is computed in float64.
    """
    with torch.inference_mode():
        logits = model.double()(images.double())
    model.float()
    best = logits.topk(2, dim=1)
    margins = (best.values[:, 0] - best.values[:, 1]) / (math.sqrt(2) * constant)
    return torch.where(best.indices[:, 0] == labels, margins, -math.inf)


def _groups(runs: Sequence[Run]) -> Mapping[tuple[bool, str], list[Run]]:
    groups: dict[tuple[bool, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.batch_norm, run.kind), []).append(run)
    return groups


def _show(runs: Sequence[Run]) -> None:
    """Print means over the seeds, and the standard deviation of the accuracies."""
    places = [int(np.argmin(np.abs(np.asarray(RADII) - radius))) for radius in SHOWN]
    heads = "".join(f"{f'certified {RADII[place]:.2f}, %':>21}" for place in places)
    click.echo(f"{'':8} {'':22} {'upper':>9} {'lower':>7} {heads}")
    for (batch_norm, kind), some in _groups(runs).items():
        shares = "".join(
            "{:12.1f} +- {:5.1f}".format(*(100 * one for one in mean_and_deviation([r.accuracy[place] for r in some])))
            for place in places
        )
        upper, lower = (float(np.mean([getattr(run, name) for run in some])) for name in ("upper", "lower"))
        click.echo(f"{_label(batch_norm):8} {kind:22} {upper:9.3g} {lower:7.3g} {shares}")


def draw(runs: Sequence[Run]) -> Figure:
    """Draw the certified accuracy over the radius, with one line a kind: mean and range over the seeds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, batch_norm in zip(panels, (False, True), strict=True):
        for number, kind in enumerate(KINDS):
            shares = np.asarray([r.accuracy for r in runs if (r.batch_norm, r.kind) == (batch_norm, kind)]) * 100
            axes.plot(RADII, shares.mean(axis=0), color=f"C{number}", label=kind)
            axes.fill_between(RADII, shares.min(axis=0), shares.max(axis=0), color=f"C{number}", alpha=0.2)
        axes.set(title="batch normalisation" if batch_norm else "no batch normalisation", xlabel="radius")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="certified accuracy, %", ylim=(0, 101))
    panels[1].legend(fontsize="small")
    return figure


def _label(batch_norm: bool) -> str:
    return "BN" if batch_norm else "no BN"
