"""Write a report as one file for a browser, which needs no network: charts, images, and a table that sorts.

The scripts come from other packages: Vega-Lite for charts, which `vl-convert-python` brings, and DataTables for the
table, which `itables` brings. They are put into the file.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import vl_convert

from convsv_core.reports import charts, pictures, texts
from convsv_core.reports.images import TopVectors
from convsv_core.reports.network_report import Report
from convsv_core.reports.plain_table import TextTable, lay_out

__all__ = ["page"]

ORIGINS = {
    "exact": "exact, to the rounding of the arithmetic",
    "certified": "certified: proved, rounding included",
    "estimated": "estimated, without an error bound",
    "": "-",
}
"""A sentence for each figure that says how it is computed."""

OF_IMAGES = (
    (
        "by frequency",
        "The largest singular value of the layer's matrix at each frequency of the input. Where there are more than 64 "
        "frequencies along an axis, a pixel shows the largest value of its neighbours. Of three "
        "axes, it is the largest along the first one.",
        "exact",
    ),
    (
        "top singular vectors",
        "The input that the circular convolution stretches most, and its output, up to a shift: waves of one "
        "frequency. A corner of the channels with the largest entries is shown. Where values repeat, other vectors are "
        "as good.",
        "exact",
    ),
)
"""The heading, the meaning and the origin of each kind of image of a layer."""


def page(report: Report[Any]) -> str:
    """Return the report as the content of an HTML file.

    Parameters
    ----------
    report : Report
        Rows that have no curves, or no images, have no such parts of the page.
    """
    from convsv_core import __version__

    table = lay_out(report, report.title, report.view)
    view = report.view
    sentences = view.sentences(report) if view.sentences is not None else [view.summary(report)]
    drawn = {"curves": charts.curves_chart(report), "norms": charts.norms_chart(report)}
    parts = {
        "title": escape(report.title or "A report of convsv"),
        "subtitle": escape(view.subtitle),
        "summary": "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences if sentence),
        "curves": _figure("curves", "Singular values", drawn["curves"]),
        "norms": _figure("norms", "Norms", drawn["norms"]),
        "chips": _chips(report) if drawn["curves"] is not None else "",
        "table": _table(report, table),
        "layers": _layers(report),
        "origins": _origins(report),
        "version": escape(__version__),
        "data": _json({name: chart._asdict() for name, chart in drawn.items() if chart is not None}),
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


# ---- the parts of the page ----------------------------------------------------------------------------------------


def _figure(name: str, heading: str, chart: charts.Chart | None) -> str:
    """Return the place of a chart, with the choice of its axis."""
    if chart is None:
        return ""
    buttons = "".join(
        f'<button type="button" data-chart="{name}" data-scale="{scale}" '
        f'aria-pressed="{"true" if scale == chart.first else "false"}">{label}</button>'
        for scale, label in (("linear", "linear"), ("log", "logarithmic"))
    )
    return (
        f'<section><div class="head"><h2>{heading}</h2><div class="choice" role="group" aria-label="axis">'
        f'{buttons}</div></div><div class="chart" id="{name}"></div></section>'
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


def _table(report: Report[Any], table: TextTable) -> str:
    """Return the table with the values by which it is sorted, its legend and the notes."""
    head = "<th>#</th>" + "".join(
        f'<th class="{"number" if column.right else "text"}">{escape(column.heading).replace(chr(10), " ")}</th>'
        for column in table.columns
    )
    lines = []
    fixed = len(table.columns) - len(report.view.columns)
    for depth, row in enumerate(report, start=1):
        cells = [f'<td class="number">{depth}</td>']
        for place, column in enumerate(table.columns):
            order = "" if place < fixed else _order(getattr(row, report.view.columns[place - fixed].field))
            kind = "number" if column.right else "text"
            cells.append(f'<td class="{kind}"{order}>{escape(column.cells[depth - 1])}</td>')
        lines.append(f'<tr data-depth="{depth}">{"".join(cells)}</tr>')
    below = "".join(f"<p>{escape(line)}</p>" for line in (*table.legend, *table.notes))
    return (
        f'<div class="wide"><table id="layers-table"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        f'</table></div><div class="small">{below}</div>'
    )


def _order(value: Any) -> str:
    """Return the attribute with the number by which a cell is sorted; missing figures come before all others."""
    if value is None:
        return ' data-order="-1"'
    if isinstance(value, bool | int | float):
        return f' data-order="{value if math.isfinite(value) else 1e300:.17g}"'
    return f' data-order="{math.prod(value)}"' if isinstance(value, tuple) else ""


def _layers(report: Report[Any]) -> str:
    """Return a card with images for each row that has some."""
    cards = [
        f'<article class="card" data-depth="{depth}" id="layer-{depth}"><h3>{depth}&ensp;{escape(row.name)}</h3>'
        f'<p class="facts">{_facts(row, report)}</p>{shown}</article>'
        for depth, row in enumerate(report, start=1)
        if (shown := _images(row))
    ]
    if not cards:
        return ""
    return (
        '<section><h2>Layers</h2><p class="hint">Left: which frequencies a layer amplifies. Right: the input that it '
        "stretches most, and the output that this input gives; red is positive, blue is negative. Frequencies count "
        "for a pixel of the layer's smaller side.</p>"
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _facts(row: Any, report: Report[Any]) -> str:
    """Return the figures of a row, each with its heading."""
    shown = [("kernel", texts.kernel(row))] if row.kernel_shape is not None else []
    shown += [(column.heading.replace("\n", " "), column.cell(row)) for column in report.view.columns]
    return " &middot; ".join(f"{escape(name)}&nbsp;<b>{escape(text)}</b>" for name, text in shown if text != "-")


def _images(row: Any) -> str:
    image, vectors = getattr(row, "by_frequency", None), getattr(row, "top_vectors", None)
    if image is None or vectors is None:
        return ""
    strides = (1,) * image.ndim if row.transposed else row.stride
    grid = [extent // stride for extent, stride in zip(row.input_shape, strides, strict=True)]
    drawn = pictures.frequency_svg(image, grid)
    text = f"The largest singular value is {texts.figure(float(image.max()))} at every frequency, to 0.1 %."
    frequency = f'<div class="frequency">{drawn}</div>' if drawn else f'<p class="frequency flat">{text}</p>'
    return f'<div class="images">{frequency}{_vectors(vectors)}</div>'


def _vectors(vectors: TopVectors) -> str:
    names = ("depth", "vertical", "horizontal")[-len(vectors.frequency) :]
    angles = ", ".join(f"{name} {_angle(angle)}" for name, angle in zip(names, vectors.frequency, strict=True))
    return (
        f'<div class="vectors"><p>frequency in rad: {angles}</p>'
        f"{_strip('input', vectors.inputs, vectors.input_channels)}"
        f"{_strip('output', vectors.outputs, vectors.output_channels)}</div>"
    )


def _angle(angle: float) -> str:
    """Return an angle as a multiple of pi."""
    share = f"{angle / math.pi:.2f}".rstrip("0").rstrip(".")
    return {"-0": "0", "0": "0", "1": "π", "-1": "-π"}.get(share, f"{share}π")


def _strip(side: str, images: Any, channels: Sequence[int]) -> str:
    """Return the images of some channels of one side."""
    limit = float(np.max(np.abs(images), initial=0.0))
    shown = []
    for image, channel in zip(images, channels, strict=True):
        plane = image.reshape(-1, *image.shape[-2:])[0] if image.ndim > 1 else image[None]
        address = pictures.png(plane, "RdBu_r", -limit, limit)
        # The samples of one axis are shown as upright bars.
        shape = "{1}/{0}".format(*plane.shape) if images.ndim > 2 else "3/1"
        shown.append(
            f'<figure><img src="{address}" alt="{side}, channel {channel}" style="aspect-ratio:{shape}">'
            f"<figcaption>channel {channel}</figcaption></figure>"
        )
    extents = f"{images.shape[-1]} samples" if images.ndim == 2 else f"{images.shape[-1]} x {images.shape[-2]} pixels"
    caption = f"{side}, {extents}, ±{texts.figure(limit, 2)}"
    return f'<div class="strip"><p>{caption}</p><div>{"".join(shown)}</div></div>'


def _origins(report: Report[Any]) -> str:
    """Return a table that says what each figure is and how it is computed."""
    rows: list[Iterable[str]] = [
        (column.heading.replace("\n", " "), column.meaning, column.origin) for column in report.view.columns
    ]
    if any(getattr(row, "by_frequency", None) is not None for row in report):
        rows += OF_IMAGES
    return "".join(
        f"<tr><th>{escape(heading)}</th><td>{escape(ORIGINS[origin])}</td><td>{escape(meaning)}</td></tr>"
        for heading, meaning, origin in rows
    )
