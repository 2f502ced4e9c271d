"""Write the table of a report as HTML without scripts, which a notebook shows as it is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from convsv_core.reports.plain_table import TextColumn, TextTable

__all__ = ["table_html"]

STYLE = """
.convsv { font-variant-numeric: tabular-nums }
.convsv .rows { overflow: auto; max-height: 36em }
@media print { .convsv .rows { max-height: none } }
.convsv table { border-collapse: collapse; margin: .5em 0; font-size: .92em }
.convsv caption { caption-side: top; text-align: left; padding-bottom: .4em; color: inherit }
.convsv th, .convsv td { padding: .25em .8em; text-align: right; white-space: nowrap; background: none; color: inherit }
.convsv th { border-bottom: 1px solid currentColor; vertical-align: bottom; font-weight: 600; white-space: pre-line }
.convsv table tr .text.text { text-align: left }
.convsv tbody tr:nth-child(even) td { background: rgba(128, 128, 128, .1) }
.convsv p { margin: .3em 0; max-width: 62em; font-size: .85em; opacity: .85 }
"""
"""The look of the table. Colours come from the notebook, so that the table is legible in light and dark themes.

A table of hundreds of rows scrolls. A class that is named twice outweighs the notebook's own rule for cells.
"""


def table_html(table: TextTable) -> str:
    """Return a table, its legend and its notes."""
    title, _, subtitle = table.title.rpartition("\n")
    caption = f"<b>{escape(title or subtitle)}</b>" + (f"<br>{escape(subtitle)}" if title else "")
    head = "".join(_cell("th", column.heading, column.right) for column in table.columns)
    below = "".join(f"<p>{escape(line)}</p>" for line in (*table.legend, *table.notes))
    return (
        f'<div class="convsv"><style>{STYLE}</style><div class="rows"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{_rows(table.columns)}</tbody></table></div>{below}</div>"
    )


def _rows(columns: Sequence[TextColumn]) -> str:
    """Return the rows of the table's body."""
    rows = zip(*(column.cells for column in columns), strict=True)
    return "".join(
        "<tr>" + "".join(_cell("td", cell, column.right) for cell, column in zip(row, columns, strict=True)) + "</tr>"
        for row in rows
    )


def _cell(tag: str, text: str, right: bool) -> str:
    return f"<{tag}>{escape(text)}</{tag}>" if right else f'<{tag} class="text">{escape(text)}</{tag}>'
