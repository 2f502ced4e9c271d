"""Print tables on stdout, and write figures as text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "LAYER",
    "MIB",
    "Column",
    "duration",
    "figures",
    "integers",
    "or_dash",
    "percent",
    "ratio",
    "say",
    "show_table",
    "signed",
    "words",
]

MIB = 1 << 20
"""Bytes in a mebibyte."""

WIDEST = 10_000
"""Columns of a console on which no table is cut: a guess, far above the width of any table here."""

NARROWEST = 80
"""Columns that a table may take in a pipe even if it needs fewer: the usual width of a terminal."""


class Column(NamedTuple):
    """Describe one column of a table: its heading, its cell for one row, and how the cells are justified."""

    heading: str
    cell: Callable[[Any], str]
    justify: Literal["left", "right"]


def words(heading: str, cell: Callable[[Any], str] | None = None) -> Column:
    """Return a column of text, by default of the rows' attribute that is called like the heading."""
    return Column(heading, cell or attrgetter(heading), "left")


def figures(heading: str, cell: Callable[[Any], str]) -> Column:
    """Return a column of numbers."""
    return Column(heading, cell, "right")


def integers(heading: str, attribute: str | None = None) -> Column:
    """Return a column of the integers in the rows' attribute that is called like the heading, or `attribute`."""
    read = attrgetter(attribute or heading)
    return figures(heading, lambda row: f"{read(row):,}")


LAYER = (words("library"), words("network"), words("convolution", attrgetter("label")))
"""Columns that say which convolution was measured in which library."""


def show_table(rows: Sequence[object], columns: Sequence[Column], explanation: str = "") -> None:
    """Print one line for each row, and what the headings mean.

    The table is as wide as the terminal; in a pipe it is as wide as its cells need.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column.heading, justify=column.justify, no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=max(NARROWEST, Console(width=WIDEST).measure(table).maximum))
    console.print()
    console.print(table)
    if explanation:
        say(f"\n{explanation}")


def say(text: str, style: str = "") -> None:
    """Print a line of text, which only the terminal may break."""
    Console(soft_wrap=True).print(Text(text), style=style)


def duration(seconds: float, *, extrapolated: object = False) -> str:
    """Return a time with three digits and its unit, and a tilde before it where it is extrapolated.

    Examples
    --------
    >>> duration(0.01234), duration(12.345), duration(1234.5, extrapolated=True)
    ('12.3 ms', '12.3 s', '~1,234 s')
    """
    mark = "~" if extrapolated else ""
    if seconds < 0.9995:
        return f"{mark}{seconds * 1e3:.3g} ms"
    return f"{mark}{seconds:.3g} s" if seconds < 999.5 else f"{mark}{seconds:,.0f} s"


def ratio(value: float) -> str:
    """Return a ratio with three digits and a cross.

    Examples
    --------
    >>> ratio(8.1234), ratio(12345.6)
    ('8.12x', '12,346x')
    """
    return f"{value:.3g}x" if value < 999.5 else f"{value:,.0f}x"


def percent(share: float, digits: int = 1) -> str:
    """Return a share as a percentage.

    Examples
    --------
    >>> percent(0.1234), percent(0.1234, 0)
    ('12.3%', '12%')
    """
    return f"{share:.{digits}%}"


def signed(value: float) -> str:
    """Return a small number with two digits and its sign.

    Examples
    --------
    >>> signed(0.000123)
    '+1.2e-04'
    """
    return f"{value:+.1e}"


def or_dash(write: Callable[[Any], str], value: Any) -> str:
    """Return what `write` makes of a value, and a dash for None.

    Examples
    --------
    >>> or_dash(duration, 0.5), or_dash(duration, None)
    ('500 ms', '-')
    """
    return "-" if value is None else write(value)
