"""``python -m benchmarks steepest``: measure directions of steepest descent, and the steps of optimizers along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click
from matplotlib.figure import Figure

from benchmarks.command import Size, json_option, plot_option, progress, size_options, write_json
from benchmarks.libraries import open_library
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.steepest_setup import SETUPS
from benchmarks.tables import duration, figures, integers, ratio, show_table, words

if TYPE_CHECKING:  # this module imports PyTorch
    from benchmarks.steepest_runs import DirectionRow

__all__ = ["draw", "steepest"]

DIRECTION_COLUMNS = (
    words("convolution", lambda row: row.label),
    integers("x", "count"),
    figures("change", lambda row: f"{row.change:.2f}"),
    words("method"),
    figures("share", lambda row: f"{row.share:.3f}"),
    figures("least", lambda row: f"{row.least:.3f}"),
    figures("time", lambda row: duration(row.seconds)),
)
DIRECTION_EXPLANATION = (
    "change: of the momentum since the step before, as a share of its length; share: inner product with the momentum "
    "over a proved upper bound of the optimum, on circular images; mean and least of the layers; time: processor time "
    "of a call, with its certificate and its bounds; warm: from the maximiser of the step before; every step: from the "
    "iterations of the step before, in all recorded steps."
)
STEP_COLUMNS = (
    words("optimizer"),
    figures("step", lambda row: duration(row.seconds)),
    figures("own", lambda row: duration(row.own_seconds)),
    figures("to SGD", lambda row: ratio(row.to_plain)),
    figures("to flattened", lambda row: ratio(row.to_flattened)),
)
STEP_EXPLANATION = (
    "step: of training, forward and backward; own: the optimizer's part; the ratios are of steps of the same turn; "
    "medians."
)


@click.command()
@size_options("A small network, in less than a minute.")
@json_option()
@plot_option("Draw the shares of the optimum")
def steepest(size: Size, json_path: Path | None, plot: Path | None) -> None:
    """Compare steepest directions for the momenta of ResNet-32 in training, and time optimizers with PyTorch.

    Directions by the flattened polar factor, by cut polar factors, and by the exact method after some iterations.
    """
    if find_spec("torch") is None:
        raise click.ClickException("the benchmark trains with PyTorch: pip install 'convsv[torch]'")
    from benchmarks import steepest_runs

    setup = SETUPS[size]
    load_before = load_average()
    library = open_library("torch")
    with progress() as tell:
        tell("timing the steps of optimizers")
        steps = steepest_runs.step_rows(setup)
        tell("recording momenta")
        recorded = steepest_runs.record(setup)
        tell("measuring directions")
        directions = steepest_runs.direction_rows(recorded, setup)
    machine = describe([library], load_before)
    show_machine(machine)
    show_table(directions, DIRECTION_COLUMNS, DIRECTION_EXPLANATION)
    show_table(steps, STEP_COLUMNS, STEP_EXPLANATION)
    if plot is not None:
        draw(plot, directions)
    arguments = {"size": size.value, "quick": size is Size.QUICK} | asdict(setup)
    write_json(json_path, "steepest", arguments, machine=machine, directions=directions, steps=steps)


def draw(path: Path, rows: Sequence[DirectionRow]) -> None:
    """Write the figure: the share of the optimum of each method, for each kind of layer."""
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(row.label for row in rows):
        chosen = [row for row in rows if row.label == label]
        axes.plot([row.share for row in chosen], [methods.index(row.method) for row in chosen], "o", label=label)
    axes.set(xlabel="share of the optimum")
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
