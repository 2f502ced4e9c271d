"""Time many checkpoints on clusters of one and of two workers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.dataset
from convsv_adapters.cli.checkpoints import Checkpoint, find
from convsv_adapters.cli.parquet import SpectraTable
from distributed import Client, LocalCluster

from benchmarks.timing import in_turns
from convsv_core import analyze_many
from convsv_core.layers import ReadOptions

__all__ = ["Clients", "Speed", "clusters", "make_table", "measure_speed", "train"]

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_digits.py"
SAVE_EVERY = 22
"""Steps from one checkpoint to the next: an epoch of the example."""


class Clients(NamedTuple):
    """Hold the clients of a cluster of one worker and of a cluster of two."""

    one: Client
    two: Client


@dataclass(frozen=True)
class Speed:
    """Record one and two single-thread workers on the same checkpoints: an entry of ``speed`` in the JSON.

    Attributes
    ----------
    extents : str
        Extents of every layer's input.
    checkpoints, rows : int
    one_times, two_times : list of float
        Seconds of each run, its table included; alternately.
    ratio : float
        Median of `one_times` over median of `two_times`.
    paired_ratio : float
        Median of the ratios of the runs of the same turn.
    workers_seconds, client_seconds : list of float
        Processor time of the workers, and of the process that holds client and scheduler: medians, on one and on two
        workers. It tells more than the clock where the machine is shared.
    equal, equal_after_kill : bool
        Whether the tables of one and of two workers are the same bit for bit, and whether this is so if one of two
        workers is killed half-way.
    """

    extents: str
    checkpoints: int
    rows: int
    one_times: list[float]
    two_times: list[float]
    ratio: float
    paired_ratio: float
    workers_seconds: list[float]
    client_seconds: list[float]
    equal: bool
    equal_after_kill: bool


def train(folder: Path, epochs: int) -> None:
    """Train the digits network as the example does, and keep the first checkpoint and one for each epoch."""
    import torch

    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.set_num_threads(1)  # as the example has it
    example.train(example.load_split(), epochs=epochs, seed=0, save_every=SAVE_EVERY, run_dir=folder)


@contextlib.contextmanager
def clusters() -> Iterator[Clients]:
    """Yield clients of two clusters, whose workers have one thread each.

    A cluster does not disturb the other one while it is idle.
    """
    settings = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with (
        LocalCluster(n_workers=1, **settings) as alone,
        LocalCluster(n_workers=2, **settings) as pair,
        Client(alone) as one,
        Client(pair) as two,
    ):
        yield Clients(one, two)


def measure_speed(
    folder: Path, extents: tuple[int, int], clients: Clients, repeats: int, tell: Callable[[str], None]
) -> Speed:
    """Compute the table on one and on two workers in turns, then on two workers of which one is killed."""
    checkpoints = find([str(folder / "run" / "*.safetensors")], folder)
    label = "x".join(map(str, extents))
    named = clients._asdict()
    times: dict[str, list[float]] = {name: [] for name in named}
    spent: dict[str, list[float]] = {name: [] for name in named}
    own: dict[str, list[float]] = {name: [] for name in named}
    tables: list[pa.Table] = []
    for turn in range(repeats + 1):  # the first turn, in which workers import and plan, does not count
        for name in in_turns(named, turn):
            tell(f"{label}: {name} worker(s), run {turn} of {repeats}")
            client, place = named[name], folder / f"{label}-{name}-{turn}.parquet"
            workers, here = sum(client.run(time.process_time).values()), time.process_time()
            start = time.perf_counter()
            tables.append(make_table(place, client, checkpoints, extents))
            if turn:
                times[name].append(time.perf_counter() - start)
                own[name].append(time.process_time() - here)
                spent[name].append(sum(client.run(time.process_time).values()) - workers)
    tell(f"{label}: two workers, one killed")
    place = folder / f"{label}-killed.parquet"
    killed = make_table(place, clients.two, checkpoints, extents, kill=len(checkpoints) // 2)
    clients.two.wait_for_workers(2)
    return Speed(
        extents=label,
        checkpoints=len(checkpoints),
        rows=tables[0].num_rows,
        one_times=times["one"],
        two_times=times["two"],
        ratio=statistics.median(times["one"]) / statistics.median(times["two"]),
        paired_ratio=statistics.median(a / b for a, b in zip(times["one"], times["two"], strict=True)),
        workers_seconds=[statistics.median(spent[name]) for name in named],
        client_seconds=[statistics.median(own[name]) for name in named],
        equal=all(table.equals(tables[0]) for table in tables),
        equal_after_kill=killed.equals(tables[0]),
    )


def make_table(
    folder: Path, client: Client, checkpoints: Sequence[Checkpoint], extents: tuple[int, int], kill: int | None = None
) -> pa.Table:
    """Compute the table; with `kill`, end a worker when so many checkpoints are done."""
    options = ReadOptions({"": extents})
    reports = analyze_many([one.path for one in checkpoints], client, options=options)
    with SpectraTable(folder, {}) as table:
        for number, (checkpoint, found) in enumerate(zip(checkpoints, reports, strict=True)):
            if number == kill:
                os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
            table.add(checkpoint, found)
    return pyarrow.dataset.dataset(folder).to_table()
