"""Describe the charts of a network's Lipschitz constant: its bound along the graph, and its residual blocks."""

from __future__ import annotations

import math

from convsv_core.reports import texts
from convsv_core.reports.charts import COLOURS, Chart, Spec, chosen, interactive, number, row_target
from convsv_core.reports.constant_report import Lipschitz

__all__ = ["blocks_chart", "growth_chart"]

UPPER, FACTOR, MISSING = "bound", "factor", "no bound"
"""The names of what the chart of the bound draws."""

SERIES: Spec = {"domain": [UPPER, FACTOR, MISSING], "range": [COLOURS[0], COLOURS[3], COLOURS[4]]}
"""The colours of what the chart of the bound draws."""

ATTAINED_COLOUR = COLOURS[2]
"""The colour of the line at the factor that an input attains."""

MOST_LINEAR = 100.0
"""The largest singular value from which the intervals of blocks are shown on a logarithmic axis first (a guess)."""

MOST_DECADES = 8
"""The largest number of powers of ten at a logarithmic axis (a guess: their texts must not meet on a phone)."""

BLOCK_HEIGHT = 22
"""The height of a block in the chart of blocks, in pixels (a guess: one line of text)."""

AROUND_BLOCKS = 96
"""The height of the axis and the margins of the chart of blocks, in pixels."""


def growth_chart(found: Lipschitz) -> Chart | None:
    """Return the decimal logarithm of the bound along the graph, and of each node's factor; None without a node."""
    finite = [value for node in found.nodes for value in (node.log10_upper, node.log10_factor) if math.isfinite(value)]
    if not finite:
        return None
    data = [
        {
            "depth": place,
            "node": f"{place}  {node.name}",
            "op": node.op,
            UPPER: number(node.log10_upper),
            FACTOR: number(node.log10_factor),
            # A node without a bound is drawn above all others.
            MISSING: None if node.log10_upper < math.inf else number(max(finite)),
            "factor, at most": texts.power_up(node.log10_factor),
            "log10 of the bound": texts.logarithm_up(node.log10_upper),
            "note": node.note or "-",
        }
        for place, node in enumerate(found.nodes, start=1)
    ]
    drawn = [UPPER, FACTOR, MISSING] if any(node.log10_upper == math.inf for node in found.nodes) else [UPPER, FACTOR]
    x = {
        "field": "depth",
        "type": "quantitative",
        "scale": {"domain": [0.4, len(data) + 0.6], "nice": False, "zero": False},
        "axis": {"title": "number of the node, in the order of execution", "tickMinStep": 1, "grid": False},
    }
    y = {
        "type": "quantitative",
        "scale": {"padding": 8},
        "axis": {"title": "decimal logarithm of the bound", "tickCount": 6, "format": ".4~g"},
    }
    colour = {
        "type": "nominal",
        "scale": SERIES,
        "legend": {"title": None, "orient": "top", "symbolType": "circle", "symbolSize": 90, "values": drawn},
    }
    told = [{"field": name} for name in ("node", "op", "factor, at most", "log10 of the bound", "note")]
    hidden = {"stroke": "transparent", "fill": "transparent", "cursor": "pointer"}
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": max(1.5, min(7.0, 420 / len(data)))},
            "encoding": {
                "x": x,
                "y": {"field": FACTOR, **y},
                "y2": {"datum": 0},
                "color": {"datum": FACTOR, **colour},
                "opacity": chosen(1, 0.35),
            },
        },
        {
            "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2},
            "encoding": {"x": x, "y": {"field": UPPER, **y}, "color": {"datum": UPPER, **colour}},
        },
        {
            "transform": [{"filter": f"isValid(datum['{UPPER}'])"}],
            "mark": {"type": "point", "filled": True, "size": 36},
            "encoding": {
                "x": x,
                "y": {"field": UPPER, **y},
                "color": {"datum": UPPER, **colour},
                "opacity": chosen(1, 0.35),
            },
        },
    ]
    if MISSING in drawn:
        layers.append(
            {
                "transform": [{"filter": f"isValid(datum['{MISSING}'])"}],
                "mark": {"type": "point", "shape": "triangle-up", "filled": True, "size": 40},
                "encoding": {
                    "x": x,
                    "y": {"field": MISSING, **y},
                    "color": {"datum": MISSING, **colour},
                    "opacity": chosen(1, 0.35),
                },
            }
        )
    if found.lower:
        layers += _attained(found.lower)
    # The pointer finds a node anywhere above or below its points.
    layers.append(
        {
            "transform": [
                {"calculate": "datum.depth - 0.5", "as": "left"},
                {"calculate": "datum.depth + 0.5", "as": "right"},
            ],
            "mark": {"type": "rect", **hidden},
            "encoding": {"x": {"field": "left", "type": "quantitative"}, "x2": {"field": "right"}, "tooltip": told},
        }
    )
    return Chart(interactive({"values": data}, [], layers, 340))


