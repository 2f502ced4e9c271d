"""What the commands share: outputs that are refused at once, and saying on stderr what is being measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console

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


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Say on stderr what is being measured: in one changing line, or where that is no terminal in one line each."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: click.echo(message, err=True)
        return
    with console.status("") as status:
        yield status.update
