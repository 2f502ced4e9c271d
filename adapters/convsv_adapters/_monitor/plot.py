"""The figure of a monitor: the figures of every layer over the steps of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from convsv_adapters._monitor.figures import FIGURES

if TYPE_CHECKING:
    from convsv_adapters._monitor.measurement import Measurement

__all__ = ["draw_measurements"]

MOST_IN_LEGEND = 10
"""The largest number of layers that a legend names (a guess); more layers have a colour bar of their depth."""

LOG_RATIO = 10
"""The ratio of the largest to the smallest figure from which an axis is logarithmic. A guess."""

TITLES = {
    "certified_norm": "certified norm of the layer",
    "reshaped_norm": "norm of the reshaped kernel",
    "stable_rank": "stable rank",
    "smallest_singular_value": "smallest singular value",
}
"""The title of each figure's panel."""


def draw_measurements(measurements: Sequence[Measurement]) -> Figure:
    """Draw one panel for each of `FIGURES`, with one line for each layer."""
    if not measurements:
        raise ValueError("nothing was measured yet: wanted a monitor after a step that was due, or after measure()")
    names = list(dict.fromkeys(one.name for measurement in measurements for one in measurement.layers))
    few = len(names) <= MOST_IN_LEGEND
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, max(len(names), 2)))
    colours = [f"C{number}" for number in range(len(names))] if few else list(shades)
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for panel, figure_name in zip(panels.flat, FIGURES, strict=True):
        everything: list[float] = []
        for name, colour in zip(names, colours, strict=False):
            points = [
                (measurement.step, value)
                for measurement in measurements
                for one in measurement.layers
                if one.name == name and (value := getattr(one, figure_name)) is not None
            ]
            if points:
                steps, values = zip(*points, strict=True)
                marker = "o" if len(points) == 1 else None
                panel.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
                everything += values
        known = [value for value in everything if math.isfinite(value)]
        if known and 0 < min(known) * LOG_RATIO <= max(known):
            panel.set_yscale("log")
        elif known:
            panel.set_ylim(bottom=min(0.0, *known))
        panel.set_title(TITLES[figure_name], fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in panels[-1]:
        panel.set_xlabel("training step")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if few:
        figure.legend(handles, labels, title="layer", loc="outside right upper", fontsize=8, frameon=False)
    else:
        scale = ScalarMappable(Normalize(1, len(names)), matplotlib.colors.ListedColormap(shades))
        bar = figure.colorbar(scale, ax=list(panels.flat), shrink=0.8)
        bar.set_label("layer, in the order of the network")
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
    return figure
