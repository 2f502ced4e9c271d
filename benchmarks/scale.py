"""``python -m benchmarks scale``: time many checkpoints on a cluster, and predict many workers."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.command import Size, json_option, progress, size_options, write_json
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.tables import MIB, duration, figures, integers, percent, ratio, say, show_table, words

__all__ = ["AMOUNTS", "Amount", "scale"]

NEEDED = ("distributed", "pyarrow", "torch", "jax")
"""Modules of the extras ``many`` and ``test`` that the command imports."""

DIGITS = (8, 8)
"""Extents of the digits."""

SPEED_COLUMNS = (
    words("extents"),
    integers("models", "checkpoints"),
    integers("rows"),
    figures("1 worker", lambda one: duration(statistics.median(one.one_times))),
    figures("2 workers", lambda one: duration(statistics.median(one.two_times))),
    figures("ratio", lambda one: ratio(one.ratio)),
    figures("paired", lambda one: ratio(one.paired_ratio)),
    figures("processor", lambda one: ", ".join(map(duration, one.workers_seconds))),
    words("", lambda one: "and " + ", ".join(map(duration, one.client_seconds))),
    figures("equal", lambda one: "yes" if one.equal else "NO"),
    figures("killed", lambda one: "yes" if one.equal_after_kill else "NO"),
)
SPEED_EXPLANATION = (
    "medians of alternate runs, the table included; paired: median of the ratios of neighbours. processor: seconds of "
    "the workers, and of client and scheduler, which share the machine's processors with them. equal: the tables, bit "
    "for bit; killed: with one of two workers killed half-way."
)
BLOCK_COLUMNS = (
    integers("channels"),
    integers("frequencies"),
    figures("block", lambda one: duration(one.seconds)),
    figures("a frequency", lambda one: duration(one.per_frequency)),
    figures("sent", lambda one: f"{one.bytes_sent / MIB:.1f} MiB"),
)
BLOCK_EXPLANATION = (
    "one block of frequencies of a 3x3 layer on one thread, as many as convsv gives one task; sent: its singular "
    "values."
)
SIMULATED_COLUMNS = (
    words("workload"),
    integers("workers"),
    integers("tasks"),
    figures("work", lambda one: duration(one.work_seconds)),
    figures("time", lambda one: duration(one.seconds)),
    figures("speed-up", lambda one: ratio(one.speedup)),
    figures("scheduler busy", lambda one: percent(one.scheduler_share, 0)),
    figures("store", lambda one: percent(one.store_share, 0)),
    figures("worker", lambda one: percent(one.worker_share, 0)),
)
SIMULATED_EXPLANATION = (
    "list scheduling of the measured times, with the engine's time a task and a file store of 1 GB/s. work: on one "
    "worker, without an engine. busy: share of the time, of the scheduler, the store and the average worker."
)


class Layer(NamedTuple):
    """Name a square 3 x 3 layer and its input's extents."""

    channels: int
    extents: tuple[int, int]


@dataclass(frozen=True)
class Amount:
    """Say how much is measured.

    Attributes
    ----------
    epochs : int
        Epochs of the training; there is one checkpoint more.
    extents : tuple of (int, int)
        Extents of the layers' inputs, one entry for each speed.
    repeats : int or None
        Runs of each cluster; None for the option's.
    empty_tasks : int
        Tasks that do nothing.
    channels : tuple of int
        Channels of the layers whose blocks are timed.
    block_seconds : float
        Time that a block is timed for, about.
    small, large : int
        Checkpoints of the digits network and of large layers in the simulation.
    sharded, grid : Layer
        The layer on JAX's devices, and the layer on the Dask cluster.
    reduced : int
        Channels of the layer on the Dask cluster whose singular values are all computed.
    workers : int
        Workers of that cluster.
    """

    epochs: int
    extents: tuple[tuple[int, int], ...]
    repeats: int | None
    empty_tasks: int
    channels: tuple[int, ...]
    block_seconds: float
    small: int
    large: int
    sharded: Layer
    grid: Layer
    reduced: int
    workers: int


