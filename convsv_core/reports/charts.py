"""Describe the charts of a page that react to the pointer, in the language of Vega-Lite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core.reports.curves import Curve, above_rounding, better_scale, curves_of, shares
from convsv_core.reports.report import BoundsReport
from convsv_core.reports.texts import figure, rounded_down, rounded_up

__all__ = [
    "COLOURS",
    "SCHEMA",
    "TEXT_STYLE",
    "Chart",
    "Spec",
    "chosen",
    "colours",
    "curves_chart",
    "interactive",
    "norms_chart",
    "number",
    "pairs_chart",
    "row_target",
    "values_axis",
]

Spec = dict[str, Any]
"""A chart in the language of Vega-Lite."""

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""The name of the language's version. Nothing is read from this address."""

CURVE_POINTS = 256
"""Number of points of a curve in a page: a few pixels apart (a guess). Of more singular values, some are left out."""

DIGITS = 5
"""Number of significant digits of the numbers in a chart. A guess: finer than a pixel of it."""

COLOURS = ("#3f6fd8", "#1f9fb0", "#3fa34d", "#c9930a", "#e2603a", "#cc4b90", "#8a63d2")
"""Colours of layers from the input on: as light in the middle of light and dark pages as they are told apart (a guess).

Layers between them have colours in between.
"""

TEXT_STYLE: Spec = {
    "background": None,
    "view": {"stroke": None},
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "tickColor": "currentColor",
        "domainColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.14,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
}
"""The look of every chart. Lines and texts have the colour of the page's text, in light, in dark and on paper."""


class Chart(NamedTuple):
    """A chart with a linear axis and the same chart with a logarithmic axis, which a reader chooses between.

    Attributes
    ----------
    linear : dict
    log : dict or None
        None for a chart whose axis a reader does not choose.
    first : "linear" or "log"
        The axis that a reader sees first: the linear one, unless the largest norm would flatten the other layers.
    """

    linear: Spec
    log: Spec | None = None
    first: str = "linear"


def colours(count: int) -> list[str]:
    """Return a colour for each layer, from the input on."""
    stops = np.asarray([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS], float)
    places = np.linspace(0, len(COLOURS) - 1, count) if count > len(COLOURS) else np.arange(count)
    mixed = [np.interp(places, np.arange(len(COLOURS)), channel).round().astype(int) for channel in stops.T]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in zip(*mixed, strict=True)]


def curves_chart(rows: Sequence[Any]) -> Chart | None:
    """Return the paper's figure: the singular values of every layer by rank; None if no row has any.

    A data point of a layer has its number `depth`. The signals `picked` and `pointed` hold the number of the layer
    that a reader has chosen, and of the layer under the pointer; 0 stands for none.
    """
    curves = curves_of(rows)
    if not curves:
        return None
    first = better_scale([float(curve.values[0]) for curve in curves])
    return Chart(_curves_spec(curves, len(rows), "linear"), _curves_spec(curves, len(rows), "log"), first)


def norms_chart(rows: Sequence[Any]) -> Chart | None:
    """Return the norm and the reshaped norm of every layer, in the order of the network; None if no norm is known."""
    points = []
    for depth, row in enumerate(rows, start=1):
        if row.norm is None or not math.isfinite(row.norm):
            continue
        point = {"depth": depth, "layer": f"{depth}  {row.name}", "norm": number(row.norm)}
        if isinstance(row, BoundsReport):
            point |= {"at least": rounded_down(row.lower, DIGITS), "at most": rounded_up(row.upper, DIGITS)}
        point |= {"reshaped norm": number(row.reshaped_norm)}
        points.append(point | {"factor": None if row.factor is None else f"{row.factor:.2f}"})
    told = ("layer", *(("at least", "at most") if points and "at least" in points[0] else ("norm",)))
    return pairs_chart(points, len(rows), ("norm", "reshaped norm"), (*told, "reshaped norm", "factor"))


def pairs_chart(points: Sequence[Spec], count: int, names: Sequence[str], told: Sequence[str]) -> Chart | None:
    """Return a chart of one or two figures of every layer, in the order of the network; None without a layer.

    Parameters
    ----------
    points : sequence of dict
        The figures of a layer by their names. `depth` is the number by which the page picks the layer. `place` is its
        number from the input on, where that is another one.
    count : int
        Number of layers of the network.
    names : sequence of str
        The figures to draw. The first one decides whether a reader sees the linear axis first.
    told : sequence of str
        The facts that the pointer shows.
    """
    if not points:
        return None
    first = better_scale([point[names[0]] for point in points if point[names[0]] is not None])
    linear, log = (_pairs_spec(points, count, names, told, scale) for scale in ("linear", "log"))
    return Chart(linear, log, first)


def _curves_spec(curves: Sequence[Curve], count: int, scale: str) -> Spec:
    """Return the chart of the curves among `count` layers."""
    data = []
    for curve in curves:
        share, values = _points(curve.values, scale)
        points = {"share": _numbers(share), "value": _numbers(values)}
        facts = {"layer": f"{curve.depth}  {curve.name}", "norm": figure(float(curve.values[0]))}
        data.append({"depth": curve.depth, **facts, "smallest": figure(float(curve.values[-1]), 2), **points})
    lines = {
        "x": {
            "field": "share",
            "type": "quantitative",
            "scale": {"domain": [0, 1]},
            "axis": {"title": "rank / number of singular values", "tickCount": 10, "format": "~g"},
        },
        "y": values_axis(scale, "value", "singular value"),
        "detail": {"field": "depth"},
    }
    return interactive(
        {"values": data},
        [{"flatten": ["share", "value"]}],
        [
            {
                "mark": {"type": "line", "point": _lone(curves)},
                "encoding": {
                    **lines,
                    "color": _layer_colours(count),
                    "opacity": chosen(1, 0.12),
                    "strokeWidth": chosen(2.6, 1.3, none=1.5),
                },
            },
            # Thin lines are hard to hit, so that wide ones which nobody sees catch the pointer.
            {
                "mark": {"type": "line", "strokeWidth": 9, "opacity": 0.001, "cursor": "pointer"},
                "encoding": {
                    **lines,
                    "tooltip": [
                        {"field": "layer", "title": "layer"},
                        {"field": "norm", "title": "largest singular value"},
                        {"field": "smallest", "title": "smallest singular value"},
                    ],
                },
            },
        ],
        360,
    )


