"""Time the first call of `norm_bounds`, which may import, plan and compile, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import click

import convsv_core as convsv
from benchmarks.libraries import Library, open_library
from benchmarks.shapes import square
from benchmarks.timing import Clock, time_once

__all__ = ["FirstCall", "Layer", "measure_first_calls"]

MODULE = "benchmarks.norm_first_call"

METHODS = {"norm_bounds": True, "norm_bounds, every size": False}
"""Whether `norm_bounds` is given the extents of the input, by the name of the method."""


class Layer(NamedTuple):
    """Say which square layer of 3 x 3 taps is measured."""

    channels: int
    extent: int


@dataclass(frozen=True)
class FirstCall:
    """Record the first call of a process, and the one after it: an entry of ``first_calls`` in the JSON.

    Attributes
    ----------
    library, method : str
    channels, extent : int
    first_seconds, later_seconds : float
    numpy_seconds : float or None
        The first call with NumPy; None where NumPy was not measured.
    """

    library: str
    method: str
    channels: int
    extent: int
    first_seconds: float
    later_seconds: float
    numpy_seconds: float | None = None


def measure_first_calls(
    libraries: Sequence[Library], layer: Layer, *, processor_time: bool, tell: Callable[[str], None]
) -> list[FirstCall]:
    """Return a row for each library and method.

    Raises
    ------
    click.ClickException
        A process failed; its own message is on stderr.
    """
    rows = []
    for library in libraries:
        for method in METHODS:
            tell(f"{library.name}: first call of {method}")
            rows.append(_in_new_process(library, method, layer, processor_time))
    numpy = {row.method: row.first_seconds for row in rows if row.library == "numpy"}
    return [replace(row, numpy_seconds=numpy.get(row.method)) for row in rows]


def _in_new_process(library: Library, method: str, layer: Layer, processor_time: bool) -> FirstCall:
    arguments = {"library": library.name, "device": library.device, "method": method, "layer": layer}
    done = subprocess.run(
        [sys.executable, "-m", MODULE, json.dumps(arguments | {"processor_time": processor_time})],
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"first call of {method} with {library.name}: the process failed, as told above")
    return FirstCall(library.name, method, *layer, *json.loads(done.stdout))


def _measure(library: Library, method: str, layer: Layer, clock: Clock) -> list[float]:
    """Return the seconds of the first call in this process, and of the second one."""
    shape = square("first call", 3, layer.channels, layer.channels, layer.extent)
    kernel = library.asarray(shape.kernel())
    library.wait(kernel)
    extents = shape.extents if METHODS[method] else None

    def task() -> None:
        library.wait(convsv.norm_bounds(kernel, shape.conv, input_shape=extents).upper)

    return [time_once(task, clock), time_once(task, clock)]


def _main(library: str, device: str | None, method: str, layer: Sequence[int], processor_time: bool) -> None:
    clock = time.process_time if processor_time else time.perf_counter
    print(json.dumps(_measure(open_library(library, device), method, Layer(*layer), clock)))


if __name__ == "__main__":
    _main(**json.loads(sys.argv[1]))
