"""``python -m benchmarks spectrum``: time every singular value, ours beside the two lines of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import click

from benchmarks import memory as peak_memory
from benchmarks import singular_values, sweeps
from benchmarks.command import Options, Size, comparison_options, progress, write_json
from benchmarks.comparison import Effort
from benchmarks.libraries import Library
from benchmarks.machine import computing_dtype, describe, load_average, product_peak, show_machine
from benchmarks.memory import MemoryCase, Peak
from benchmarks.shapes import NETWORKS, QUICK, Shape, select
from benchmarks.singular_values import SpectrumRow
from benchmarks.sweeps import Sweep, SweepRows, make_sweeps
from benchmarks.tables import show_table

__all__ = ["AMOUNTS", "Amount", "Results", "spectrum"]

SCHEMA = 1
"""Version of the JSON."""


@dataclass(frozen=True)
class Amount:
    """Say what is measured, and how thoroughly.

    Attributes
    ----------
    effort : Effort
    shapes : sequence of Shape
    product_side : int
        Side of the matrices whose product tells the speed of the machine.
    memory : sequence of MemoryCase
    sweeps : tuple of Sweep
    """

    effort: Effort
    shapes: Sequence[Shape]
    product_side: int
    memory: Sequence[MemoryCase]
    sweeps: tuple[Sweep, Sweep]


AMOUNTS = {
    Size.FULL: Amount(
        Effort(),
        NETWORKS,
        2048,
        peak_memory.CASES,
        make_sweeps((4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256), dense_side=4096),
    ),
    Size.QUICK: Amount(
        Effort(repeats=3, full_seconds=0.5, sample_seconds=0.2, reference_seconds=0.3),
        QUICK,
        512,
        peak_memory.QUICK_CASES,
        make_sweeps((4, 8, 16), (1, 4, 16), dense_side=512),
    ),
    Size.TINY: Amount(
        Effort(repeats=2, full_seconds=0.02, sample_seconds=0.005, reference_seconds=0.02),
        QUICK,
        64,
        peak_memory.QUICK_CASES,
        make_sweeps((2, 8), (1, 2), dense_side=256),
    ),
}


@dataclass
class Results:
    """Hold what one run measures.

    Attributes
    ----------
    peaks : dict
        For each library the speed of a matrix product: ``dtype``, ``side`` and ``flops`` a second.
    rows : list of SpectrumRow
    memory : list of Peak
    sweeps : list of SweepRows
    failures : list of str
        The convolutions that could not be measured, and the reasons.
    """

    peaks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[SpectrumRow] = field(default_factory=list)
    memory: list[Peak] = field(default_factory=list)
    sweeps: list[SweepRows] = field(default_factory=list)
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
def spectrum(options: Options, full_seconds: float | None, baseline_threads: int | None, memory: bool) -> None:
    """Time singular_values against the FFT and SVDs of the paper.

    Both run alternately in one process, in float32, compiled before where the library compiles. Prints the time,
    ratio and error of every distinct convolution of several networks, the sums of groups of them,
    and the peak memory of some calls, each in a process of its own.
    """
    amount = AMOUNTS[options.size]
    effort = replace(options.effort(amount.effort), baseline_threads=baseline_threads)
    if full_seconds is not None:
        effort = replace(effort, full_seconds=full_seconds)
    amount = replace(amount, effort=effort, memory=amount.memory if memory else ())
    load_before = load_average()
    libraries = options.open_libraries()
    results = Results()
    for library in libraries:
        _measure(results, library, amount, only=options.only, plot=options.plot is not None)
    if not (results.rows or results.memory or results.sweeps or results.failures):
        raise click.BadParameter(f"{options.only!r} is in the name of no shape", param_hint="--only")
    machine = describe(libraries, load_before)
    summaries = singular_values.summarise(results.rows)
    show_machine(machine, results.peaks)
    if results.rows:
        show_table(results.rows, singular_values.ROW_COLUMNS, singular_values.EXPLANATION)
        show_table(summaries, singular_values.SUM_COLUMNS)
    if results.memory:
        show_table(results.memory, peak_memory.COLUMNS)
    for one in results.sweeps:
        show_table(one.rows, sweeps.columns(one.sweep))
    if options.plot is not None:
        sweeps.draw(options.plot, results.sweeps)
    write_json(
        options.json_path,
        "spectrum",
        options.arguments() | asdict(effort),
        schema=SCHEMA,
        machine=machine,
        matrix_product=results.peaks,
        rows=results.rows,
        summary=summaries,
        memory=results.memory,
        sweeps=[{"name": one.sweep.name, "title": one.sweep.title, "rows": one.rows} for one in results.sweeps],
        failures=results.failures,
    )
    if results.failures:
        raise click.ClickException("\n".join(results.failures))


def _measure(results: Results, library: Library, amount: Amount, *, only: str | None, plot: bool) -> None:
    """Add the figures of one library; a failure is noted, and the other figures are still taken."""
    dtype = computing_dtype(library)
    peak = product_peak(library, dtype, amount.product_side)
    results.peaks[library.name] = {"dtype": dtype, "side": amount.product_side, "flops": peak}
    shapes = select(amount.shapes, only)
    with progress() as tell:
        for number, shape in enumerate(shapes, start=1):
            tell(f"{library.name} {number}/{len(shapes)} {shape.name}")
            try:
                results.rows.append(singular_values.measure(library, shape, amount.effort, dtype=dtype, peak=peak))
            except Exception as error:  # hours of other figures are not lost to one shape
                results.failures.append(f"{library.name} {shape.name}: {type(error).__name__}: {error}")
        for shape, methods in amount.memory:
            for method in methods if select([shape], only) else ():
                tell(f"{library.name} peak memory of {method}, {shape.name}")
                try:
                    results.memory.append(peak_memory.measure_peak(library, shape, method))
                except click.ClickException as error:
                    results.failures.append(error.message)
        for sweep in amount.sweeps if plot else ():
            rows: list[SpectrumRow] = []
            results.sweeps.append(SweepRows(sweep, rows))
            for shape in sweep.shapes:
                tell(f"{library.name} {shape.name}")
                dense = sweep.has_dense(shape)
                rows.append(singular_values.measure(library, shape, amount.effort, dtype=dtype, peak=peak, dense=dense))
