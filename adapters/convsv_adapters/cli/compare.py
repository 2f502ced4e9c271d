"""The command `convsv compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from convsv_adapters.cli.options import (
    MODEL,
    ModelOptions,
    OneCall,
    add_options,
    html_option,
    input_range_option,
    model_options,
)
from convsv_adapters.cli.output import exit_without_figures, files_of, one_line_errors, write_results
from convsv_adapters.cli.progress import tracked
from convsv_adapters.cli.request import Request
from convsv_adapters.cli.table import show
from convsv_core import Lipschitz
from convsv_core.networks import Graph, network_graph, network_lipschitz, output_difference
from convsv_core.reports import DIFFERENCE, Comparison, difference_reports, match_layers

__all__ = ["FIELDS", "command"]

FIELDS = DIFFERENCE.fields
"""The fields of a layer in the JSON."""


def _models(command: Callable[..., Any]) -> Callable[..., Any]:
    return add_options(command, [click.argument("model", type=MODEL), click.argument("other", type=MODEL)])


def _graph(path: Path, options: ModelOptions) -> Graph:
    with one_line_errors(path):
        return network_graph(path, options=options.read_options)


def _constant(path: Path, options: ModelOptions) -> Lipschitz:
    """Return the certified Lipschitz constant of a file's network."""
    with one_line_errors(path):
        return network_lipschitz(_graph(path, options), lower=False)


def _distance(model: Path, other: Path, options: ModelOptions, input_range: tuple[float, float] | None) -> float | None:
    """Return the bound of the distance between the outputs of two files' networks, if there is a range."""
    if input_range is None:
        return None
    first, second = _graph(model, options), _graph(other, options)
    with one_line_errors(model):
        return output_difference(first, second, input_range)


@click.command("compare", cls=OneCall)
@model_options(DIFFERENCE.sort_keys, _models, default_sort="share")
@html_option
@click.option(
    "--lipschitz", is_flag=True, help="Also certify the Lipschitz constant of each network, if both files hold graphs."
)
@input_range_option("The distance between the outputs then has a bound, if the networks have one structure.")
def command(
    model: Path,
    other: Path,
    options: ModelOptions,
    json_path: Path | None,
    sort: str,
    html: Path | None,
    lipschitz: bool,
    input_range: tuple[float, float] | None,
) -> None:
    """Certify how far apart the weights of two networks are.

    Each layer has its own figures. MODEL and OTHER are as for `convsv spectrum`, and may be of different formats: a
    network and the same network quantised, fine-tuned, pruned or exported. Layers are matched by name. Layers that one
    network alone has, or that differ in shape or geometry, are named below the table, and under "unmatched" in the
    JSON.

    difference is a certified bound of the norm of the layer whose weights are the difference. share is a bound of that
    norm divided by the norm of MODEL's layer. Both include rounding, and with zero padding they hold for every input
    size.

    The exit status is 0 if some layer has figures. It is 1 if no layer has figures or something failed, and 2 if the
    call was wrong.
    """
    first, second = Request.of(model, options), Request.of(other, options)
    matching = match_layers(first.layers, second.layers)
    rows = difference_reports(matching.pairs, first.backend, dtype=options.dtype, device=options.device)
    found = list(tracked(rows, len(matching.pairs)))
    report = Comparison(
        found,
        title=f"{first.label} and {second.label}, with {first.backend.name}",
        about={"model": str(model), "other": str(other), "backend": first.backend.name},
        unmatched=matching.unmatched,
        lipschitz=[_constant(path, options) for path in (model, other)] if lipschitz else (),
        output_difference=_distance(model, other, options, input_range),
    ).ordered("share")
    write_results(report.document(), json_path, lambda: show(report, sort), files_of(report, html=html))
    exit_without_figures(report)
