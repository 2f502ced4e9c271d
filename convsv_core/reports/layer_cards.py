"""Show each layer of a network in a card of a page: which frequencies it amplifies, and its top singular vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from convsv_core.reports import pictures, texts
from convsv_core.reports.charts import Spec
from convsv_core.reports.images import TopVectors
from convsv_core.reports.network_report import Report

__all__ = ["MEANINGS", "Cards", "cards_of"]

MEANINGS = (
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


class Cards(NamedTuple):
    """The cards of the layers of a page.

    Attributes
    ----------
    html : str
        The section with the cards; empty if no layer has images.
    pictures : dict from str to dict
        The charts that tell of the pointer's frequency, by the names of their places.
    """

    html: str
    pictures: dict[str, Spec]


def cards_of(report: Report[Any]) -> Cards:
    """Return a card with images for each row that has some."""
    cards, live = [], {}
    for depth, row in enumerate(report, start=1):
        image, vectors = getattr(row, "by_frequency", None), getattr(row, "top_vectors", None)
        if image is None or vectors is None:
            continue
        strides = (1,) * image.ndim if row.transposed else row.stride
        grid = [extent // stride for extent, stride in zip(row.input_shape, strides, strict=True)]
        drawn = pictures.frequency_picture(image, grid)
        if drawn is not None:
            live[str(depth)] = drawn.live
            frequency = f'<div class="frequency" data-picture="{depth}">{drawn.svg}</div>'
        else:
            text = f"The largest singular value is {texts.figure(float(image.max()))} at every frequency, to 0.1 %."
            frequency = f'<p class="frequency flat">{text}</p>'
        cards.append(
            f'<article class="card" data-depth="{depth}" id="layer-{depth}"><h3>{depth}&ensp;{escape(row.name)}</h3>'
            f'<p class="facts">{_facts(row, report)}</p>'
            f'<div class="images">{frequency}{_vectors(vectors)}</div></article>'
        )
    return Cards(_section(cards) if cards else "", live)


def _section(cards: Sequence[str]) -> str:
    return (
        '<section><h2>Layers</h2><p class="hint">Left: which frequencies a layer amplifies; point at one to read '
        "its value. Right: the input that it stretches most, and the output that this input gives; red is positive, "
        "blue is negative. Frequencies count for a pixel of the layer's smaller side.</p>"
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _facts(row: Any, report: Report[Any]) -> str:
    """Return the figures of a row, each with its heading."""
    shown = [("kernel", texts.kernel(row))] if row.kernel_shape is not None else []
    shown += [(column.heading.replace("\n", " "), column.cell(row)) for column in report.view.columns]
    return " &middot; ".join(f"{escape(name)}&nbsp;<b>{escape(text)}</b>" for name, text in shown if text != "-")


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
