"""Describe the charts of a comparison of two networks: the largest shares, and the differences beside the norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from convsv_core.reports import texts
from convsv_core.reports.charts import COLOURS, Chart, Spec, chosen, interactive, number, pairs_chart, row_target
from convsv_core.reports.curves import better_scale
from convsv_core.reports.report import DifferenceReport

__all__ = ["MOST_BARS", "differences_chart", "shares_chart"]

MOST_BARS = 30
"""The largest number of layers in the chart of shares (a guess: the height of a screen)."""

BAR_HEIGHT = 20
"""The height of a layer in the chart of shares, in pixels (a guess: one line of text)."""

AROUND_BARS = 60
"""The height of the axis and the margins of the chart of shares, in pixels."""


def shares_chart(rows: Sequence[DifferenceReport]) -> Chart | None:
    """Return the layers with the largest shares, as bars in the order of the shares; None if no weight differs.

    Of more than `MOST_BARS` layers, those with the smaller shares are left out. Layers with equal weights have no bar.
    """
    points: list[Spec] = [
        {
            "depth": depth,
            "layer": f"{depth}  {row.name}",
            "percent": 100 * row.share,
            "share": texts.percent_up(row.share),
            "difference": texts.rounded_up(row.difference_upper),
            "norm": texts.rounded_up(row.norm_upper),
        }
        for depth, row in enumerate(rows, start=1)
        if row.share and math.isfinite(row.share)
    ]
    points = sorted(points, key=lambda point: -point["percent"])[:MOST_BARS]
    if not points:
        return None
    first = better_scale([point["percent"] for point in points])
    return Chart(_shares_spec(points, "linear"), _shares_spec(points, "log"), first)


def differences_chart(rows: Sequence[DifferenceReport]) -> Chart | None:
    """Return the norm of every layer and of its difference, in the order of the network; None if none is known."""
    points: list[Spec] = [
        {
            "depth": depth,
            "place": row.place + 1,
            "layer": f"{depth}  {row.name}",
            "difference": number(row.difference_upper),
            "norm": number(row.norm_upper),
            "difference, at most": texts.rounded_up(row.difference_upper),
            "norm, at most": texts.rounded_up(row.norm_upper),
            "share, at most": texts.percent_up(row.share),
        }
        for depth, row in enumerate(rows, start=1)
        if row.difference_upper is not None and math.isfinite(row.difference_upper)
    ]
    if not points:
        return None
    told = ("layer", "difference, at most", "norm, at most", "share, at most")
    chart = pairs_chart(points, max(point["place"] for point in points), ("difference", "norm"), told)
    if chart is None:
        return None
    # A small difference beside a large norm is a point at the bottom of a linear axis.
    changed = [point for point in points if point["difference"]]
    return chart._replace(first="log" if changed else "linear")


def _shares_spec(points: Sequence[Spec], scale: str) -> Spec:
    """Return the chart of shares. A bar has no length on a logarithmic axis, so that it has points."""
    stated: Spec = {"type": scale, "zero": True} if scale == "linear" else {"type": scale, "nice": False, "padding": 12}
    layer = {
        "field": "layer",
        "type": "nominal",
        "sort": None,
        "axis": {"title": None, "labelLimit": 150, "ticks": False, "domain": scale == "linear", "grid": scale == "log"},
    }
    mark = (
        {"type": "bar", "height": {"band": 0.7}} if scale == "linear" else {"type": "point", "filled": True, "size": 80}
    )
    told = [
        {"field": "layer"},
        {"field": "share", "title": "share, at most"},
        {"field": "difference", "title": "difference, at most"},
        {"field": "norm", "title": "norm, at most"},
    ]
    return interactive(
        {"values": list(points)},
        [],
        [
            {
                "mark": {**mark, "color": COLOURS[0]},
                "encoding": {
                    "y": layer,
                    "x": {
                        "field": "percent",
                        "type": "quantitative",
                        "scale": stated,
                        "axis": {"title": "share of the layer's norm, in percent", "tickCount": 6, "format": ".3~g"},
                    },
                    "opacity": chosen(1, 0.3),
                },
            },
            row_target(layer, told),
        ],
        BAR_HEIGHT * len(points) + AROUND_BARS,
    )
