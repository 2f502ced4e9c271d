"""The bar on stderr that shows how far a command is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")


def tracked(rows: Iterable[T], total: int, *, done: int = 0) -> Iterator[T]:
    """Yield the rows, with a bar on a terminal's stderr as they come; `done` of the `total` were there before."""
    messages = Console(stderr=True)
    with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done)
        for row in rows:
            yield row
            progress.advance(task)
