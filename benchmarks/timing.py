"""Take the times of alternatives in turns, so that other load on the machine falls on all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

__all__ = ["Clock", "Task", "WeightedTasks", "alternate", "in_turns", "time_once"]

Task: TypeAlias = Callable[[], Any]
"""A function that does the work once and returns when it is done, also on a device."""

Clock: TypeAlias = Callable[[], float]
"""A function that returns seconds, of which differences are taken: `time.perf_counter` or `time.process_time`."""

Key = TypeVar("Key", bound=Hashable)

SHORTEST = 0.02
"""Seconds that one measurement takes at least: a guess, far above the resolution of the clock.

A shorter task is called several times.
"""


@dataclass
class WeightedTasks:
    """Describe how one method is timed, which may be by parts that are scaled up.

    Attributes
    ----------
    tasks : dict of str to callable
        The parts that are timed.
    estimates : dict of str to float
        Seconds that each part took at its first run, or is expected to take.
    weights : dict of str to float
        The time of the method is the sum of the parts' times with these weights. A part that runs in full has
        weight 1.
    sampled : int
        Frequencies whose SVDs are timed; 0 for a method that does not visit frequencies.
    extrapolated : bool
        Whether a weight differs from 1.
    compile_seconds : float or None
        None where nothing is compiled.
    """

    tasks: dict[str, Task]
    estimates: dict[str, float]
    weights: dict[str, float]
    sampled: int
    extrapolated: bool
    compile_seconds: float | None = None

    @classmethod
    def whole(
        cls, name: str, task: Task, seconds: float, *, sampled: int = 0, compile_seconds: float | None = None
    ) -> WeightedTasks:
        """Return the description of a method that is one task, run in full, which takes about `seconds`."""
        return cls({name: task}, {name: seconds}, {name: 1.0}, sampled, False, compile_seconds)

    def combine(self, times: Mapping[str, list[float]]) -> list[float]:
        """Return the seconds of the whole method in each turn."""
        parts = [[self.weights[name] * t for t in times[name]] for name in self.tasks]
        return [sum(turn) for turn in zip(*parts, strict=True)]


def time_once(task: Task, clock: Clock = time.perf_counter) -> float:
    """Return the seconds that `task` takes."""
    start = clock()
    task()
    return clock() - start


def in_turns(names: Mapping[Key, object], turn: int) -> list[Key]:
    """Return the names in the order of this turn: backwards in every other one.

    So no task always follows the same one.
    """
    return list(names)[:: -1 if turn % 2 else 1]


def alternate(
    tasks: Mapping[Key, Task], estimates: Mapping[Key, float], repeats: int, clock: Clock = time.perf_counter
) -> dict[Key, list[float]]:
    """Measure each task `repeats` times, in turns.

    Parameters
    ----------
    tasks : mapping to callable
        Each task has run before, so that nothing is compiled, loaded or planned here.
    estimates : mapping to float
        Seconds that each task took then. A task that looks short is timed again first, since a first call may
        have done more.
    repeats : int
        Number of turns.
    clock : callable
        The processor's time of this process is disturbed less by other programs, but counts every thread.

    Returns
    -------
    dict to list of float
        Seconds a call, in the order of the turns. A task shorter than `SHORTEST` is called as often as it takes
        to fill that time, and the mean is one measurement.
    """
    calls = {name: _calls(task, estimates[name]) for name, task in tasks.items()}
    times: dict[Key, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats):
        for name in in_turns(tasks, turn):
            start = clock()
            for _ in range(calls[name]):
                tasks[name]()
            times[name].append((clock() - start) / calls[name])
    return times


def _calls(task: Task, estimate: float) -> int:
    """Return how often `task` is called in one measurement."""
    if estimate > 10 * SHORTEST:
        return 1
    return max(1, math.ceil(SHORTEST / max(time_once(task), 1e-7)))
