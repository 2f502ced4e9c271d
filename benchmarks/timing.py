"""Times of alternatives, taken alternately, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

Task: TypeAlias = Callable[[], None]
"""Does the work once and returns when it is done, on a device too."""

SHORTEST = 0.02
"""Seconds that one measurement takes at least: a shorter task is called several times."""


def time_once(task: Task) -> float:
    """Return the seconds that `task` takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def alternate(tasks: Mapping[str, Task], estimates: Mapping[str, float], repeats: int) -> dict[str, list[float]]:
    """Measure each task `repeats` times, in turns.

    Parameters
    ----------
    tasks : mapping of str to callable
        Each has run before, so that nothing is compiled, loaded or planned here.
    estimates : mapping of str to float
        Seconds that each took then. Those that look short are timed again first, since a first call may
        have done more.
    repeats : int
        Turns. Every other one goes backwards, so that no task always follows the same one.

    Returns
    -------
    dict of str to list of float
        Seconds a call, in the order of the turns. A task shorter than `SHORTEST` is called as often as it takes
        to fill that time, and the mean is one measurement.
    """
    calls = {name: _calls(task, estimates[name]) for name, task in tasks.items()}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats):
        for name in list(tasks)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                tasks[name]()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def _calls(task: Task, estimate: float) -> int:
    """How often to call `task` in one measurement."""
    if estimate > 10 * SHORTEST:
        return 1
    return max(1, math.ceil(SHORTEST / max(time_once(task), 1e-7)))
