"""The figures of `convsv spectrum`: singular values, or norms over training, with layers coloured by depth."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from convsv_core.reports import LayerReport

if TYPE_CHECKING:  # this module imports pyarrow, which a call for one model does not need
    from convsv_adapters.cli.parquet import Norm

__all__ = ["draw", "draw_norms", "make_figure", "make_norms_figure"]

MOST_IN_LEGEND = 12
"""The largest number of lines that a legend names (a guess); more layers are named at a colour bar."""

TICKS = 8
"""The number of layers that are named at a colour bar (a guess)."""

LONGEST_NAME = 28
"""The largest number of characters of a layer's name that is shown (a guess)."""

DASHES = ("-", "--", ":", "-.")
"""The line styles of the runs, which repeat after four: matplotlib has no more by name."""

DECADES = 5
"""The number of decades that a logarithmic axis of singular values shows below the largest norm (a guess).

A singular operator has values of 0, so that the values themselves do not end the axis.
"""

LOG_RATIO = 10
"""The ratio of the largest value to the median from which an axis is logarithmic (a guess)."""

DOTS_PER_INCH = 150
"""The resolution of a png file (a guess)."""


def draw(reports: Sequence[LayerReport], title: str, file_format: str) -> bytes:
    """Draw singular values against rank as a share of their number: figure 1 of Sedghi, Gupta and Long.

    Up to `MOST_IN_LEGEND` layers are named in a legend. If there are more, some are named at a colour bar. The axis of
    the values is linear as in the paper, and logarithmic where one layer's norm would flatten the other curves.

    Parameters
    ----------
    reports : sequence of LayerReport
        The reports in the order of the network. A report without figures has no curve.
    title : str
    file_format : str
        "png", "pdf" or "svg".

    Returns
    -------
    bytes
        Content of the file.
    """
    return _content(make_figure(reports, title), file_format)


def draw_norms(norms: Iterable[Norm], title: str, file_format: str) -> bytes:
    """Draw each layer's norm over the steps of training, with one line style for each run.

    Parameters
    ----------
    norms : iterable of Norm
        The norms in any order. In a run without steps a norm is drawn over its place in the run.
    title, file_format : str
        As for `draw`.

    Returns
    -------
    bytes
        Content of the file.
    """
    return _content(make_norms_figure(norms, title), file_format)


def _content(figure: Figure, file_format: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def make_figure(reports: Sequence[LayerReport], title: str) -> Figure:
    """Make the figure that `draw` writes. Its axes are those of the curves, and of the colour bar if there is one."""
    curves = [(depth, r.name, r.curve) for depth, r in enumerate(reports, start=1) if r.curve is not None]
    colours = _by_depth(len(reports))
    figure, axes = _empty_figure(title, "rank / number of singular values", "singular value")
    axes.set_xlim(0, 1)
    for depth, name, curve in curves:
        share = np.linspace(0, 1, len(curve)) if len(curve) > 1 else np.asarray([0.0])
        marker = "o" if len(curve) == 1 else None
        colour = colours.to_rgba(depth)  # type: ignore[arg-type]  # the stubs know of arrays only
        axes.plot(share, curve, color=colour, label=_label(depth, name), linewidth=1.2, marker=marker)
    norms = [float(curve[0]) for _, _, curve in curves]
    if _scale(axes, norms):
        axes.set_ylim(bottom=max(norms) / 10**DECADES)
    if len(curves) <= MOST_IN_LEGEND:
        _name_layers(figure, axes, colours, {depth: name for depth, name, _ in curves})
    else:
        _name_layers(figure, axes, colours, {depth: r.name for depth, r in enumerate(reports, start=1)})
    return figure


def make_norms_figure(norms: Iterable[Norm], title: str) -> Figure:
    """Make the figure that `draw_norms` writes, with axes like those of `make_figure`."""
    curves: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for norm in norms:
        curve = curves.setdefault((norm.run, norm.depth, norm.layer), [])
        curve.append((len(curve) if norm.step is None else norm.step, norm.norm))
    runs = list(dict.fromkeys(run for run, _, _ in curves))
    names = {depth: name for _, depth, name in sorted(curves, key=lambda key: key[1])}
    colours = _by_depth(max(names, default=1))
    figure, axes = _empty_figure(title, "step", "operator norm")
    for (run, depth, _), curve in sorted(curves.items(), key=lambda item: (runs.index(item[0][0]), item[0][1])):
        steps, values = zip(*sorted(curve), strict=True)
        axes.plot(
            steps,
            values,
            color=colours.to_rgba(depth),  # type: ignore[arg-type]  # the stubs know of arrays only
            linestyle=DASHES[runs.index(run) % len(DASHES)],
            label=_label(depth, names[depth]) if run == runs[0] else None,
            linewidth=1.2,
            marker="." if len(curve) == 1 else None,
        )
    _scale(axes, [value for curve in curves.values() for _, value in curve])
    _name_layers(figure, axes, colours, names)
    if len(runs) > 1:
        _name_runs(axes, runs)
    return figure


def _empty_figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(f"{title}\ncircular convolution at each layer's extents", fontsize="medium")
    axes.grid(alpha=0.3)
    return figure, axes


def _scale(axes: Axes, values: Sequence[float]) -> bool:
    """Make the axis of the values logarithmic where the largest would flatten the others, and return whether it is."""
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and bool(max(positive) > LOG_RATIO * np.median(positive))
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return logarithmic


def _by_depth(layers: int) -> ScalarMappable:
    return ScalarMappable(Normalize(1, max(2, layers)), matplotlib.colormaps["viridis"])


def _name_layers(figure: Figure, axes: Axes, colours: ScalarMappable, names: Mapping[int, str]) -> None:
    """Name the layers, which `names` maps from their depths, in a legend or at a colour bar."""
    if not names:
        axes.text(0.5, 0.5, "no layer has figures", ha="center", transform=axes.transAxes)
    elif len(names) <= MOST_IN_LEGEND:
        axes.legend(fontsize="small", title="layer, from the input on")
    else:
        bar = figure.colorbar(colours, ax=axes, label="layer, from the input on")
        depths = np.asarray(list(names))
        ticks = depths[np.unique(np.linspace(0, len(names) - 1, TICKS).round().astype(int))]
        bar.set_ticks(list(ticks), labels=[_label(tick, names[tick]) for tick in ticks])
        bar.ax.tick_params(labelsize="x-small")
        bar.ax.invert_yaxis()


def _name_runs(axes: Axes, runs: Sequence[str]) -> None:
    """Name the runs in a second legend, below the legend of the layers."""
    layers = axes.get_legend()
    shown = [Line2D([], [], color="0.3", linestyle=DASHES[n % len(DASHES)], label=run) for n, run in enumerate(runs)]
    axes.legend(handles=shown[:MOST_IN_LEGEND], fontsize="small", title="run", loc="lower right")
    if layers is not None:
        axes.add_artist(layers)


def _label(depth: int, name: str) -> str:
    shown = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
    return f"{depth}  {shown}"
