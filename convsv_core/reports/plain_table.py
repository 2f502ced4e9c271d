"""Lay out the table of a report as columns of text, and print it without any library."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from convsv_core.reports import texts
from convsv_core.reports.report import Row
from convsv_core.reports.views import View

__all__ = ["TextColumn", "TextTable", "lay_out", "plain_text"]

LEAST_WIDTH = 80
"""The width, in characters, to which the text below a narrow table is broken: the usual width of a terminal."""


class TextColumn(NamedTuple):
    """A column of texts.

    Attributes
    ----------
    heading : str
        Of one line or several.
    cells : list of str
    right : bool
        Whether the cells are aligned at the right.
    values : list, optional
        What the cells show, by which a page sorts them: numbers, tuples of numbers, or None. By default the texts sort
        themselves.
    """

    heading: str
    cells: list[str]
    right: bool = False
    values: list[Any] | None = None


class TextTable(NamedTuple):
    """The table of a report as texts.

    Attributes
    ----------
    title : str
        Of one line or several.
    columns : list of TextColumn
        The first column holds the names of the layers, with the numbers of their notes.
    order : tuple of str
        The headings of the columns that may be left out where there is no room, in turn.
    legend : list of str
        The paragraphs below the table.
    notes : list of str
        The notes of the layers, each with its number.
    """

    title: str
    columns: list[TextColumn]
    order: tuple[str, ...]
    legend: list[str]
    notes: list[str]


def lay_out(rows: Sequence[Row], title: str, view: View) -> TextTable:
    """Return the table of rows, in their order, as texts.

    Examples
    --------
    >>> from convsv_core.reports.report import BoundsReport
    >>> from convsv_core.reports.views import NORM
    >>> table = lay_out([BoundsReport("first", lower=1.0, upper=1.5)], "model.npz", NORM)
    >>> [(column.heading, column.cells) for column in table.columns[2:4]]
    [('lower', ['1']), ('upper', ['1.5'])]
    """
    notes: dict[str, int] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, len(notes) + 1)
    columns = [TextColumn("layer", [f"{row.name} ({notes[row.note]})" if row.note else row.name for row in rows])]
    columns.append(TextColumn("kernel", [texts.kernel(row) for row in rows]))
    columns += [
        TextColumn(
            column.heading,
            [column.cell(row) for row in rows],
            column.figure,
            [getattr(row, column.field) for row in rows],
        )
        for column in view.columns
    ]
    # The first figure always stays. Columns without figures, such as the extents, are the last to go.
    _, *others = [column.heading for column in view.columns if column.figure]
    order = (*others[::-1], *(column.heading for column in view.columns if not column.figure))
    legend = f"kernel: its shape, with s stride, d dilation, g groups, T transposed where it has them. {view.legend}"
    return TextTable(
        f"{title}\n{view.subtitle}" if title else view.subtitle,
        columns,
        order,
        list(filter(None, (legend, view.summary(rows)))),
        [f"({number}) {note}" for note, number in notes.items()],
    )


def plain_text(table: TextTable) -> str:
    """Return a table as text, with lines as long as the columns need."""
    lines = list(_lines(table.columns))
    width = max(LEAST_WIDTH, *map(len, lines))
    below = [textwrap.fill(line, width) for line in (*table.legend, *table.notes)]
    return "\n\n".join([table.title, "\n".join(lines), "\n".join(below)])


def _lines(columns: Sequence[TextColumn]) -> Iterator[str]:
    """Yield the lines of the headings, a rule, and a line for each row."""
    headings = [column.heading.split("\n") for column in columns]
    height = max(map(len, headings))
    above = [[""] * (height - len(heading)) + heading for heading in headings]
    widths = [max(map(len, (*lines, *column.cells))) for lines, column in zip(above, columns, strict=True)]
    rule = ["-" * width for width in widths]
    for cells in (*zip(*above, strict=True), rule, *zip(*(column.cells for column in columns), strict=True)):
        aligned = (
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        )
        yield "  ".join(aligned).rstrip()