AMOUNTS = {
    Size.FULL: Amount(
        epochs=59,
        extents=(DIGITS, (32, 32)),
        repeats=None,
        empty_tasks=2000,
        channels=(16, 32, 64, 128, 256, 512),
        block_seconds=2.0,
        small=60_000,
        large=60,
        sharded=Layer(64, (64, 64)),
        grid=Layer(128, (512, 512)),
        reduced=16,
        workers=2,
    ),
    Size.QUICK: Amount(3, (DIGITS,), 2, 200, (16, 64), 0.05, 600, 2, Layer(8, (16, 16)), Layer(8, (16, 16)), 4, 2),
    Size.TINY: Amount(3, (DIGITS,), 2, 10, (16, 64), 0.001, 60, 1, Layer(4, (8, 8)), Layer(4, (8, 8)), 2, 1),
}


@click.command()
@size_options("Few checkpoints and channels, in less than a minute.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Runs of each cluster.")
@click.option("--arrays/--no-arrays", default=True, show_default=True, help="Measure one large layer, too.")
@json_option()
def scale(size: Size, repeats: int, arrays: bool, json_path: Path | None) -> None:
    """Time many checkpoints on one and on two workers, and predict thousands.

    The checkpoints are those of a training run of the digits network, all layers of each. One and two workers in turns;
    then two workers of which one is killed half-way. The tables must be equal bit for bit, or the command ends with an
    error. Then the cost of a block of frequencies over the channels, the engine's overhead for each task, and a
    simulation from these times of 10, 100 and 1,000 workers. Run it on an idle machine.

    Then, unless it is left out, one large layer: on a Dask cluster of two workers of at most 2 GiB, and over eight
    virtual devices of JAX's.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"no module {', '.join(missing)}: pip install 'convsv[many,test]'")
    from benchmarks import scale_arrays, scale_costs, scale_runs

    amount = AMOUNTS[size]
    load_before = load_average()
    with progress() as tell, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tell("training the digits network")
        scale_runs.train(folder / "run", amount.epochs)
        with scale_runs.clusters() as clients:
            runs = amount.repeats or repeats
            speeds = [scale_runs.measure_speed(folder, shape, clients, runs, tell) for shape in amount.extents]
            tell("overhead of the engine")
            overhead = scale_costs.measure_overhead(clients, amount.empty_tasks)
        blocks = []
        for channels in amount.channels:
            tell(f"block of {channels} channels")
            blocks.append(scale_costs.measure_block(channels, amount.block_seconds))
        tell("simulation")
        simulated = scale_costs.predict(speeds[0], blocks, overhead, amount.small, amount.large)
        sharded, grids = None, []
        if arrays:
            tell("eight virtual devices of JAX's")
            sharded = scale_arrays.sharded_jax(*amount.sharded)
            tell("a large grid on a Dask cluster")
            grids = scale_arrays.grid(*amount.grid, amount.reduced, amount.workers)
    machine = describe([], load_before)
    show_machine(machine)
    show_table(speeds, SPEED_COLUMNS, SPEED_EXPLANATION)
    show_table(blocks, BLOCK_COLUMNS, BLOCK_EXPLANATION)
    say(
        f"\nA task that does nothing: {duration(overhead.one_worker)} on one worker, "
        f"{duration(overhead.two_workers)} on two, of which the client and the scheduler take "
        f"{duration(overhead.service)} of a processor; 5 % of a task of {duration(overhead.least_task)}."
    )
    show_table(simulated, SIMULATED_COLUMNS, SIMULATED_EXPLANATION)
    if sharded is not None:
        scale_arrays.show(sharded, grids)
    write_json(
        json_path,
        "scale",
        {
            "size": size.value,
            "quick": size is Size.QUICK,
            "repeats": repeats,
            "store_bytes_per_second": scale_costs.STORE,
        },
        machine=machine,
        speed=speeds,
        blocks=blocks,
        overhead=overhead,
        simulated=simulated,
        **({} if sharded is None else {"sharded_jax": sharded, "grid": grids}),
    )
    if not all(speed.equal and speed.equal_after_kill for speed in speeds):
        raise click.ClickException("the tables differ")
    if not all(one.agrees for one in grids):
        raise click.ClickException("the values of the large grid are not those of NumPy")
