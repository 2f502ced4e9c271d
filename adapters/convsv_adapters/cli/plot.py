"""The figures of `--plot`: the singular values of one model, or the norms of many models over training."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from convsv_adapters.cli.options import Scale
from convsv_core.reports import Report
from convsv_core.reports.curves import better_scale, name_beside, set_scale, short_label

if TYPE_CHECKING:  # this module imports pyarrow, which a call for one model does not need
    from convsv_adapters.cli.parquet import Norm

__all__ = ["draw", "draw_norms", "make_norms_figure"]

NUMBER = r"\d+"
"""The digits of a file's name that may be a step."""

MOST_IN_LEGEND = 10
"""The largest number of layers that a legend names: matplotlib's colours. More are named at a colour bar."""

TICKS = 8
"""The number of layers that are named at a colour bar (a guess)."""

MOST_STEPS = 6
"""The largest number of intervals between the steps at an axis (a guess: numbers of six digits must not meet)."""

COLUMNS = 2
"""The largest number of panels side by side (a guess: a page's width)."""

MOST_PANELS = 60
"""The largest number of panels in a figure (a guess). A png file has at most 65536 pixels a side."""

PANEL_SIZE = (7.4, 3.8)
"""The width and the height of a panel with its legend, in inches (a guess)."""

DOTS_PER_INCH = 150
"""The resolution of a png file (a guess)."""


def draw(report: Report[Any], file_format: str, scale: Scale | None = None) -> bytes:
    """Draw the singular values of one model, as `convsv_core.Report.plot` does.

    Parameters
    ----------
    report : Report
    file_format : str
        "png", "pdf" or "svg".
    scale : "linear" or "log", optional
        The axis of the singular values. Linear by default, as in the paper.

    Returns
    -------
    bytes
        Content of the file.
    """
    return _content(report.plot(Figure(), scale=scale or "linear").figure, file_format)


def draw_norms(norms: Iterable[Norm], title: str, file_format: str, scale: Scale | None = None) -> bytes:
    """Draw each layer's norm over the steps of training, in a panel for each run.

    Parameters
    ----------
    norms : iterable of Norm
        The norms in any order.
    title : str
    file_format : str
        As for `draw`.
    scale : "linear" or "log", optional
        The axis of the norms. By default it is logarithmic where the largest norm would flatten the other curves.

    Returns
    -------
    bytes
        Content of the file.
    """
    return _content(make_norms_figure(norms, title, scale), file_format)


def _content(figure: Figure, file_format: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def make_norms_figure(norms: Iterable[Norm], title: str, scale: Scale | None = None) -> Figure:
    """Make the figure that `draw_norms` writes. A run that holds several networks has a panel for each of them."""
    panels = _by_network(norms)
    left_out = len(panels) - MOST_PANELS
    columns = min(COLUMNS, max(1, len(panels)))
    rows = max(1, math.ceil(min(len(panels), MOST_PANELS) / columns))
    figure = Figure(figsize=(PANEL_SIZE[0] * columns, PANEL_SIZE[1] * rows + 0.6), layout="constrained")
    more = f"\n{left_out} more runs are not drawn" if left_out > 0 else ""
    figure.suptitle(f"{title}\nnorm of the circular convolution at each layer's extents{more}", fontsize="medium")
    # Each panel has a part of the figure of its own, so that a long legend takes room of its panel alone.
    grid = figure.subfigures(rows, columns, squeeze=False)
    for part, (name, found) in zip(grid.flat, panels.items(), strict=False):
        _draw_run(part, name, found, scale)
    if not panels:
        axes = grid[0, 0].subplots()
        axes.text(0.5, 0.5, "no layer has figures", ha="center", transform=axes.transAxes)
    return figure


def _by_network(norms: Iterable[Norm]) -> dict[str, list[Norm]]:
    """Return the norms of each network of each run, by the name of the panel.

    Models of a run that have a step in common are of different networks. Their files' names tell them apart.
    """
    panels: dict[str, list[Norm]] = {}
    for found in _grouped(norms, lambda norm: norm.run).values():
        for name_of in (_run, _without_numbers, _without_step):
            parts = _grouped(found, name_of)
            if not any(map(_share_a_step, parts.values())):
                break
        panels |= parts
    return dict(sorted(panels.items()))


def _grouped(norms: Iterable[Norm], name_of: Callable[[Norm], str]) -> dict[str, list[Norm]]:
    groups: dict[str, list[Norm]] = {}
    for norm in norms:
        groups.setdefault(name_of(norm), []).append(norm)
    return groups


def _share_a_step(norms: Iterable[Norm]) -> bool:
    """Tell whether two models have the same step."""
    models = {(norm.step, norm.model) for norm in norms if norm.step is not None}
    return len(models) > len({step for step, _ in models})


def _run(norm: Norm) -> str:
    return norm.run


def _without_numbers(norm: Norm) -> str:
    """Return the run, and the model's name without its numbers, which are steps, epochs and the like."""
    return _panel(norm, re.sub(NUMBER, "#", _name(norm)))


def _without_step(norm: Norm) -> str:
    """Return the run, and the model's name without the step alone, as for resnet18 and resnet50."""
    name = re.sub(NUMBER, lambda found: "#" if int(found[0]) == norm.step else found[0], _name(norm))
    return _panel(norm, name)


def _panel(norm: Norm, name: str) -> str:
    """Return the name of a panel of some models of a run; the folder of the table itself has no name."""
    return name if norm.run == os.curdir else f"{norm.run}: {name}"


def _name(norm: Norm) -> str:
    return norm.model.removeprefix(norm.run).lstrip(os.sep)


def _draw_run(part: SubFigure, name: str, norms: Sequence[Norm], scale: Scale | None) -> None:
    """Draw the norms of one network over its steps."""
    axes = part.subplots()
    curves: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for norm in norms:
        curve = curves.setdefault((norm.depth, norm.layer), [])
        curve.append((len(curve) if norm.step is None else norm.step, norm.norm))
    in_order = sorted(curves)
    few = len(in_order) <= MOST_IN_LEGEND
    by_depth = ScalarMappable(Normalize(1, len(in_order)), matplotlib.colormaps["viridis"])
    for number, (depth, layer) in enumerate(in_order, start=1):
        steps, values = zip(*sorted(curves[depth, layer]), strict=True)
        colour = f"C{number - 1}" if few else by_depth.to_rgba(number)  # type: ignore[arg-type]
        marker = "." if len(set(steps)) == 1 else None
        axes.plot(steps, values, color=colour, label=short_label(depth, layer), linewidth=1.3, marker=marker)
    stepless = any(norm.step is None for norm in norms)
    axes.set(xlabel="model, in the order of names" if stepless else "training step", ylabel="operator norm")
    axes.set_title(name, fontsize="medium", loc="left")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(MOST_STEPS, integer=True))
    positive = [norm.norm for norm in norms if norm.norm > 0]
    set_scale(axes, scale or better_scale(positive), min(positive, default=math.inf))
    if few:
        name_beside(axes)
        return
    bar = part.colorbar(by_depth, ax=axes)
    bar.ax.set_title("layer, from the input on", fontsize="small", loc="left")
    ticks = np.unique(np.linspace(1, len(in_order), TICKS).round().astype(int))
    bar.set_ticks(list(ticks), labels=[short_label(*in_order[tick - 1]) for tick in ticks])
    bar.ax.tick_params(labelsize="x-small")
    bar.ax.invert_yaxis()
