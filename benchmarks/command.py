"""What the commands share: options, outputs that are refused at once, and saying on stderr what is being measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import click
from rich.console import Console

from benchmarks.libraries import LIBRARIES

Command: TypeAlias = Callable[..., Any]

PLOT_FORMATS = (".png", ".pdf", ".svg")


def check_output(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse at once what could not be written after minutes of work."""
    if value is None:
        return None
    if value.is_dir() or not value.absolute().parent.is_dir():
        raise click.BadParameter(f"{value}: a directory, or in none that exists")
    if param.name == "plot" and value.suffix.lower() not in PLOT_FORMATS:
        raise click.BadParameter(f"{value}: wanted a name that ends in {', '.join(PLOT_FORMATS)}")
    return value


def comparison_options(plot: str) -> Callable[[Command], Command]:
    """The options of every command that measures convolutions with several array libraries.

    Parameters
    ----------
    plot : str
        What ``--plot`` does, without a full stop.
    """
    options = (
        click.option("--quick", is_flag=True, help="A few small convolutions, in less than a minute."),
        click.option(
            "--backend",
            "backends",
            type=click.Choice(list(LIBRARIES)),
            multiple=True,
            default=("numpy",),
            show_default=True,
            help="Array library; may be given several times.",
        ),
        click.option("--device", help="Where to compute, as cuda:0."),
        click.option(
            "--only",
            metavar="PATTERN",
            help="Only convolutions whose name holds this, as 'ResNet-50 3x3' or '*960*'.",
        ),
        click.option("--repeats", type=click.IntRange(min=1), help="Measurements of which the median is taken."),
        click.option(
            "--json",
            "json_path",
            type=click.Path(path_type=Path),
            callback=check_output,
            help="Write everything that was measured to this file.",
        ),
        click.option(
            "--plot",
            type=click.Path(path_type=Path),
            callback=check_output,
            help=f"{plot} ({', '.join(PLOT_FORMATS)}).",
        ),
    )

    def with_options(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return with_options


networks_option = click.option(
    "--networks",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="Model file, or folder of some; may be given several times. [default: the network of the package]",
)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Say on stderr what is being measured: in one changing line, or where that is no terminal in one line each."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: click.echo(message, err=True)
        return
    with console.status("") as status:
        yield status.update
