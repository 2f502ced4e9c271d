"""The command `convsv lipschitz`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import click

from convsv_adapters.cli.options import (
    MODEL,
    OneCall,
    html_option,
    input_range_option,
    input_shape_option,
    output_file,
    shapes_by_input,
)
from convsv_adapters.cli.output import one_line_errors, write_results
from convsv_adapters.cli.request import BUNDLED, file_of, label_of
from convsv_core.layers import ReadOptions
from convsv_core.networks import network_graph, network_lipschitz

__all__ = ["command"]


@click.command("lipschitz", cls=OneCall)
@click.argument("model", required=False, type=MODEL)
@input_shape_option
@click.option("--output", metavar="NAME", help="Stop at this tensor, such as the logits before a softmax.")
@input_range_option("Products of activations then have a bound.")
@click.option(
    "--lower/--no-lower", default=True, show_default=True, help="Whether to measure a lower bound at random inputs."
)
@click.option(
    "--search",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Largest number of inputs at which the lower bound is measured. Large networks get fewer.",
)
@click.option("--seed", default=0, show_default=True, help="The seed of the search for a lower bound.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, allow_dash=True),
    callback=output_file(),
    help="Write the figures to this file, or with - to stdout in place of the table.",
)
@html_option
def command(
    model: Path | None,
    input_shapes: Sequence[tuple[str, tuple[int, ...]]],
    output: str | None,
    input_range: tuple[float, float] | None,
    lower: bool,
    search: int,
    seed: int,
    json_path: Path | None,
    html: Path | None,
) -> None:
    """Certify the Lipschitz constant of a whole network.

    MODEL is a file that holds a network's graph: an ONNX model. Without it the network that comes with convsv is
    taken. The constant is that of one example, in Euclidean norms of whole tensors. Figures are decimal logarithms
    where they are large. The table lists each node's factor and the bound up to it, and every residual block.

    The exit status is 0 if the network has a bound. It is 1 if a node has none, which stderr names with the bound up to
    it, or if something failed. It is 2 if the call was wrong.
    """
    with one_line_errors(model), file_of(model) as path:
        graph = network_graph(path, options=ReadOptions(shapes_by_input(input_shapes)))
    try:
        if output is not None:
            graph.find(output)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--output") from None
    found = network_lipschitz(graph, output=output, input_range=input_range, lower=lower, search=search, seed=seed)
    document = {"model": str(model) if model is not None else BUNDLED, **found.to_dict()}
    title = f"{label_of(model)}, output {found.output}"
    files = {html: lambda: found.page(title).encode()} if html is not None else {}
    write_results(document, json_path, lambda: click.echo(f"{title}\n{found}"), files)
    for missing in found.missing:
        if missing.log10_before < math.inf:
            click.echo(
                f"{label_of(model)}: no bound for {missing.name} ({missing.op}): {missing.reason}; the bound up to it "
                f"is 10^{missing.log10_before:.4f}",
                err=True,
            )
    if found.missing:
        raise click.exceptions.Exit(1)
