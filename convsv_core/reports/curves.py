"""Draw the singular values of every layer with matplotlib, as figure 1 of Sedghi, Gupta and Long does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core.reports.extras import import_for

__all__ = [
    "Curve",
    "Plot",
    "above_rounding",
    "better_scale",
    "curves_of",
    "empty_figure",
    "name_beside",
    "plot_curves",
    "set_scale",
    "shares",
    "short_label",
]

MOST_IN_PANEL = 8
"""The largest number of layers in one panel: as many as people tell apart by colour (a guess)."""

COLUMNS = 3
"""The largest number of panels side by side (a guess: a page's width)."""

PANEL_SIZE = (6.2, 3.4)
"""The width and the height of a panel with its legend, in inches (a guess)."""

ALONE_SIZE = (8.0, 4.8)
"""The width and the height of the figure of one panel, in inches (a guess)."""

LOG_RATIO = 10
"""The ratio of the largest norm to the median from which a linear axis flattens most layers (a guess)."""

LONGEST_NAME = 28
"""The largest number of characters of a layer's name that is shown (a guess)."""


class Plot(NamedTuple):
    """A figure of matplotlib, and its axes as `pyplot.subplots` returns them: one, or an array of several."""

    figure: Any
    axes: Any


class Curve(NamedTuple):
    """The singular values of the layer that is number `depth` from the input on, descending."""

    depth: int
    name: str
    values: HostArray


def curves_of(rows: Sequence[Any]) -> list[Curve]:
    """Return the curves of the rows that have any."""
    found = ((depth, row.name, getattr(row, "curve", None)) for depth, row in enumerate(rows, start=1))
    return [Curve(depth, name, values) for depth, name, values in found if values is not None]


def shares(values: HostArray) -> HostArray:
    """Return the rank of each value of a curve as a share of the number of singular values."""
    return np.linspace(0, 1, len(values)) if len(values) > 1 else np.zeros(1)


def above_rounding(values: HostArray) -> HostArray:
    """Return the values with NaN in place of rounding errors, which a logarithmic axis would show.

    The absolute error of a singular value is about ``eps`` times the largest one.
    """
    floor = np.finfo(values.dtype).eps * values[0]
    return np.where(values > floor, values, np.nan)


def plot_curves(rows: Sequence[Any], figure: Any = None, scale: Literal["linear", "log"] = "linear") -> Plot:
    """Draw singular values against rank as a share of their number, with up to `MOST_IN_PANEL` layers in a panel.

    Parameters
    ----------
    rows : sequence of LayerReport
        The reports in the order of the network, as a list or a `Report` with a title. A report without figures has no
        curve.
    figure : matplotlib.figure.Figure, optional
        An empty figure, made with `pyplot` by default.
    scale : "linear" or "log"
        The axis of the values. It begins at 0, or below the smallest value that is drawn. On a logarithmic axis,
        values that may be rounding errors are not drawn.
    """
    curves = curves_of(rows)
    count = max(1, math.ceil(len(curves) / MOST_IN_PANEL))
    columns = min(count, COLUMNS)
    height = math.ceil(count / columns)
    size = ALONE_SIZE if count == 1 else (PANEL_SIZE[0] * columns, PANEL_SIZE[1] * height + 0.6)
    figure = empty_figure(figure, size, scale)
    title = getattr(rows, "title", "")
    figure.suptitle(f"{title}\nsingular values of the circular convolution at each layer's extents".strip())
    grid = figure.subplots(height, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    for axes, places in zip(grid.flat, np.array_split(np.arange(len(curves)), count), strict=False):
        _draw_panel(axes, [curves[place] for place in places], scale)
    if not curves:
        grid[0, 0].text(0.5, 0.5, "no layer has singular values", ha="center", transform=grid[0, 0].transAxes)
    return Plot(figure, grid[0, 0] if count == 1 else grid.reshape(-1)[:count])


def empty_figure(figure: Any, size: tuple[float, float], scale: str = "linear") -> Any:
    """Return an empty figure of this size in inches: the given one, or else a new one of `pyplot`.

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed.
    ValueError
        There is no such scale.
    """
    if scale not in ("linear", "log"):
        raise ValueError(f"scale={scale!r}: wanted 'linear' or 'log'")
    import_for("matplotlib", "plot()", "cli")
    if figure is None:
        from matplotlib import pyplot

        return pyplot.figure(figsize=size, layout="constrained")
    figure.set_size_inches(size)
    figure.set_layout_engine("constrained")
    return figure


def better_scale(norms: Sequence[float]) -> Literal["linear", "log"]:
    """Return the axis on which the largest norm does not flatten the other norms."""
    positive = [norm for norm in norms if norm > 0]
    return "log" if positive and max(positive) > LOG_RATIO * np.median(positive) else "linear"


def set_scale(axes: Any, scale: Literal["linear", "log"], smallest: float) -> None:
    """Set the axis of the values, which ends below `smallest`, the smallest value that is drawn."""
    axes.set_yscale(scale)
    if scale == "linear":
        axes.set_ylim(bottom=0)
    elif 0 < smallest < math.inf:
        axes.set_ylim(bottom=smallest / 1.5)


def _draw_panel(axes: Any, curves: Sequence[Curve], scale: Literal["linear", "log"]) -> None:
    """Draw curves of at most `MOST_IN_PANEL` layers."""
    colours = [f"C{number}" for number in range(MOST_IN_PANEL)]
    smallest = math.inf
    for curve, colour in zip(curves, colours, strict=False):
        values = above_rounding(curve.values) if scale == "log" else curve.values
        marker = "o" if len(values) == 1 else None
        axes.plot(
            shares(values),
            values,
            color=colour,
            label=short_label(curve.depth, curve.name),
            linewidth=1.4,
            marker=marker,
        )
        smallest = min(smallest, *np.nanmin(values, initial=math.inf, keepdims=True))
    axes.set(xlabel="rank / number of singular values", ylabel="singular value", xlim=(0, 1))
    axes.grid(alpha=0.3)
    set_scale(axes, scale, float(smallest))
    if curves:
        name_beside(axes)


def name_beside(axes: Any) -> None:
    """Name the layers beside the panel, where the legend hides no curve."""
    legend = axes.legend(
        fontsize="small", title="layer, from the input on", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False
    )
    legend.get_title().set_fontsize("small")


def short_label(depth: int, name: str) -> str:
    """Return a layer's number and name, of which the end is shown if it is long."""
    short = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
    return f"{depth}  {short}"
