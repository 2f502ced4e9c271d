"""The tables that the commands print on stdout."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.text import Text

from convsv_adapters.cli.columns import Column, print_columns
from convsv_core.plugins import BackendInfo
from convsv_core.reports import Bounds, Row

if TYPE_CHECKING:  # this module imports pyarrow, which a call for one model does not need
    from convsv_adapters.cli.parquet import Norm

__all__ = [
    "NORM",
    "SPECTRUM",
    "SortKey",
    "View",
    "projection_view",
    "show",
    "show_backends",
    "show_runs",
    "spectrum_view",
]

SortKey: TypeAlias = Callable[[Any], float | str | None]
"""The key by which a report is sorted, or None for the end of the table."""

NAME_WIDTH, SHORTEST_NAME_WIDTH = 16, 5
"""The widths, in characters, to which layer names are narrowed before and after kernels are.

The first is a guess. The second is the length of the heading, which would be broken letter by letter below it.
"""

DTYPE_WIDTH = 10
"""The least width, in characters, of a column of dtypes: the length of "complex128"."""


@dataclass(frozen=True)
class View:
    """The parts of a command's table that differ from the tables of other commands.

    Attributes
    ----------
    subtitle : str
        The line above the table, which says what operator the figures belong to.
    legend : str
        The text below the table, which explains the headings.
    columns : mapping from heading to callable
        The columns after layer and kernel. Each callable makes the cell of a report.
    sort_keys : mapping from name to callable
        The orders of the rows, ascending, with None last.
    summary : callable
        Makes a line about all reports, or "".
    """

    subtitle: str
    legend: str
    columns: Mapping[str, Callable[[Any], str]]
    sort_keys: Mapping[str, SortKey]
    summary: Callable[[Sequence[Any]], str]


def show(reports: Sequence[Row], title: str, view: View, sort: str) -> None:
    """Print the table of layers, its legend, and the notes of the layers."""
    notes: dict[str, int] = {}
    for report in reports:
        if report.note:
            notes.setdefault(report.note, len(notes) + 1)
    rows = sorted(reports, key=lambda report: _none_last(view.sort_keys[sort](report)))
    names = [f"{report.name} ({notes[report.note]})" if report.note else report.name for report in rows]
    kernels = [f"{_by(report.kernel_shape)} {_geometry(report)}".rstrip() for report in rows]
    shapes = max((len(_by(report.kernel_shape)) for report in rows), default=0)
    columns = [
        Column("layer", names, least=(NAME_WIDTH, SHORTEST_NAME_WIDTH)),
        Column("kernel", kernels, least=(shapes,)),
        *(
            Column(heading, [cell(report) for report in rows], right=heading != "extents")
            for heading, cell in view.columns.items()
        ),
    ]
    first, *others = view.columns
    # The figure that stays longest is the first one; extents go before it.
    order = [*reversed(others), first] if first != "extents" else [*reversed(others[1:]), first]
    console = print_columns(columns, order, f"{title}\n{view.subtitle}", hint="; --json has every figure")
    legend = f"kernel: its shape, with s stride, d dilation, g groups, T transposed where it has them. {view.legend}"
    console.print(Text("\n" + "\n".join(filter(None, (legend, view.summary(reports))))))
    for note, number in notes.items():
        console.print(Text(f"({number}) {note}"))


def show_backends(rows: Sequence[BackendInfo]) -> None:
    """Print one row for each backend."""
    columns = [
        Column("backend", [row.name for row in rows]),
        Column("available", ["yes" if row.available else "no" for row in rows]),
        Column("devices", [" ".join(row.devices) for row in rows], least=(DTYPE_WIDTH,)),
        Column("dtypes", [" ".join(row.dtypes) for row in rows], least=(DTYPE_WIDTH,)),
        Column("reason", [row.reason for row in rows], least=(NAME_WIDTH,)),
    ]
    print_columns(columns, ("dtypes", "devices", "reason"), gap=2)


def _geometry(report: Row) -> str:
    """Return the stride, the dilation, the groups and T, as far as they differ from a plain convolution."""
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


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _yes_or_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[value]


def _rounded(value: float | None, rounding: str, digits: int) -> str:
    """Return `digits` digits of a bound, rounded to the side on which it stays a bound."""
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
"""The number of digits of a bound in a table of bounds, enough to show a gap of 1e-3 (a guess)."""

SIDE_DIGITS = 4
"""The number of digits of a bound in a table of other figures: that of the figures, so that columns are narrow."""

_RESHAPED: dict[str, Callable[[Any], str]] = {
    "reshaped\nnorm": lambda report: _figure(report.reshaped_norm),
    "factor": lambda report: "-" if report.factor is None else f"{report.factor:.2f}x",
}
_RESHAPED_LEGEND = (
    " reshaped norm: the norm of the kernel as a matrix, which frameworks call spectral_norm. factor: norm / reshaped "
    "norm."
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
    """Return a line that says how far off the reshaped norm is."""
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
"""The table of `convsv spectrum`, whose rows are a `LayerReport` each, with both bounds."""

_LEGEND_OF_BOUNDS = {
    "none": "",
    "upper": " upper: a certified bound of the norm with the layer's own padding.",
    "both": " lower, upper: certified bounds of the norm with the layer's own padding.",
}


def spectrum_view(bounds: Bounds) -> View:
    """Return `SPECTRUM` with the bounds that were asked for, and without the columns of the others."""
    left_out = {"none": ("lower", "upper"), "upper": ("lower",), "both": ()}[bounds]
    columns = {heading: cell for heading, cell in SPECTRUM.columns.items() if heading not in left_out}
    return replace(SPECTRUM, legend=SPECTRUM.legend + _LEGEND_OF_BOUNDS[bounds], columns=columns)


NORM = View(
    "certified bounds of the norm, for every input size",
    "lower, upper: bounds of the largest factor by which the layer stretches an input, over all extents, with zero or "
    "valid padding, or with circular padding where the stride divides the extents. evals: number of matrices whose "
    "norm was computed. met: whether the requested gap was reached." + _RESHAPED_LEGEND,
    {
        "lower": lambda report: _rounded(report.lower, decimal.ROUND_FLOOR, BOUND_DIGITS),
        "upper": lambda report: _rounded(report.upper, decimal.ROUND_CEILING, BOUND_DIGITS),
        "evals": lambda report: _count(report.evaluations),
        "met": lambda report: _yes_or_no(report.converged),
        **_RESHAPED,
    },
    _SORT_KEYS,
    _off_by,
)
"""The table of `convsv norm`, whose rows are a `BoundsReport` each."""


def projection_view(bound: float, method: str) -> View:
    """Return the table of `convsv project`, whose rows are a `ProjectionReport` each."""
    return View(
        f"projected to norms of at most {bound:g} by {method}",
        "before, after: certified norms with the layer's own padding, which under zero padding hold for every input "
        "size. after belongs to the weights as they are stored. distance: Frobenius norm of the change of the weights. "
        "iter.: number of iterations. conv.: whether the method converged.",
        {
            "before": lambda report: _rounded(report.norm_before, decimal.ROUND_CEILING, BOUND_DIGITS),
            "after": lambda report: _rounded(report.norm_after, decimal.ROUND_CEILING, BOUND_DIGITS),
            "distance": lambda report: _figure(report.distance),
            "iter.": lambda report: _count(report.iterations),
            "conv.": lambda report: _yes_or_no(report.converged),
        },
        {
            **_ANY_SORT_KEYS,
            "before": lambda report: _negative(report.norm_before),
            "distance": lambda report: _negative(report.distance),
        },
        _moved,
    )


def _moved(reports: Sequence[Any]) -> str:
    """Return a line that says how many layers have changed, and how far."""
    changed = [report for report in reports if report.kernel is not None]
    if not changed:
        return f"None of {len(reports)} convolutions changed."
    total = math.hypot(*(report.distance for report in changed))
    return f"{len(changed)} of {len(reports)} convolutions changed, by {_figure(total)} in all."


# ---- many models -----------------------------------------------------------------------------------------


@dataclass
class _Course:
    """A layer's norm over the steps of one run."""

    models: int
    first: Norm
    last: Norm
    largest: Norm


