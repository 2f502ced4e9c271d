"""``python -m benchmarks project``: time clip and project beside the paper's clip and plain algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import clipping, projection
from benchmarks.clipping import CLIP, CLIP_GROUPS, ClipRow
from benchmarks.command import (
    Options,
    Size,
    comparison_options,
    each_layer,
    networks_option,
    progress,
    select_groups,
    write_json,
)
from benchmarks.comparison import Effort, group_by
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.projection import AMOUNTS, SHARE, ProjectionRow, find_projected
from benchmarks.tables import show_table

__all__ = ["EFFORTS", "draw", "project"]

EFFORTS = {
    Size.FULL: Effort(repeats=3, full_seconds=2.0, sample_seconds=1.0),
    Size.QUICK: Effort(repeats=1, full_seconds=0.5, sample_seconds=0.1),
    Size.TINY: Effort(repeats=1, full_seconds=0.5, sample_seconds=0.005),
}


@click.command()
@comparison_options(plot="Draw the ratios of clip, and distance over time of project")
@networks_option
def project(options: Options, networks: Sequence[Path]) -> None:
    """Time clip and project against the paper's clip, and project by every method.

    The layers of clip are those of ResNet-32 and ResNet-50. Every method of project runs on Gaussian kernels and on
    layers of trained networks, beside one clip-and-cut step and Dykstra's algorithm as it stands.
    """
    effort, amount = options.effort(EFFORTS[options.size]), AMOUNTS[options.size]
    load_before = load_average()
    libraries = options.open_libraries()
    clipped = select_groups(CLIP_GROUPS[options.size], options.only)
    projected = select_groups(find_projected(networks, options.size), options.only)
    if not any((*clipped.values(), *projected.values())):
        raise click.BadParameter(f"{options.only!r} is in the name of no layer", param_hint="--only")
    clips: list[ClipRow] = []
    projections: list[ProjectionRow] = []
    with progress() as tell:
        for layer in each_layer(tell, libraries, clipped, "clip, "):
            clips.extend(clipping.measure(layer, effort))
        for layer in each_layer(tell, libraries, projected, "project, "):
            projections.extend(projection.measure(layer, amount, effort.repeats))
    machine = describe(libraries, load_before)
    summaries = clipping.summarise(clips)
    show_machine(machine)
    if clips:
        show_table(clips, clipping.ROW_COLUMNS, clipping.EXPLANATION)
        show_table(summaries, clipping.SUM_COLUMNS)
    if projections:
        show_table(projections, projection.COLUMNS, projection.EXPLANATION)
    if options.plot is not None:
        draw(options.plot, clips, projections)
    write_json(
        options.json_path,
        "project",
        options.arguments() | {"share": SHARE, "gap": amount.gap} | asdict(effort),
        machine=machine,
        clip=clips,
        clip_summary=summaries,
        projections=projections,
    )


def draw(path: Path, clips: Sequence[ClipRow], projections: Sequence[ProjectionRow]) -> None:
    """Write the figure: the ratios of every case and layer, and distance over time of every method."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_ratios(left, clips)
    _draw_projections(right, projections)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def _draw_ratios(axes: Axes, rows: Sequence[ClipRow]) -> None:
    layers = list(group_by(rows, "library", "label"))
    for number, ((question, case), members) in enumerate(group_by(rows, "question", "case").items()):
        axes.semilogx(
            [row.ratio for row in members],
            [layers.index((row.library, row.label)) for row in members],
            "o" if question == CLIP else "x",
            color=f"C{number}",
            label=f"{question}: {case}",
        )
    axes.set(xlabel="time of the paper's clip / time of ours", title="clip, and the check of a feasible kernel")
    axes.set_yticks(range(len(layers)), [f"{library} {label}" for library, label in layers], fontsize="xx-small")


def _draw_projections(axes: Axes, rows: Sequence[ProjectionRow]) -> None:
    for number, ((method,), members) in enumerate(group_by(rows, "method").items()):
        seconds, distances = [row.seconds for row in members], [row.distance_ratio for row in members]
        axes.loglog(seconds, distances, "o", color=f"C{number}", alpha=0.7, label=method)
    axes.set(xlabel="seconds", ylabel="distance / that of dykstra", title="project")
