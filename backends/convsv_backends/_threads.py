"""Blocks of frequencies computed by several threads, while the library's own threading is limited to one thread.

Decompositions of small matrices gain nothing from the threads inside LAPACK. On some sizes most of the time is
lost to them. With whole blocks for each thread, nearly all of the processors' time is used.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from convsv_core.backend import Array, BlockFunction, split_rows

__all__ = ["SharedLimit", "UserLimit", "map_groups_in_threads", "map_in_threads", "usable_processors", "worth_threads"]

SMALL_BYTES = 1 << 22
"""Smallest work, in bytes of working memory, that is given to several threads.

Less work is done by the caller's thread, because handing it over would cost more time. A guess.
"""

SHARED_OPERATIONS = 1e8
"""Smallest work on several groups, in operations, that is shared out to threads. A guess.

It takes about 10 ms. PyTorch's own threads wait actively for some milliseconds after the caller's last operation.
"""

BLOCKS_PER_THREAD = 4
"""Number of blocks for each thread, so that all threads end at about the same time. A guess.

There are fewer blocks where a block would otherwise have less than `SMALL_BYTES`.
"""


class UserLimit(NamedTuple):
    """Hold what a process allowed before a limit was set.

    Attributes
    ----------
    threads : int
        The number of threads that the user's own limit allows.
    restore : callable
        Restores the user's own limit.
    """

    threads: int
    restore: Callable[[], object]


class SharedLimit:
    """Hold a limit on the threads of a whole process while any thread needs it.

    The first thread to enter sets the limit. The last one to leave restores the user's own. If each thread set and
    restored the limit by itself, it would outlive the calls or end too early.

    Parameters
    ----------
    limit : callable
        Sets the limit and returns the user's own, a `UserLimit`.
    """

    def __init__(self, limit: Callable[[], UserLimit]) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._holders = 0
        self._threads = 1
        self._restore: Callable[[], object] = lambda: None
        self._alone = threading.local()

    def __enter__(self) -> int:
        with self._lock:
            if self._holders == 0:
                users = self._limit()
                self._restore = users.restore
                self._threads = max(1, min(users.threads, usable_processors()))
            self._holders += 1
            return 1 if getattr(self._alone, "is_set", False) else self._threads

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._restore()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Return a context manager that holds the limit and tells this thread to use no other threads.

        It is for a thread that works beside others which have work of their own.
        """
        before = getattr(self._alone, "is_set", False)
        with self:
            self._alone.is_set = True
            try:
                yield
            finally:
                self._alone.is_set = before


def usable_processors() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worth_threads(rows: Any, row_bytes: int, least: int = SMALL_BYTES) -> bool:
    """Return whether the rows together have at least `least` bytes of work, which is enough for several threads."""
    return len(rows) > 1 and len(rows) * row_bytes >= least


