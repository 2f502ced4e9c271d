"""The keys that sort the rows of a report: functions that can be pickled, so that a report can be too."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

from convsv_core.reports.report import Row

__all__ = ["SortKey", "by_depth", "by_factor", "descending", "largest_first"]

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


def largest_first(field: str) -> SortKey:
    """Return the key that sorts rows from the largest value of a field on."""
    return functools.partial(_descending_field, field)


def _descending_field(field: str, row: Row) -> float | None:
    return descending(getattr(row, field))


def by_depth(row: Row) -> float:
    """Return the same key for every row, which keeps the order of the network."""
    return 0.0


def by_factor(row: Row) -> float | None:
    """Return the key that sorts from the norm that the reshaped norm misses most on."""
    return -abs(math.log(row.factor)) if row.factor else None