def _attained(lower: float) -> list[Spec]:
    """Return a line at the factor that an input attains, and its name."""
    place = {"datum": number(math.log10(lower)), "type": "quantitative"}
    text = f"attained at one input: {texts.rounded_down(lower)}"
    return [
        {
            "data": {"values": [{}]},
            "mark": {"type": "rule", "color": ATTAINED_COLOUR, "strokeDash": [6, 4], "strokeWidth": 1.5},
            "encoding": {"y": place},
        },
        {
            "data": {"values": [{}]},
            "mark": {
                "type": "text",
                "text": text,
                "align": "right",
                "baseline": "bottom",
                "dx": -4,
                "dy": -4,
                "color": "currentColor",
                "fontSize": 12,
            },
            "encoding": {"x": {"value": "width"}, "y": place},
        },
    ]


def blocks_chart(found: Lipschitz) -> Chart | None:
    """Return the interval of singular values of every residual block with a bound; None if there is none."""
    numbers = {node.name: place for place, node in enumerate(found.nodes, start=1)}
    data = [
        {
            "depth": numbers.get(block.name, 0),
            "block": block.name,
            "low": number(block.smallest_singular_value),
            "high": number(block.largest_singular_value),
            "at least": texts.rounded_down(block.smallest_singular_value),
            "at most": texts.rounded_up(block.largest_singular_value),
            "branch": texts.rounded_up(block.branch_upper),
            "full rank": "yes" if block.smallest_singular_value else "not shown",
        }
        for block in found.blocks
        if math.isfinite(block.largest_singular_value)
    ]
    if not data:
        return None
    largest = max(block.largest_singular_value for block in found.blocks if math.isfinite(block.largest_singular_value))
    first = "log" if largest > MOST_LINEAR else "linear"
    # The logarithm begins at 1, because an interval may begin at 0.
    return Chart(
        _blocks_spec(data, {"type": "linear"}, {"format": ".3~g"}),
        _blocks_spec(data, {"type": "symlog", "constant": 1}, _decades(largest)),
        first,
    )


def _decades(largest: float) -> Spec:
    """Return an axis with 0, 1 and powers of ten up to a number, of which some are left out."""
    top = max(1, math.ceil(math.log10(largest)))
    powers = range(0, top + 1, math.ceil(top / MOST_DECADES))
    text = "datum.value < 1e4 ? format(datum.value, '~g') : '1e' + round(log(datum.value) / LN10)"
    return {"values": [0.0, *(10.0**power for power in powers)], "labelExpr": text}


def _blocks_spec(data: list[Spec], scale: Spec, marks: Spec) -> Spec:
    """Return the chart of the blocks with this scale, and these marks on its axis."""
    told = [
        {"field": "block"},
        {"field": "branch", "title": "constant of the branch, at most"},
        {"field": "at least", "title": "singular values, at least"},
        {"field": "at most", "title": "singular values, at most"},
        {"field": "full rank"},
    ]
    axis = {"title": "singular values of the block's Jacobian", "tickCount": 6, **marks}
    colour = {
        "field": "full rank",
        "type": "nominal",
        "scale": {"domain": ["yes", "not shown"], "range": [COLOURS[2], COLOURS[4]]},
        "legend": {"title": "full rank:", "titleOrient": "left", "orient": "top", "symbolType": "square"},
    }
    y = {"field": "block", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 150, "ticks": False}}
    return interactive(
        {"values": data},
        [],
        [
            {
                "mark": {"type": "bar", "height": 9, "cornerRadius": 3},
                "encoding": {
                    "y": y,
                    "x": {"field": "low", "type": "quantitative", "scale": {**scale, "zero": True}, "axis": axis},
                    "x2": {"field": "high"},
                    "color": colour,
                    "opacity": chosen(1, 0.35),
                },
            },
            {
                "data": {"values": [{}]},
                "mark": {"type": "rule", "strokeDash": [4, 3], "color": "currentColor", "opacity": 0.6},
                "encoding": {"x": {"datum": 1, "type": "quantitative"}},
            },
            row_target(y, told),
        ],
        BLOCK_HEIGHT * len(data) + AROUND_BLOCKS,
    )
