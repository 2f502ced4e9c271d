"""Run the sections of each library in processes of their own, and end a section that does not keep its time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.accelerator_setup import Request

__all__ = ["Found", "SectionRow", "measure_library"]

GRACE_SECONDS, GRACE_SHARE = 10.0, 0.25
"""A section may take so much longer than its time before its process is ended: guesses.

It looks at the clock only between measurements, and the first one compiles.
"""

LEAST_SHARE = 0.1
"""Share of the time that is kept for a measurement under way at the end, up to `GRACE_SECONDS`: a guess."""

START_SECONDS = 120.0
"""Time in which a process must import its library and find the device: a guess; the first start may take long."""

MODULE = "benchmarks.accelerator_worker"


@dataclass(frozen=True)
class SectionRow:
    """Record how a section of a library went: an entry of ``sections`` in the JSON.

    Attributes
    ----------
    library, section : str
    status : str
        "complete"; "out of time" where `left_out` is not empty; "ended" where the process was ended or ended
        itself within the section; "not run".
    seconds, budget_seconds : float
    left_out : list of str
        What there was no time for.
    failures : list of str
        Measurements that raised an exception.
    reason : str
        Why the section was ended or not run.
    crashed : bool
        Whether the process ended by itself.
    """

    library: str
    section: str
    status: str
    seconds: float
    budget_seconds: float
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    reason: str = ""
    crashed: bool = False


@dataclass
class Found:
    """Hold what the processes of one library told.

    Attributes
    ----------
    library : str
    skipped : str
        Why nothing was measured, or "".
    facts : dict
        ``device``, ``model``, ``version`` and ``threads``; empty if no process came so far.
    peak : dict or None
        The speed of a matrix product: ``flops``, ``side`` and ``dtype``.
    sections : list of SectionRow
    rows : dict of str to list
        Rows by their key in the JSON.
    """

    library: str
    skipped: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    peak: dict[str, Any] | None = None
    sections: list[SectionRow] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def measure_library(
    request: Request, tell: Callable[[str], None], command: Sequence[str] = (sys.executable, "-m", MODULE)
) -> Found:
    """Run the sections of one library, and return what was found by the time that the request ends.

    A section that takes much more than its time is ended with its process, and another process runs the later ones.

    Parameters
    ----------
    request : Request
    tell : callable
        Is told what is being measured.
    command : sequence of str
        The process to run, without its argument.
    """
    found = Found(request.library)
    pending = dict(request.sections)
    while pending:
        left = request.until - time.time()
        if left <= 0:
            found.sections.extend(
                SectionRow(request.library, name, "not run", 0.0, 0.0, reason="no time was left") for name in pending
            )
            break
        before = len(pending)
        until = request.until - min(GRACE_SECONDS, LEAST_SHARE * left)
        _run(replace(request, sections=dict(pending), until=until), found, pending, request.until, tell, command)
        if found.skipped:
            break
        if len(pending) == before:
            found.sections.extend(
                SectionRow(request.library, name, "not run", 0.0, 0.0, reason="the process did not start")
                for name in pending
            )
            break
    return found


def _run(
    request: Request,
    found: Found,
    pending: dict[str, float],
    end: float,
    tell: Callable[[str], None],
    command: Sequence[str],
) -> None:
    """Run one process, to its end or to that of a section's time, and take what it has begun from `pending`."""
    section, began, budget, crashed = "", time.time(), 0.0, False
    limit = min(began + START_SECONDS, end)
    with _process([*command, json.dumps(asdict(request))], _environment(request)) as events:
        while True:
            try:
                event = events.get(timeout=max(0.0, limit - time.time()))
            except queue.Empty:
                reason = "the time was over, and the process was ended"
                break
            kind = event.pop("event")
            if kind == "exit":
                reason, crashed = f"the process ended with status {event['status']}", True
                break
            if kind == "skip":
                found.skipped = event["reason"]
            elif kind == "library":
                found.facts = event
            elif kind == "peak":
                del event["section"]
                found.peak = event
            elif kind == "row":
                found.rows.setdefault(event["kind"], []).append(event["row"])
            elif kind == "begin":
                section, budget, began = event["section"], event["seconds"], time.time()
                limit = min(began + budget + max(GRACE_SECONDS, GRACE_SHARE * budget), end)
                tell(f"{request.library}: {section}, {budget:.0f} s")
            elif kind == "end":
                status = "out of time" if event["left_out"] else "complete"
                found.sections.append(SectionRow(request.library, status=status, budget_seconds=budget, **event))
                del pending[section]
                section, limit = "", min(time.time() + START_SECONDS, end)
    if section:
        spent = time.time() - began
        row = SectionRow(request.library, section, "ended", spent, budget, reason=reason, crashed=crashed)
        found.sections.append(row)
        del pending[section]


def _environment(request: Request) -> Mapping[str, str]:
    """Return the environment of a process: JAX must not take an accelerator where the processor is asked for."""
    if request.device is not None and request.device.partition(":")[0] == "cpu":
        return {"JAX_PLATFORMS": "cpu"} | dict(os.environ)
    return os.environ


class _process:
    """Start a process on entry and end it on exit; between, a queue has its events, the last of which is "exit"."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> queue.Queue[dict[str, Any]]:
        self._reader.start()
        return self._events

    def __exit__(self, *exception: object) -> None:
        self._running.kill()
        self._reader.join(GRACE_SECONDS)  # a process of its own that still writes must not hold up the others

    def _read(self) -> None:
        assert self._running.stdout is not None
        with self._running.stdout as lines:
            for event in _parsed(lines):
                self._events.put(event)
        self._events.put({"event": "exit", "status": self._running.wait()})


def _parsed(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines that are whole: a process that is ended may leave a part of one."""
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
