"""``python -m benchmarks spectrum``: every singular value, ours beside the two lines of the paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from benchmarks import sweeps, tables
from benchmarks.command import comparison_options, progress
from benchmarks.libraries import Library, open_library
from benchmarks.machine import computing_dtype, describe, load_average, product_peak
from benchmarks.memory import CASES, QUICK_CASES, Peak, measure_peak
from benchmarks.shapes import NETWORKS, QUICK, select
from benchmarks.singular_values import Effort, Row, compare, summarise
from benchmarks.sweeps import Sweep, make_sweeps

SCHEMA = 1
QUICK_EFFORT = Effort(repeats=3, full_seconds=0.5, sample_seconds=0.2, reference_seconds=0.3)
PRODUCT_SIDE, QUICK_PRODUCT_SIDE = 2048, 512


@dataclass
class Results:
    """What one run measures.

    Attributes
    ----------
    peaks : dict
        For each library the speed of a matrix product: ``dtype``, ``side`` and ``flops`` a second.
    rows : list of Row
    memory : list of Peak
    sweeps : list of (Sweep, list of Row)
    failures : list of str
        What could not be measured, and why.
    """

    peaks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    memory: list[Peak] = field(default_factory=list)
    sweeps: list[tuple[Sweep, list[Row]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@click.command()
@comparison_options(plot="Measure and draw time over extent and channels")
@click.option(
    "--full-seconds",
    type=click.FloatRange(min=0),
    help="Extrapolate baselines that would take longer than this. [default: 10; quick: 0.5]",
)
@click.option(
    "--baseline-threads",
    type=click.IntRange(min=1),
    help="Threads of BLAS and OpenMP for the baseline alone. [default: the libraries' own]",
)
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory, in other processes.")
def spectrum(
    quick: bool,
    backends: Sequence[str],
    device: str | None,
    only: str | None,
    repeats: int | None,
    json_path: Path | None,
    plot: Path | None,
    full_seconds: float | None,
    baseline_threads: int | None,
    memory: bool,
) -> None:
    """Time singular_values against the FFT and SVDs of the paper.

    Both run alternately in one process, in float32, compiled before where the library compiles. Prints the time,
    ratio and error of every distinct convolution of several networks, the sums of groups of them,
    and the peak memory of some calls, each in a process of its own.
    """
    default = QUICK_EFFORT if quick else Effort()
    effort = replace(
        default,
        repeats=repeats or default.repeats,
        full_seconds=default.full_seconds if full_seconds is None else full_seconds,
        baseline_threads=baseline_threads,
    )
    load_before = load_average()
    libraries = [open_library(name, device) for name in dict.fromkeys(backends)]
    results = Results()
    for library in libraries:
        _measure(results, library, effort, quick=quick, only=only, memory=memory, plot=plot is not None)
    if not (results.rows or results.memory or results.sweeps or results.failures):
        raise click.BadParameter(f"{only!r} is in the name of no shape", param_hint="--only")
    machine = describe(libraries) | {"load_average": [load_before, load_average()]}
    summaries = summarise(results.rows)
    tables.show_machine(machine, results.peaks)
    if results.rows:
        tables.show_rows(results.rows)
        tables.show_summary(summaries)
    if results.memory:
        tables.show_memory(results.memory)
    for sweep, rows in results.sweeps:
        tables.show_sweep(sweep.title, rows)
    if plot is not None:
        sweeps.draw(plot, results.sweeps)
    if json_path is not None:
        content = {
            "schema": SCHEMA,
            "benchmark": "spectrum",
            "arguments": {"quick": quick, "only": only, "device": device} | asdict(effort),
            "machine": machine,
            "matrix_product": results.peaks,
            "rows": [asdict(row) for row in results.rows],
            "summary": [asdict(summary) for summary in summaries],
            "memory": [asdict(peak) for peak in results.memory],
            "sweeps": [
                {"name": sweep.name, "title": sweep.title, "rows": [asdict(row) for row in rows]}
                for sweep, rows in results.sweeps
            ],
            "failures": results.failures,
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    if results.failures:
        raise click.ClickException("\n".join(results.failures))


def _measure(
    results: Results, library: Library, effort: Effort, *, quick: bool, only: str | None, memory: bool, plot: bool
) -> None:
    """Add one library's figures; what fails is noted, and the rest goes on."""
    dtype, side = computing_dtype(library), QUICK_PRODUCT_SIDE if quick else PRODUCT_SIDE
    peak = product_peak(library, dtype, side)
    results.peaks[library.name] = {"dtype": dtype, "side": side, "flops": peak}
    shapes = select(QUICK if quick else NETWORKS, only)
    with progress() as tell:
        for number, shape in enumerate(shapes, start=1):
            tell(f"{library.name} {number}/{len(shapes)} {shape.name}")
            try:
                results.rows.append(compare(library, shape, effort, dtype=dtype, peak=peak))
            except Exception as error:  # hours of other figures are not lost to one shape
                results.failures.append(f"{library.name} {shape.name}: {type(error).__name__}: {error}")
        for shape, methods in (QUICK_CASES if quick else CASES) if memory else []:
            for method in methods if select([shape], only) else ():
                tell(f"{library.name} peak memory of {method}, {shape.name}")
                try:
                    results.memory.append(measure_peak(library, shape, method))
                except click.ClickException as error:
                    results.failures.append(error.message)
        for sweep in make_sweeps(quick=quick) if plot else ():
            rows: list[Row] = []
            results.sweeps.append((sweep, rows))
            for shape in sweep.shapes:
                tell(f"{library.name} {shape.name}")
                dense = sweeps.dense_is_possible(shape, quick=quick)
                rows.append(compare(library, shape, effort, dtype=dtype, peak=peak, dense=dense))
