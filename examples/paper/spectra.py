"""The experiment on spectra: every singular value of every layer, before training and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from convsv_adapters.torch import ConvLayer, conv_layers
from matplotlib.figure import Figure

from convsv_core import singular_values
from examples.paper.data import load
from examples.paper.results import experiment_options, write
from examples.paper.training import Recipe, accuracy, circular_conv, make_model, train

__all__ = ["draw", "spectra"]

BOUND = 1.0
"""The bound of the operator norms: the one of a layer that enlarges nothing."""

QUANTILES = tuple(np.linspace(0, 1, 11).tolist())
"""The quantiles of the singular values that the JSON states: the deciles."""

BEFORE, FREE, BOUNDED = "before training", "after, no bound", f"after, bound {BOUND}"


@click.command()
@experiment_options
def spectra(quick: bool, cifar10: Path | None, seeds: int, epochs: int | None, output: Path, threads: int) -> None:
    """Compute all singular values before training, and after it with a bound of 1 and without."""
    images = load(cifar10, 128 if quick else None)
    recipe = Recipe(widths=(4, 8), epochs=1) if quick else Recipe()
    recipe = replace(recipe, epochs=epochs or recipe.epochs, every=1 if quick else 10)
    rows: list[dict[str, Any]] = []
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for seed in range(seeds):
        one = replace(recipe, seed=seed)
        found = {BEFORE: _values(conv_layers(make_model(images, one), images.train_images[:1]))}
        errors = {}
        for name, bound in ((FREE, None), (BOUNDED, BOUND)):
            trained = train(images, replace(one, bound=bound))
            found[name] = _values(trained.layers)
            errors[name] = 1 - accuracy(trained.model, images.test_images, images.test_labels)
        rows += [
            {"seed": seed, "when": when, "test_error": errors.get(when), "layer": layer} | _numbers(values)
            for when, layers in found.items()
            for layer, values in layers.items()
        ]
        drawn = drawn or found
    _show(rows)
    arguments = {"cifar10": cifar10, "quick": quick, "quantiles": QUANTILES} | asdict(recipe) | {"bound": BOUND}
    write("spectra", output, draw(drawn), arguments, {"layers": rows})


def _values(layers: Sequence[ConvLayer]) -> dict[str, np.ndarray]:
    """Return all singular values of each layer's circular convolution, in descending order."""
    return {
        layer.name: singular_values(layer.weight.detach(), layer.input_shape, circular_conv(layer)).numpy()
        for layer in layers
    }


def _numbers(values: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(values),
        "norm": float(values[0]),
        "median": float(np.median(values)),
        "least": float(values[-1]),
        "quantiles": np.quantile(values, QUANTILES).tolist(),
    }


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the norm, the median and the least singular value of each layer, averaged over the seeds."""
    click.echo(f"{'layer':18} {'when':20} {'values':>6} {'norm':>8} {'median':>8} {'least':>8}")
    for layer in dict.fromkeys(row["layer"] for row in rows):
        for when in (BEFORE, FREE, BOUNDED):
            some = [row for row in rows if (row["layer"], row["when"]) == (layer, when)]
            norm, median, least = (np.mean([row[key] for row in some]) for key in ("norm", "median", "least"))
            click.echo(f"{layer:18} {when:20} {some[0]['count']:6} {norm:8.3f} {median:8.3f} {least:8.4f}")


def draw(found: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draw the singular values of each layer in descending order, for the first seed, with one panel a layer."""
    names = list(found[BEFORE])
    columns = 4
    figure = Figure(figsize=(11, 2.4 * -(-len(names) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(names) // columns), columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for when, layers in found.items():
            values = layers[name]
            axes.plot(np.arange(len(values)) / len(values), values, label=when)
        axes.set_title(name, fontsize="small")
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set(ylabel="singular value")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
    figure.supxlabel("share of the singular values", fontsize="small")
    return figure
