"""Options that the commands share, and the writing of their numbers and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
from matplotlib.figure import Figure

from convsv_core.training import METHODS

__all__ = ["experiment_options", "mean_and_deviation", "method_option", "write"]

Command = TypeVar("Command", bound=Callable[..., Any])
DISTRIBUTIONS = ("convsv", "numpy", "torch")
"""Distributions whose versions every result states."""


def experiment_options(command: Command) -> Command:
    """Add the options of every experiment."""
    options = (
        click.option("--quick", is_flag=True, help="Try the experiment: a few steps of a tiny network."),
        click.option(
            "--cifar10",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            help="Train on CIFAR-10, from the folder of its binary version (data_batch_1.bin ...), not on the digits.",
        ),
        click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each kind."),
        click.option("--epochs", type=click.IntRange(min=1), help="Epochs of each run."),
        click.option(
            "--output",
            type=click.Path(path_type=Path, file_okay=False),
            default=Path("paper-results"),
            show_default=True,
            help="Folder for the figure and the numbers, made if it does not exist.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            callback=lambda ctx, param, value: torch.set_num_threads(value) or value,
            help="Threads of PyTorch; a small network gains nothing from more than one.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


method_option = click.option(
    "--method",
    type=click.Choice(METHODS),
    default="dykstra",
    show_default=True,
    help="How to bring kernels within the bound; dykstra finds the nearest kernel.",
)


def write(
    name: str, output: Path, figure: Figure, arguments: Mapping[str, Any], content: Mapping[str, Any], *more: str
) -> None:
    """Write ``name.png`` and ``name.json``.

    Parameters
    ----------
    name : str
    output : Path
    figure : Figure
    arguments, content : mapping
        The options of the experiment, and its results.
    *more : str
        Distributions besides `DISTRIBUTIONS` whose versions are stated.
    """
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / f"{name}.png", dpi=80)
    versions = {distribution: version(distribution) for distribution in (*DISTRIBUTIONS, *more)}
    document = {"experiment": name, "arguments": dict(arguments), "versions": versions, **content}
    (output / f"{name}.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
    click.echo(f"wrote {output / name}.png and .json", err=True)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation of a sample; the deviation of one value is 0."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
