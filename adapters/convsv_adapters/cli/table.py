"""The tables that the commands print on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.text import Text

from convsv_adapters.cli.columns import Column, print_columns
from convsv_core.plugins import BackendInfo
from convsv_core.reports import NORM, SPECTRUM, Report, lay_out, texts

if TYPE_CHECKING:  # this module imports pyarrow, which a call for one model does not need
    from convsv_adapters.cli.parquet import Norm

__all__ = ["NORM", "SPECTRUM", "show", "show_backends", "show_runs"]

NAME_WIDTH, SHORTEST_NAME_WIDTH = 16, 5
"""The widths, in characters, to which layer names are narrowed before and after kernels are.

The first is a guess. The second is the length of the heading, which would be broken letter by letter below it.
"""

DTYPE_WIDTH = 10
"""The least width, in characters, of a column of dtypes: the length of "complex128"."""


def show(report: Report[Any], sort: str) -> None:
    """Print the table of a report in this order of its rows, its legend, and the notes of the layers."""
    table = lay_out(report.ordered(sort), report.title, report.view)
    least: dict[str, tuple[int, ...]] = {"layer": (NAME_WIDTH, SHORTEST_NAME_WIDTH)}
    if table.columns[1].heading == "kernel":
        least["kernel"] = (max((cell_len(cell.partition(" ")[0]) for cell in table.columns[1].cells), default=0),)
    columns = [
        Column(column.heading, column.cells, column.right, least.get(column.heading, ())) for column in table.columns
    ]
    console = print_columns(columns, table.order, table.title, hint="; --json has every figure")
    console.print(Text("\n" + "\n".join(table.legend)))
    for note in table.notes:
        console.print(Text(note))


def show_backends(rows: Sequence[BackendInfo]) -> None:
    """Print one row for each backend."""
    columns = [
        Column("backend", [row.name for row in rows]),
        Column("available", ["yes" if row.available else "no" for row in rows]),
        Column("devices", [" ".join(row.devices) for row in rows], least=(DTYPE_WIDTH,)),
        Column("dtypes", [" ".join(row.dtypes) for row in rows], least=(DTYPE_WIDTH,)),
        Column("reason", [row.reason for row in rows], least=(NAME_WIDTH,)),
    ]
    print_columns(columns, ("dtypes", "devices", "reason"), gap=2)


# ---- many models -----------------------------------------------------------------------------------------


@dataclass
class _Course:
    """A layer's norm over the steps of one run."""

    models: int
    first: Norm
    last: Norm
    largest: Norm


def show_runs(norms: Iterable[Norm], title: str) -> None:
    """Print one row for each layer of each run: its first, last and largest norm."""
    courses: dict[tuple[str, int, str], _Course] = {}
    for norm in norms:
        course = courses.setdefault((norm.run, norm.depth, norm.layer), _Course(0, norm, norm, norm))
        course.models += 1
        course.first = min(course.first, norm, key=_step)
        course.last = max(course.last, norm, key=_step)
        course.largest = max(course.largest, norm, key=lambda one: one.norm)
    rows = []
    for (run, _, layer), course in sorted(courses.items()):
        between = "-" if course.first.step is None else f"{course.first.step}-{course.last.step}"
        figures = (texts.figure(one.norm) for one in (course.first, course.last, course.largest))
        rows.append((run, layer, str(course.models), between, *figures, texts.count(course.largest.step)))
    if not rows:
        return
    headings = ("run", "layer", "models", "steps", "first\nnorm", "last\nnorm", "largest\nnorm", "at step")
    columns = [
        Column(heading, list(cells), right=heading not in ("run", "layer"))
        for heading, cells in zip(headings, zip(*rows, strict=True), strict=True)
    ]
    for column in columns[:2]:
        column.least = (NAME_WIDTH, SHORTEST_NAME_WIDTH)
    print_columns(columns, ("at step", "models", "steps", "first\nnorm", "last\nnorm"), title)


def _step(norm: Norm) -> int:
    return -1 if norm.step is None else norm.step
