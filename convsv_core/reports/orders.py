"""The keys that sort the rows of a report: functions with names, so that a report can be pickled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from convsv_core.reports.report import Row

__all__ = [
    "SortKey",
    "by_condition",
    "by_depth",
    "by_distance",
    "by_factor",
    "by_name",
    "by_norm",
    "by_norm_before",
    "by_place",
    "by_rank",
    "by_share",
    "by_smallest",
    "descending",
]

SortKey: TypeAlias = Callable[[Any], float | str | None]
"""The key by which a row is sorted, or None for the end of the table."""


def descending(value: float | None) -> float | None:
    """Return the key that sorts figures from the largest one on, with None last.

    Examples
    --------
    >>> sorted([1.0, 3.0, 2.0], key=descending)
    [3.0, 2.0, 1.0]
    """
    return None if value is None else -value


def by_depth(row: Row) -> float:
    """Return the same key for every row, which keeps the order of the network."""
    return 0.0


def by_name(row: Row) -> str:
    """Return the row's name."""
    return row.name


def by_norm(row: Row) -> float | None:
    """Return the key that sorts from the largest norm on."""
    return descending(row.norm)


def by_factor(row: Row) -> float | None:
    """Return the key that sorts from the norm that the reshaped norm misses most on."""
    return -abs(math.log(row.factor)) if row.factor else None


def by_smallest(row: Any) -> float | None:
    """Return the smallest singular value."""
    return row.smallest_singular_value


def by_condition(row: Any) -> float | None:
    """Return the key that sorts from the largest condition number on."""
    return descending(row.condition_number)


def by_rank(row: Any) -> float | None:
    """Return the stable rank."""
    return row.stable_rank


def by_norm_before(row: Any) -> float | None:
    """Return the key that sorts from the largest norm before a projection on."""
    return descending(row.norm_before)


def by_distance(row: Any) -> float | None:
    """Return the key that sorts from the largest change on."""
    return descending(row.distance)


def by_share(row: Any) -> float | None:
    """Return the key that sorts from the largest share of a norm on."""
    return descending(row.share)


def by_place(row: Any) -> float:
    """Return the row's place in the network."""
    return float(row.place)
