"""Tables of `convsv` on stdout."""

from __future__ import annotations

import decimal
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convsv_core.plugins import BackendInfo
from convsv_core.reports import Bounds, Row

if TYPE_CHECKING:  # its library is needed for many models only
    from convsv_adapters._spectra import Norm

SortKey: TypeAlias = Callable[[Any], float | str | None]


@dataclass(frozen=True)
class View:
    """What the table of one command shows besides layer and kernel.

    Attributes
    ----------
    subtitle, legend : str
        What the figures are of, above the table, and what the headings mean, below it.
    columns : mapping from heading to callable
        The cell of a report.
    sort_keys : mapping from name to callable
        Orders of the rows, ascending, with None last.
    summary : callable
        A line about all reports, or "".
    """

    subtitle: str
    legend: str
    columns: Mapping[str, Callable[[Any], str]]
    sort_keys: Mapping[str, SortKey]
    summary: Callable[[Sequence[Any]], str]


def show(reports: Sequence[Row], title: str, view: View, sort: str) -> None:
    """Print the layers, what their notes say, and what stands out."""
    notes: dict[str, int] = {}
    for report in reports:
        if report.note:
            notes.setdefault(report.note, len(notes) + 1)
    table = Table(
        title=f"{title}\n{view.subtitle}",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("layer", overflow="fold")
    table.add_column("kernel")
    for heading in view.columns:
        table.add_column(heading, justify="left" if heading == "extents" else "right", no_wrap=True)
    for report in sorted(reports, key=lambda report: _none_last(view.sort_keys[sort](report))):
        cells = [
            f"{report.name} ({notes[report.note]})" if report.note else report.name,
            f"{_by(report.kernel_shape)} {_geometry(report)}".rstrip(),
            *(cell(report) for cell in view.columns.values()),
        ]
        table.add_row(*map(Text, cells))
    console = _console(table)
    _narrow(table, console.width, reports)
    console.print(table)
    console.print(Text(f"\n{_explain(reports, view)}"))
    for note, number in notes.items():
        console.print(Text(f"({number}) {note}"))


def show_backends(rows: Sequence[BackendInfo]) -> None:
    """Print one row for each plugin."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("backend", "available", "devices", "dtypes", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        available = "yes" if row.available else "no"
        cells = (row.name, available, " ".join(row.devices), " ".join(row.dtypes), row.reason)
        table.add_row(*map(Text, cells))
    _console(table).print(table)


def _narrow(table: Table, width: int, reports: Sequence[Row]) -> None:
    """Break names, and kernels before their strides and groups, so that no figure is cut."""
    excess = _needed_width(table) - width
    layer, kernel = table.columns[:2]
    layer.width, kernel.width = (max(len(str(cell)) for cell in column.cells) for column in (layer, kernel))
    shortest_kernel = max(6, *(len(_by(report.kernel_shape)) for report in reports))
    for column, least in ((layer, 16), (kernel, shortest_kernel), (layer, 4)):
        assert column.width is not None
        taken = max(0, min(excess, column.width - least))
        column.width -= taken
        excess -= taken


def _needed_width(table: Table) -> int:
    return Console(width=10_000).measure(table).maximum


def _console(table: Table) -> Console:
    """Make a console as wide as the terminal, and in a pipe as wide as the table needs."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=max(80, _needed_width(table)))
    return console


def _explain(reports: Sequence[Row], view: View) -> str:
    legend = f"kernel: its shape, with s stride, d dilation, g groups, T transposed where it has them. {view.legend}"
    return "\n".join(filter(None, (legend, view.summary(reports))))


def _geometry(report: Row) -> str:
    """Say what differs from stride 1, dilation 1 and one group."""
    parts = ["T"] if report.transposed else []
    for letter, values in (("s", report.stride), ("d", report.dilation)):
        if values and max(values) > 1:
            parts.append(letter + (str(values[0]) if len(set(values)) == 1 else ",".join(map(str, values))))
    if report.groups and report.groups > 1:
        parts.append(f"g{report.groups}")
    return " ".join(parts)


def _by(extents: Sequence[int] | None) -> str:
    return "-" if extents is None else "x".join(map(str, extents))


def _figure(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf"
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _rounded(value: float | None, rounding: str, digits: int) -> str:
    """`digits` digits of a bound, rounded so that it stays one."""
    if value is None:
        return "-"
    context = decimal.Context(prec=digits, rounding=rounding)
    return _figure(float(context.create_decimal_from_float(value)), digits)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _none_last(key: float | str | None) -> tuple[bool, float | str]:
    return key is None, "" if key is None else key


# ---- the tables ----------------------------------------------------------------------------------------

BOUND_DIGITS = 5
SIDE_DIGITS = 4  # of bounds in a table of other figures

_RESHAPED: dict[str, Callable[[Any], str]] = {
    "reshaped\nnorm": lambda report: _figure(report.reshaped_norm),
    "factor": lambda report: "-" if report.factor is None else f"{report.factor:.2f}x",
}
_RESHAPED_LEGEND = (
    " reshaped norm: that of the kernel as a matrix, which frameworks call spectral_norm. factor: norm / reshaped norm."
)
_ANY_SORT_KEYS: dict[str, SortKey] = {
    "depth": lambda report: 0.0,
    "name": lambda report: report.name,
    "norm": lambda report: _negative(report.norm),
}
_SORT_KEYS: dict[str, SortKey] = {
    **_ANY_SORT_KEYS,
    "factor": lambda report: -abs(math.log(report.factor)) if report.factor else None,
}


def _off_by(reports: Sequence[Row]) -> str:
    """Say how far off the reshaped norm is."""
    known = [report for report in reports if report.norm is not None and report.factor is not None]
    if not known:
        return ""
    largest = max(known, key=lambda report: report.norm or 0.0)
    factors = [report.factor or 0.0 for report in known]
    return (
        f"{len(reports)} convolutions. Largest norm: {_figure(largest.norm)}, {largest.name}. "
        f"The reshaped norm is off by factors of {min(factors):.2f} to {max(factors):.2f}."
    )


SPECTRUM = View(
    "figures of the circular convolution at each layer's extents",
    "min: the smallest singular value. cond.: norm / min." + _RESHAPED_LEGEND,
    {
        "extents": lambda report: _by(report.input_shape),
        "norm": lambda report: _figure(report.operator_norm),
        "min": lambda report: _figure(report.smallest_singular_value, 2),
        "cond.": lambda report: _figure(report.condition_number, 2),
        "stable\nrank": lambda report: _figure(report.stable_rank, 3),
        "lower": lambda report: _rounded(report.norm_lower, decimal.ROUND_FLOOR, SIDE_DIGITS),
        "upper": lambda report: _rounded(report.norm_upper, decimal.ROUND_CEILING, SIDE_DIGITS),
        **_RESHAPED,
    },
    {
        **_SORT_KEYS,
        "smallest": lambda report: report.smallest_singular_value,
        "condition": lambda report: _negative(report.condition_number),
        "rank": lambda report: report.stable_rank,
    },
    _off_by,
)
"""The table of `convsv spectrum`, of `LayerReport`, with both bounds."""

_LEGEND_OF_BOUNDS = {
    "none": "",
    "upper": " upper: a certified bound of the norm with the layer's own padding.",
    "both": " lower, upper: certified bounds of the norm with the layer's own padding.",
}


def spectrum_view(bounds: Bounds) -> View:
    """`SPECTRUM` with the bounds that were asked for."""
    left_out = {"none": ("lower", "upper"), "upper": ("lower",), "both": ()}[bounds]
    columns = {heading: cell for heading, cell in SPECTRUM.columns.items() if heading not in left_out}
    return replace(SPECTRUM, legend=SPECTRUM.legend + _LEGEND_OF_BOUNDS[bounds], columns=columns)


NORM = View(
    "certified bounds of the norm, for every input size",
    "lower, upper: between them lies the most by which any input is stretched, over all extents, with zero or valid "
    "padding, or with circular padding where the stride divides the extents. evals: matrices whose norm was computed. "
    "met: whether the gap asked for was reached." + _RESHAPED_LEGEND,
    {
        "lower": lambda report: _rounded(report.lower, decimal.ROUND_FLOOR, BOUND_DIGITS),
        "upper": lambda report: _rounded(report.upper, decimal.ROUND_CEILING, BOUND_DIGITS),
        "evals": lambda report: "-" if report.evaluations is None else str(report.evaluations),
        "met": lambda report: {True: "yes", False: "no", None: "-"}[report.converged],
        **_RESHAPED,
    },
    _SORT_KEYS,
    _off_by,
)
"""The table of `convsv norm`, of `BoundsReport`."""


def projection_view(bound: float, method: str) -> View:
    """Table of `convsv project`, of `ProjectionReport`."""
    return View(
        f"projected to norms of at most {bound:g} by {method}",
        "before, after: certified norms with the layer's own padding, under zero padding for every input size; after "
        "is that of the weights as they are stored. distance: Frobenius norm of the change of the weights. iter.: "
        "iterations. conv.: whether the method's own aim was reached.",
        {
            "before": lambda report: _rounded(report.norm_before, decimal.ROUND_CEILING, BOUND_DIGITS),
            "after": lambda report: _rounded(report.norm_after, decimal.ROUND_CEILING, BOUND_DIGITS),
            "distance": lambda report: _figure(report.distance),
            "iter.": lambda report: "-" if report.iterations is None else str(report.iterations),
            "conv.": lambda report: {True: "yes", False: "no", None: "-"}[report.converged],
        },
        {
            **_ANY_SORT_KEYS,
            "before": lambda report: _negative(report.norm_before),
            "distance": lambda report: _negative(report.distance),
        },
        _moved,
    )


def _moved(reports: Sequence[Any]) -> str:
    """Say how many layers have changed, and how far."""
    changed = [report for report in reports if report.kernel is not None]
    total = math.hypot(*(report.distance for report in changed))
    return (
        f"{len(changed)} of {len(reports)} convolutions changed, by {_figure(total)} in all."
        if changed
        else (f"None of {len(reports)} convolutions changed.")
    )


# ---- many models -----------------------------------------------------------------------------------------


@dataclass
class _Course:
    """A layer's norm over the steps of one run."""

    models: int
    first: Norm
    last: Norm
    largest: Norm


def show_runs(norms: Iterable[Norm], title: str) -> None:
    """Print the course of each layer's norm over each run."""
    courses: dict[tuple[str, int, str], _Course] = {}
    for norm in norms:
        course = courses.setdefault((norm.run, norm.depth, norm.layer), _Course(0, norm, norm, norm))
        course.models += 1
        course.first = min(course.first, norm, key=_step)
        course.last = max(course.last, norm, key=_step)
        course.largest = max(course.largest, norm, key=lambda one: one.norm)
    table = Table(
        title=title, title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for heading in ("run", "layer", "models", "steps", "first\nnorm", "last\nnorm", "largest\nnorm", "at step"):
        table.add_column(heading, overflow="fold", justify="left" if heading in ("run", "layer") else "right")
    for (run, _, layer), course in sorted(courses.items()):
        between = "-" if course.first.step is None else f"{course.first.step}-{course.last.step}"
        figures = (_figure(one.norm) for one in (course.first, course.last, course.largest))
        at = "-" if course.largest.step is None else str(course.largest.step)
        table.add_row(*map(Text, (run, layer, str(course.models), between, *figures, at)))
    if courses:
        _console(table).print(table)


def _step(norm: Norm) -> int:
    return -1 if norm.step is None else norm.step
