"""The command `convsv spectrum`."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from convsv_adapters.cli.many_options import LOCAL, ManyOptions, many_options
from convsv_adapters.cli.options import MODEL, ModelOptions, Scale, html_option, model_options, plot_options
from convsv_adapters.cli.output import exit_without_figures, files_of, import_for_option
from convsv_adapters.cli.request import Request
from convsv_core.reports import BOUNDS, SPECTRUM, Bounds, layer_reports, spectrum_view

__all__ = ["FIELDS", "command"]

FIELDS = SPECTRUM.fields
"""The fields of a layer in the JSON."""

EXTENTS = (
    " extents: those that the file states, or else those that a note names; --input-shape gives others, as in "
    "--input-shape 3,224,224."
)
"""The end of the legend of a call without an input shape."""


@click.command("spectrum")
@model_options(SPECTRUM.sort_keys, click.argument("models", metavar="[MODEL]...", nargs=-1))
@click.option(
    "--bounds",
    type=click.Choice(BOUNDS),
    default="upper",
    show_default=True,
    help="Certified bounds of the norm with the layer's own padding. upper: an upper bound from the supremum over all "
    "frequencies. both: the exact norm too, which takes seconds for each layer.",
)
@plot_options
@html_option
@many_options
def command(
    models: Sequence[str],
    options: ModelOptions,
    many: ManyOptions | None,
    json_path: Path | None,
    sort: str,
    plot: Path | None,
    scale: Scale | None,
    html: Path | None,
    bounds: Bounds,
) -> None:
    """Compute the singular values of every convolution.

    MODEL is an ONNX model, a PyTorch checkpoint, a safetensors file, the index of a model in several files, a Keras
    model or an .npz archive. Every network of a checkpoint is read, unless --network chooses one. Without MODEL,
    convsv reads a small network that comes along. The figures belong to the circular convolution at the layer's
    extents, whatever padding the layer has. norm is the largest singular value, min the smallest one, and cond. is
    norm / min. stable rank is the sum of the squared singular values, divided by the largest square. reshaped norm is
    the norm of the kernel as a matrix, and factor is norm / reshaped norm.

    lower and upper (norm_lower and norm_upper in the JSON) are certified bounds of the norm with the padding that the
    layer declares. Under zero padding upper holds for every input size, and as a rule it is within 1 % of the least
    such bound. lower is the norm at the layer's own extents, less a rounding error bound. It is computed with --bounds
    both.

    A model may leave axes of its input free, such as time or height. Then the figures belong to extents that the note
    of each layer states; --input-shape gives others.

    With --scheduler and --out there may be many models: files, and quoted patterns such as 'run/*.safetensors', that
    all workers can read. Every layer of every model is a row of the table. The run of a model is its folder, relative
    to the folder of the table. The step is the number behind "step" in the file's name, or else the last number in the
    name. If the name has no number, the step is the number of a folder such as checkpoint-500. q05 is the value that
    5 % of the singular values do not exceed. A second call computes the models that are missing or have changed.
    --json tells how many models there were, and which models failed.

    The exit status is 0 if some layer has figures, and for many models if some layer of each model has. It is 1 if no
    layer has figures or something failed, and 2 if the call was wrong.
    """
    if plot is not None:
        import_for_option("plot", "--plot", "cli")  # a library that is missing is reported before minutes of work
    if many is not None:
        if sort != "depth":
            raise click.UsageError("--sort is for the table of one model")
        if html is not None:
            raise click.UsageError(
                "--html is for one model: call convsv spectrum MODEL --html FILE for each, or give --plot, which draws "
                "the norms of all of them"
            )
        if many.scheduler == LOCAL:
            options.backend()  # the workers of another cluster may have libraries and devices that this machine lacks
        engine = import_for_option("many", "--scheduler", "many")
        engine.ManyRequest(models, many, options, bounds).run(json_path, plot, scale)
        return
    request = Request.of(_only(models), options)
    rows = request.reports(layer_reports, bounds=bounds, images=html is not None)
    view = spectrum_view(bounds)
    if request.model is not None and not options.read_options.input_shapes:
        view = replace(view, legend=view.legend + EXTENTS)
    report = request.report(rows, view)
    request.publish(report, sort, json_path, files_of(report, plot, html, scale))
    exit_without_figures(report)


def _only(models: Sequence[str]) -> Path | None:
    """Return the only model, or None if there is none; a call with several is wrong."""
    if len(models) > 1:
        raise click.UsageError(
            f"{len(models)} models: give --scheduler and --out for one table of all, as --scheduler local --out "
            "spectra.parquet; a page or a figure of singular values is of one model, so call again for each"
        )
    try:
        return MODEL.convert(models[0], None, None) if models else None
    except click.BadParameter as error:
        hint = ": of many models by a pattern, --scheduler and --out are wanted" if glob.has_magic(models[0]) else ""
        raise click.BadParameter(f"{error.message}{hint}", param_hint="'[MODEL]...'") from None
