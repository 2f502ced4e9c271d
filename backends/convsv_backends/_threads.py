"""Blocks of frequencies over threads, while the library's own threading is held to one thread a call.

The decompositions of small matrices that this project asks for gain nothing from the threads inside LAPACK, and
on some sizes lose most of their time to them; one matrix a thread gains nearly all that there is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from convsv_core.backend import Array, BlockFunction, split_rows

SMALL_BYTES = 1 << 22
"""Work of fewer bytes than this is done by the caller's thread: starting others would cost more."""

BLOCKS_PER_THREAD = 4
"""Enough for the threads to end at about one time; fewer where blocks would be of less than `SMALL_BYTES`."""


class SharedLimit:
    """A limit that is one for the whole process, held while any thread needs it.

    The first thread in sets the limit and the last one out restores it, whichever threads they are: with a
    context of its own for each, the limit would outlive the calls or end too early.

    Parameters
    ----------
    limit : callable
        Sets the limit. Returns how many threads the user's own limit left, and a function that restores it.
    """

    def __init__(self, limit: Callable[[], tuple[int, Callable[[], object]]]) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._holders = 0
        self._threads = 1
        self._restore: Callable[[], object] = lambda: None
        self._alone = threading.local()

    def __enter__(self) -> int:
        with self._lock:
            if self._holders == 0:
                threads, self._restore = self._limit()
                self._threads = max(1, min(threads, usable_processors()))
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
        """Hold the limit, and leave the thread that does so no others: those around it have their own work."""
        before = getattr(self._alone, "is_set", False)
        with self:
            self._alone.is_set = True
            try:
                yield
            finally:
                self._alone.is_set = before


def usable_processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worth_threads(rows: Any, row_bytes: int, least: int = SMALL_BYTES) -> bool:
    """Whether there is enough work, in bytes, for more than one thread."""
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
    """Results of `function` on consecutive blocks of `rows`, in order; the threads share `budget` bytes.

    The caller's thread is one of them, unless each has to be prepared by an `initializer`.
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
        places = iter(())  # the helpers end with the blocks that they are at
        raise
    finally:
        # A helper that has not begun finds nothing left to do; it may be waiting for another caller's work.
        begun = [task for task in tasks if initializer or not task.cancel()]
        for task in begun:
            task.wait()
    for task in begun:
        if task.error is not None:
            raise task.error
    return results


class _Task:
    """A function that a helper runs, unless it is cancelled before.

    By locks of the interpreter's own: a `concurrent.futures.Future` is left locked for ever, and its thread with it, by
    a keyboard interrupt at the wrong moment.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._begun, self._running = threading.Lock(), threading.Lock()
        self._running.acquire()
        self.error: BaseException | None = None

    def run(self, failure: BaseException | None) -> None:
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
        """Whether it has not begun, and now never will by anybody else."""
        return self._begun.acquire(blocking=False)

    def wait(self) -> None:
        """Until it has ended; it must have begun, or be going to."""
        with self._running:
            pass


class _Helpers:
    """Threads that are kept, since starting them takes longer than many a call; they end with the process."""

    def __init__(self, count: int, initializer: Callable[[], object] | None) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._serve, args=(initializer,), name="convsv", daemon=True).start()

    def submit(self, function: Callable[[], object]) -> _Task:
        task = _Task(function)
        self._tasks.put(task)
        return task

    def _serve(self, initializer: Callable[[], object] | None) -> None:
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
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child has none of its parent's threads
