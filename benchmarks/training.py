"""``python -m benchmarks training``: measure the time that a bound on the norms adds to a training step."""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click
from matplotlib.figure import Figure

from benchmarks.command import Size, json_option, plot_option, progress, size_options, write_json
from benchmarks.comparison import group_by
from benchmarks.libraries import open_library
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.tables import duration, figures, integers, or_dash, ratio, show_table, words
from benchmarks.training_setup import SETUPS

if TYPE_CHECKING:  # these modules import PyTorch
    from benchmarks.training_replay import RanksRow, Replay, ShapeRow
    from benchmarks.training_steps import TrainingRow

__all__ = ["draw", "training"]

PAPER_BOUND = 1.0
"""Bound of the norms in the paper."""

BINDING_SHARE = 0.9
"""Where a network has norms below `PAPER_BOUND`, the bound is this share of the least norm: a guess."""

PART, ALL, FIRST = "half of the layers", "all layers", "first ten steps"
COLUMNS = (
    words("case"),
    figures("bound", lambda row: f"{row.bound:.3f}"),
    words("method"),
    integers("steps"),
    figures("step", lambda row: duration(row.seconds)),
    figures("added", lambda row: f"{row.overhead:+.1%}"),
    figures("from", lambda row: f"{row.quartiles[0]:+.1%}"),
    figures("to", lambda row: f"{row.quartiles[1]:+.1%}"),
    figures("own", lambda row: "-" if row.moved is None else duration(row.own_seconds)),
    figures("moved", lambda row: or_dash("{:.1f}".format, row.moved)),
    figures("norm", lambda row: f"{row.norm:.3f}"),
    figures("circular", lambda row: f"{row.circular_norm:.3f}"),
)
EXPLANATION = (
    "added: to the time of a plain step of the same turn, median and quartiles over the periods; own: after the "
    "optimizer, a step; moved: layers that a projection changed, on average; norm: the largest after the last step "
    "over the bound, certified for each layer's own padding and every input size; circular: norm of the paper's "
    "operator at each layer's extents."
)
SHAPE_COLUMNS = (
    words("case"),
    words("convolution", lambda row: row.label),
    integers("x", "count"),
    figures("moved", lambda row: f"{row.moved:.1f}"),
    figures("time", lambda row: duration(row.seconds)),
)
SHAPE_EXPLANATION = "the same weights once more; time: of one layer's projection, median over the steps."
RANKS_COLUMNS = (
    words("case"),
    figures("alone", lambda row: duration(row.alone_seconds)),
    figures("shared", lambda row: duration(row.shared_seconds)),
    figures("ratio", lambda row: ratio(row.ratio)),
)
RANKS_EXPLANATION = (
    "the same weights once more, without the training; alone: one process on one processor; shared: two, of which each "
    "projects its share and tells the other; ratio: median of the steps."
)


@click.command()
@size_options("A small network, in less than a minute.")
@click.option(
    "--only", metavar="PATTERN", help="Only the methods whose name holds this, as 'circular', and plain steps."
)
@click.option(
    "--case",
    "cases",
    type=click.Choice([PART, ALL, FIRST]),
    multiple=True,
    default=(PART, ALL, FIRST),
    show_default=True,
)
@click.option("--turns", type=click.IntRange(min=1), help="Measured steps; rounded up to whole periods.")
@click.option(
    "--limit", type=click.FloatRange(min=0), help="Seconds of steps after which a method is measured no more."
)
@click.option("--ranks/--no-ranks", default=True, show_default=True, help="Share the projection over two processes.")
@json_option()
@plot_option("Draw the overheads")
def training(
    size: Size,
    only: str | None,
    cases: Sequence[str],
    turns: int | None,
    limit: float | None,
    ranks: bool,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Time training steps of ResNet-32 with PyTorch, with and without a bound on the norms of its convolutions.

    Batches of 128 images of 32 x 32 pixels, stochastic gradient descent. Every method trains a copy of one network, a
    step of each in turn. The first ten steps after the random weights are a case of their own, because the spectra of
    random weights are flat.
    """
    if find_spec("torch") is None:
        raise click.ClickException("the benchmark trains with PyTorch: pip install 'convsv[torch]'")
    from convsv_adapters.torch import conv_layers

    from benchmarks import training_replay, training_steps
    from benchmarks.training_steps import PLAIN, PROJECT

    setup = SETUPS[size]
    setup = replace(
        setup,
        turns=-(-(turns or setup.turns) // setup.every) * setup.every,
        limit=setup.limit if limit is None else limit,
    )
    methods = {
        name: method
        for name, method in training_steps.make_methods(setup).items()
        if only is None or name == PLAIN or fnmatch.fnmatch(name.lower(), f"*{only.lower()}*")
    }
    if list(methods) == [PLAIN]:
        raise click.BadParameter(f"{only!r} is in the name of no method", param_hint="--only")
    load_before = load_average()
    library = open_library("torch")
    rows: list[TrainingRow] = []
    layers: list[ShapeRow] = []
    shared: list[RanksRow] = []
    replays: dict[str, Replay] = {}
    with progress() as tell:
        tell("training without a bound")
        model, batches = training_steps.start(setup)
        norms = training_steps.certified_norms(conv_layers(model))
        bounds = {PART: statistics.median_low(norms), ALL: min(PAPER_BOUND, BINDING_SHARE * min(norms))}
        for case in dict.fromkeys(cases):
            bound = bounds.get(case, PAPER_BOUND)
            tell(f"training with a bound of {bound:.3f}: {case}")
            if case == FIRST:
                found = training_steps.measure_first(setup, methods, bound)
            else:
                found = training_steps.measure(model, batches, setup, methods, bound)
            rows.extend(training_steps.make_row(case, bound, name, one, found[PLAIN]) for name, one in found.items())
            if PROJECT in found and case != FIRST:
                tell(f"projecting shape by shape: {case}")
                replays[case] = training_replay.Replay(found[PROJECT].snapshots, bound)
                layers.extend(training_replay.by_shape(case, model, replays[case], setup))
        if replays and ranks:
            tell("projecting in two processes")
            shared = training_replay.on_ranks(replays, setup)
    machine = describe([library], load_before)
    show_machine(machine)
    show_table(rows, COLUMNS, EXPLANATION)
    if layers:
        show_table(layers, SHAPE_COLUMNS, SHAPE_EXPLANATION)
    if shared:
        show_table(shared, RANKS_COLUMNS, RANKS_EXPLANATION)
    if plot is not None:
        draw(plot, rows)
    arguments = {"size": size.value, "quick": size is Size.QUICK, "only": only} | asdict(setup)
    write_json(json_path, "training", arguments, machine=machine, norms=norms, rows=rows, layers=layers, ranks=shared)


def draw(path: Path, rows: Sequence[TrainingRow]) -> None:
    """Write the figure: the overhead of every method, by case."""
    compared = [row for row in rows if row.own_seconds or row.overhead]  # plain steps have neither
    methods = list(dict.fromkeys(row.method for row in compared))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for number, ((case,), chosen) in enumerate(group_by(compared, "case").items()):
        axes.errorbar(
            [100 * row.overhead for row in chosen],
            [methods.index(row.method) + 0.2 * number for row in chosen],
            xerr=[
                [100 * max(0.0, row.overhead - row.quartiles[0]) for row in chosen],
                [100 * max(0.0, row.quartiles[1] - row.overhead) for row in chosen],
            ],
            fmt="o",
            label=f"{case} bound",
        )
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="added to the time of a training step, %")
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
