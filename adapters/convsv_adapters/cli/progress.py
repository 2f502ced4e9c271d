"""The progress bar on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

__all__ = ["tracked"]

T = TypeVar("T")


def tracked(rows: Iterable[T], total: int, *, done: int = 0) -> Iterator[T]:
    """Yield the rows, and show a progress bar if stderr is a terminal.

    Parameters
    ----------
    rows : iterable
    total : int
        The number of rows when all is done.
    done : int, default 0
        The number of the `total` rows that were there before.
    """
    messages = Console(stderr=True)
    with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done)
        for row in rows:
            yield row
            progress.advance(task)
