"""Peak memory of one call, taken in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

import convsv_core as convsv
from benchmarks.baselines import TwoLines
from benchmarks.libraries import Library, open_library
from benchmarks.shapes import QUICK, RESNET_50, SYMBOL_TOO_LARGE, VGG_16, Shape, square
from benchmarks.timing import Task, time_once
from convsv_core.backend import Array

OURS, TWO_LINES = "ours", "two lines"
CASES: list[tuple[Shape, tuple[str, ...]]] = [
    (RESNET_50[2], (OURS, TWO_LINES)),
    (RESNET_50[10], (OURS, TWO_LINES)),
    (VGG_16[1], (OURS, TWO_LINES)),
    (SYMBOL_TOO_LARGE, (OURS,)),
]
QUICK_CASES: list[tuple[Shape, tuple[str, ...]]] = [(QUICK[1], (OURS, TWO_LINES))]


@dataclass(frozen=True)
class Peak:
    """Peak resident memory of one call: an entry of ``memory`` in the JSON.

    Attributes
    ----------
    imported_bytes : int
        Peak of the process before the call: the libraries, and a small call that loads what is loaded late.
    peak_bytes : int
        Peak of the process after it.
    symbol_bytes : int
        What the whole symbol takes in complex64.
    seconds : float
        Of the call, compiled before.
    """

    library: str
    method: str
    label: str
    imported_bytes: int
    peak_bytes: int
    symbol_bytes: int
    seconds: float


def measure_peak(library: Library, shape: Shape, method: str) -> Peak:
    """Run `method` on `shape` in a process of its own; `click.ClickException` with its message where that fails."""
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
    """Measure the peak memory of one call in this process, as JSON: what `spectrum` starts."""
    library = open_library(backend, device)
    shape = find(name, [case for case, _ in CASES + QUICK_CASES])
    _prepare(library, square("warm", 3, 4, 4, 8), method)()
    task = _prepare(library, shape, method)
    imported = peak_resident_bytes()
    seconds = time_once(task)
    symbol_bytes = 8 * shape.inputs * shape.outputs // shape.groups
    for extent in shape.extents:
        symbol_bytes *= extent
    peak = Peak(backend, method, shape.label, imported, peak_resident_bytes(), symbol_bytes, seconds)
    click.echo(json.dumps(vars(peak)))


def find(name: str, shapes: Sequence[Shape]) -> Shape:
    """Return the shape called `name`."""
    for shape in shapes:
        if shape.name == name:
            return shape
    raise click.BadParameter(f"{name!r}: no such shape")


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far.

    From Linux's own count for the program where there is one: `resource.getrusage` also counts what the
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
    if method == TWO_LINES:
        lines = TwoLines(library, shape, 0.0, 0.0)
        kernel = library.asarray(lines.kernel)
        run, _ = library.compile(lines, kernel)
    else:
        kernel = library.asarray(shape.kernel())

        def spectrum(array: Array) -> Array:
            return convsv.singular_values(array, shape.extents, shape.conv)

        run, _ = library.compile(spectrum, kernel)

    def task() -> None:
        library.wait(run(kernel))

    return task
