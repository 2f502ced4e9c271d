"""Hold the results of a comparison with a baseline: the times of each row, and their sums over groups of rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from benchmarks.libraries import Library
from benchmarks.shapes import Shape
from benchmarks.tables import LAYER, Column, duration, figures, or_dash, ratio, words
from benchmarks.timing import WeightedTasks

__all__ = [
    "CONVOLUTION",
    "EPS",
    "ERROR",
    "Comparison",
    "Effort",
    "Sums",
    "comparison_of",
    "group_by",
    "sum_columns",
    "sums_of",
    "time_columns",
]

EPS = float(np.finfo(np.float32).eps)
"""Unit of all errors: the spacing of float32 numbers after 1."""

ERROR = figures("error", lambda row: or_dash("{:.2f}".format, row.error_eps))
"""Column of the error of a row, in units of `EPS`."""

CONVOLUTION = (*LAYER, figures("x", lambda row: str(row.multiplicity or "-")))
"""Columns that say which convolution was measured in which library, and how often the network holds it."""

Row = TypeVar("Row")


@dataclass(frozen=True)
class Effort:
    """Say how much is spent on each convolution.

    Attributes
    ----------
    repeats : int
        Measurements of which the median is taken.
    full_seconds : float
        A baseline that is estimated to take longer is sampled and extrapolated.
    sample_seconds : float
        Time of such a sample.
    reference_seconds : float
        Time of the SVDs in float64 that the error is taken against.
    baseline_threads : int or None
        Threads that BLAS and OpenMP may use for the baseline; None for the libraries' defaults.
    """

    repeats: int = 5
    full_seconds: float = 10.0
    sample_seconds: float = 2.0
    reference_seconds: float = 2.0
    baseline_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Hold the times of ours and of a baseline on one convolution.

    Attributes
    ----------
    library, network, label : str
    multiplicity : int
        How often the network holds the convolution.
    ours_seconds, baseline_seconds : float
        Medians.
    ratio : float
        ``baseline_seconds / ours_seconds``.
    ours_times, baseline_times : list of float
        In the order they were taken, alternately.
    extrapolated : bool
        Whether the baseline's time was scaled up from `baseline_frequencies` frequencies.
    """

    library: str
    network: str
    label: str
    multiplicity: int
    ours_seconds: float
    baseline_seconds: float
    ratio: float
    ours_times: list[float]
    baseline_times: list[float]
    extrapolated: bool
    baseline_frequencies: int


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Hold the sums of the times of several rows.

    Attributes
    ----------
    library, group : str
    count : int
        Convolutions that were summed, each as often as it was counted.
    ours_seconds, baseline_seconds : float
    ratio : float
        ``baseline_seconds / ours_seconds``.
    least_ratio : float
        The smallest ratio of one row, whose label is `least`.
    worst_error_eps : float or None
        The largest error of one row; None where no row has one.
    extrapolated : int
        Rows whose baseline was extrapolated.
    """

    library: str
    group: str
    count: int
    ours_seconds: float
    baseline_seconds: float
    ratio: float
    least_ratio: float
    least: str
    worst_error_eps: float | None
    extrapolated: int


def comparison_of(
    ours: list[float], baseline: WeightedTasks, times: Mapping[str, list[float]], library: Library, shape: Shape
) -> dict[str, Any]:
    """Return the attributes of a `Comparison`.

    Parameters
    ----------
    ours : list of float
    baseline : WeightedTasks
    times : mapping of str to list of float
        The times of the baseline's tasks, among others.
    library : Library
    shape : Shape
    """
    theirs = baseline.combine(times)
    seconds, other = statistics.median(ours), statistics.median(theirs)
    return {
        "library": library.name,
        "network": shape.network,
        "label": shape.label,
        "multiplicity": shape.multiplicity,
        "ours_seconds": seconds,
        "baseline_seconds": other,
        "ratio": other / seconds,
        "ours_times": ours,
        "baseline_times": theirs,
        "extrapolated": baseline.extrapolated,
        "baseline_frequencies": baseline.sampled,
    }


def group_by(rows: Sequence[Row], *attributes: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows by the values of some attributes, in the order in which these come first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in attributes), []).append(row)
    return groups


def sums_of(rows: Sequence[Any], counts: Sequence[int], **where: str) -> dict[str, Any]:
    """Return the attributes of `Sums` over rows that are `Comparison`s with an ``error_eps``.

    Parameters
    ----------
    rows : sequence of Comparison
    counts : sequence of int
        How often each row is counted.
    **where
        The attributes that are not sums.
    """
    ours, theirs = (
        sum(count * getattr(row, name) for count, row in zip(counts, rows, strict=True))
        for name in ("ours_seconds", "baseline_seconds")
    )
    least = min(rows, key=attrgetter("ratio"))
    return where | {
        "count": sum(counts),
        "ours_seconds": ours,
        "baseline_seconds": theirs,
        "ratio": theirs / ours,
        "least_ratio": least.ratio,
        "least": least.label,
        "worst_error_eps": max((row.error_eps for row in rows if row.error_eps is not None), default=None),
        "extrapolated": sum(row.extrapolated for row in rows),
    }


def time_columns(baseline: str) -> tuple[Column, ...]:
    """Return the columns of the times of a `Comparison` or of `Sums`; `baseline` is the name of the other method."""
    return (
        figures("ours", lambda row: duration(row.ours_seconds)),
        figures(baseline, lambda row: duration(row.baseline_seconds, extrapolated=row.extrapolated)),
        figures("ratio", lambda row: ratio(row.ratio)),
    )


def sum_columns(baseline: str) -> tuple[Column, ...]:
    """Return the columns of `Sums`: the times, the least ratio, the worst error, and the row of the least ratio."""
    return (
        *time_columns(baseline),
        figures("least", lambda one: ratio(one.least_ratio)),
        figures("error", lambda one: or_dash("{:.2f}".format, one.worst_error_eps)),
        words("", lambda one: one.least if one.count > 1 else ""),
    )
