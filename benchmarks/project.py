"""``python -m benchmarks project``: clip and project beside the paper's clip and plain algorithms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.clipping import CLIP, CLIP_GROUPS, QUICK_CLIP_GROUPS, StepRow, summarise
from benchmarks.clipping import measure as measure_steps
from benchmarks.command import comparison_options, networks_option, progress
from benchmarks.libraries import open_library
from benchmarks.machine import describe, load_average
from benchmarks.projection import GAP, SHARE, ProjectionRow, find_projected
from benchmarks.projection import measure as measure_projections
from benchmarks.shapes import select
from benchmarks.singular_values import Effort

EFFORT = Effort(repeats=3, full_seconds=2.0, sample_seconds=1.0)
QUICK_EFFORT = Effort(repeats=1, full_seconds=0.5, sample_seconds=0.1)


@click.command()
@comparison_options(plot="Draw the ratios of clip, and distance over time of project")
@networks_option
def project(
    quick: bool,
    backends: Sequence[str],
    device: str | None,
    only: str | None,
    repeats: int | None,
    json_path: Path | None,
    plot: Path | None,
    networks: Sequence[Path],
) -> None:
    """Time clip and project against the paper's clip, and project by every method.

    On the layers of ResNet-32 and ResNet-50; every method of project on Gaussian kernels and on layers of
    trained networks, beside one clip-and-cut step and Dykstra's algorithm as it stands.
    """
    default = QUICK_EFFORT if quick else EFFORT
    effort = replace(default, repeats=repeats or default.repeats)
    load_before = load_average()
    libraries = [open_library(name, device) for name in dict.fromkeys(backends)]
    clipped = {group: select(shapes, only) for group, shapes in (QUICK_CLIP_GROUPS if quick else CLIP_GROUPS).items()}
    projected = {group: select(shapes, only) for group, shapes in find_projected(networks, quick=quick).items()}
    if not any((*clipped.values(), *projected.values())):
        raise click.BadParameter(f"{only!r} is in the name of no layer", param_hint="--only")
    steps: list[StepRow] = []
    projections: list[ProjectionRow] = []
    with progress() as tell:
        for library in libraries:
            for group, shapes in clipped.items():
                for number, shape in enumerate(shapes, start=1):
                    tell(f"{library.name} clip, {group} {number}/{len(shapes)} {shape.name}")
                    steps.extend(measure_steps(library, group, shape, effort))
            for group, shapes in projected.items():
                for number, shape in enumerate(shapes, start=1):
                    tell(f"{library.name} project, {group} {number}/{len(shapes)} {shape.name}")
                    projections.extend(measure_projections(library, group, shape, effort, quick=quick))
    machine = describe(libraries) | {"load_average": [load_before, load_average()]}
    summaries = summarise(steps)
    tables.show_machine(machine, {})
    if steps:
        tables.show_steps(steps)
        tables.show_step_summary(summaries)
    if projections:
        tables.show_projections(projections)
    if plot is not None:
        draw(plot, steps, projections)
    if json_path is not None:
        content = {
            "benchmark": "project",
            "arguments": {"quick": quick, "only": only, "device": device, "share": SHARE, "gap": GAP} | asdict(effort),
            "machine": machine,
            "clip": [asdict(row) for row in steps],
            "clip_summary": [asdict(summary) for summary in summaries],
            "projections": [asdict(row) for row in projections],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")


def draw(path: Path, steps: Sequence[StepRow], projections: Sequence[ProjectionRow]) -> None:
    """Write the figure: the ratios of every case and layer, and distance over time of every method."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_ratios(left, steps)
    _draw_projections(right, projections)
    figure.savefig(path, dpi=150)


def _draw_ratios(axes: Axes, steps: Sequence[StepRow]) -> None:
    layers = list(dict.fromkeys((row.library, row.label) for row in steps))
    for number, (question, case) in enumerate(dict.fromkeys((row.question, row.case) for row in steps)):
        points = [
            (row.ratio, layers.index((row.library, row.label)))
            for row in steps
            if (row.question, row.case) == (question, case)
        ]
        marker = "o" if question == CLIP else "x"
        axes.semilogx(*zip(*points, strict=True), marker, color=f"C{number}", label=f"{question}: {case}")
    axes.set(xlabel="time of the paper's clip / time of ours", title="clip, and the check of a feasible kernel")
    axes.set_yticks(range(len(layers)), [f"{library} {label}" for library, label in layers], fontsize="xx-small")
    axes.grid(alpha=0.3)
    if layers:
        axes.legend(fontsize="x-small")


def _draw_projections(axes: Axes, rows: Sequence[ProjectionRow]) -> None:
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        points = [(row.seconds, row.distance_ratio) for row in rows if row.method == method]
        axes.loglog(*zip(*points, strict=True), "o", color=f"C{number}", alpha=0.7, label=method)
    axes.set(xlabel="seconds", ylabel="distance / that of dykstra", title="project")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize="x-small")
