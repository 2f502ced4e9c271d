"""The command `convsv norm`."""

from __future__ import annotations

from pathlib import Path

import click

from convsv_adapters.cli.options import ModelOptions, OneCall, html_option, model_options, number
from convsv_adapters.cli.output import exit_without_figures, files_of
from convsv_adapters.cli.request import Request
from convsv_core.reports import NORM, bounds_reports

__all__ = ["FIELDS", "command"]

FIELDS = NORM.fields
"""The fields of a layer in the JSON."""


@click.command("norm", cls=OneCall)
@model_options(NORM.sort_keys)
@click.option(
    "--rtol",
    type=float,
    callback=number(zero=False),
    default=1e-3,
    show_default=True,
    help="Relative gap between the bounds at which the search ends.",
)
@html_option
def command(
    model: Path | None, options: ModelOptions, json_path: Path | None, sort: str, rtol: float, html: Path | None
) -> None:
    """Certify the norm of every convolution for every input size.

    MODEL is as for `convsv spectrum`. The bounds hold for zero, valid and circular padding. A layer that repeats
    pixels in another way is listed without bounds. No bound depends on the input shape, which is needed only where
    a model must be run to find its layers.

    The exit status is 0 if some layer has figures. It is 1 if no layer has figures or something failed, and 2 if the
    call was wrong.
    """
    request = Request.of(model, options)
    report = request.report(request.reports(bounds_reports, rtol=rtol), NORM)
    request.publish(report, sort, json_path, files_of(report, html=html))
    exit_without_figures(report)
