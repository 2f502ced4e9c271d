"""``python -m benchmarks training``: what it costs a training step to hold the norms of its convolutions."""

from __future__ import annotations

import fnmatch
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.command import check_output, progress
from benchmarks.libraries import open_library
from benchmarks.machine import describe, load_average

if TYPE_CHECKING:
    from benchmarks.training_replay import RanksRow, ShapeRow
    from benchmarks.training_steps import Measured

PAPER_BOUND = 1.0
PART, ALL = "half of the layers", "all layers"


@dataclass(frozen=True)
class TrainingRow:
    """One method at one bound: an entry of ``rows`` in the JSON.

    Attributes
    ----------
    case : str
        Which layers the bound binds to begin with.
    bound : float
    method : str
    period : int
        Steps from one projection to the next.
    steps : int
        Measured ones.
    seconds, own_seconds : float
        Medians over periods of a step's time, and of what follows the optimizer in it.
    overhead : float
        Median over the periods of their time over that of the plain steps of the same turns, less 1.
    quartiles : tuple of float
        Of the same.
    moved : float or None
        Layers whose weights a projection changed, on average; None where nothing follows the optimizer.
    norm, circular_norm : float
        Largest of a layer after the last step over the bound: certified for its own padding and every input size, and
        that of the paper's operator.
    times, own_times : list of float
        Of every measured step, in turns.
    """

    case: str
    bound: float
    method: str
    period: int
    steps: int
    seconds: float
    own_seconds: float
    overhead: float
    quartiles: tuple[float, float]
    moved: float | None
    norm: float
    circular_norm: float
    times: list[float]
    own_times: list[float]


@click.command()
@click.option("--quick", is_flag=True, help="A small network, in less than a minute.")
@click.option(
    "--only", metavar="PATTERN", help="Only the methods whose name holds this, as 'circular', and plain steps."
)
@click.option("--case", "cases", type=click.Choice([PART, ALL]), multiple=True, default=(PART, ALL), show_default=True)
@click.option("--turns", type=click.IntRange(min=1), help="Measured steps; rounded up to whole periods.")
@click.option(
    "--limit", type=click.FloatRange(min=0), help="Seconds of steps after which a method is measured no more."
)
@click.option("--ranks/--no-ranks", default=True, show_default=True, help="Share the projection over two processes.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    callback=check_output,
    help="Write everything that was measured to this file.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), callback=check_output, help="Draw the overheads (.png, .pdf, .svg)."
)
def training(
    quick: bool,
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
    step of each in turn.
    """
    if find_spec("torch") is None:
        raise click.ClickException("the benchmark trains with PyTorch: pip install 'convsv[torch]'")
    from benchmarks import training_replay, training_steps

    full = training_steps.Setup((16, 32, 64), 5, 128, 32, free_steps=20, settle=3, every=10, turns=30, limit=120.0)
    small = training_steps.Setup((4, 8), 1, 8, 8, free_steps=5, settle=1, every=2, turns=4, limit=60.0)
    setup = small if quick else full
    wanted = turns or setup.turns
    setup = replace(setup, turns=-(-wanted // setup.every) * setup.every, limit=setup.limit if limit is None else limit)
    methods = {
        name: method
        for name, method in training_steps.make_methods(setup).items()
        if only is None or name == training_steps.PLAIN or fnmatch.fnmatch(name.lower(), f"*{only.lower()}*")
    }
    if list(methods) == [training_steps.PLAIN]:
        raise click.BadParameter(f"{only!r} is in the name of no method", param_hint="--only")
    load_before = load_average()
    library = open_library("torch")
    rows: list[TrainingRow] = []
    layers: list[ShapeRow] = []
    shared: list[RanksRow] = []
    replayed: dict[str, Any] = {}
    with progress() as tell:
        tell("training without a bound")
        model, batches = training_steps.start(setup)
        norms = training_steps.certified_norms(training_steps.conv_layers(model))
        # The paper's bound, or where the norms of a small network are below it one that binds them all.
        bounds = {PART: statistics.median_low(norms), ALL: min(PAPER_BOUND, 0.9 * min(norms))}
        for case in dict.fromkeys(cases):
            bound = bounds[case]
            tell(f"training with a bound of {bound:.3f}: {case}")
            found = training_steps.measure(model, batches, setup, methods, bound)
            plain = found[training_steps.PLAIN]
            rows.extend(_row(case, bound, name, one, plain) for name, one in found.items())
            if training_steps.PROJECT in found:
                tell(f"projecting shape by shape: {case}")
                snapshots = found[training_steps.PROJECT].snapshots
                layers.extend(training_replay.by_shape(case, model, snapshots, setup, bound))
                replayed[case] = snapshots, bound
        if replayed and ranks:
            tell("projecting in two processes")
            shared = training_replay.on_ranks(replayed, setup)
    machine = describe([library]) | {"load_average": [load_before, load_average()]}
    tables.show_machine(machine, {})
    tables.show_training(rows)
    if layers:
        tables.show_shapes(layers)
    if shared:
        tables.show_ranks(shared)
    if plot is not None:
        draw(plot, rows)
    if json_path is not None:
        content = {
            "benchmark": "training",
            "arguments": {"quick": quick, "only": only} | asdict(setup),
            "machine": machine,
            "norms": norms,
            "rows": [asdict(row) for row in rows],
            "layers": [asdict(row) for row in layers],
            "ranks": [asdict(row) for row in shared],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")


def _row(case: str, bound: float, name: str, found: Measured, plain: Measured) -> TrainingRow:
    from benchmarks.training_steps import certified_norms
    from examples.paper.training import circular_norms

    period, steps = found.period, len(found.seconds)
    taken, own = (_by_period(times, period) for times in (found.seconds, found.own_seconds))
    overheads = taken / _by_period(plain.seconds[:steps], period) - 1
    moved = found.moved[period - 1 :: period]
    low, high = np.percentile(overheads, [25, 75])
    return TrainingRow(
        case=case,
        bound=bound,
        method=name,
        period=period,
        steps=steps,
        seconds=float(np.median(taken)) / period,
        own_seconds=float(np.median(own)) / period,
        overhead=float(np.median(overheads)),
        quartiles=(float(low), float(high)),
        moved=statistics.mean(moved) if moved else None,
        norm=max(certified_norms(found.layers)) / bound,
        circular_norm=max(circular_norms(found.layers)) / bound,
        times=found.seconds,
        own_times=found.own_seconds,
    )


def _by_period(times: Sequence[float], period: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sums over whole periods."""
    return np.asarray(times).reshape(-1, period).sum(axis=1)


def draw(path: Path, rows: Sequence[TrainingRow]) -> None:
    """Write the figure: the overhead of every method, by case."""
    compared = [row for row in rows if row.own_seconds or row.overhead]  # all but the plain steps
    cases, methods = (list(dict.fromkeys(getattr(row, name) for row in compared)) for name in ("case", "method"))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for number, case in enumerate(cases):
        chosen = [row for row in compared if row.case == case]
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
