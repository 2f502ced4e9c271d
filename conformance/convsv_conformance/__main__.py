"""Run the conformance suite: ``python -m convsv_conformance``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from convsv_conformance.failures import KnownFailures
from convsv_conformance.report import Report, check_path
from convsv_conformance.running import run
from convsv_conformance.suite import Item, Skip, select

try:
    import click
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    sys.exit(f"convsv conformance needs click and rich, which come with convsv[cli]: {error}")

__all__ = ["main"]

PRINTED = 20
"""Largest number of failures that are printed: a guess at what a terminal shows. A report has all failures."""


@click.command()
@click.option("--backend", multiple=True, metavar="NAME", help="Backend to test; repeatable. Default: all there are.")
@click.option("--device", multiple=True, metavar="NAME", help="Device; repeatable. Default: all of the backend's.")
@click.option("--dtype", multiple=True, metavar="NAME", help="Kernel dtype; repeatable. Default: all.")
@click.option("--feature", multiple=True, metavar="NAME", help="Feature; repeatable. Default: all.")
@click.option("--thorough", is_flag=True, help="Every case also for libraries that take seconds for each (JAX).")
@click.option(
    "--known-failures",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Cases that the backend is known to fail, one 'feature/subject/dtype: reason' a line.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write the results to a .json, .md or .html file.",
)
def main(
    backend: tuple[str, ...],
    device: tuple[str, ...],
    dtype: tuple[str, ...],
    feature: tuple[str, ...],
    thorough: bool,
    known_failures: Path | None,
    report: Path | None,
) -> None:
    """Test array backends of convsv against the dense matrix of the operator.

    Prints, for each feature and backend, the number of cases, the largest error in units of eps times the largest
    singular value, and the time. The exit status is 0 if every case passed, 1 if one failed or none could be
    run, 2 if the call was wrong.
    """
    # JAX reads this when it is imported, and has no double precision without it. The user's own setting wins.
    os.environ.setdefault("JAX_ENABLE_X64", "1")
    try:
        if report is not None:
            check_path(report)
        selection = select(backend, device, dtype, features=feature, depth="thorough" if thorough else "usual")
        known = {t.backend.name: KnownFailures.of(t.backend.name, known_failures) for t in selection.targets}
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        items = list(selection.items())
        skipped = [(item.name, item.reason) for item in items if isinstance(item, Skip)]
        found = run(_progress([item for item in items if isinstance(item, Item)]), known, skipped)
    except KeyboardInterrupt:
        raise click.Abort from None
    _print(found)
    if report is not None:
        try:
            found.write(report)
        except OSError as error:
            raise click.ClickException(f"{report} cannot be written: {error.strerror}") from error
    if not found.cells:
        raise click.ClickException("no case could be run")
    sys.exit(1 if found.failures else 0)


def _progress(items: list[Item]) -> Iterable[Item]:
    console = Console(stderr=True)
    if not console.is_terminal:
        return items
    return track(items, description="cases", console=console, transient=True)


def _print(found: Report) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 200
    header, rows = found.matrix()
    table = Table(title="cases, largest error in units of eps * sigma_max, time")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(f"[bold red]{escape(cell)}[/]" if "FAILED" in cell else escape(cell) for cell in row))
    if found.cells:
        console.print(table)
    for name, reason in found.skipped:
        console.print(f"skipped {escape(name)}: {escape(reason)}", soft_wrap=True)
    for failure in found.failures[:PRINTED]:
        console.print(f"[red]FAILED[/] {escape(failure)}", soft_wrap=True)
    if len(found.failures) > PRINTED:
        console.print(f"and {len(found.failures) - PRINTED} more failures, which --report writes to a file")


if __name__ == "__main__":
    main(prog_name="python -m convsv_conformance")
