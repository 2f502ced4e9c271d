"""Write a report as one file for a browser, which needs no network: charts, images, and a table that sorts."""

from __future__ import annotations

from html import escape
from typing import Any

from convsv_core.reports import charts, comparison_page, layer_cards
from convsv_core.reports.comparison import Comparison
from convsv_core.reports.network_report import Report
from convsv_core.reports.page_parts import Content, figure_part, origins_part, table_part, written
from convsv_core.reports.plain_table import lay_out

__all__ = ["page"]

PAPER = "The method: Sedghi, Gupta and Long, <cite>The Singular Values of Convolutional Layers</cite>, ICLR 2019."
"""The source of the figures."""


def page(report: Report[Any]) -> str:
    """Return the report as the content of an HTML file.

    Parameters
    ----------
    report : Report
        Rows that have no curves, or no images, have no such parts of the page.
    """
    content = comparison_page.content_of(report) if isinstance(report, Comparison) else _content(report)
    return written(content)


def _content(report: Report[Any]) -> Content:
    """Return the page of one network."""
    view = report.view
    curves, norms, cards = charts.curves_chart(report), charts.norms_chart(report), layer_cards.cards_of(report)
    origins: list[tuple[str, str, str]] = [
        (column.heading.replace("\n", " "), column.meaning, column.origin) for column in view.columns
    ]
    if cards.html:
        origins += layer_cards.MEANINGS
    return Content(
        report.title or "A report of convsv",
        view.subtitle,
        view.sentences(report) if view.sentences is not None else [view.summary(report)],
        [
            figure_part("curves", "Singular values", curves),
            _chips(report) if curves is not None else "",
            figure_part("norms", "Norms", norms),
            table_part(lay_out(report, "", view)),
            cards.html,
            origins_part(origins, PAPER),
        ],
        {name: chart for name, chart in (("curves", curves), ("norms", norms)) if chart is not None},
        cards.pictures,
    )


def _chips(report: Report[Any]) -> str:
    """Return a button for each layer in the colour of its curve."""
    buttons = "".join(
        f'<button type="button" class="chip" data-depth="{depth}"><i style="background:{colour}"></i>'
        f"{depth}&ensp;{escape(row.name)}</button>"
        for depth, (row, colour) in enumerate(zip(report, charts.colours(len(report)), strict=True), start=1)
    )
    return (
        f'<div class="chips" role="group" aria-label="layers">{buttons}</div>'
        '<p class="hint">Layers from the input on. Point at a curve or a name, and click to pick the layer out '
        "here, in the table and among the images.</p>"
    )
