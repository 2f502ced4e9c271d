"""The experiment on the cost of projections: their time, the norms between them, and the test error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from convsv_adapters.torch import ConvLayer
from matplotlib.figure import Figure

from examples.paper.data import Images, load
from examples.paper.results import experiment_options, mean_and_deviation, method_option, write
from examples.paper.training import Recipe, accuracy, circular_norms, train

__all__ = ["Run", "cost", "draw"]

PERIODS = (1, 10, 100)
"""Steps from one projection to the next. Chosen as powers of ten."""

BOUND = 1.0
"""The bound of the operator norms: the one of a layer that enlarges nothing."""

WATCH_EVERY = 5
"""The norms are recorded every so many steps, and at each step that a projection follows. A guess."""


@dataclass(frozen=True)
class Run:
    """One training run: an entry of ``runs`` in the JSON.

    Attributes
    ----------
    every : int or None
        Steps from one projection to the next; None for no bound.
    test_error : float
        Share of the test images that get a wrong label.
    seconds, projection_seconds : float
        Processor time of all steps without the projections, and of the projections.
    steps : list of int
        The steps at which the norms were recorded, before a projection.
    norms : list of float
        The largest operator norm among the layers' circular convolutions at each of `steps`.
    """

    every: int | None
    seed: int
    test_error: float
    seconds: float
    projection_seconds: float
    steps: list[int]
    norms: list[float]


@click.command()
@experiment_options
@method_option
def cost(
    quick: bool, cifar10: Path | None, seeds: int, epochs: int | None, output: Path, threads: int, method: str
) -> None:
    """Project to a bound of 1 every 1, 10 and 100 steps: time, norms before projections, test error."""
    images = load(cifar10, 128 if quick else None)
    recipe = Recipe(widths=(4, 8), epochs=1, batch=8) if quick else Recipe()
    recipe = replace(recipe, epochs=epochs or recipe.epochs, method=method)
    runs = []
    for seed, every in itertools.product(range(seeds), (*PERIODS, None)):  # in turns: a machine's speed drifts
        runs.append(_run(images, replace(recipe, seed=seed), every))
        click.echo(
            f"seed {seed}, {_label(every)}: test error {runs[-1].test_error:.2%}, "
            f"{runs[-1].projection_seconds:.1f} s of projections beside {runs[-1].seconds:.1f} s",
            err=True,
        )
    _show(runs)
    arguments = {"cifar10": cifar10, "quick": quick} | asdict(recipe) | {"bound": BOUND}
    write("cost", output, draw(runs), arguments, {"runs": [asdict(run) for run in runs]})


def _run(images: Images, recipe: Recipe, every: int | None) -> Run:
    steps: list[int] = []
    norms: list[float] = []

    def watch(step: int, layers: Sequence[ConvLayer]) -> None:
        if step % WATCH_EVERY == 0 or (every is not None and every > 1 and step % every == 0):
            steps.append(step)
            norms.append(max(circular_norms(layers)))

    if every is not None:
        recipe = replace(recipe, bound=BOUND, every=every)
    trained = train(images, recipe, watch)
    error = 1 - accuracy(trained.model, images.test_images, images.test_labels)
    return Run(every, recipe.seed, error, trained.seconds, trained.projection_seconds, steps, norms)


def _show(runs: Sequence[Run]) -> None:
    """Print the mean and the standard deviation over the seeds."""
    click.echo(f"{'':24} {'added, %':>16} {'test error, %':>16} {'norm before, largest':>22} {'median':>7}")
    for every in (*PERIODS, None):
        some = [run for run in runs if run.every == every]
        added, error = (
            "{:7.1f} +- {:5.1f}".format(*(100 * value for value in mean_and_deviation(values)))
            for values in ([run.projection_seconds / run.seconds for run in some], [run.test_error for run in some])
        )
        # Norms up to the first projection are left out: they are near those of the random initial weights.
        norms = [norm for run in some for step, norm in zip(run.steps, run.norms, strict=True) if step > (every or 0)]
        largest, median = (max(norms), float(np.median(norms))) if norms else (np.nan, np.nan)
        click.echo(f"{_label(every):24} {added:>16} {error:>16} {largest:22.3f} {median:7.3f}")


def draw(runs: Sequence[Run]) -> Figure:
    """Draw the largest norm before projections over the steps, for the first seed; then cost and test error."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    kinds = [*PERIODS, None]
    for number, every in enumerate(kinds):
        some = [run for run in runs if run.every == every]
        left.plot(some[0].steps, some[0].norms, color=f"C{number}", label=_label(every))
        for axes, values in (
            (middle, [100 * run.projection_seconds / run.seconds for run in some]),
            (right, [100 * run.test_error for run in some]),
        ):
            mean, deviation = mean_and_deviation(values)
            axes.errorbar([number], [mean], yerr=[deviation], fmt="o", capsize=3, color=f"C{number}")
    left.axhline(BOUND, color="grey", linewidth=0.8)
    left.set(xlabel="step", ylabel="largest norm before a projection", yscale="log")
    left.legend(fontsize="small")
    middle.set(ylabel="time added by projections, %", yscale="symlog")
    right.set(ylabel="test error, %", ylim=(0, None))
    for axes in (middle, right):
        axes.set_xticks(range(len(kinds)), ["none" if every is None else str(every) for every in kinds])
        axes.set_xlabel("steps between projections")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    return figure


def _label(every: int | None) -> str:
    if every is None:
        return "no bound"
    return "after every step" if every == 1 else f"after every {every} steps"
