"""Measure the peak memory of one call, in a process of its own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click

import convsv_core as convsv
from benchmarks.baselines import TwoLines
from benchmarks.libraries import Library, open_library
from benchmarks.shapes import QUICK, RESNET_50, SYMBOL_TOO_LARGE, VGG_16, Shape, square
from benchmarks.tables import MIB, Column, duration, figures, words
from benchmarks.timing import Task, time_once
from convsv_core.backend import Array

__all__ = [
    "CASES",
    "COLUMNS",
    "QUICK_CASES",
    "MemoryCase",
    "Peak",
    "find",
    "measure_peak",
    "peak_memory",
    "peak_resident_bytes",
]

OURS, TWO_LINES = "ours", "two lines"


class MemoryCase(NamedTuple):
    """Name a convolution and the methods whose peak memory is measured on it."""

    shape: Shape
    methods: tuple[str, ...] = (OURS, TWO_LINES)


CASES = [
    MemoryCase(RESNET_50[2]),
    MemoryCase(RESNET_50[10]),
    MemoryCase(VGG_16[1]),
    MemoryCase(SYMBOL_TOO_LARGE, (OURS,)),
]
QUICK_CASES = [MemoryCase(QUICK[1])]


def _mebibytes(heading: str, read: Callable[[Any], int]) -> Column:
    return figures(heading, lambda row: f"{read(row) / MIB:,.0f} MiB")


COLUMNS = (
    words("library"),
    words("convolution", lambda row: row.label),
    words("method"),
    _mebibytes("imported", lambda row: row.imported_bytes),
    _mebibytes("peak", lambda row: row.peak_bytes),
    _mebibytes("of the call", lambda row: row.peak_bytes - row.imported_bytes),
    _mebibytes("symbol", lambda row: row.symbol_bytes),
    figures("time", lambda row: duration(row.seconds)),
)


@dataclass(frozen=True)
class Peak:
    """Record the peak resident memory of one call: an entry of ``memory`` in the JSON.

    Attributes
    ----------
    imported_bytes : int
        Peak of the process before the call, when a small call has loaded all libraries.
    peak_bytes : int
        Peak of the process after it.
    symbol_bytes : int
        Memory of the whole symbol in complex64.
    seconds : float
        Time of the call, which was compiled before.
    """

    library: str
    method: str
    label: str
    imported_bytes: int
    peak_bytes: int
    symbol_bytes: int
    seconds: float


def measure_peak(library: Library, shape: Shape, method: str) -> Peak:
    """Run `method` on `shape` in a process of its own.

    Raises
    ------
    click.ClickException
        The process failed; the message ends with the last line on its stderr.
    """
    command = [sys.executable, "-m", "benchmarks", peak_memory.name or "", "--backend", library.name]
    command += ["--method", method, "--shape", shape.name]
    if library.device is not None:
        command += ["--device", library.device]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise click.ClickException(f"peak memory of {method} on {shape.name} with {library.name}: {reason}")
    return Peak(**json.loads(done.stdout))


@click.command("peak-memory", hidden=True)
@click.option("--backend", required=True)
@click.option("--device")
@click.option("--method", type=click.Choice([OURS, TWO_LINES]), required=True)
@click.option("--shape", "name", required=True)
def peak_memory(backend: str, device: str | None, method: str, name: str) -> None:
    """Print the peak memory of one call in this process, as JSON; `spectrum` runs this command in a new process."""
    library = open_library(backend, device)
    shape = find(name, [case.shape for case in CASES + QUICK_CASES])
    _prepare(library, square("warm", 3, 4, 4, 8), method)()
    task = _prepare(library, shape, method)
    imported = peak_resident_bytes()
    seconds = time_once(task)
    symbol_bytes = 8 * shape.inputs * shape.outputs // shape.groups * math.prod(shape.extents)
    peak = Peak(backend, method, shape.label, imported, peak_resident_bytes(), symbol_bytes, seconds)
    click.echo(json.dumps(vars(peak)))


def find(name: str, shapes: Sequence[Shape]) -> Shape:
    """Return the shape called `name`."""
    for shape in shapes:
        if shape.name == name:
            return shape
    raise click.BadParameter(f"{name!r}: no such shape")


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process so far.

    On Linux the number is that of ``/proc/self/status``, since `resource.getrusage` also counts the memory that the
    parent held at the moment of the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for row in status.read_text().splitlines():
            name, _, value = row.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _prepare(library: Library, shape: Shape, method: str) -> Task:
    """Return the call, compiled."""
    if method == TWO_LINES:
        lines = TwoLines(library, shape, 0.0, 0.0)
        kernel = library.asarray(lines.kernel)
        run = library.compile(lines, kernel).run
    else:
        kernel = library.asarray(shape.kernel())

        def spectrum(array: Array) -> Array:
            return convsv.singular_values(array, shape.extents, shape.conv)

        run = library.compile(spectrum, kernel).run

    def task() -> None:
        library.wait(run(kernel))

    return task
