"""Lay out and draw the efficiency experiment of the paper: time over the input's extent, and over the channels.

Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019, figures of section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.comparison import ERROR, time_columns
from benchmarks.shapes import Shape, square
from benchmarks.singular_values import SpectrumRow
from benchmarks.tables import Column, duration, figures, or_dash, words

__all__ = ["Sweep", "SweepRows", "columns", "draw", "make_sweeps"]

CHANNELS, EXTENT = 16, 16
"""Channels of the sweep over extents, and extent of the sweep over channels."""


@dataclass(frozen=True)
class Sweep:
    """List the convolutions along one axis of a plot.

    Attributes
    ----------
    name : str
        The quantity that changes: "extent" or "channels".
    title : str
        The quantities that stay the same.
    shapes : tuple of Shape
    dense_side : int
        Largest whole matrix that is decomposed.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    dense_side: int

    def position(self, row: SpectrumRow) -> int:
        """Return where a measurement stands on the axis."""
        return row.input_shape[0] if self.name == "extent" else row.kernel_shape[-1]

    def has_dense(self, shape: Shape) -> bool:
        """Return whether the whole matrix is small enough to be decomposed."""
        return math.prod(shape.extents) * shape.inputs <= self.dense_side


class SweepRows(NamedTuple):
    """Hold a sweep and its measurements."""

    sweep: Sweep
    rows: list[SpectrumRow]


def make_sweeps(extents: Sequence[int], widths: Sequence[int], dense_side: int) -> tuple[Sweep, Sweep]:
    """Return the two sweeps of 3 x 3 kernels: over these extents, and over these channels."""
    along = tuple(square("sweep", 3, CHANNELS, CHANNELS, extent, times=0) for extent in extents)
    across = tuple(square("sweep", 3, width, width, EXTENT, times=0) for width in widths)
    return (
        Sweep("extent", f"3x3, {CHANNELS} channels", along, dense_side),
        Sweep("channels", f"3x3, {EXTENT} x {EXTENT} input", across, dense_side),
    )


def columns(sweep: Sweep) -> tuple[Column, ...]:
    """Return the columns of the table of one sweep."""
    return (
        words("library"),
        words(sweep.title, lambda row: row.label),
        *time_columns("baseline"),
        figures("whole matrix", lambda row: or_dash(duration, row.dense_seconds)),
        ERROR,
    )


def draw(path: Path, measured: Sequence[SweepRows]) -> None:
    """Write the figure: one row of plots for each library, one column for each sweep.

    Parameters
    ----------
    path : Path
        Its suffix says the format.
    measured : sequence of SweepRows
        Both sweeps for each library.
    """
    wide = len({sweep.name for sweep, _ in measured})
    high = math.ceil(len(measured) / wide)
    figure = Figure(figsize=(5 * wide, 3.8 * high), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False)
    for axes, (sweep, points) in zip(grid.flat, measured, strict=True):
        _draw_sweep(axes, sweep, points)
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_sweep(axes: Axes, sweep: Sweep, rows: Sequence[SpectrumRow]) -> None:
    places = [sweep.position(row) for row in rows]
    axes.loglog(places, [row.ours_seconds for row in rows], "o-", label="convsv")
    axes.loglog(places, [row.baseline_seconds for row in rows], "s-", label="FFT, then SVDs")
    guessed = [(place, row.baseline_seconds) for place, row in zip(places, rows, strict=True) if row.extrapolated]
    if guessed:
        axes.loglog(*zip(*guessed, strict=True), "s", color="white", markersize=3, label="extrapolated")
    dense = [(place, row.dense_seconds) for place, row in zip(places, rows, strict=True) if row.dense_seconds]
    if dense:
        axes.loglog(*zip(*dense, strict=True), "^-", label="SVD of the whole matrix")
    axes.set_xticks(places)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    library = rows[0].library if rows else ""
    axes.set(xlabel="extent n of an n x n input" if sweep.name == "extent" else "channels", ylabel="seconds")
    axes.set_title(f"{library}: {sweep.title}", fontsize="medium")
    axes.grid(alpha=0.3)
