"""What the commands share: their options, and writing numbers and figure."""

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

from convsv_core._projection.project import METHODS

__all__ = ["experiment_options", "mean_and_deviation", "method_option", "write"]

Command = TypeVar("Command", bound=Callable[..., Any])
DISTRIBUTIONS = ("convsv", "numpy", "torch")


def experiment_options(command: Command) -> Command:
    """Add the options of every experiment."""
    options = (
        click.option("--quick", is_flag=True, help="A few steps of a tiny network, to see that it runs."),
        click.option(
            "--cifar10",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            help="Folder of CIFAR-10's binary version (data_batch_1.bin ...), in place of the digits.",
        ),
        click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each kind."),
        click.option("--epochs", type=click.IntRange(min=1), help="Of each run."),
        click.option(
            "--output",
            type=click.Path(path_type=Path, file_okay=False),
            default=Path("paper-results"),
            show_default=True,
            help="Folder for the figure and the numbers, made if it is not there.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            callback=lambda ctx, param, value: torch.set_num_threads(value) or value,
            help="Of PyTorch; a small network gains nothing from more.",
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
    help="How kernels are brought within the bound: dykstra, to the nearest one.",
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
        What the experiment was asked, and found.
    *more : str
        Distributions, besides PyTorch, whose versions matter.
    """
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / f"{name}.png", dpi=80)
    versions = {distribution: version(distribution) for distribution in (*DISTRIBUTIONS, *more)}
    document = {"experiment": name, "arguments": dict(arguments), "versions": versions, **content}
    (output / f"{name}.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
    click.echo(f"wrote {output / name}.png and .json", err=True)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation of the sample, which is 0 for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
