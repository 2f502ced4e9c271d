"""The columns of every table of layers: what they are called, what they hold, and how each figure is computed.

A table in a terminal, in a notebook and in a page, and the JSON of a command, are all made from a `View`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal, TypeAlias

from convsv_core.reports import sentences, texts
from convsv_core.reports.curves import Plot, plot_curves
from convsv_core.reports.layer_plots import plot_bounds, plot_shares
from convsv_core.reports.orders import SortKey, by_depth, by_factor, largest_first
from convsv_core.reports.report import Bounds, Row

__all__ = [
    "ANY_SORT_KEYS",
    "DIFFERENCE",
    "GEOMETRY_FIELDS",
    "NORM",
    "SPECTRUM",
    "Column",
    "Origin",
    "View",
    "projection_view",
    "spectrum_view",
]

Origin: TypeAlias = Literal["", "exact", "certified", "estimated"]
"""How a figure is computed.

"exact": to the rounding of the arithmetic. "certified": a bound that is proved, with its rounding. "estimated": without
an error bound. "" is for what is no figure of the operator, such as a number of iterations.
"""

FACTS_OF_SOME = ("linear", "normalisation", "folded_upper")
"""The fields of rows that a report has only where some row has more than their default to say."""

GEOMETRY_FIELDS = ("name", "kernel_shape", "layout", "stride", "dilation", "groups")
"""The fields with which the JSON of every command describes a layer."""


@dataclass(frozen=True)
class Column:
    """A column of a table of layers.

    Attributes
    ----------
    heading : str
        Of one line or several.
    field : str
        The attribute of the rows that the column shows.
    text : callable
        Writes the value of the attribute, which may be None.
    origin : Origin
    meaning : str
        A sentence that says what the figure is, for people who see it for the first time.
    figure : bool
        Whether the values are numbers, which are aligned at the right.
    """

    heading: str
    field: str
    text: texts.Text = texts.figure
    origin: Origin = "exact"
    meaning: str = ""
    figure: bool = True

    def cell(self, row: Any) -> str:
        """Return the text of a row in this column."""
        return self.text(getattr(row, self.field))


@dataclass(frozen=True)
class View:
    """The parts of a report that differ between commands.

    Attributes
    ----------
    subtitle : str
        The line above the table, which says what operator the figures belong to.
    legend : str
        The text below the table, which explains the headings.
    columns : tuple of Column
        The columns after layer and kernel. The first column of figures is left out last where a terminal is narrow.
    fields : tuple of str
        The attributes of the rows that the JSON has.
    sort_keys : mapping from name to callable
        The orders of the rows, ascending, with None last.
    summary : callable
        Makes a line about all rows, or "".
    rows_key : str
        The key of the rows in the JSON.
    sentences : callable, optional
        Makes the sentences at the top of a page about all rows. Without it they are the line of `summary`.
    draw : callable
        Draws the rows in a figure of matplotlib with an axis: see `Report.plot`.
    """

    subtitle: str
    legend: str
    columns: tuple[Column, ...]
    fields: tuple[str, ...]
    sort_keys: Mapping[str, SortKey]
    summary: Callable[[Sequence[Any]], str]
    rows_key: str = field(default="layers", kw_only=True)
    sentences: Callable[[Sequence[Any]], list[str]] | None = field(default=None, kw_only=True)
    draw: Callable[[Sequence[Any], Any, Any], Plot] = field(default=plot_curves, kw_only=True)

    def fitting(self, rows: Sequence[Any]) -> View:
        """Return the view without the columns of `FACTS_OF_SOME` that are empty in every row."""
        lacking = {fact for fact in FACTS_OF_SOME if not any(getattr(row, fact) for row in rows)}
        if not lacking:
            return self
        return replace(
            self,
            legend=self.legend.replace(_FOLDED_LEGEND, "") if _FOLDED.field in lacking else self.legend,
            columns=tuple(column for column in self.columns if column.field not in lacking),
            fields=tuple(field for field in self.fields if field not in lacking),
        )


def _off_by(rows: Sequence[Row]) -> str:
    """Return a line that says how far off the reshaped norm is."""
    known = [row for row in rows if row.norm is not None and row.factor is not None]
    if not known:
        return ""
    largest = max(known, key=lambda row: row.norm or 0.0)
    least, most = (f"{find(row.factor or 0.0 for row in known):.2f}" for find in (min, max))
    factors = f"a factor of {least}" if least == most else f"factors of {least} to {most}"
    return (
        f"{texts.layers(rows)}. Largest norm: {texts.figure(largest.norm)}, {largest.name}. "
        f"The reshaped norm is off by {factors}."
    )


def _moved(rows: Sequence[Any]) -> str:
    """Return a line that says how many layers have changed, and how far."""
    changed = [row for row in rows if row.kernel is not None]
    if not changed:
        return f"None of {texts.layers(rows)} changed."
    total = math.hypot(*(row.distance for row in changed))
    return f"{len(changed)} of {texts.layers(rows)} changed, by {texts.figure(total)} in all."


ANY_SORT_KEYS: Mapping[str, SortKey] = {
    "depth": by_depth,
    "name": attrgetter("name"),
    "norm": largest_first("norm"),
}
"""The orders that the rows of every report have."""

_FACTOR_SORT_KEYS: Mapping[str, SortKey] = {**ANY_SORT_KEYS, "factor": by_factor}


# ---- the views ------------------------------------------------------------------------------------------------------

BOUND_DIGITS = 5
"""The number of digits of a bound in a table of bounds, enough to show a gap of 1e-3 (a guess)."""

_FOLDED = Column(
    "with\nnorm.",
    "folded_upper",
    texts.rounded_up,
    "certified",
    "An upper bound of the norm of the layer with the batch normalisation directly behind it, at inference.",
)
_FOLDED_LEGEND = (
    " with norm.: a certified bound of the norm of the layer with the batch normalisation directly behind it, at "
    "inference."
)

_RESHAPED = (
    Column(
        "reshaped\nnorm",
        "reshaped_norm",
        meaning="The norm of the kernel as a matrix, which frameworks call spectral_norm. It is not the layer's norm.",
    ),
    Column("factor", "factor", texts.times, meaning="The norm divided by the reshaped norm."),
)
_RESHAPED_LEGEND = (
    " reshaped norm: the norm of the kernel as a matrix, which frameworks call spectral_norm. factor: norm / reshaped "
    "norm."
)

SPECTRUM = View(
    "figures of the circular convolution at each layer's extents",
    "min: the smallest singular value. cond.: norm / min." + _FOLDED_LEGEND + _RESHAPED_LEGEND,
    (
        Column(
            "extents",
            "input_shape",
            texts.extents,
            "",
            "The spatial extents of the layer's input, in pixels or samples.",
            figure=False,
        ),
        Column(
            "norm",
            "operator_norm",
            meaning="The largest singular value of the circular convolution: the largest factor by which it stretches "
            "an input.",
        ),
        Column(
            "min",
            "smallest_singular_value",
            texts.with_digits(2),
            meaning="The smallest singular value of the circular convolution.",
        ),
        Column(
            "cond.",
            "condition_number",
            texts.with_digits(2),
            meaning="The condition number: the norm divided by the smallest singular value.",
        ),
        Column(
            "stable\nrank",
            "stable_rank",
            texts.with_digits(3),
            meaning="The sum of the squared singular values, divided by the largest square.",
        ),
        Column(
            "lower",
            "norm_lower",
            texts.rounded_down,
            "certified",
            "A lower bound of the norm with the layer's own padding.",
        ),
        Column(
            "upper",
            "norm_upper",
            texts.rounded_up,
            "certified",
            "An upper bound of the norm with the layer's own padding.",
        ),
        _FOLDED,
        *_RESHAPED,
    ),
    (
        *GEOMETRY_FIELDS,
        "input_shape",
        "operator_norm",
        "smallest_singular_value",
        "condition_number",
        "stable_rank",
        "norm_lower",
        "norm_upper",
        "reshaped_norm",
        *FACTS_OF_SOME,
        "note",
    ),
    {
        **_FACTOR_SORT_KEYS,
        "smallest": attrgetter("smallest_singular_value"),
        "condition": largest_first("condition_number"),
        "rank": attrgetter("stable_rank"),
    },
    _off_by,
    sentences=sentences.of_spectrum,
)
"""The report of `convsv spectrum`, whose rows are a `LayerReport` each, with both bounds."""

_LEGEND_OF_BOUNDS = {
    "none": "",
    "upper": " upper: a certified bound of the norm with the layer's own padding.",
    "both": " lower, upper: certified bounds of the norm with the layer's own padding.",
}


def spectrum_view(bounds: Bounds) -> View:
    """Return `SPECTRUM` with the columns of the bounds that were asked for, and of no other bounds.

    Examples
    --------
    >>> [column.heading for column in spectrum_view("upper").columns if "norm_" in column.field]
    ['upper']
    """
    left_out = {"none": ("norm_lower", "norm_upper"), "upper": ("norm_lower",), "both": ()}[bounds]
    columns = tuple(column for column in SPECTRUM.columns if column.field not in left_out)
    return replace(SPECTRUM, legend=SPECTRUM.legend + _LEGEND_OF_BOUNDS[bounds], columns=columns)


NORM = View(
    "certified bounds of the norm, for every input size",
    "lower, upper: bounds of the largest factor by which the layer stretches an input, over all extents, with zero or "
    "valid padding, or with circular padding where the stride divides the extents. evals: number of matrices whose "
    "norm was computed. met: whether the requested gap was reached." + _FOLDED_LEGEND + _RESHAPED_LEGEND,
    (
        Column(
            "lower",
            "lower",
            texts.with_digits(BOUND_DIGITS, texts.rounded_down),
            "certified",
            "A lower bound of the largest factor by which the layer stretches an input, over all extents.",
        ),
        Column(
            "upper",
            "upper",
            texts.with_digits(BOUND_DIGITS, texts.rounded_up),
            "certified",
            "An upper bound of the largest factor by which the layer stretches an input, over all extents.",
        ),
        Column("evals", "evaluations", texts.count, "", "The number of matrices whose norm was computed."),
        Column("met", "converged", texts.yes_or_no, "", "Whether the requested gap between the bounds was reached."),
        _FOLDED,
        _RESHAPED[0],
        replace(_RESHAPED[1], meaning="The lower bound divided by the reshaped norm."),
    ),
    (
        *GEOMETRY_FIELDS,
        *("lower", "upper", "frequency", "evaluations", "converged", "reshaped_norm"),
        *FACTS_OF_SOME,
        "note",
    ),
    _FACTOR_SORT_KEYS,
    _off_by,
    sentences=sentences.of_bounds,
    draw=plot_bounds,
)
"""The report of `convsv norm`, whose rows are a `BoundsReport` each."""


def projection_view(bound: float, method: str) -> View:
    """Return the view of `convsv project`, whose rows are a `ProjectionReport` each.

    Examples
    --------
    >>> projection_view(1.0, "dykstra").subtitle
    'projected to norms of at most 1 by dykstra'
    """
    bound_text = texts.with_digits(BOUND_DIGITS, texts.rounded_up)
    return View(
        f"projected to norms of at most {bound:g} by {method}",
        "before, after: certified norms with the layer's own padding, which under zero padding hold for every input "
        "size. after belongs to the weights as they are stored. distance: Frobenius norm of the change of the weights. "
        "iter.: number of iterations. conv.: whether the method converged." + _FOLDED_LEGEND,
        (
            Column("before", "norm_before", bound_text, "certified", "An upper bound of the norm before."),
            Column("after", "norm_after", bound_text, "certified", "An upper bound of the norm of the stored weights."),
            Column("distance", "distance", meaning="The Frobenius norm of the change of the weights."),
            Column("iter.", "iterations", texts.count, "", "The number of iterations."),
            Column("conv.", "converged", texts.yes_or_no, "", "Whether the method converged."),
            _FOLDED,
        ),
        (
            *GEOMETRY_FIELDS,
            *("norm_before", "norm_after", "distance", "iterations", "converged"),
            *FACTS_OF_SOME,
            "note",
        ),
        {**ANY_SORT_KEYS, "before": largest_first("norm_before"), "distance": largest_first("distance")},
        _moved,
    )


DIFFERENCE = View(
    "the difference of the weights, as a layer of its own",
    "difference: a certified bound of the norm of the layer whose weights are the difference. norm: a certified bound "
    "of the norm of the first model's layer. Both hold with the layer's own padding, and for every input size where "
    "the padding repeats no pixel. share: a bound of the norm of the difference, divided by the norm of the first "
    "model's layer.",
    (
        Column(
            "difference",
            "difference_upper",
            texts.rounded_up,
            "certified",
            "An upper bound of the norm of the layer whose weights are the difference.",
        ),
        Column("norm", "norm_upper", texts.rounded_up, "certified", "An upper bound of the norm of the first layer."),
        Column(
            "share",
            "share",
            texts.percent_up,
            "certified",
            "An upper bound of the norm of the difference, divided by the norm of the first model's layer.",
        ),
    ),
    (*GEOMETRY_FIELDS, "other_name", "difference_upper", "norm_upper", "share", "linear", "note"),
    {"share": largest_first("share"), **ANY_SORT_KEYS, "depth": attrgetter("place")},
    sentences.how_many_differ,
    sentences=sentences.of_differences,
    draw=plot_shares,
)
"""The report of `convsv compare`, whose rows are a `DifferenceReport` each."""
