"""The figures of `convsv spectrum`: layers coloured by depth, their singular values or their norms over training."""

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

if TYPE_CHECKING:  # its library is needed for many models only
    from convsv_adapters._spectra import Norm

MOST_IN_LEGEND = 12
TICKS = 8
LONGEST_NAME = 28
DASHES = ("-", "--", ":", "-.")
DECADES = 5  # that a logarithmic axis goes down from the largest value; singular operators have no end


def draw(reports: Sequence[LayerReport], title: str, file_format: str) -> bytes:
    """Draw singular values against rank as a share of their number: figure 1 of Sedghi, Gupta and Long.

    Up to `MOST_IN_LEGEND` layers are named in a legend; of more, some at a colour bar. The axis of the values
    is linear as in the paper, and logarithmic where one layer's norm would flatten the other curves.

    Parameters
    ----------
    reports : sequence of LayerReport
        In the order of the network; those without figures are left out.
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
    """Draw each layer's norm over the steps of training, every run with a dash of its own.

    Parameters
    ----------
    norms : iterable of Norm
        In any order. Those of a run without steps are drawn over their places in it.
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
    figure.savefig(buffer, format=file_format, dpi=150)
    return buffer.getvalue()


def make_norms_figure(norms: Iterable[Norm], title: str) -> Figure:
    """Figure that `draw_norms` writes: the axes of the curves, and of the colour bar if there is one."""
    curves: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for norm in norms:
        curve = curves.setdefault((norm.run, norm.depth, norm.layer), [])
        curve.append((len(curve) if norm.step is None else norm.step, norm.norm))
    runs = list(dict.fromkeys(run for run, _, _ in curves))
    names = {depth: name for _, depth, name in sorted(curves, key=lambda key: key[1])}
    colours = _by_depth(max(names, default=1))
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
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
    axes.set(xlabel="step", ylabel="operator norm")
    axes.set_title(f"{title}\ncircular convolution at each layer's extents", fontsize="medium")
    axes.grid(alpha=0.3)
    everything = [value for curve in curves.values() for _, value in curve if value > 0]
    if everything and max(everything) > 10 * np.median(everything):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _name_layers(figure, axes, colours, names)
    if len(runs) > 1:
        _name_runs(axes, runs)
    return figure


def _name_runs(axes: Axes, runs: Sequence[str]) -> None:
    """A second legend, below the first."""
    layers = axes.get_legend()
    shown = [Line2D([], [], color="0.3", linestyle=DASHES[n % len(DASHES)], label=run) for n, run in enumerate(runs)]
    axes.legend(handles=shown[:MOST_IN_LEGEND], fontsize="small", title="run", loc="lower right")
    if layers is not None:
        axes.add_artist(layers)


def make_figure(reports: Sequence[LayerReport], title: str) -> Figure:
    """Figure that `draw` writes: the axes of the curves, and of the colour bar if there is one."""
    curves = [(depth, r.name, r.curve) for depth, r in enumerate(reports, start=1) if r.curve is not None]
    colours = _by_depth(len(reports))
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for depth, name, curve in curves:
        share = np.linspace(0, 1, len(curve)) if len(curve) > 1 else np.asarray([0.0])
        marker = "o" if len(curve) == 1 else None
        colour = colours.to_rgba(depth)  # type: ignore[arg-type]  # the stubs know of arrays only
        axes.plot(share, curve, color=colour, label=_label(depth, name), linewidth=1.2, marker=marker)
    axes.set(xlabel="rank / number of singular values", ylabel="singular value", xlim=(0, 1))
    axes.set_title(f"{title}\ncircular convolution at each layer's extents", fontsize="medium")
    axes.grid(alpha=0.3)
    norms = [float(curve[0]) for _, _, curve in curves if curve[0] > 0]
    if norms and max(norms) > 10 * np.median(norms):
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(norms) / 10**DECADES)
    else:
        axes.set_ylim(bottom=0)
    if len(curves) <= MOST_IN_LEGEND:
        _name_layers(figure, axes, colours, {depth: name for depth, name, _ in curves})
    else:
        _name_layers(figure, axes, colours, {depth: r.name for depth, r in enumerate(reports, start=1)})
    return figure


def _by_depth(layers: int) -> ScalarMappable:
    return ScalarMappable(Normalize(1, max(2, layers)), matplotlib.colormaps["viridis"])


def _name_layers(figure: Figure, axes: Axes, colours: ScalarMappable, names: Mapping[int, str]) -> None:
    """Say which layers, by their depth, the colours stand for: in a legend, or of many some at a colour bar."""
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


def _label(depth: int, name: str) -> str:
    shown = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
    return f"{depth}  {shown}"
