"""Predict the time of a run on any number of workers from the measured times of its tasks: list scheduling.

The tasks of a model are those of `convsv_core.reports.many`: a survey, then the blocks of the layers that it splits,
then one task a layer that puts the blocks together. Each free worker takes the ready task of the earliest model. The
scheduler, with the client, serves one task at a time, and the file store passes on so many bytes a second to all
readers together. What is left out: transfers of blocks between workers, which are 8 bytes a singular value, the start
of workers, and their differences in speed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """What one cluster costs beside the work.

    Attributes
    ----------
    workers : int
        Of one thread each.
    service : float
        Seconds that scheduler and client spend on one task, during which no other is served.
    overhead : float
        Seconds that a worker spends on a task beside its work.
    bytes_per_second : float
        Of the file store, for all workers together.
    """

    workers: int
    service: float
    overhead: float
    bytes_per_second: float


@dataclass(frozen=True)
class Job:
    """The tasks of one model.

    Attributes
    ----------
    survey : float
        Seconds.
    size : int
        Bytes of the file, which is read by the survey and again for every layer that is split.
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
        """Of work on one worker, with an engine and a store that cost nothing."""
        return self.survey + sum(map(sum, self.layers)) + self.combine * len(self.layers)

    @property
    def tasks(self) -> int:
        """How many there are."""
        return 1 + sum(len(blocks) + 1 for blocks in self.layers)


@dataclass(frozen=True)
class Prediction:
    """What a simulated run took.

    Attributes
    ----------
    seconds : float
    scheduler_share, store_share, worker_share : float
        Of that time, for which the scheduler, the file store and the average worker were busy.
    """

    seconds: float
    scheduler_share: float
    store_share: float
    worker_share: float


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
    ready: list[tuple[int, int, float, int, int]] = []  # job, number, seconds, bytes, layer (-1: survey, -2: combine)
    left = [[len(blocks) for blocks in job.layers] for job in jobs]
    unread = deque((number, job) for number, job in enumerate(jobs))
    running: list[tuple[float, int, int]] = []  # end, job, layer
    idle, count = engine.workers, 0
    now = served = stored = worked = busy_store = 0.0
    tasks = 0

    def add(job: int, seconds: float, size: int, layer: int) -> None:
        nonlocal count
        heapq.heappush(ready, (job, count, seconds, size, layer))
        count += 1

    while unread or ready or running:
        while idle and (ready or unread):
            if not ready:
                number, job = unread.popleft()
                add(number, job.survey, job.size, -1)
            number, _, seconds, size, layer = heapq.heappop(ready)
            served = max(served, now) + engine.service
            start, reading = served, size / engine.bytes_per_second
            if size:
                stored = max(stored, start) + reading
                start, busy_store = stored, busy_store + reading
            heapq.heappush(running, (start + engine.overhead + seconds, number, layer))
            worked += engine.overhead + seconds
            idle, tasks = idle - 1, tasks + 1
        now, number, layer = heapq.heappop(running)
        idle += 1
        if layer == -1:
            for index, blocks in enumerate(jobs[number].layers):
                for position, seconds in enumerate(blocks):
                    add(number, seconds, 0 if position else jobs[number].size, index)
        elif layer >= 0:
            left[number][layer] -= 1
            if not left[number][layer]:
                add(number, jobs[number].combine, 0, -2)
    if not now:
        return Prediction(0.0, 0.0, 0.0, 0.0)
    return Prediction(now, tasks * engine.service / now, busy_store / now, worked / engine.workers / now)


def packed(jobs: Sequence[Job], seconds: float) -> list[Job]:
    """Consecutive jobs without layers to split, put together into tasks of about `seconds`."""
    found: list[Job] = []
    for job in jobs:
        last = found[-1] if found else None
        if last is not None and not (job.layers or last.layers) and last.survey + job.survey <= seconds:
            found[-1] = Job(last.survey + job.survey, last.size + job.size)
        else:
            found.append(job)
    return found
