"""Tables of the benchmarks on stdout."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.comparison import Row, Summary
from benchmarks.memory import Peak

if TYPE_CHECKING:  # modules that import this one
    from benchmarks import certify, clipping, norm, projection, scale, training, training_replay

MIB = 1 << 20
BUSY = 0.5  # load, before the run, for each usable processor
EXPLANATION = (
    "baseline: FFT of the zero-padded kernel, then the SVD without vectors at all frequencies, same library and "
    "dtype (float32). ratio: baseline / ours, medians of alternate runs. ~: extrapolated linearly from the SVDs of "
    "a uniform sample of the frequencies. error: largest difference of a singular value from a float64 SVD, in "
    "eps(float32) * sigma_max. peak: share of the speed of a large matrix product reached by the whole call, "
    "counting the operations of the decompositions alone. x: how often the network holds the convolution."
)

NORMS = (
    "time: summed, a layer as often as its network holds it; ratio: over that of norm_bounds, summed, median and least "
    "of the layers; error: of the norm, median of the moduli, then from the least to the largest. ~: extrapolated from "
    "a sample of frequencies. x: layers."
)
CERTIFICATES = (
    "upper above, lower below: least relative distance of a bound from the truth, which itself is rounded; median to "
    "max: evaluations of a block of the symbol."
)
STEPS = (
    "paper: FFT of the zero-padded kernel, SVD with vectors at all frequencies, minimum, back and cut; same library "
    "and dtype (float32). ratio: paper / ours, medians of alternate runs; in sums, a layer as often as its network "
    "holds it. above: share of the frequencies whose norm exceeds the bound. ~: extrapolated from a sample of the "
    "frequencies. error: largest difference of a tap from the paper's clip in float64, in eps(float32) * norm."
)
PROJECTIONS = (
    "ratio: time over that of dykstra, medians of alternate runs; plain Dykstra runs once. distance: over that of "
    "dykstra. norm: of the result over the bound, less 1. converged: whether the method's own aim was reached; plain "
    "Dykstra's is the gap of dykstra."
)
TRAINING = (
    "added: to the time of a plain step of the same turn, median and quartiles over the periods; own: what follows the "
    "optimizer, a step; moved: layers that a projection changed, on average; norm: the largest after the last step "
    "over the bound, certified for each layer's own padding and every input size; circular: that of the paper's "
    "operator at each layer's extents."
)
SHAPES = "the same weights once more; time: of one layer's projection, median over the steps."
RANKS = (
    "the same weights once more, without the training; alone: one process on one processor; shared: two, of which each "
    "projects its share and tells the other; ratio: median of the steps."
)

SCALE = (
    "medians of alternate runs, the table included; paired: median of the ratios of neighbours. processor: seconds of "
    "the workers, and of client and scheduler, which share the machine's processors with them. equal: the tables, bit "
    "for bit; killed: with one of two workers killed half-way."
)
BLOCKS = (
    "one block of frequencies of a 3x3 layer on one thread, as many as `analyze_many` gives one task; sent: its "
    "singular values."
)
SIMULATED = (
    "list scheduling of the measured times, with the engine's time a task and a file store of 1 GB/s. work: on one "
    "worker, without an engine. busy: share of the time, of the scheduler, the store and the average worker."
)


def show_machine(machine: dict[str, Any], peaks: dict[str, dict[str, Any]]) -> None:
    """Print what the figures were taken on."""
    pools = [f"{pool.get('internal_api')} {pool.get('num_threads')}" for pool in machine["thread_pools"]]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console = Console(soft_wrap=True)
    console.print(Text(f"{machine['processor']}, {machine['processors_usable']} processors usable, {machine['date']}"))
    console.print(Text(f"{versions}; threads: {', '.join(pools) or 'unknown'}"))
    before, _ = machine["load_average"]
    if before is not None and before > BUSY * machine["processors_usable"]:
        console.print(
            Text(f"The machine was busy (load {before:.1f}): libraries that thread small matrices suffer most."),
            style="yellow",
        )
    for library, peak in peaks.items():
        console.print(
            Text(f"{library}: {peak['flops'] / 1e9:.0f} GFLOP/s in a {peak['dtype']} product of side {peak['side']}")
        )


def show_rows(rows: Sequence[Row]) -> None:
    """Print one line for each convolution and library."""
    table = _table(
        "library", "network", "convolution", "x", "ours", "baseline", "ratio", "error", "peak", "compile", ""
    )
    for row in rows:
        compiled = row.ours_compile_seconds
        table.add_row(
            row.library,
            row.network,
            row.label,
            str(row.multiplicity or "-"),
            duration(row.ours_seconds),
            ("~" if row.extrapolated else "") + duration(row.baseline_seconds),
            ratio(row.ratio),
            f"{row.error_eps:.2f}",
            "-" if row.peak_share is None else f"{row.peak_share:.1%}",
            "-" if compiled is None else duration(compiled),
        )
    _print(table)
    Console(soft_wrap=True).print(Text(f"\n{EXPLANATION}"))


def show_summary(summaries: Sequence[Summary]) -> None:
    """Print one line for each group and library."""
    table = _table("library", "each distinct convolution once", "n", "ours", "baseline", "ratio", "least", "error", "")
    for one in summaries:
        table.add_row(
            one.library,
            one.group,
            str(one.count),
            duration(one.ours_seconds),
            ("~" if one.extrapolated else "") + duration(one.baseline_seconds),
            ratio(one.ratio),
            ratio(one.least_ratio),
            f"{one.worst_error_eps:.2f}",
            one.least if one.count > 1 else "",
        )
    _print(table)


def show_memory(peaks: Sequence[Peak]) -> None:
    """Print one line for each process."""
    table = _table("library", "convolution", "method", "imported", "peak", "of the call", "symbol", "time")
    for one in peaks:
        table.add_row(
            one.library,
            one.label,
            one.method,
            *(f"{size / MIB:,.0f} MiB" for size in (one.imported_bytes, one.peak_bytes)),
            f"{(one.peak_bytes - one.imported_bytes) / MIB:,.0f} MiB",
            f"{one.symbol_bytes / MIB:,.0f} MiB",
            duration(one.seconds),
        )
    _print(table)


def show_sweep(title: str, rows: Sequence[Row]) -> None:
    """Print the points of one plot."""
    table = _table("library", title, "ours", "baseline", "whole matrix", "ratio", "error")
    for row in rows:
        table.add_row(
            row.library,
            row.label,
            duration(row.ours_seconds),
            ("~" if row.extrapolated else "") + duration(row.baseline_seconds),
            "-" if row.dense_seconds is None else duration(row.dense_seconds),
            ratio(row.ratio),
            f"{row.error_eps:.2f}",
        )
    _print(table)


def show_norms(rows: Sequence[norm.NormRow]) -> None:
    """Print one line for each layer and method."""
    table = _table("library", "network", "convolution", "method", "time", "ratio", "error", "evaluations", "certified")
    for row in rows:
        table.add_row(
            row.library,
            row.network,
            row.label,
            row.method,
            ("~" if row.extrapolated else "") + duration(row.seconds),
            ratio(row.ratio),
            _signed(row.error),
            str(row.evaluations or ""),
            row.certified,
        )
    _print(table)


def show_norm_summary(summaries: Sequence[norm.NormSummary]) -> None:
    """Print one line for each group and method."""
    table = _table(
        "library", "group", "method", "x", "time", "ratio", "median", "least", "error", "from", "to", "evaluations",
        "certified",
    )  # fmt: skip
    for one in summaries:
        table.add_row(
            one.library,
            one.group,
            one.method,
            str(one.count),
            ("~" if one.extrapolated else "") + duration(one.seconds),
            *(ratio(value) for value in (one.ratio, one.median_ratio, one.least_ratio)),
            *(_signed(value) for value in (one.median_error, one.least_error, one.largest_error)),
            one.evaluations,
            one.certified,
        )
    _print(table)
    Console(soft_wrap=True).print(Text(f"\n{NORMS}"))


def show_steps(rows: Sequence[clipping.StepRow]) -> None:
    """Print one line for each layer and case of clip and of the check."""
    table = _table(
        "library", "network", "convolution", "x", "question", "case", "above", "ours", "paper", "ratio", "error"
    )
    for row in rows:
        table.add_row(
            row.library,
            row.network,
            row.label,
            str(row.multiplicity or "-"),
            row.question,
            row.case,
            f"{row.share:.1%}",
            duration(row.ours_seconds),
            ("~" if row.extrapolated else "") + duration(row.baseline_seconds),
            ratio(row.ratio),
            "-" if row.error_eps is None else f"{row.error_eps:.2f}",
        )
    _print(table)
    Console(soft_wrap=True).print(Text(f"\n{STEPS}"))


def show_step_summary(summaries: Sequence[clipping.StepSummary]) -> None:
    """Print one line for each group and case."""
    table = _table("library", "group", "question", "case", "x", "ours", "paper", "ratio", "least", "error", "")
    for one in summaries:
        table.add_row(
            one.library,
            one.group,
            one.question,
            one.case,
            str(one.count),
            duration(one.ours_seconds),
            ("~" if one.extrapolated else "") + duration(one.baseline_seconds),
            ratio(one.ratio),
            ratio(one.least_ratio),
            "-" if one.worst_error_eps is None else f"{one.worst_error_eps:.2f}",
            one.least,
        )
    _print(table)


def show_projections(rows: Sequence[projection.ProjectionRow]) -> None:
    """Print one line for each layer and method of project."""
    table = _table(
        "library", "network", "convolution", "method", "time", "ratio", "iterations", "distance", "norm", "converged"
    )
    for row in rows:
        table.add_row(
            row.library,
            row.network,
            row.label,
            row.method,
            duration(row.seconds),
            ratio(row.ratio),
            str(row.iterations),
            f"{row.distance_ratio:.5f}",
            _signed(row.norm_ratio - 1),
            {True: "yes", False: "no", None: ""}[row.converged],
        )
    _print(table)
    Console(soft_wrap=True).print(Text(f"\n{PROJECTIONS}"))


def show_training(rows: Sequence[training.TrainingRow]) -> None:
    """Print one line for each method at each bound."""
    table = _table(
        "case", "bound", "method", "steps", "step", "added", "from", "to", "own", "moved", "norm", "circular"
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.case,
            f"{row.bound:.3f}",
            row.method,
            str(row.steps),
            duration(row.seconds),
            *(f"{100 * share:+.1f} %" for share in (row.overhead, *row.quartiles)),
            "-" if row.moved is None else duration(row.own_seconds),
            "-" if row.moved is None else f"{row.moved:.1f}",
            f"{row.norm:.3f}",
            f"{row.circular_norm:.3f}",
        )
    _print(table)
    Console(soft_wrap=True).print(Text(f"\n{TRAINING}"))


def show_shapes(rows: Sequence[training_replay.ShapeRow]) -> None:
    """Print one line for the layers of each kernel shape."""
    table = _table("case", "convolution", "x", "moved", "time")
    for row in rows:
        table.add_row(row.case, row.label, str(row.count), f"{row.moved:.1f}", duration(row.seconds))
    _print(table)
    Console(soft_wrap=True).print(Text(f"\n{SHAPES}"))


def show_ranks(rows: Sequence[training_replay.RanksRow]) -> None:
    """Print one line for each bound."""
    table = _table("case", "alone", "shared", "ratio")
    for row in rows:
        table.add_row(row.case, duration(row.alone_seconds), duration(row.shared_seconds), ratio(row.ratio))
    _print(table)
    Console(soft_wrap=True).print(Text(f"\n{RANKS}"))


def show_certificates(summaries: Sequence[certify.Summary], seconds: float) -> None:
    """Print one line for each question and number of axes."""
    quantiles = list(summaries[0].evaluations)
    table = _table(
        "bounds on the", "layers", "violated", "converged", "worst gap", "upper above", "lower below", *quantiles
    )
    for one in summaries:
        table.add_row(
            f"{one.question}, {one.ndim}-D",
            f"{one.count:,}",
            str(one.violations),
            f"{one.converged:,}",
            *(f"{value:.2g}" for value in (one.worst_gap, one.upper_margin, one.lower_margin)),
            *(str(one.evaluations[name]) for name in quantiles),
        )
    _print(table)
    total, violated = (sum(getattr(one, name) for one in summaries) for name in ("count", "violations"))
    Console(soft_wrap=True).print(Text(f"\n{total:,} certificates, {violated} violated; {duration(seconds)}."))
    Console(soft_wrap=True).print(Text(CERTIFICATES))


def show_scale(
    speeds: Sequence[scale.Speed],
    blocks: Sequence[scale.BlockCost],
    overhead: scale.Overhead,
    simulated: Sequence[scale.Scaling],
) -> None:
    """Print the tables of many checkpoints."""
    table = _table(
        "extents", "models", "rows", "1 worker", "2 workers", "ratio", "paired", "processor", "", "equal", "killed"
    )
    for speed in speeds:
        table.add_row(
            speed.extents,
            str(speed.checkpoints),
            str(speed.rows),
            duration(statistics.median(speed.one_times)),
            duration(statistics.median(speed.two_times)),
            ratio(speed.ratio),
            ratio(speed.paired_ratio),
            ", ".join(map(duration, speed.workers_seconds)),
            "and " + ", ".join(map(duration, speed.client_seconds)),
            "yes" if speed.equal else "NO",
            "yes" if speed.equal_after_kill else "NO",
        )
    _explained(table, SCALE)
    table = _table("channels", "frequencies", "block", "a frequency", "sent")
    for block in blocks:
        table.add_row(
            str(block.channels),
            f"{block.frequencies:,}",
            duration(block.seconds),
            duration(block.per_frequency),
            f"{block.bytes_sent / MIB:.1f} MiB",
        )
    _explained(table, BLOCKS)
    Console(soft_wrap=True).print(
        Text(
            f"\nA task that does nothing: {duration(overhead.one_worker)} on one worker, "
            f"{duration(overhead.two_workers)} on two, of which {duration(overhead.service)} of a processor are the "
            f"client's and the scheduler's; 5 % of a task of {duration(overhead.least_task)}."
        )
    )
    table = _table("workload", "workers", "tasks", "work", "time", "speed-up", "scheduler busy", "store", "worker")
    for one in simulated:
        table.add_row(
            one.workload,
            f"{one.workers:,}",
            f"{one.tasks:,}",
            duration(one.work_seconds),
            duration(one.seconds),
            ratio(one.speedup),
            *(f"{share:.0%}" for share in (one.scheduler_share, one.store_share, one.worker_share)),
        )
    _explained(table, SIMULATED)


def _explained(table: Table, words: str) -> None:
    _print(table)
    Console(soft_wrap=True).print(Text(f"\n{words}"))


def duration(seconds: float) -> str:
    """Three digits and a unit.

    Examples
    --------
    >>> duration(0.01234), duration(12.345), duration(1234.5)
    ('12.3 ms', '12.3 s', '1,234 s')
    """
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def ratio(value: float) -> str:
    """Three digits and a cross.

    Examples
    --------
    >>> ratio(8.1234), ratio(12345.6)
    ('8.12x', '12,346x')
    """
    return f"{value:.3g}x" if value < 999.5 else f"{value:,.0f}x"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1e}"


def _table(*headings: str) -> Table:
    left = {
        "group",
        "extents",
        "workload",
        "question",
        "case",
        "certified",
        "library",
        "network",
        "convolution",
        "method",
        "each distinct convolution once",
        "",
    }
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in headings:
        words = heading in left or "," in heading
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    """Print as wide as the terminal, and in a pipe as wide as the table needs."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=max(80, Console(width=10_000).measure(table).maximum))
    console.print()
    console.print(table)
