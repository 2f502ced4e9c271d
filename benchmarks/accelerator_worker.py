"""Run the sections of one library in a process of its own, and write each result as a line of JSON.

The parent is `benchmarks.accelerator_processes`. A process of its own gives each library the whole memory of the
device, and a compilation that takes too long can be ended.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeAlias

from benchmarks.accelerator_layers import measure_derivatives, measure_layers, measure_peak
from benchmarks.accelerator_setup import (
    AMOUNTS,
    CONFORMANCE,
    LAYERS,
    TRAINING,
    Amount,
    Clock,
    Request,
)
from benchmarks.command import Size
from benchmarks.libraries import Library, open_library
from benchmarks.machine import computing_dtype
from convsv_core.backend import Backend
from convsv_core.plugins import get_backend

__all__ = ["find_device", "main"]

Tell: TypeAlias = Callable[..., None]

HOST = "cpu"
ALIASES = {"gpu": "cuda", "rocm": "cuda"}
"""Platforms that JAX and the other libraries call by different names."""


def find_device(backend: Backend, wanted: str | None) -> str | None:
    """Return the name of a device as the backend has it, or None where it has no such device.

    Parameters
    ----------
    backend : Backend
    wanted : str or None
        A platform, as "cpu", or a platform and a number, as "cuda:1"; "cuda" and JAX's "gpu" are the same. None for
        the first device that is not the processor.
    """
    for name in backend.devices():
        platform, _, index = name.partition(":")
        if wanted is None:
            if platform != HOST:
                return name
            continue
        asked, _, number = wanted.partition(":")
        if ALIASES.get(platform, platform) == ALIASES.get(asked, asked) and (index or "0") == (number or "0"):
            return name
    return None


def main(request: Request, tell: Tell) -> None:
    """Run the sections that are asked for, and tell what is found."""
    backend = get_backend(request.library)
    reason = backend.unavailable()
    if reason:
        tell("skip", reason=reason)
        return
    device = find_device(backend, request.device)
    if device is None:
        wanted = request.device or "an accelerator"
        tell("skip", reason=f"wanted {wanted}; {request.library} has {', '.join(backend.devices())} here")
        return
    library = open_library(request.library, device)
    tell("library", device=device, model=library.accelerator(), version=library.version(), threads=library.threads())
    amount, weights = AMOUNTS[Size(request.size)], dict(request.sections)
    for section in request.sections:
        left = max(0.0, request.until - time.time())
        section_clock = Clock(left * weights[section] / sum(weights.values()))
        del weights[section]
        tell("begin", section=section, seconds=section_clock.seconds)
        try:
            for kind, row in _rows(section, library, amount, section_clock, tell):
                tell("row", section=section, kind=kind, row=row)
        except Exception as error:  # the other sections go on, whatever a library raises on a device
            section_clock.fail(section, error)
        tell(
            "end",
            section=section,
            seconds=section_clock.spent(),
            left_out=section_clock.left_out,
            failures=section_clock.failures,
        )


def _rows(section: str, library: Library, amount: Amount, clock: Clock, tell: Tell) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a section, each with the key of the JSON that it belongs to."""
    if section == CONFORMANCE:
        yield from _conformance(library, amount, clock)
    elif section == TRAINING:
        from benchmarks.accelerator_training import measure_training  # it imports PyTorch

        for step in measure_training(library, amount, clock):
            yield "steps", asdict(step)
    elif section == LAYERS:
        peak = measure_peak(library, computing_dtype(library), amount.product_seconds)
        tell("peak", section=section, **peak._asdict())
        for method in measure_layers(library, amount, clock, peak):
            yield "methods", asdict(method)
    else:
        for method in measure_derivatives(library, amount, clock):
            yield "methods", asdict(method)


def _conformance(library: Library, amount: Amount, clock: Clock) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the suite skips, and the cell of each check that is run, with the number of all checks as ``of``."""
    from convsv_conformance.failures import KnownFailures
    from convsv_conformance.running import by_feature_in_turns, run
    from convsv_conformance.suite import Item, Skip, select

    assert library.device is not None  # `find_device` has named it
    items = list(select([library.name], [library.device], depth="quick").items())
    for skip in items:
        if isinstance(skip, Skip):
            yield "conformance_skips", {"library": library.name, "name": skip.name, "reason": skip.reason}
    checks = list(by_feature_in_turns(item for item in items if isinstance(item, Item)))
    known = {library.name: KnownFailures.of(library.name)}
    left = dict.fromkeys(check.feature.name for check in checks)
    for check in checks[: amount.checks]:
        if clock.left() <= 0:
            clock.left_out.extend(left)
            return
        (cell,) = run([check], known).cells
        left.pop(check.feature.name, None)
        yield CONFORMANCE, asdict(cell) | {"of": len(checks)}


if __name__ == "__main__":
    answers = sys.stdout

    def write(event: str, **content: Any) -> None:
        """Write one event as a line of JSON."""
        print(json.dumps({"event": event} | content), file=answers, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not stand between the answers
        main(Request(**json.loads(sys.argv[1])), write)
