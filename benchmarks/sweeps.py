"""The efficiency experiment of the paper: time over the input's extent, and over the channels.

Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019, figures of section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.shapes import Shape, square
from benchmarks.singular_values import Row

CHANNELS, EXTENT = 16, 16
EXTENTS = (4, 8, 16, 32, 64, 128, 256)
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
QUICK_EXTENTS = (4, 8, 16)
QUICK_WIDTHS = (1, 4, 16)
DENSE_SIDE, QUICK_DENSE_SIDE = 4096, 512
"""Largest whole matrix that is decomposed."""


@dataclass(frozen=True)
class Sweep:
    """Convolutions along one axis of a plot.

    Attributes
    ----------
    name : str
        What changes: "extent" or "channels".
    title : str
        What stays.
    shapes : tuple of Shape
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]

    def position(self, shape_or_row: Shape | Row) -> int:
        """Where a measurement stands on the axis."""
        if isinstance(shape_or_row, Shape):
            return shape_or_row.extents[0] if self.name == "extent" else shape_or_row.inputs
        return shape_or_row.input_shape[0] if self.name == "extent" else shape_or_row.kernel_shape[-1]


def make_sweeps(*, quick: bool) -> tuple[Sweep, Sweep]:
    """Return the two sweeps of 3 x 3 kernels; `quick` leaves the large ones out."""
    extents, widths = (QUICK_EXTENTS, QUICK_WIDTHS) if quick else (EXTENTS, WIDTHS)
    return (
        Sweep(
            "extent",
            f"3x3, {CHANNELS} channels",
            tuple(square("sweep", 3, CHANNELS, CHANNELS, extent, times=0) for extent in extents),
        ),
        Sweep(
            "channels",
            f"3x3, {EXTENT} x {EXTENT} input",
            tuple(square("sweep", 3, width, width, EXTENT, times=0) for width in widths),
        ),
    )


def dense_is_possible(shape: Shape, *, quick: bool) -> bool:
    """Whether the whole matrix is small enough to be decomposed."""
    return math.prod(shape.extents) * shape.inputs <= (QUICK_DENSE_SIDE if quick else DENSE_SIDE)


def draw(path: Path, measured: Sequence[tuple[Sweep, Sequence[Row]]]) -> None:
    """Write the figure: one row of plots a library, one column a sweep.

    Parameters
    ----------
    path : Path
        Its suffix says the format.
    measured : sequence of (Sweep, sequence of Row)
        Both sweeps for each library.
    """
    columns = len({sweep.name for sweep, _ in measured})
    rows = math.ceil(len(measured) / columns)
    figure = Figure(figsize=(5 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (sweep, points) in zip(grid.flat, measured, strict=True):
        _draw_sweep(axes, sweep, points)
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_sweep(axes: Axes, sweep: Sweep, rows: Sequence[Row]) -> None:
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
