"""``python -m benchmarks norm``: compare the certified norm with other ways to it, in time and true error."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.command import (
    Options,
    comparison_options,
    each_layer,
    networks_option,
    progress,
    select_groups,
    write_json,
)
from benchmarks.comparison import group_by
from benchmarks.layers import find_layers
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.norm_methods import AMOUNTS, OURS, PAPER, RTOL, NormRow, measure
from benchmarks.tables import LAYER, duration, figures, integers, or_dash, ratio, show_table, signed, words

__all__ = ["NormSummary", "draw", "norm", "summarise"]

LEAST_ERROR = 1e-9
"""Least error that is drawn: a guess, below the rounding errors of float32."""

EXPLANATION = (
    "time: summed, a layer as often as its network holds it; ratio: over that of norm_bounds, summed, median and least "
    "of the layers; error: of the norm, median of the moduli, then from the least to the largest. ~: extrapolated from "
    "a sample of frequencies. x: layers."
)
TIME = (
    figures("time", lambda row: duration(row.seconds, extrapolated=row.extrapolated)),
    figures("ratio", lambda row: ratio(row.ratio)),
)
ROW_COLUMNS = (
    *LAYER,
    words("method"),
    *TIME,
    figures("error", lambda row: or_dash(signed, row.error)),
    figures("evaluations", lambda row: str(row.evaluations or "")),
    words("certified"),
)
SUM_COLUMNS = (
    words("library"),
    words("group"),
    words("method"),
    integers("x", "count"),
    *TIME,
    figures("median", lambda one: ratio(one.median_ratio)),
    figures("least", lambda one: ratio(one.least_ratio)),
    figures("error", lambda one: or_dash(signed, one.median_error)),
    figures("from", lambda one: or_dash(signed, one.least_error)),
    figures("to", lambda one: or_dash(signed, one.largest_error)),
    figures("evaluations", lambda one: one.evaluations),
    words("certified"),
)


@dataclass(frozen=True)
class NormSummary:
    """Sum up a method on a group of layers: an entry of ``summary`` in the JSON.

    Attributes
    ----------
    count : int
        Layers, each as often as its network holds it.
    seconds : float
        Time summed over these.
    ratio, median_ratio, least_ratio : float
        Ratio of the summed times to those of `norm_bounds`; median and least ratio of one layer.
    median_error : float or None
        Median of the absolute errors.
    least_error, largest_error : float or None
        Signed.
    evaluations : str
        Median and largest number.
    """

    library: str
    group: str
    method: str
    certified: str
    count: int
    seconds: float
    extrapolated: int
    ratio: float
    median_ratio: float
    least_ratio: float
    median_error: float | None
    least_error: float | None
    largest_error: float | None
    evaluations: str


@click.command()
@comparison_options(plot="Draw time against error")
@networks_option
def norm(options: Options, networks: Sequence[Path]) -> None:
    """Time norm_bounds against other ways to the norm, and tell how wrong each is.

    The layers are the dense ones of trained networks, Gaussian ones, and those of ResNet-18 with random weights.
    """
    amount = AMOUNTS[options.size]
    effort = options.effort(amount.effort)
    load_before = load_average()
    libraries = options.open_libraries()
    groups = select_groups(find_layers(networks, options.size), options.only)
    if not any(groups.values()):
        raise click.BadParameter(f"{options.only!r} is in the name of no layer", param_hint="--only")
    rows: list[NormRow] = []
    with progress() as tell:
        for layer in each_layer(tell, libraries, groups):
            rows.extend(measure(layer, replace(amount, effort=effort)))
    machine = describe(libraries, load_before)
    summaries = summarise(rows)
    show_machine(machine)
    show_table(rows, ROW_COLUMNS)
    show_table(summaries, SUM_COLUMNS, EXPLANATION)
    if options.plot is not None:
        draw(options.plot, rows)
    arguments = options.arguments() | {"rtol": RTOL} | asdict(effort)
    write_json(options.json_path, "norm", arguments, machine=machine, rows=rows, summary=summaries)


def summarise(rows: Sequence[NormRow]) -> list[NormSummary]:
    """Return one summary for each library, group and method."""
    groups = group_by(rows, "library", "group", "method")
    return [_summarise(members, groups[library, group, OURS]) for (library, group, _), members in groups.items()]


def _summarise(members: Sequence[NormRow], ours: Sequence[NormRow]) -> NormSummary:
    first = members[0]
    seconds, base = (sum(row.seconds * row.multiplicity for row in listed) for listed in (members, ours))
    errors = [row.error for row in members if row.error is not None]
    spent = [row.evaluations for row in members if row.evaluations is not None]
    return NormSummary(
        library=first.library,
        group=first.group,
        method=first.method,
        certified=min((row.certified for row in members), key=len),
        count=sum(row.multiplicity for row in members),
        seconds=seconds,
        extrapolated=sum(row.extrapolated for row in members),
        ratio=seconds / base,
        median_ratio=statistics.median(row.ratio for row in members),
        least_ratio=min(row.ratio for row in members),
        median_error=statistics.median(map(abs, errors)) if errors else None,
        least_error=min(errors, default=None),
        largest_error=max(errors, default=None),
        evaluations=f"{statistics.median(spent):.0f} / {max(spent)}" if spent else "",
    )


def draw(path: Path, rows: Sequence[NormRow]) -> None:
    """Write the figure: time against the absolute error, one plot for each library and group."""
    panels = group_by(rows, "library", "group")
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, (panel, members) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        _draw(axes, ", ".join(panel), members)
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, title: str, rows: Sequence[NormRow]) -> None:
    for number, ((method,), members) in enumerate(group_by(rows, "method").items()):
        points = [(row.seconds, max(abs(row.error), LEAST_ERROR)) for row in members if row.error is not None]
        if not points:
            continue
        marker = "o" if method.startswith(OURS) else "s" if method.startswith(PAPER) else "^"
        axes.loglog(*zip(*points, strict=True), marker, color=f"C{number % 10}", markersize=5, alpha=0.7, label=method)
    axes.set(xlabel="seconds", ylabel="relative error of the norm", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
