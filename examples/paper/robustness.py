"""The experiment on robustness: test error and accuracy under attack, by bound and learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.paper.data import Images, load
from examples.paper.results import experiment_options, mean_and_deviation, method_option, write
from examples.paper.training import Recipe, accuracy, attacked, circular_norms, train

__all__ = ["Run", "draw", "robustness"]

BOUNDS = (0.5, 1.0, None)
"""Bounds of the operator norms; None for no bound. Chosen by hand."""

LEARNING_RATES = (0.02, 0.1, 0.5)
"""The initial learning rates. A guess: the default of `Recipe`, and five times as much and as little."""

ATTACKS = (0.05, 0.1, 0.2)
"""Sizes of the attack, where pixels lie between 0 and 1. A guess."""

DRAWN = 0.1
"""The one of `ATTACKS` in the figure and the table."""


@dataclass(frozen=True)
class Run:
    """One training run: an entry of ``runs`` in the JSON.

    Attributes
    ----------
    test_error : float
        Share of the test images that get a wrong label.
    attacked : dict of str to float
        Accuracy on the test images after an attack, by the attack's size.
    norm : float or None
        The largest operator norm among the layers' circular convolutions after training; None if it diverged.
    """

    bound: float | None
    batch_norm: bool
    learning_rate: float
    seed: int
    diverged: bool
    test_error: float
    attacked: dict[str, float]
    norm: float | None


@click.command()
@experiment_options
@method_option
@click.option("--every", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between projections.")
def robustness(
    quick: bool,
    cifar10: Path | None,
    seeds: int,
    epochs: int | None,
    output: Path,
    threads: int,
    method: str,
    every: int,
) -> None:
    """Train with bounds of 0.5, 1 and none: test error, and accuracy under a gradient-sign attack."""
    images = load(cifar10, 128 if quick else None)
    recipe = Recipe(widths=(4, 8), epochs=epochs or 1, every=every) if quick else Recipe(every=every)
    recipe = replace(recipe, epochs=epochs or recipe.epochs, method=method)
    rates = LEARNING_RATES[1:2] if quick else LEARNING_RATES
    runs = []
    for batch_norm, bound, rate, seed in itertools.product((True, False), BOUNDS, rates, range(seeds)):
        run = _run(images, replace(recipe, batch_norm=batch_norm, bound=bound, learning_rate=rate, seed=seed))
        click.echo(
            f"{_kind(batch_norm)}, {_label(bound)}, learning rate {rate}, seed {seed}: "
            f"test error {run.test_error:.2%}, attacked {run.attacked[str(DRAWN)]:.2%}",
            err=True,
        )
        runs.append(run)
    _show(runs)
    arguments = {"cifar10": cifar10, "quick": quick} | asdict(recipe)
    write("robustness", output, draw(runs), arguments, {"runs": [asdict(run) for run in runs]})


def _run(images: Images, recipe: Recipe) -> Run:
    trained = train(images, recipe)
    test = images.test_images, images.test_labels
    return Run(
        recipe.bound,
        recipe.batch_norm,
        recipe.learning_rate,
        recipe.seed,
        trained.diverged,
        1 - accuracy(trained.model, *test),
        {
            str(size): accuracy(trained.model, attacked(trained.model, *test, size), images.test_labels)
            for size in ATTACKS
        },
        None if trained.diverged else max(circular_norms(trained.layers)),
    )


def _show(runs: Sequence[Run]) -> None:
    """Print the mean and the standard deviation over the seeds."""
    click.echo(f"{'':8} {'bound':6} {'rate':5} {'test error, %':>15} {f'under {DRAWN}, %':>15} {'norm':>7}")
    for (batch_norm, bound, rate), some in _groups(runs):
        error, attack = (
            "{:6.2f} +- {:5.2f}".format(*(100 * value for value in mean_and_deviation(values)))
            for values in ([run.test_error for run in some], [run.attacked[str(DRAWN)] for run in some])
        )
        norm = max((run.norm for run in some if run.norm is not None), default=math.nan)
        click.echo(
            f"{'BN' if batch_norm else 'no BN':8} {bound or 'none':<6} {rate:<5} {error:>15} {attack:>15} {norm:7.2f}"
        )


def draw(runs: Sequence[Run]) -> Figure:
    """Draw test error and accuracy under attack over the learning rate: mean and deviation over the seeds."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for column, batch_norm in enumerate((True, False)):
        chosen = [run for run in runs if run.batch_norm == batch_norm]
        _lines(panels[0, column], chosen, [100 * run.test_error for run in chosen])
        _lines(panels[1, column], chosen, [100 * run.attacked[str(DRAWN)] for run in chosen])
        panels[0, column].set(title=_kind(batch_norm), ylim=(0, None))
        panels[1, column].set(xlabel="learning rate")
    panels[0, 0].set(ylabel="test error, %")
    panels[1, 0].set(ylabel=f"accuracy under an attack of {DRAWN}, %")
    panels[0, 0].legend(fontsize="small")
    return figure


def _lines(axes: Axes, runs: Sequence[Run], values: Sequence[float]) -> None:
    """Draw one line for each bound."""
    pairs = list(zip(runs, values, strict=True))
    rates = sorted({run.learning_rate for run in runs})
    for number, bound in enumerate(BOUNDS):
        points = [
            mean_and_deviation([v for run, v in pairs if (run.bound, run.learning_rate) == (bound, rate)])
            for rate in rates
        ]
        means, deviations = zip(*points, strict=True)
        shifted = [rate * 1.05 ** (number - 1) for rate in rates]  # shifted so that error bars do not hide each other
        axes.errorbar(shifted, means, yerr=deviations, fmt="o-", capsize=3, label=_label(bound))
    axes.set_xscale("log")
    axes.set_xticks(rates, [str(rate) for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _groups(runs: Sequence[Run]) -> Iterable[tuple[tuple[bool, float | None, float], list[Run]]]:
    """Return the runs in groups that differ only in their seed."""
    groups: dict[tuple[bool, float | None, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.batch_norm, run.bound, run.learning_rate), []).append(run)
    return groups.items()


def _kind(batch_norm: bool) -> str:
    return "batch normalisation" if batch_norm else "no batch normalisation"


def _label(bound: float | None) -> str:
    return "no bound" if bound is None else f"bound {bound}"
