"""The places that measurements are written to: TensorBoard's writers, functions of a dict, and CSV files."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from convsv_adapters._monitor.figures import FIGURES, LayerFigures

__all__ = ["Log", "Write", "as_writes", "entries"]

COLUMNS = ("step", "layer", *FIGURES)
"""The columns of a CSV file, which has one row for each layer at each measurement."""


class ScalarWriter(Protocol):
    """TensorBoard's `SummaryWriter`, or an object with its methods."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write a number."""


Log: TypeAlias = "ScalarWriter | Callable[[dict[str, Any]], Any] | str | os.PathLike[str] | Iterable[Log] | None"
"""A place to write to, or several, as a monitor takes them."""

Write: TypeAlias = Callable[[int, Sequence[LayerFigures]], None]
"""A function that writes the figures of all layers at a step."""


def entries(figures: Iterable[LayerFigures]) -> dict[str, float]:
    """Return the numbers of all layers by ``FIGURE/LAYER``, as in "certified_norm/conv1"."""
    return {f"{name}/{one.name}": number for one in figures for name, number in one.numbers().items()}


def as_writes(log: Log) -> list[Write]:
    """Return the functions that write to the places of a `log`.

    Raises
    ------
    TypeError
        One of the places is of no kind that is known.
    ValueError
        A CSV file has other columns, or would stand in a folder that does not exist.
    """
    if log is None:
        return []
    if isinstance(log, str | os.PathLike):
        return [_CsvFile(Path(log)).write]
    if hasattr(log, "add_scalar"):
        return [_Scalars(log).write]
    if callable(log):
        return [_Function(log).write]
    if isinstance(log, Iterable):
        return [write for one in log for write in as_writes(one)]
    raise TypeError(
        f"log is a {type(log).__module__}.{type(log).__qualname__}: wanted a SummaryWriter, a function of a dict, the "
        f"path of a CSV file, or a list of these"
    )


class _Scalars:
    """Write to the methods `add_scalar` and `add_histogram` of TensorBoard's `SummaryWriter`."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, step: int, figures: Sequence[LayerFigures]) -> None:
        for tag, number in entries(figures).items():
            self.writer.add_scalar(tag, number, step)
        for one in figures:
            if one.singular_values is not None:
                self.writer.add_histogram(f"singular_values/{one.name}", one.singular_values, step)


class _Function:
    """Call a function with one dict: the step, the numbers, and the arrays of singular values if they were kept."""

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self.function = function

    def write(self, step: int, figures: Sequence[LayerFigures]) -> None:
        kept = {
            f"singular_values/{one.name}": one.singular_values for one in figures if one.singular_values is not None
        }
        self.function({"step": step, **entries(figures), **kept})


class _CsvFile:
    """Append rows to a CSV file, which is whole after each measurement."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.parent.is_dir():
            raise ValueError(f"log={str(path)!r}: there is no directory {str(path.parent)!r}")
        if path.exists() and path.stat().st_size:
            with path.open(newline="") as file:
                found = next(csv.reader(file), [])
            if tuple(found) != COLUMNS:
                raise ValueError(f"log={str(path)!r}: the file has the columns {','.join(found)}; wanted a new file")

    def write(self, step: int, figures: Sequence[LayerFigures]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if not file.tell():
                writer.writeheader()
            writer.writerows({"step": step, "layer": one.name, **one.numbers()} for one in figures)