def map_in_threads(
    function: BlockFunction,
    rows: Any,
    threads: int,
    *,
    row_bytes: int,
    budget: int,
    initializer: Callable[[], object] | None = None,
) -> list[Array | tuple[Array, ...]]:
    """Return the results of `function` on consecutive blocks of `rows`, in order.

    Parameters
    ----------
    function : callable
        Takes a block of `rows`.
    rows : array
        One row for each item of work.
    threads : int
        The number of threads, one of which is the caller's. With an `initializer` the caller's thread only waits.
    row_bytes, budget : int
        Bytes of working memory of one row, and of all blocks that are computed at one time.
    initializer : callable, optional
        Prepares each thread when it starts.
    """
    affordable = max(1, budget // threads // max(1, row_bytes))
    count = threads * max(1, min(BLOCKS_PER_THREAD, len(rows) * row_bytes // (SMALL_BYTES * threads)))
    blocks = list(split_rows(rows, min(affordable, -(-len(rows) // count))))
    results: list[Any] = [None] * len(blocks)
    places = iter(range(len(blocks)))
    choosing = threading.Lock()

    def work() -> None:
        while True:
            with choosing:
                place = next(places, None)
            if place is None:
                return
            results[place] = function(blocks[place])

    helpers = _helpers(threads if initializer else threads - 1, initializer)
    tasks: list[_Task] = []
    try:
        for _ in range(helpers.count):
            tasks.append(helpers.submit(work))
        if not initializer:
            work()
    except BaseException:
        places = iter(())  # The helpers stop after their present blocks.
        raise
    finally:
        # A helper that has not begun may be busy with another caller's work. It is not waited for: no block is left.
        begun = [task for task in tasks if initializer or not task.cancel()]
        for task in begun:
            task.wait()
    for task in begun:
        if task.error is not None:
            raise task.error
    return results


class _Share(NamedTuple):
    """Hold a part of a group: the group's number, the places of the members in the group, and the cost of the work."""

    group: int
    places: range
    cost: float


def map_groups_in_threads(
    function: Callable[[Any], list[Any]],
    groups: Sequence[Any],
    costs: Sequence[float],
    limit: SharedLimit,
    *,
    initializer: Callable[[], object] | None = None,
) -> list[list[Any]] | None:
    """Return the list ``function(group)`` of each group, as `Backend.map_groups` does, or None if threads do not gain.

    A group that costs more than a thread's share of the work is cut into parts, each of which costs less. The most
    expensive parts come first, so that the threads end at about the same time. While a thread computes a part, `limit`
    gives it no further threads.
    """
    if sum(costs) < SHARED_OPERATIONS:
        return None
    with limit as threads:
        return _map_groups(function, groups, costs, threads, limit, initializer) if threads > 1 else None


def _map_groups(
    function: Callable[[Any], list[Any]],
    groups: Sequence[Any],
    costs: Sequence[float],
    threads: int,
    limit: SharedLimit,
    initializer: Callable[[], object] | None,
) -> list[list[Any]]:
    shares = []
    for index, (group, cost) in enumerate(zip(groups, costs, strict=True)):
        parts = max(1, min(len(group), math.ceil(threads * cost / sum(costs))))
        places = [range(first, len(group), parts) for first in range(parts)]
        shares += [_Share(index, chosen, cost * len(chosen) / max(1, len(group))) for chosen in places]
    shares.sort(key=lambda share: -share.cost)
    results: list[list[Any]] = [[None] * len(group) for group in groups]

    def work(block: Any) -> tuple[Array, ...]:
        for share in (shares[int(place)] for place in block):
            with limit.alone():
                found = function([groups[share.group][place] for place in share.places])
            for place, result in zip(share.places, found, strict=True):
                results[share.group][place] = result
        return ()

    # A budget of one row for each thread makes every block one share.
    map_in_threads(work, np.arange(len(shares)), threads, row_bytes=1, budget=threads, initializer=initializer)
    return results


class _Task:
    """Hold a function that a helper thread runs, unless it is cancelled first.

    The locks are the interpreter's own, because a keyboard interrupt at the wrong moment can leave a
    `concurrent.futures.Future` locked for ever, and its thread too.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._begun, self._running = threading.Lock(), threading.Lock()
        self._running.acquire()
        self.error: BaseException | None = None

    def run(self, failure: BaseException | None) -> None:
        """Run the function, or record `failure` if the thread could not be prepared; do nothing if cancelled."""
        if not self.cancel():
            return
        try:
            if failure is not None:
                raise failure
            self._function()
        except BaseException as error:
            self.error = error
        finally:
            self._running.release()

    def cancel(self) -> bool:
        """Return whether the task had not begun. If it had not, no other thread can begin it any more."""
        return self._begun.acquire(blocking=False)

    def wait(self) -> None:
        """Wait until the task has ended. The task must not have been cancelled."""
        with self._running:
            pass


class _Helpers:
    """Keep threads for later calls, because many a call is shorter than the start of a thread.

    The threads end with the process.
    """

    def __init__(self, count: int, initializer: Callable[[], object] | None) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._serve, args=(initializer,), name="convsv", daemon=True).start()

    def submit(self, function: Callable[[], object]) -> _Task:
        """Queue a function for the next free thread and return its task."""
        task = _Task(function)
        self._tasks.put(task)
        return task

    def _serve(self, initializer: Callable[[], object] | None) -> None:
        """Prepare the thread, and then run tasks for ever."""
        failure: BaseException | None = None
        try:
            if initializer is not None:
                initializer()
        except BaseException as error:
            failure = error
        while True:
            self._tasks.get().run(failure)


_helpers = functools.cache(_Helpers)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # A child process has no thread of its parent.
