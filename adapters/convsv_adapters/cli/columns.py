"""Columns of a table, which fold or are left out where a terminal is narrow. No figure and no heading is ever cut."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "print_columns"]

PIPE_WIDTH = 80
"""The least width, in characters, of a table that goes to no terminal: the usual width of a terminal."""


@dataclass
class Column:
    """A column of a table.

    Attributes
    ----------
    heading : str
        Of one line or several. It is never broken further.
    cells : list of str
    right : bool
        Whether the cells are aligned at the right.
    least : tuple of int
        Widths to which the column may be narrowed, in turn, by folding its cells. Figures are never folded.
    width : int
        The width that is shown.
    """

    heading: str
    cells: list[str]
    right: bool = False
    least: tuple[int, ...] = ()
    width: int = 0

    def __post_init__(self) -> None:
        self.width = max(self.heading_width, *map(cell_len, self.cells), 0)

    @property
    def heading_width(self) -> int:
        """The width of the heading's longest line."""
        return max(map(cell_len, self.heading.split("\n")))


def print_columns(
    columns: list[Column], order: Sequence[str], title: str | None = None, *, gap: int = 1, hint: str = ""
) -> Console:
    """Print columns as a table that fits the terminal, and a line that names the columns left out.

    Parameters
    ----------
    columns : list of Column
        Changed in place where they do not fit.
    order : sequence of str
        The headings of the columns that may be left out, in turn.
    title : str, optional
    gap : int, default 1
        Spaces behind a column.
    hint : str
        The end of the line about the columns left out.

    Returns
    -------
    Console
        As wide as the terminal, or in a pipe as wide as the table needs.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=max(PIPE_WIDTH, _width(columns, gap)))
    left_out = _fit(columns, console.width, order, gap)
    wide = console if _width(columns, gap) <= console.width else Console(width=_width(columns, gap))
    wide.print(_table(columns, title, gap))
    if left_out:
        console.print(Text(f"\nToo narrow here for the columns {', '.join(left_out)}{hint}."))
    return console


def _width(columns: Sequence[Column], gap: int) -> int:
    """Return the width of a table, with `gap` spaces and one character of its box between two columns."""
    return sum(column.width for column in columns) + (gap + 1) * (len(columns) - 1)


def _fit(columns: list[Column], width: int, order: Sequence[str], gap: int) -> list[str]:
    """Leave out columns, then fold cells, until a table is at most so wide; and return the headings left out.

    Parameters
    ----------
    columns : list of Column
        Changed in place.
    order : sequence of str
        The headings of the columns that may be left out, in turn.
    """
    left_out: list[str] = []
    for heading in order:
        spare = sum(
            column.width - max(column.heading_width, *column.least[-1:], 0) for column in columns if column.least
        )
        if _width(columns, gap) - spare <= width:
            break
        columns[:] = [column for column in columns if column.heading != heading]
        left_out.insert(0, " ".join(heading.split()))
    for turn in itertools.zip_longest(*(column.least for column in columns)):
        for column, least in zip(columns, turn, strict=True):
            if least is not None:
                excess = _width(columns, gap) - width
                column.width -= max(0, min(excess, column.width - max(least, column.heading_width)))
    return left_out


def _table(columns: Sequence[Column], title: str | None, gap: int) -> Table:
    """Make a table with `gap` spaces behind its columns."""
    table = Table(
        title=title, title_style="bold", box=SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False
    )
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        folds = bool(column.least)
        table.add_column(column.heading, justify=justify, width=column.width, overflow="fold", no_wrap=not folds)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table
