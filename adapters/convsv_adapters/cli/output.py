"""Write the output of commands: JSON, figures, tables and messages."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from convsv_adapters.cli.files import write_whole
from convsv_core.layers import ModelError
from convsv_core.reports import Row

__all__ = [
    "GEOMETRY_FIELDS",
    "exit_without_figures",
    "figures_of",
    "import_for_option",
    "one_line_errors",
    "write_results",
]

GEOMETRY_FIELDS = ("name", "kernel_shape", "layout", "stride", "dilation", "groups")
"""The fields with which the JSON of every command describes a layer."""


def figures_of(reports: Sequence[Row], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Return the named fields of each report as JSON has them.

    JSON has no infinity. A figure is null where there is none and where it is infinite. A condition number is infinite
    if and only if `smallest_singular_value` is 0, and the note then says that the operator is singular. The note of a
    transposed convolution says `transposed`. `norm_lower` and `norm_upper` are null too where ``--bounds`` did not ask
    for them.
    """
    rows = [{field: _finite(getattr(report, field)) for field in fields} for report in reports]
    for report, row in zip(reports, rows, strict=True):
        if report.transposed:
            row["note"] = "; ".join(filter(None, ("transposed", report.note)))
    return rows


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        click.echo(f"{without} of {len(reports)} convolutions have no figures; their notes say why.", err=True)
    if without == len(reports):
        raise click.exceptions.Exit(1)


def import_for_option(module: str, option: str, extra: str) -> Any:
    """Import a module of the command line that needs the libraries of `extra` for one option alone."""
    try:
        return importlib.import_module(f"convsv_adapters.cli.{module}")
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{option} needs {error.name}: pip install 'convsv[{extra}]'") from None
