"""Draw the pictures of a layer for a page: its singular values by frequency, and its singular vectors."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import vl_convert
from PIL import Image

from convsv_core._geometry.plan import HostArray
from convsv_core.reports.charts import COLOURS, SCHEMA, TEXT_STYLE, Spec

__all__ = ["FrequencyPicture", "frequency_picture", "png"]

IMAGE_SIZE = 190
"""Width and height of an image of frequencies in pixels of a page (a guess)."""

VALUE_DIGITS = 4
"""Number of significant digits of the value under the pointer: as many as the table shows."""

FLAT = 1e-3
"""Relative range of singular values below which an image of them is one colour, and a sentence says more (a guess)."""


class FrequencyPicture(NamedTuple):
    """The picture of a layer's singular values by frequency.

    Attributes
    ----------
    svg : str
        The picture as it stands in the page, and on paper.
    live : dict
        The same chart for Vega-Lite, which tells the frequency and the value under the pointer.
    """

    svg: str
    live: Spec


def frequency_picture(image: HostArray, grid: Sequence[int]) -> FrequencyPicture | None:
    """Draw the largest singular value at each frequency: a curve for one axis, and an image for two.

    Of three axes, a pixel has the largest value over the frequencies of the first one. The result is None where the
    values hardly differ.

    Parameters
    ----------
    image : array
        See `convsv_core.reports.images.by_frequency`.
    grid : sequence of int
        Number of frequencies along each axis, of which the image may have fewer.
    """
    low, high = float(image.min()), float(image.max())
    if high - low <= FLAT * high:
        return None
    plane = image.max(axis=tuple(range(image.ndim - 2))) if image.ndim > 2 else image
    pixels = plane.shape
    for axis, count in enumerate(grid[-plane.ndim :]):
        if count % 2 == 0 and count == plane.shape[axis]:  # The values at -pi and at pi are the same.
            plane = np.concatenate([plane, np.take(plane, [0], axis)], axis)
    chart = _frequency_curve(plane, grid[-1]) if plane.ndim == 1 else _frequency_image(plane, grid[-2:], low, high)
    chart = {"$schema": SCHEMA, **chart, "config": TEXT_STYLE}
    cells = _cells(plane, pixels, grid[-plane.ndim :])
    # The converter writes colours by name as they are, and a page then gives them the colour of its text.
    return FrequencyPicture(str(vl_convert.vegalite_to_svg(chart)), {**chart, "layer": [*chart["layer"], cells]})


def png(values: HostArray, colormap: str, low: float, high: float) -> str:
    """Return an image with a pixel for each value as the address of a picture in a page.

    Parameters
    ----------
    values : array, shape (rows, columns)
    colormap : str
        A name that matplotlib knows.
    low, high : float
        Values of the first and of the last colour.
    """
    scaled = (np.asarray(values, float) - low) / ((high - low) or 1.0)
    picture = Image.fromarray((255 * np.clip(scaled, 0, 1)).round().astype(np.uint8))
    table = matplotlib.colormaps[colormap](np.arange(256), bytes=True)[:, :3]
    picture.putpalette(table.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _frequency_curve(values: HostArray, count: int) -> Spec:
    left, right = _ends(count, len(values))
    edges = np.linspace(left, right, 2 * len(values) + 1)
    data = [{"angle": float(x), "value": float(y)} for x, y in zip(edges[1::2], values, strict=True)]
    return {
        "width": 2 * IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "data": {"values": data},
        "layer": [
            {
                "mark": {"type": "line", "color": COLOURS[0], "point": len(data) <= 32},
                "encoding": {
                    "x": {"field": "angle", "type": "quantitative", **_angles("frequency in rad")},
                    "y": {"field": "value", "type": "quantitative", "axis": {"title": "largest singular value"}},
                },
            }
        ],
    }


def _cells(plane: HostArray, pixels: Sequence[int], grid: Sequence[int]) -> Spec:
    """Return a layer of a chart with an unseen rectangle for each pixel, which tells its frequency and its value.

    Parameters
    ----------
    plane : array
        The values that are drawn, of one axis or two.
    pixels : sequence of int
        Number of pixels along each axis before the first one was repeated at the end.
    grid : sequence of int
        Number of frequencies along each axis.
    """
    columns = plane.shape[-1]
    places = {"x": f"(datum.n - 1) % {columns}", "y": f"floor((datum.n - 1) / {columns})"}
    names = {"x": "horizontal frequency", "y": "vertical frequency"} if plane.ndim == 2 else {"x": "frequency"}
    steps: list[Spec] = [{"window": [{"op": "row_number", "as": "n"}]}]
    encoding: Spec = {"tooltip": [{"field": name} for name in names.values()] + [_VALUE]}
    for channel, axis in zip(names, (-1, -2), strict=False):
        start, end = _ends(grid[axis], plane.shape[axis])
        width = (end - start) / plane.shape[axis]
        # A pixel shows the largest value of some neighbouring frequencies where there are more than pixels.
        first = f"floor(({places[channel]}) * {grid[axis]} / {pixels[axis]})"
        last = f"floor(({places[channel]} + 1) * {grid[axis]} / {pixels[axis]}) - 1"
        low, high = (f"2 * PI * ({index} - {grid[axis] // 2}) / {grid[axis]}" for index in (first, last))
        alone = f"format({low}, '.3~f') + ' rad (' + format({low} / PI, '.3~f') + 'π)'"
        shared = f"format({low}, '.3~f') + ' to ' + format({high}, '.3~f') + ' rad'"
        steps += [
            {"calculate": f"{start} + {width} * ({places[channel]})", "as": channel},
            {"calculate": f"datum.{channel} + {width}", "as": f"{channel}2"},
            {"calculate": alone if grid[axis] <= pixels[axis] else shared, "as": names[channel]},
        ]
        encoding[channel] = {"field": channel, "type": "quantitative"}
        encoding[f"{channel}2"] = {"field": f"{channel}2"}
    if plane.ndim == 1:
        encoding |= {"y": {"value": 0}, "y2": {"value": IMAGE_SIZE}}
    pointed = {"name": "pointed", "select": {"type": "point", "on": "pointerover", "clear": "pointerout"}}
    return {
        "data": {"values": [float(f"{value:.{VALUE_DIGITS}g}") for value in plane.flat]},
        "transform": steps,
        "params": [pointed],
        "mark": {"type": "rect", "fill": "transparent", "stroke": "currentColor", "strokeWidth": 1.5, "clip": True},
        "encoding": {
            **encoding,
            "strokeOpacity": {"condition": {"param": "pointed", "empty": False, "value": 1}, "value": 0},
        },
    }


_VALUE: Spec = {"field": "data", "title": "largest singular value"}
"""The line of the value under the pointer; Vega-Lite calls a number that stands alone "data"."""


def _frequency_image(values: HostArray, grid: Sequence[int], low: float, high: float) -> Spec:
    (bottom, top), (left, right) = map(_ends, grid, values.shape)
    # The lowest frequency is at the bottom, and the first row of a picture at its top.
    picture = png(values[::-1], "viridis", low, high)
    colour = {
        "type": "quantitative",
        "scale": {"scheme": "viridis", "domain": [low, high]},
        "legend": {
            "title": ["largest", "singular", "value"],
            "gradientLength": IMAGE_SIZE - 60,
            "tickCount": 4,
            "format": ".4~g",
        },
    }
    return {
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "data": {"values": [{"url": picture, "value": low}]},
        "layer": [
            {
                "mark": {"type": "image", "aspect": False, "smooth": False, "clip": True},
                "encoding": {
                    "x": {"datum": left, "type": "quantitative", **_angles("horizontal frequency in rad")},
                    "x2": {"datum": right},
                    "y": {"datum": top, "type": "quantitative", **_angles("vertical frequency in rad")},
                    "y2": {"datum": bottom},
                    "url": {"field": "url"},
                },
            },
            {
                "mark": {"type": "point", "opacity": 0},
                "encoding": {
                    "x": {"datum": 0, "type": "quantitative"},
                    "y": {"datum": 0, "type": "quantitative"},
                    "color": {"field": "value", **colour},
                },
            },
        ],
    }


def _ends(count: int, pixels: int) -> tuple[float, float]:
    """Return the angles at the two ends of an axis of `count` frequencies, with 0 in the middle.

    There is one pixel more than frequencies where the first one is repeated at the end.
    """
    first = -(count // 2) - 0.5
    return 2 * math.pi * first / count, 2 * math.pi * (first + max(count, pixels)) / count


def _angles(title: str) -> Spec:
    labels = "['-π', '-π/2', '0', 'π/2', 'π'][round(2 * datum.value / PI) + 2]"
    marks = [place * math.pi / 2 for place in range(-2, 3)]
    return {
        "scale": {"domain": [-math.pi, math.pi], "nice": False},
        "axis": {"title": title, "values": marks, "labelExpr": labels, "grid": False},
    }
