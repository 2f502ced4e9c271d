"""The figure of `convsv spectrum`: sorted singular values of each layer, coloured by depth."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from convsv_core.analysis import LayerReport

MOST_IN_LEGEND = 12
TICKS = 8
LONGEST_NAME = 28
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
    buffer = io.BytesIO()
    make_figure(reports, title).savefig(buffer, format=file_format, dpi=150)
    return buffer.getvalue()


def make_figure(reports: Sequence[LayerReport], title: str) -> Figure:
    """Figure that `draw` writes: the axes of the curves, and of the colour bar if there is one."""
    curves = [(depth, r.name, r.curve) for depth, r in enumerate(reports, start=1) if r.curve is not None]
    colours = ScalarMappable(Normalize(1, max(2, len(reports))), matplotlib.colormaps["viridis"])
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
    if not curves:
        axes.text(0.5, 0.5, "no layer has figures", ha="center", transform=axes.transAxes)
    elif len(curves) <= MOST_IN_LEGEND:
        axes.legend(fontsize="small", title="layer, from the input on")
    else:
        bar = figure.colorbar(colours, ax=axes, label="layer, from the input on")
        ticks = np.unique(np.linspace(1, len(reports), TICKS).round().astype(int))
        bar.set_ticks(list(ticks), labels=[_label(tick, reports[tick - 1].name) for tick in ticks])
        bar.ax.tick_params(labelsize="x-small")
        bar.ax.invert_yaxis()
    return figure


def _label(depth: int, name: str) -> str:
    shown = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
    return f"{depth}  {shown}"
