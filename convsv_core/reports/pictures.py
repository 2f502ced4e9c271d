"""Draw the pictures of a layer for a page: its singular values by frequency, and its singular vectors."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import vl_convert
from PIL import Image

from convsv_core._geometry.plan import HostArray
from convsv_core.reports.charts import COLOURS, SCHEMA, TEXT_STYLE, Spec

__all__ = ["frequency_svg", "png"]

IMAGE_SIZE = 190
"""Width and height of an image of frequencies in pixels of a page (a guess)."""

FLAT = 1e-3
"""Relative range of singular values below which an image of them is one colour, and a sentence says more (a guess)."""


def frequency_svg(image: HostArray, grid: Sequence[int]) -> str:
    """Draw the largest singular value at each frequency: a curve for one axis, and an image for two.

    Of three axes, a pixel has the largest value over the frequencies of the first one. The result is "" where the
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
        return ""
    plane = image.max(axis=tuple(range(image.ndim - 2))) if image.ndim > 2 else image
    for axis, count in enumerate(grid[-plane.ndim :]):
        if count % 2 == 0 and count == plane.shape[axis]:  # The values at -pi and at pi are the same.
            plane = np.concatenate([plane, np.take(plane, [0], axis)], axis)
    chart = _frequency_curve(plane, grid[-1]) if plane.ndim == 1 else _frequency_image(plane, grid[-2:], low, high)
    # The converter writes colours by name as they are, and a page then gives them the colour of its text.
    return str(vl_convert.vegalite_to_svg({"$schema": SCHEMA, **chart, "config": TEXT_STYLE}))


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
        "mark": {"type": "line", "color": COLOURS[0], "point": len(data) <= 32},
        "encoding": {
            "x": {"field": "angle", "type": "quantitative", **_angles("frequency in rad")},
            "y": {"field": "value", "type": "quantitative", "axis": {"title": "largest singular value"}},
        },
    }


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
