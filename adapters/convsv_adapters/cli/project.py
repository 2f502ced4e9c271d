"""The command `convsv project`."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

import click

from convsv_adapters.cli.options import ModelOptions, OneCall, model_options, number, output_file
from convsv_adapters.cli.request import Request
from convsv_core.reports import project_layers, projection_view
from convsv_core.training import METHODS, ProjectionMethod

__all__ = ["FIELDS", "command"]

FIELDS = projection_view(1.0, "dykstra").fields
"""The fields of a layer in the JSON."""


@click.command("project", cls=OneCall)
@model_options(projection_view(1.0, "dykstra").sort_keys)
@click.option("--bound", type=float, callback=number(zero=True), required=True, help="Largest norm of a layer.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    callback=output_file(either=True),
    required=True,
    help="File to write the network to, in its own format. For the index of several files: a folder, or an index.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="dykstra",
    show_default=True,
    help="dykstra: the nearest kernel. alternating, newton-schulz: a near kernel. rescale: the kernel times a factor.",
)
@click.option(
    "--rtol",
    type=float,
    callback=number(zero=False),
    default=1e-2,
    show_default=True,
    help="dykstra: relative gap of the squared distance to the least one. Other methods: relative excess to stop at.",
)
@click.option(
    "--max-iterations",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="After so many iterations a layer is scaled to the bound.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Project only the layers whose names match, as 'block1.*'. May be given more than once.",
)
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists, even if it is MODEL.")
def command(
    model: Path | None,
    options: ModelOptions,
    json_path: Path | None,
    sort: str,
    bound: float,
    output: Path,
    method: ProjectionMethod,
    rtol: float,
    max_iterations: int,
    only: Sequence[str],
    force: bool,
) -> None:
    """Project every convolution onto the kernels of bounded norm.

    MODEL is as for `convsv spectrum`. OUTPUT is the same network in the same format, with other weights and nothing
    else changed. If MODEL is the index of several files, OUTPUT is a folder, or the name of an index, beside which the
    files are written.

    Each layer's norm, with the layer's own padding and for every input size, is then at most the bound. This is
    certified for the weights as they are stored. A layer within the bound keeps its weights bit for bit. Where
    reflected or repeated pixels make the norm depend on the extents, the extents are those of the input shape.

    Nothing is written unless every layer, or every layer that --only selects, is proved to be within the bound.
    Weights that the file does not store as such cannot be replaced: quantised or normalised weights, and weights that
    nodes compute.

    The exit status is 0 if OUTPUT was written. It is 1 if a layer stays above the bound or something failed, and 2 if
    the call was wrong.
    """
    request = Request.of(model, options)
    destination = request.destination(output, force=force)
    names = [layer.name for layer in request.layers]
    if lost := [pattern for pattern in only if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]:
        raise click.BadParameter(f"no convolution is called {lost[0]!r}", param_hint="--only")
    reports = request.reports(
        project_layers,
        bound,
        method=method,
        rtol=rtol,
        max_iterations=max_iterations,
        selected=lambda name: not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only),
    )
    failed = [report.name for report in reports if report.failed]
    if not failed:
        request.write(reports, destination)
    about = {"output": None if failed else str(destination.targets[0]), "bound": bound, "method": method}
    request.publish(request.report(reports, projection_view(bound, method), about), sort, json_path)
    if failed:
        shown = ", ".join(failed[:3]) + (f" and {len(failed) - 3} more" if len(failed) > 3 else "")
        raise click.ClickException(f"{output} was not written: no norm of at most {bound:g} for {shown}; see the notes")