def show_runs(norms: Iterable[Norm], title: str) -> None:
    """Print one row for each layer of each run: its first, last and largest norm."""
    courses: dict[tuple[str, int, str], _Course] = {}
    for norm in norms:
        course = courses.setdefault((norm.run, norm.depth, norm.layer), _Course(0, norm, norm, norm))
        course.models += 1
        course.first = min(course.first, norm, key=_step)
        course.last = max(course.last, norm, key=_step)
        course.largest = max(course.largest, norm, key=lambda one: one.norm)
    rows = []
    for (run, _, layer), course in sorted(courses.items()):
        between = "-" if course.first.step is None else f"{course.first.step}-{course.last.step}"
        figures = (_figure(one.norm) for one in (course.first, course.last, course.largest))
        rows.append((run, layer, str(course.models), between, *figures, _count(course.largest.step)))
    if not rows:
        return
    headings = ("run", "layer", "models", "steps", "first\nnorm", "last\nnorm", "largest\nnorm", "at step")
    columns = [
        Column(heading, list(cells), right=heading not in ("run", "layer"))
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True)
    ]
    for column in columns[:2]:
        column.least = (NAME_WIDTH, SHORTEST_NAME_WIDTH)
    print_columns(columns, ("at step", "models", "steps", "first\nnorm", "last\nnorm"), title)


def _step(norm: Norm) -> int:
    return -1 if norm.step is None else norm.step
