"""Measure the cost of a task and of a block of frequencies, and predict runs on many workers from these costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from distributed import Client

from benchmarks.scale_runs import Clients, Speed
from benchmarks.simulation import Engine, Job, packed, simulate
from benchmarks.timing import time_once
from convsv_core.conv import Conv
from convsv_core.layers import Layer, ReadOptions
from convsv_core.reports import many, tasks

__all__ = ["STORE", "BlockCost", "Overhead", "Scaling", "measure_block", "measure_overhead", "predict"]

WORKERS = (10, 100, 1000)
STORE = 1e9
"""Bytes a second that a file store passes on in the simulation: a guess."""

LARGEST_SHARE = 0.05
"""Share of its time that a worker may spend on the engine's behalf: a guess."""

SURVEY_BYTES, LARGE_BYTES = 160_000, 100_000_000
"""Bytes of a checkpoint of the digits network (measured, rounded) and of a network of large layers (a guess)."""

LARGE_SURVEY, LARGE_COMBINE = 1.0, 0.05
"""Seconds of the survey of a network of large layers, and to put the blocks of a layer together: guesses."""


@dataclass(frozen=True)
class BlockCost:
    """Record the cost of one block of frequencies of a 3x3 layer: an entry of ``blocks`` in the JSON.

    Attributes
    ----------
    channels : int
        Inputs, and as many outputs.
    frequencies : int
        Frequencies of a block on a large grid, by the rule for the task of a large layer.
    seconds : float
        Time of such a block on one thread, scaled up from fewer frequencies.
    per_frequency : float
        Seconds.
    bytes_sent : int
        Bytes of its singular values.
    """

    channels: int
    frequencies: int
    seconds: float
    per_frequency: float
    bytes_sent: int


@dataclass(frozen=True)
class Overhead:
    """Record the time that the engine adds to a task that does nothing: ``overhead`` in the JSON.

    Attributes
    ----------
    tasks : int
    one_worker, two_workers : float
        Seconds for each task, on one worker and on two.
    service : float
        Processor seconds for each task, in the process that holds client and scheduler.
    least_task : float
        Seconds of a task of whose time `one_worker` is the share `LARGEST_SHARE`.
    """

    tasks: int
    one_worker: float
    two_workers: float
    service: float
    least_task: float


@dataclass(frozen=True)
class Scaling:
    """Record a simulated run: an entry of ``simulated`` in the JSON.

    Attributes
    ----------
    workload : str
    workers, tasks : int
    work_seconds : float
        Time of the work on one worker, without an engine.
    seconds : float
    speedup : float
        ``work_seconds / seconds``.
    scheduler_share, store_share, worker_share : float
        As in `benchmarks.simulation.Prediction`.
    """

    workload: str
    workers: int
    tasks: int
    work_seconds: float
    seconds: float
    speedup: float
    scheduler_share: float
    store_share: float
    worker_share: float


class _TaskCost(NamedTuple):
    """Hold the seconds for each task by the clock, and of this process."""

    seconds: float
    service: float


class _Workload(NamedTuple):
    """Hold jobs, and whether several of them may make up one task."""

    jobs: Sequence[Job]
    pack: bool


def measure_overhead(clients: Clients, count: int) -> Overhead:
    """Time tasks that do nothing, submitted and waited for as `analyze_many` does, with one future for each."""
    for client in clients:
        _task_cost(client, count)
    one, two = (min(_task_cost(client, count) for _ in range(3)) for client in clients)
    return Overhead(count, one.seconds, two.seconds, two.service, one.seconds / LARGEST_SHARE)


def _task_cost(client: Client, count: int) -> _TaskCost:
    before = time.process_time()
    seconds = time_once(lambda: client.gather([client.submit(_nothing, n, pure=False) for n in range(count)]))
    return _TaskCost(seconds / count, (time.process_time() - before) / count)


def _nothing(number: int) -> int:
    return number


def measure_block(channels: int, seconds: float) -> BlockCost:
    """Time a block of a Gaussian 3x3 layer, as a worker computes it, for about so many seconds."""
    kernel = np.random.default_rng(channels).standard_normal((channels, channels, 3, 3)).astype(np.float32)
    options = tasks.TaskOptions(ReadOptions(), "numpy", "none", None, None)
    prepared = tasks.prepare(Layer("layer", kernel, Conv("OIHW"), (256, 256)), options)
    plan = prepared.operand.plan
    size = max(block.last - block.first for block in tasks.cut(plan))
    part = len(prepared.parts) - 1  # the last part has the frequencies that are not their own conjugates

    def spend(count: int) -> float:
        return time_once(lambda: tasks.block_values(tasks.Block(part, 0, count), prepared))

    count, taken = 2, 0.0
    while count < size and taken < seconds / 4:
        count = min(size, 2 * count)
        taken = spend(count)
    taken = min(taken, spend(count), spend(count))
    each = taken / count
    return BlockCost(channels, size, each * size, each, 8 * size * channels)


def predict(speed: Speed, blocks: Sequence[BlockCost], overhead: Overhead, small: int, large: int) -> list[Scaling]:
    """Simulate the measured checkpoints, `small` checkpoints of the same kind, and `large` ones of large layers."""
    survey = speed.workers_seconds[0] / speed.checkpoints
    digits = Job(survey, size=SURVEY_BYTES)
    block = blocks[-1]
    layer = [block.seconds] * max(1, round(513 / block.frequencies))  # 32 x 32, half of it for a real kernel
    wide = Job(LARGE_SURVEY, size=LARGE_BYTES, layers=[layer] * 16, combine=LARGE_COMBINE)
    workloads = {
        f"{speed.checkpoints} of the digits network": _Workload([digits] * speed.checkpoints, pack=True),
        f"{small:,} of the digits network": _Workload([digits] * small, pack=True),
        f"{small:,}, one task each": _Workload([digits] * small, pack=False),
        f"{large} of 16 layers of {block.channels} channels": _Workload([wide] * large, pack=False),
    }
    found = []
    for workload, (jobs, pack) in workloads.items():
        work = sum(job.seconds for job in jobs)
        for workers in (2, *WORKERS):
            size = max(survey, min(many.SECONDS_PER_TASK, work / (many.ROUNDS * workers)))
            cut = packed(jobs, size) if pack else jobs
            engine = Engine(workers, overhead.service, max(0.0, overhead.one_worker - overhead.service), STORE)
            predicted = simulate(cut, engine)
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
