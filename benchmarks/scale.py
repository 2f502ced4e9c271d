"""``python -m benchmarks scale``: many checkpoints on a cluster, and what many workers would make of them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.dataset
from convsv_adapters.cli.checkpoints import Checkpoint, find
from convsv_adapters._spectra import SpectraTable
from distributed import Client, LocalCluster

from benchmarks import report
from benchmarks.command import check_output, progress
from benchmarks.machine import describe, load_average
from benchmarks.scale_arrays import grid, sharded_jax, show
from benchmarks.simulation import Engine, Job, packed, simulate
from benchmarks.timing import time_once
from convsv_core.conv import Conv
from convsv_core.layers import Layer, ReadOptions
from convsv_core.reports import many, tasks

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_digits.py"
SAVE_EVERY = 22  # steps: an epoch, so that 59 epochs give 60 checkpoints
EXTENTS = (8, 8)  # of the digits
WORKERS = (10, 100, 1000)
STORE = 1e9
"""Bytes a second that a file store is supposed to pass on."""

LARGEST_SHARE = 0.05
"""Of its time, that a worker may spend on the engine's behalf."""


@dataclass(frozen=True)
class Speed:
    """One and two single-thread workers on the same checkpoints: an entry of ``speed`` in the JSON.

    Attributes
    ----------
    extents : str
        Of every layer's input.
    checkpoints, rows : int
    one_times, two_times : list of float
        Seconds of each run, its table included; alternately.
    ratio : float
        The median of the first over that of the second.
    paired_ratio : float
        The median of the ratios of neighbours.
    workers_seconds, client_seconds : list of float
        Processor time, on one and on two workers, of the workers and of the process that holds client and scheduler;
        medians. It tells more than the clock where the machine is shared.
    equal, equal_after_kill : bool
        Whether the tables are the same bit for bit; of two workers, and of two of which one is killed half-way.
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


@dataclass(frozen=True)
class BlockCost:
    """One block of frequencies of a 3x3 layer: an entry of ``blocks`` in the JSON.

    Attributes
    ----------
    channels : int
        Inputs, and as many outputs.
    frequencies : int
        That a block has by the rule of `convsv_core.reports.tasks.cut`, on a large grid.
    seconds : float
        Of such a block on one thread, by the time of fewer frequencies.
    per_frequency : float
        Seconds.
    bytes_sent : int
        Of its singular values.
    """

    channels: int
    frequencies: int
    seconds: float
    per_frequency: float
    bytes_sent: int


@dataclass(frozen=True)
class Overhead:
    """What the engine adds to a task that does nothing: ``overhead`` in the JSON.

    Attributes
    ----------
    tasks : int
    one_worker, two_workers : float
        Seconds a task, one after another on one worker, and on two.
    service : float
        Processor seconds a task of the process that holds client and scheduler.
    least_task : float
        Seconds that a task is to have so that `one_worker` is at most `LARGEST_SHARE` of its time.
    """

    tasks: int
    one_worker: float
    two_workers: float
    service: float
    least_task: float


@dataclass(frozen=True)
class Scaling:
    """A simulated run: an entry of ``simulated`` in the JSON; see `benchmarks.simulation.Prediction`."""

    workload: str
    workers: int
    tasks: int
    work_seconds: float
    seconds: float
    speedup: float
    scheduler_share: float
    store_share: float
    worker_share: float


@click.command()
@click.option("--quick", is_flag=True, help="Few checkpoints and channels, in less than a minute.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Runs of each cluster.")
@click.option("--arrays/--no-arrays", default=True, show_default=True, help="Measure one large layer, too.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    callback=check_output,
    help="Write everything that was measured to this file.",
)
def scale(quick: bool, repeats: int, arrays: bool, json_path: Path | None) -> None:
    """Time many checkpoints on one and on two workers, and predict thousands.

    The checkpoints are those of a training run of the digits network, all layers of each. One and two workers in turns;
    then two of which one is killed half-way. The tables must be equal bit for bit, or it ends with an error. Then the
    cost of a block of frequencies over the channels, the engine's overhead a task, and what a simulation from these
    times says of 10, 100 and 1,000 workers. Run it on an idle machine.

    Then, unless it is left out, one large layer: on a Dask cluster of two workers of at most 2 GiB, and over eight
    virtual devices of JAX's.
    """
    load_before = load_average()
    with progress() as tell, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tell("training the digits network")
        train(folder / "run", epochs=3 if quick else 59)
        with clusters() as (one, two):
            extents = [EXTENTS] if quick else [EXTENTS, (32, 32)]
            speeds = [measure_speed(folder, shape, one, two, 2 if quick else repeats, tell) for shape in extents]
            tell("overhead of the engine")
            overhead = measure_overhead(one, two, 200 if quick else 2000)
    blocks = []
    for channels in (16, 64) if quick else (16, 32, 64, 128, 256, 512):
        tell(f"block of {channels} channels")
        blocks.append(measure_block(channels, seconds=0.05 if quick else 2.0))
    tell("simulation")
    simulated = predict(speeds[0], blocks, overhead, quick=quick)
    if arrays:
        with progress() as tell:
            tell("eight virtual devices of JAX's")
            sharded = sharded_jax(channels=8, extents=(16, 16)) if quick else sharded_jax()
            tell("a large grid on a Dask cluster")
            grids = grid(8, (16, 16), 4) if quick else grid()
    machine = describe([]) | {"load_average": [load_before, load_average()]}
    report.show_machine(machine, {})
    report.show_scale(speeds, blocks, overhead, simulated)
    if arrays:
        show(sharded, grids)
    if json_path is not None:
        content = {
            "benchmark": "scale",
            "arguments": {"quick": quick, "repeats": repeats, "store_bytes_per_second": STORE},
            "machine": machine,
            "speed": [asdict(one) for one in speeds],
            "blocks": [asdict(one) for one in blocks],
            "overhead": asdict(overhead),
            "simulated": [asdict(one) for one in simulated],
        }
        if arrays:
            content |= {"sharded_jax": asdict(sharded), "grid": [asdict(one) for one in grids]}
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    if not all(speed.equal and speed.equal_after_kill for speed in speeds):
        raise click.ClickException("the tables differ")
    if arrays and not all(one.agrees for one in grids):
        raise click.ClickException("the values of the large grid are not those of NumPy")


def train(folder: Path, epochs: int) -> None:
    """Train the digits network as the example does, and keep a checkpoint an epoch and the first."""
    import torch

    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.set_num_threads(1)  # as the example has it
    example.train(example.load_split(), epochs=epochs, seed=0, save_every=SAVE_EVERY, run_dir=folder)


@contextlib.contextmanager
def clusters() -> Iterator[tuple[Client, Client]]:
    """Clients of clusters of one and of two workers, of one thread each; they do not disturb each other while idle."""
    settings: dict[str, Any] = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with (
        LocalCluster(n_workers=1, **settings) as alone,
        LocalCluster(n_workers=2, **settings) as pair,
        Client(alone) as one,
        Client(pair) as two,
    ):
        yield one, two


# ---- speed --------------------------------------------------------------------------------------------------


def measure_speed(
    folder: Path,
    extents: tuple[int, int],
    one: Client,
    two: Client,
    repeats: int,
    tell: Callable[[str], None],
) -> Speed:
    """One and two workers in turns, and two of which one is killed."""
    checkpoints = find([str(folder / "run" / "*.safetensors")], folder)
    label = "x".join(map(str, extents))
    clients = {"one": one, "two": two}
    times: dict[str, list[float]] = {name: [] for name in clients}
    spent: dict[str, list[float]] = {name: [] for name in clients}
    own: dict[str, list[float]] = {name: [] for name in clients}
    tables: list[pa.Table] = []
    for turn in range(repeats + 1):  # the first, in which workers import and plan, does not count
        for name in list(clients)[:: -1 if turn % 2 else 1]:
            tell(f"{label}: {name} worker(s), run {turn} of {repeats}")
            before = sum(clients[name].run(time.process_time).values()), time.process_time()
            start = time.perf_counter()
            tables.append(make_table(folder / f"{label}-{name}-{turn}.parquet", clients[name], checkpoints, extents))
            if turn:
                times[name].append(time.perf_counter() - start)
                own[name].append(time.process_time() - before[1])
                spent[name].append(sum(clients[name].run(time.process_time).values()) - before[0])
    tell(f"{label}: two workers, one killed")
    killed = make_table(folder / f"{label}-killed.parquet", two, checkpoints, extents, kill=len(checkpoints) // 2)
    two.wait_for_workers(2)
    return Speed(
        extents=label,
        checkpoints=len(checkpoints),
        rows=tables[0].num_rows,
        one_times=times["one"],
        two_times=times["two"],
        ratio=statistics.median(times["one"]) / statistics.median(times["two"]),
        paired_ratio=statistics.median(a / b for a, b in zip(times["one"], times["two"], strict=True)),
        workers_seconds=[statistics.median(spent[name]) for name in clients],
        client_seconds=[statistics.median(own[name]) for name in clients],
        equal=all(table.equals(tables[0]) for table in tables),
        equal_after_kill=killed.equals(tables[0]),
    )


def make_table(
    folder: Path, client: Client, checkpoints: Sequence[Checkpoint], extents: tuple[int, int], kill: int | None = None
) -> pa.Table:
    """Compute the table; with `kill`, a worker dies when so many checkpoints are done."""
    options = ReadOptions({"": extents})
    reports = many.analyze_many([one.path for one in checkpoints], client, options=options)
    with SpectraTable(folder, {}) as table:
        for number, (checkpoint, found) in enumerate(zip(checkpoints, reports, strict=True)):
            if number == kill:
                os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
            table.add(checkpoint, found)
    return pyarrow.dataset.dataset(folder).to_table()


# ---- costs --------------------------------------------------------------------------------------------------


def measure_overhead(one: Client, two: Client, count: int) -> Overhead:
    """Tasks that do nothing, submitted and waited for as `analyze_many` does, one future each."""

    def spend(client: Client) -> tuple[float, float]:
        before = time.process_time()
        seconds = time_once(lambda: client.gather([client.submit(_nothing, n, pure=False) for n in range(count)]))
        return seconds / count, (time.process_time() - before) / count

    spend(one), spend(two)
    (alone, _), (pair, service) = (min(spend(client) for _ in range(3)) for client in (one, two))
    return Overhead(count, alone, pair, service, alone / LARGEST_SHARE)


def _nothing(number: int) -> int:
    return number


def measure_block(channels: int, seconds: float) -> BlockCost:
    """Time a block of a Gaussian 3x3 layer, as a worker computes it, for about so many seconds."""
    kernel = np.random.default_rng(channels).standard_normal((channels, channels, 3, 3)).astype(np.float32)
    settings = tasks.TaskOptions(ReadOptions(), "numpy", "none", None, None)
    prepared = tasks.prepare(Layer("layer", kernel, Conv("OIHW"), (256, 256)), settings)
    plan = prepared.operand.plan
    size = max(block.last - block.first for block in tasks.cut(plan))
    part = len(prepared.parts) - 1  # the frequencies that are not their own conjugates

    def spend(count: int) -> float:
        return time_once(lambda: tasks.block_values(tasks.Block(part, 0, count), prepared))

    count, taken = 2, 0.0
    while count < size and taken < seconds / 4:
        count = min(size, 2 * count)
        taken = spend(count)
    taken = min(taken, spend(count), spend(count))
    each = taken / count
    return BlockCost(channels, size, each * size, each, 8 * size * channels)


# ---- many workers ---------------------------------------------------------------------------------------------


def predict(speed: Speed, blocks: Sequence[BlockCost], overhead: Overhead, *, quick: bool) -> list[Scaling]:
    """Simulate the measured checkpoints, many more of them, and checkpoints of large layers."""
    survey = speed.workers_seconds[0] / speed.checkpoints
    small = Job(survey, size=160_000)
    block = blocks[-1]
    layer = [block.seconds] * max(1, round(513 / block.frequencies))  # 32 x 32, half of it for a real kernel
    large = Job(1.0, size=100_000_000, layers=[layer] * 16, combine=0.05)
    few, many_small, many_large = (speed.checkpoints, 600, 2) if quick else (speed.checkpoints, 60_000, 60)
    workloads = {
        f"{few} of the digits network": ([small] * few, True),
        f"{many_small:,} of the digits network": ([small] * many_small, True),
        f"{many_small:,}, one task each": ([small] * many_small, False),
        f"{many_large} of 16 layers of {block.channels} channels": ([large] * many_large, False),
    }
    found = []
    for workload, (jobs, pack) in workloads.items():
        for workers in (2, *WORKERS):
            size = max(survey, min(many.SECONDS_PER_TASK, sum(job.seconds for job in jobs) / (many.ROUNDS * workers)))
            cut = packed(jobs, size) if pack else jobs
            engine = Engine(workers, overhead.service, max(0.0, overhead.one_worker - overhead.service), STORE)
            predicted = simulate(cut, engine)
            work = sum(job.seconds for job in jobs)
            found.append(
                Scaling(
                    workload=workload,
                    workers=workers,
                    tasks=sum(job.tasks for job in cut),
                    work_seconds=work,
                    seconds=predicted.seconds,
                    speedup=work / predicted.seconds,
                    scheduler_share=predicted.scheduler_share,
                    store_share=predicted.store_share,
                    worker_share=predicted.worker_share,
                )
            )
    return found
