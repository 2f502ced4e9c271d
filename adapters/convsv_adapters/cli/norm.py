"""The command `convsv norm`."""

from __future__ import annotations

from pathlib import Path

import click

from convsv_adapters.cli.options import ModelOptions, model_options, number
from convsv_adapters.cli.output import GEOMETRY_FIELDS, exit_without_figures
from convsv_adapters.cli.request import Request
from convsv_adapters.cli.table import NORM
from convsv_core.reports import bounds_reports

__all__ = ["FIELDS", "command"]

FIELDS = (*GEOMETRY_FIELDS, "lower", "upper", "frequency", "evaluations", "converged", "reshaped_norm", "note")
"""The fields of a layer in the JSON."""


@click.command("norm")
@model_options(NORM.sort_keys)
@click.option(
    "--rtol",
    type=float,
    callback=number(zero=False),
    default=1e-3,
    show_default=True,
    help="Relative gap between the bounds at which the search ends.",
)
def command(model: Path | None, options: ModelOptions, json_path: Path | None, sort: str, rtol: float) -> None:
    """Certify the norm of every convolution for every input size.

    MODEL is as for `convsv spectrum`. The bounds hold for zero, valid and circular padding. A layer that repeats
    pixels in another way is listed without bounds. No bound depends on the input shape, which is needed only where
    a model must be run to find its layers.

    The exit status is 0 if some layer has figures. It is 1 if no layer has figures or something failed, and 2 if the
    call was wrong.
    """
    request = Request.of(model, options)
    reports = request.reports(bounds_reports, rtol=rtol)
    request.publish(reports, FIELDS, NORM, sort, json_path)
    exit_without_figures(reports)
