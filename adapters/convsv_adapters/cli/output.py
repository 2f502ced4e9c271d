"""Write the output of commands: JSON, figures, tables and messages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from convsv_adapters.cli.files import write_whole
from convsv_core.layers import ModelError
from convsv_core.reports import GEOMETRY_FIELDS, Report, Row, figures_of, import_for

__all__ = [
    "GEOMETRY_FIELDS",
    "exit_without_figures",
    "figures_of",
    "files_of",
    "import_for_option",
    "one_line_errors",
    "write_results",
]


def write_results(
    document: Mapping[str, Any],
    json_path: Path | None,
    show_table: Callable[[], None],
    files: Mapping[Path, Callable[[], bytes]] | None = None,
) -> None:
    """Write the JSON and other files, and print the table unless the JSON goes to stdout in its place.

    Parameters
    ----------
    document : mapping
        The content of the JSON.
    json_path : Path or None
        Where the JSON goes: ``-`` is stdout. It is not written if None.
    show_table : callable
        Prints the table.
    files : mapping from Path to callable, optional
        Makes the content of each other file.
    """
    text = json.dumps(document, indent=2, allow_nan=False)
    to_stdout = json_path is not None and str(json_path) == "-"
    if json_path is not None and not to_stdout:
        with one_line_errors(json_path):
            write_whole(json_path, f"{text}\n".encode())
    for path, content in (files or {}).items():
        with one_line_errors(path):
            write_whole(path, content())
    if to_stdout:
        click.echo(text)
    else:
        show_table()


@contextlib.contextmanager
def one_line_errors(path: Path | None = None) -> Iterator[None]:
    """Report a model or a file that cannot be used on one line, and exit with status 1.

    Parameters
    ----------
    path : Path, optional
        The file to name where the operating system's error names none.
    """
    try:
        yield
    except ModelError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or path}: {error.strerror or error}") from None


def exit_without_figures(reports: Sequence[Row]) -> None:
    """Say how many layers have no figures, and exit with status 1 if no layer has any."""
    without = sum(not report.has_figures for report in reports)
    if without:
        nouns = "layers" if any(report.linear for report in reports) else "convolutions"
        click.echo(f"{without} of {len(reports)} {nouns} have no figures; their notes say why.", err=True)
    if without == len(reports):
        raise click.exceptions.Exit(1)


def import_for_option(module: str, option: str, extra: str) -> Any:
    """Import a module that needs the libraries of `extra` for one option alone.

    A `module` without a package is one of the command line.
    """
    try:
        return import_for(module if "." in module else f"convsv_adapters.cli.{module}", option, extra)
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from None


def files_of(
    report: Report[Any],
    plot: Path | None = None,
    html: Path | None = None,
    scale: Literal["linear", "log"] | None = None,
) -> dict[Path, Callable[[], bytes]]:
    """Return what makes the content of the files of ``--plot`` and ``--html``.

    Parameters
    ----------
    report : Report
    plot, html : Path, optional
        The files that were asked for.
    scale : "linear" or "log", optional
        The axis of the singular values in the figure; linear by default.
    """
    files: dict[Path, Callable[[], bytes]] = {}
    if plot is not None:
        plots = import_for_option("plot", "--plot", "cli")
        files[plot] = lambda: plots.draw(report, plot.suffix[1:].lower(), scale)
    if html is not None:
        files[html] = lambda: report.page().encode()
    return files
