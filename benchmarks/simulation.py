"""Predict the time of a run on any number of workers from the measured times of its tasks, by list scheduling.

The tasks of a model are those of `convsv_core.analyze_many`: a survey, then the blocks of the layers that it splits,
then for each layer one task that puts the blocks together. Each free worker takes the ready task of the earliest
model. The scheduler, with the client, serves one task at a time. The file store passes on a fixed number of bytes a
second to all readers together. The simulation leaves out the transfers of blocks between workers, which are 8 bytes
for each singular value, the start of workers, and their differences in speed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Engine", "Job", "Prediction", "packed", "simulate"]

SURVEY, COMBINE = -1, -2
"""Tasks that are not a block of a layer, in place of the number of the layer."""


@dataclass(frozen=True)
class Engine:
    """Describe the costs of one cluster beside the work.

    Attributes
    ----------
    workers : int
        Workers of one thread each.
    service : float
        Seconds that scheduler and client spend on one task; they serve no other task in that time.
    overhead : float
        Seconds that a worker spends on a task beside its work.
    bytes_per_second : float
        Speed of the file store, for all workers together.
    """

    workers: int
    service: float
    overhead: float
    bytes_per_second: float


@dataclass(frozen=True)
class Job:
    """List the tasks of one model.

    Attributes
    ----------
    survey : float
        Seconds of the survey.
    size : int
        Bytes of the file, which the survey reads, and again a task of every layer that is split.
    layers : sequence of sequence of float
        Seconds of the blocks of each such layer.
    combine : float
        Seconds of the task that puts the blocks of a layer together.
    """

    survey: float
    size: int = 0
    layers: Sequence[Sequence[float]] = ()
    combine: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds on one worker, with an engine and a store that cost nothing."""
        return self.survey + sum(map(sum, self.layers)) + self.combine * len(self.layers)

    @property
    def tasks(self) -> int:
        """Return the number of tasks."""
        return 1 + sum(len(blocks) + 1 for blocks in self.layers)


@dataclass(frozen=True)
class Prediction:
    """Hold the time of a simulated run.

    Attributes
    ----------
    seconds : float
    scheduler_share, store_share, worker_share : float
        Shares of the time for which the scheduler, the file store and the average worker were busy.
    """

    seconds: float
    scheduler_share: float
    store_share: float
    worker_share: float


class _Task(NamedTuple):
    """Describe a task that is ready; tasks are taken in the order of their fields.

    Attributes
    ----------
    job : int
    number : int
        Number of the task in the order in which tasks become ready.
    seconds : float
    size : int
        Bytes to read.
    layer : int
        Number of the layer, `SURVEY` or `COMBINE`.
    """

    job: int
    number: int
    seconds: float
    size: int
    layer: int


class _Running(NamedTuple):
    """Describe a task that a worker runs until the time `end`."""

    end: float
    job: int
    layer: int


def simulate(jobs: Sequence[Job], engine: Engine) -> Prediction:
    """Run `jobs` on `engine`, earlier ones first.

    Examples
    --------
    >>> free = Engine(workers=2, service=0, overhead=0, bytes_per_second=float("inf"))
    >>> simulate([Job(1.0), Job(1.0), Job(1.0)], free).seconds
    2.0
    >>> simulate([Job(1.0, layers=[[1.0] * 4], combine=0.5)], free).seconds
    3.5
    """
    ready: list[_Task] = []
    left = [[len(blocks) for blocks in job.layers] for job in jobs]
    unread = deque((number, job) for number, job in enumerate(jobs))
    running: list[_Running] = []
    idle, count = engine.workers, 0
    now = served = stored = worked = busy_store = 0.0
    tasks = 0

    def add(job: int, seconds: float, size: int, layer: int) -> None:
        nonlocal count
        heapq.heappush(ready, _Task(job, count, seconds, size, layer))
        count += 1

    while unread or ready or running:
        while idle and (ready or unread):
            if not ready:
                number, job = unread.popleft()
                add(number, job.survey, job.size, SURVEY)
            task = heapq.heappop(ready)
            served = max(served, now) + engine.service
            start, reading = served, task.size / engine.bytes_per_second
            if task.size:
                stored = max(stored, start) + reading
                start, busy_store = stored, busy_store + reading
            heapq.heappush(running, _Running(start + engine.overhead + task.seconds, task.job, task.layer))
            worked += engine.overhead + task.seconds
            idle, tasks = idle - 1, tasks + 1
        now, number, layer = heapq.heappop(running)
        idle += 1
        if layer == SURVEY:
            for index, blocks in enumerate(jobs[number].layers):
                for position, seconds in enumerate(blocks):
                    add(number, seconds, 0 if position else jobs[number].size, index)
        elif layer >= 0:
            left[number][layer] -= 1
            if not left[number][layer]:
                add(number, jobs[number].combine, 0, COMBINE)
    if not now:
        return Prediction(0.0, 0.0, 0.0, 0.0)
    return Prediction(now, tasks * engine.service / now, busy_store / now, worked / engine.workers / now)


def packed(jobs: Sequence[Job], seconds: float) -> list[Job]:
    """Return the jobs, with consecutive ones without layers to split put together into tasks of about `seconds`."""
    found: list[Job] = []
    for job in jobs:
        last = found[-1] if found else None
        if last is not None and not (job.layers or last.layers) and last.survey + job.survey <= seconds:
            found[-1] = Job(last.survey + job.survey, last.size + job.size)
        else:
            found.append(job)
    return found
