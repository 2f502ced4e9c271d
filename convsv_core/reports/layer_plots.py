"""Draw a figure of each layer with matplotlib: the bounds of the norms, or the largest differences of two networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from convsv_core.reports.curves import Plot, empty_figure, set_scale, short_label

__all__ = ["plot_bounds", "plot_shares"]

MOST_BARS = 30
"""The largest number of layers in the figure of shares (a guess: the height of a page)."""

WIDTH = 8.0
"""The width of a figure, in inches (a guess)."""

BAR_HEIGHT, AROUND_BARS = 0.26, 1.5
"""The height of a bar, and of the title and the axis around the bars, in inches (a guess: one line of text)."""

NORMS_HEIGHT = 4.4
"""The height of the figure of norms, in inches (a guess)."""


def plot_bounds(rows: Sequence[Any], figure: Any = None, scale: Literal["linear", "log"] = "linear") -> Plot:
    """Draw the certified interval of every layer's norm, and the reshaped norm, in the order of the rows.

    Parameters
    ----------
    rows : sequence of BoundsReport
    figure : matplotlib.figure.Figure, optional
        An empty figure, made with `pyplot` by default.
    scale : "linear" or "log"
        The axis of the norms.
    """
    figure = empty_figure(figure, (WIDTH, NORMS_HEIGHT), scale)
    axes = figure.subplots()
    figure.suptitle(f"{getattr(rows, 'title', '')}\ncertified norm of each layer, for every input size".strip())
    known = [(depth, row) for depth, row in enumerate(rows, start=1) if row.upper is not None]
    depths = [depth for depth, _ in known]
    axes.vlines(depths, [row.lower for _, row in known], [row.upper for _, row in known], color="C0", linewidth=2)
    axes.plot(
        depths, [row.upper for _, row in known], "o", color="C0", markersize=4, label="norm: lower to upper bound"
    )
    reshaped = [(depth, row.reshaped_norm) for depth, row in known if row.reshaped_norm is not None]
    axes.plot(*(zip(*reshaped, strict=True) if reshaped else ([], [])), "D", color="C1", fillstyle="none",
              label="reshaped norm")  # fmt: skip
    axes.set(xlabel="number of the layer, from the input on", ylabel="norm")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    drawn = [value for _, row in known for value in (row.lower, row.reshaped_norm) if value]
    set_scale(axes, scale, min(drawn, default=math.inf))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return Plot(figure, axes)


def plot_shares(rows: Sequence[Any], figure: Any = None, scale: Literal["linear", "log"] = "linear") -> Plot:
    """Draw the layers with the largest shares of a comparison, in the order of the shares.

    Parameters
    ----------
    rows : sequence of DifferenceReport
    figure : matplotlib.figure.Figure, optional
        An empty figure, made with `pyplot` by default.
    scale : "linear" or "log"
        The axis of the shares.
    """
    known = sorted((row for row in rows if row.share and math.isfinite(row.share)), key=lambda row: -row.share)
    shown = known[:MOST_BARS]
    figure = empty_figure(figure, (WIDTH, BAR_HEIGHT * max(3, len(shown)) + AROUND_BARS), scale)
    axes = figure.subplots()
    more = f"\n{len(known) - len(shown)} layers with smaller shares are not drawn" if len(known) > len(shown) else ""
    figure.suptitle(f"{getattr(rows, 'title', '')}\nthe largest relative differences{more}".strip())
    places = range(len(shown))
    axes.barh(places, [100 * row.share for row in shown], color="C0")
    axes.set_yticks(places, labels=[short_label(row.place + 1, row.name) for row in shown], fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="certified share of the layer's norm, in percent", ylabel="layer", xscale=scale)
    axes.grid(alpha=0.3, axis="x")
    if not shown:
        axes.text(0.5, 0.5, "no layer with a share has other weights", ha="center", transform=axes.transAxes)
    return Plot(figure, axes)
