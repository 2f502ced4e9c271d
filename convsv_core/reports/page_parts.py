"""Put a page for a browser together: the template, the scripts, and the parts that every page has.

The scripts come from other packages: Vega-Lite for charts, which `vl-convert-python` brings, and DataTables for the
table, which `itables` brings. They are put into the file.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import vl_convert

from convsv_core.reports.charts import Chart, Spec
from convsv_core.reports.plain_table import TextTable

__all__ = ["ORIGINS", "Content", "Origins", "figure_part", "origins_part", "plain_table", "table_part", "written"]

ORIGINS = {
    "exact": "exact, to the rounding of the arithmetic",
    "certified": "certified: proved, rounding included",
    "attained": "attained at one input, from below",
    "estimated": "estimated, without an error bound",
    "": "-",
}
"""A sentence for each figure that says how it is computed."""

UNSORTABLE = 1e301
"""A number beyond every figure, by which cells without a figure are sorted before all others."""

LONG_TEXT = 40
"""The number of characters from which the column of a text stays wide on a phone (a guess)."""

Origins = Iterable[tuple[str, str, str]]
"""The heading, the meaning and the origin of each figure of a page."""


class Content(NamedTuple):
    """Hold what a page shows.

    Attributes
    ----------
    title, subtitle : str
    sentences : sequence of str
        What a person should know first.
    parts : sequence of str
        The sections in HTML, from top to bottom.
    charts : mapping from str to Chart
        The charts by the names of their places, as `figure_part` makes them.
    pictures : mapping from str to dict
        Charts that take the place of a picture in the page when the pointer comes, by the names of their places.
    """

    title: str
    subtitle: str
    sentences: Sequence[str]
    parts: Sequence[str]
    charts: Mapping[str, Chart]
    pictures: Mapping[str, Spec] = {}


def written(content: Content) -> str:
    """Return the content of an HTML file."""
    from convsv_core import __version__

    parts = {
        "title": escape(content.title),
        "subtitle": escape(content.subtitle),
        "summary": "".join(f"<p>{escape(sentence)}</p>" for sentence in content.sentences if sentence),
        "body": "\n".join(filter(None, content.parts)),
        "version": escape(__version__),
        "data": _json({name: chart._asdict() for name, chart in content.charts.items()}),
        "pictures": _json(content.pictures),
        **_assets(),
    }
    head, *rest = _asset("page.html").split("{{")
    # One pass over the template, so that no part is searched for the names of others.
    filled = ((name, after) for name, _, after in (part.partition("}}") for part in rest))
    return head + "".join(parts[name] + after for name, after in filled)


@functools.cache
def _assets() -> dict[str, str]:
    """Return the style and the scripts, which all pages have in common."""
    tables = importlib.resources.files("itables") / "html"
    return {
        "style": (tables / "dt_bundle.css").read_text("utf-8").replace("</style", "<\\/style") + _asset("page.css"),
        # The bundle declares hundreds of short names, which a function keeps from the page's own names.
        "charts_script": _script(f"(() => {{{vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')}\n}})();"),
        # The bundle of the table is a module, which the page imports from its text.
        "table_script": _json((tables / "dt_bundle.js").read_text("utf-8")),
        "page_script": _script(_asset("page.js")),
    }


def _asset(name: str) -> str:
    return (importlib.resources.files("convsv_core.reports") / "assets" / name).read_text("utf-8")


def _script(text: str) -> str:
    """Return a script that does not end the element that holds it."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _json(value: Any) -> str:
    """Return JSON that can stand in an element for scripts."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# ---- the parts of a page ------------------------------------------------------------------------------------------


def figure_part(name: str, heading: str, chart: Chart | None, hint: str = "") -> str:
    """Return the place of a chart, with the choice of its axis where it has two, and a line below it."""
    if chart is None:
        return ""
    buttons = "".join(
        f'<button type="button" data-chart="{name}" data-scale="{scale}" '
        f'aria-pressed="{"true" if scale == chart.first else "false"}">{label}</button>'
        for scale, label in (("linear", "linear"), ("log", "logarithmic"))
    )
    choice = f'<div class="choice" role="group" aria-label="axis">{buttons}</div>' if chart.log is not None else ""
    below = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return (
        f'<section><div class="head"><h2>{heading}</h2>{choice}</div>'
        f'<div class="chart" id="{name}"></div>{below}</section>'
    )


def table_part(table: TextTable, noun: str = "Layer") -> str:
    """Return the table that sorts and filters, its legend and the notes.

    Parameters
    ----------
    table : TextTable
        Its rows have the numbers 1, 2, ... by which the charts of the page name them.
    noun : str
        What a row is, for the line about the row that a reader has picked.
    """
    head = '<th class="number">#</th>' + "".join(
        f'<th class="{"number" if column.right else "text"}">{escape(column.heading).replace(chr(10), " ")}</th>'
        for column in table.columns
    )
    lines = []
    for place in range(len(table.columns[0].cells)):
        cells = [f'<td class="number">{place + 1}</td>']
        for column in table.columns:
            order = "" if column.values is None else _order(column.values[place])
            kind = "number" if column.right else "text"
            cells.append(f'<td class="{kind}"{order}>{escape(column.cells[place])}</td>')
        lines.append(f'<tr data-depth="{place + 1}">{"".join(cells)}</tr>')
    below = "".join(f"<p>{escape(line)}</p>" for line in (*table.legend, *table.notes))
    return (
        f'<section><h2>Table</h2><div class="wide"><table id="layers-table" data-noun="{noun}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
        f'</table></div><div class="small">{below}</div></section>'
    )


def _order(value: Any) -> str:
    """Return the attribute with the number by which a cell is sorted; missing figures come before all others."""
    if value is None:
        return f' data-order="{-UNSORTABLE:g}"'
    if isinstance(value, bool | int | float):
        return f' data-order="{value if math.isfinite(value) else math.copysign(1e300, value):.17g}"'
    return f' data-order="{math.prod(value)}"' if isinstance(value, tuple) else ""


def plain_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a small table of texts, which neither sorts nor filters."""
    head = f"<thead><tr>{''.join(f'<th>{escape(one)}</th>' for one in headings)}</tr></thead>" if headings else ""
    body = "".join(f"<tr><th>{escape(first)}</th>{''.join(map(_plain_cell, rest))}</tr>" for first, *rest in rows)
    return f'<div class="wide"><table class="plain">{head}<tbody>{body}</tbody></table></div>'


def _plain_cell(text: str) -> str:
    return f'<td class="long">{escape(text)}</td>' if len(text) > LONG_TEXT else f"<td>{escape(text)}</td>"


def origins_part(origins: Origins, below: str = "") -> str:
    """Return a table that says what each figure is and how it is computed, and a line of HTML below it."""
    rows = [(heading, ORIGINS[origin], meaning) for heading, meaning, origin in origins]
    source = f'<p class="small">{below}</p>' if below else ""
    return f"<section><h2>How each figure is computed</h2>{plain_table((), rows)}{source}</section>"