def _pairs_spec(points: Sequence[Spec], count: int, names: Sequence[str], told: Sequence[str], scale: str) -> Spec:
    """Return the chart of one or two figures of `count` layers."""
    x = {
        "field": "place" if "place" in points[0] else "depth",
        "type": "quantitative",
        "scale": {"domain": [0.4, count + 0.6], "nice": False, "zero": False},
        "axis": {"title": "number of the layer, from the input on", "tickMinStep": 1, "grid": False},
    }
    drawn = {"domain": list(names), "range": ["#3f6fd8", "#e2603a"][: len(names)]}
    series = {
        "field": "figure",
        "type": "nominal",
        "scale": drawn,
        "legend": {"title": None, "orient": "top", "symbolSize": 90, "symbolStrokeWidth": 2},
    }
    shape = {"field": "figure", "scale": {**drawn, "range": ["circle", "diamond"][: len(names)]}}
    # Where the two are equal, the small circle is seen inside of the large diamond.
    size = {"condition": {"test": f"datum.figure == '{names[0]}'", "value": 30}, "value": 130}
    positive = [{"filter": "datum.value > 0"}] if scale == "log" else [{"filter": "isValid(datum.value)"}]
    return interactive(
        {"values": list(points)},
        [],
        [
            {
                "transform": [{"fold": list(names), "as": ["figure", "value"]}, *positive],
                "mark": {"type": "point", "filled": False, "strokeWidth": 2, "cursor": "pointer"},
                "encoding": {
                    "x": x,
                    "y": values_axis(scale, "value", "norm"),
                    "color": series,
                    "shape": shape,
                    "size": size,
                    "opacity": chosen(1, 0.25),
                    "tooltip": [{"field": name} for name in told],
                },
            }
        ],
        260,
    )


def _points(values: HostArray, scale: str) -> tuple[HostArray, HostArray]:
    """Return the points of a curve that is drawn, as near to each other as the pointer needs them.

    Vega finds a curve near its points, and not between them. A curve of few values has more points on its lines.
    """
    share = shares(values)
    if scale == "log":
        drawn = ~np.isnan(above_rounding(values))
        share, values = share[drawn], values[drawn]
    kept = np.linspace(0, len(values) - 1, min(len(values), CURVE_POINTS)).round().astype(int)
    share, values = share[kept], values[kept].astype(float)
    if not 1 < len(values) < CURVE_POINTS:
        return share, values
    every = np.union1d(share, np.linspace(share[0], share[-1], CURVE_POINTS))
    if scale == "log":  # Lines between values are straight where the logarithms are.
        return every, np.exp(np.interp(every, share, np.log(values)))
    return every, np.interp(every, share, values)


def values_axis(scale: str, field: str, title: str) -> Spec:
    """Return the axis of figures, which begins at 0 if it is linear."""
    stated: Spec = {"type": scale, "zero": True} if scale == "linear" else {"type": scale, "nice": False, "padding": 8}
    axis = {"title": title, "tickCount": 6, "format": ".4~g"}
    return {"field": field, "type": "quantitative", "scale": stated, "axis": axis}


def _layer_colours(count: int) -> Spec:
    scale = {"domain": list(range(1, count + 1)), "range": colours(count)}
    return {"field": "depth", "type": "nominal", "scale": scale, "legend": None}


def chosen(value: float, other: float, none: float | None = None) -> Spec:
    """Return the value of marks of the chosen layers, of other layers, and of all layers while none is chosen."""
    one = {"test": "datum.depth == picked || datum.depth == pointed", "value": value}
    free = {"test": "!picked && !pointed", "value": value if none is None else none}
    return {"condition": [one, free], "value": other}


def _lone(curves: Sequence[Any]) -> bool:
    """Return whether some layer has a single value, which a line does not show."""
    return any(len(curve.values) == 1 for curve in curves)


def interactive(data: Spec, transform: Sequence[Spec], layers: Sequence[Spec], height: int) -> Spec:
    """Return a chart as wide as the page, with the signals `picked` and `pointed` that `curves_chart` describes."""
    return {
        "$schema": SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        "params": [{"name": "picked", "value": 0}, {"name": "pointed", "value": 0}],
        "data": data,
        "transform": list(transform),
        "layer": list(layers),
        "config": TEXT_STYLE,
    }


def row_target(y: Spec, told: Sequence[Spec]) -> Spec:
    """Return a layer of a chart that nobody sees, in which the pointer finds a short bar anywhere in its row."""
    mark = {"type": "rect", "fill": "transparent", "stroke": "transparent", "cursor": "pointer"}
    return {"mark": mark, "encoding": {"y": y, "tooltip": list(told)}}


def number(value: float | None) -> float | None:
    """Return a number as a chart has it: with `DIGITS` digits, or None where it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def _numbers(values: HostArray) -> list[float | None]:
    return [number(float(value)) for value in values]
