"""Give the commands their options, show their progress on stderr, and write their JSON."""

from __future__ import annotations

import contextlib
import enum
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import click
from rich.console import Console

from benchmarks.comparison import Effort
from benchmarks.libraries import LIBRARIES, Library, open_library
from benchmarks.shapes import Shape, select

__all__ = [
    "Measured",
    "Options",
    "Size",
    "comparison_options",
    "each_layer",
    "json_option",
    "networks_option",
    "plot_option",
    "progress",
    "select_groups",
    "size_options",
    "write_json",
]

Command: TypeAlias = Callable[..., Any]
Tell: TypeAlias = Callable[[str], None]

PLOT_FORMATS = (".png", ".pdf", ".svg")


class Size(enum.Enum):
    """Say how much a command measures.

    `TINY` runs every line in a few seconds, for tests: its figures mean nothing.
    """

    FULL = "full"
    QUICK = "quick"
    TINY = "tiny"


@dataclass(frozen=True)
class Options:
    """Hold the options of every command that measures convolutions with several array libraries.

    Attributes
    ----------
    size : Size
    backends : tuple of str
        Array libraries, which may repeat.
    device : str or None
        As the backends name it; None for their default.
    only : str or None
        Pattern that the name of a convolution must match; None for all of them.
    repeats : int or None
        Measurements of which the median is taken; None for the default of `size`.
    json_path, plot : Path or None
        Files to write.
    """

    size: Size
    backends: tuple[str, ...]
    device: str | None
    only: str | None
    repeats: int | None
    json_path: Path | None
    plot: Path | None

    def open_libraries(self) -> list[Library]:
        """Return each library once, ready for the device."""
        return [open_library(name, self.device) for name in dict.fromkeys(self.backends)]

    def effort(self, default: Effort) -> Effort:
        """Return the effort of this size, with the number of repeats that was asked for."""
        return default if self.repeats is None else replace(default, repeats=self.repeats)

    def arguments(self) -> dict[str, Any]:
        """Return the options for the JSON."""
        quick = self.size is Size.QUICK
        return {"size": self.size.value, "quick": quick, "only": self.only, "device": self.device}


class Measured(NamedTuple):
    """Name one convolution to be measured: in which library, and of which group."""

    library: Library
    group: str
    shape: Shape


def size_options(quick: str) -> Callable[[Command], Command]:
    """Return a decorator: give a command an argument `size`.

    Parameters
    ----------
    quick : str
        The help text of ``--quick``.
    """

    def with_size(command: Command) -> Command:
        @click.option("--quick", is_flag=True, help=quick)
        @click.option("--tiny", is_flag=True, help="Every line of the command in a few seconds, for tests.")
        @functools.wraps(command)
        def sized(*, quick: bool, tiny: bool, **options: Any) -> Any:
            if quick and tiny:
                raise click.UsageError("--quick and --tiny exclude each other: give one of them")
            return command(size=Size.TINY if tiny else Size.QUICK if quick else Size.FULL, **options)

        return sized

    return with_size


def comparison_options(plot: str | None) -> Callable[[Command], Command]:
    """Return a decorator: give a command an argument `options`, an `Options`.

    Parameters
    ----------
    plot : str or None
        What ``--plot`` does, without a full stop; None for a command that draws nothing.
    """
    drawing = (lambda command: command) if plot is None else plot_option(plot)

    def with_options(command: Command) -> Command:
        @size_options("A few small convolutions, in less than a minute.")
        @click.option(
            "--backend",
            "backends",
            type=click.Choice(list(LIBRARIES)),
            multiple=True,
            default=("numpy",),
            show_default=True,
            help="Array library; may be given several times.",
        )
        @click.option("--device", help="Where to compute, as cuda:0.")
        @click.option(
            "--only",
            metavar="PATTERN",
            help="Only convolutions whose name holds this, as 'ResNet-50 3x3' or '*960*'.",
        )
        @click.option("--repeats", type=click.IntRange(min=1), help="Measurements of which the median is taken.")
        @json_option()
        @drawing
        @functools.wraps(command)
        def gathered(
            *,
            size: Size,
            backends: tuple[str, ...],
            device: str | None,
            only: str | None,
            repeats: int | None,
            json_path: Path | None,
            plot: Path | None = None,
            **others: Any,
        ) -> Any:
            return command(options=Options(size, backends, device, only, repeats, json_path, plot), **others)

        return gathered

    return with_options


def json_option(what: str = "everything that was measured") -> Callable[[Command], Command]:
    """Return a decorator: give a command an argument `json_path`, for a file that holds `what`."""
    return _output_option("--json", "json_path", f"Write {what} to this file.")


def plot_option(what: str) -> Callable[[Command], Command]:
    """Return a decorator: give a command an argument `plot`; `what` says what is drawn, without a full stop."""
    return _output_option("--plot", "plot", f"{what} ({', '.join(PLOT_FORMATS)}).")


def _output_option(flag: str, name: str, text: str) -> Callable[[Command], Command]:
    return click.option(flag, name, type=click.Path(path_type=Path), callback=_check_output, help=text)


def _check_output(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a path that could not be written, before minutes of work."""
    if value is None:
        return None
    if value.is_dir() or not value.absolute().parent.is_dir():
        raise click.BadParameter(f"{value}: this is a directory, or the directory it lies in does not exist")
    if param.name == "plot" and value.suffix.lower() not in PLOT_FORMATS:
        raise click.BadParameter(f"{value}: wanted a name that ends in {', '.join(PLOT_FORMATS)}")
    return value


networks_option = click.option(
    "--networks",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="Model file, or folder of some; may be given several times. [default: the network of the package]",
)


def select_groups(groups: Mapping[str, Sequence[Shape]], only: str | None) -> dict[str, list[Shape]]:
    """Return the convolutions of each group whose name matches `only`."""
    return {group: select(shapes, only) for group, shapes in groups.items()}


def each_layer(
    tell: Tell, libraries: Iterable[Library], groups: Mapping[str, Sequence[Shape]], what: str = ""
) -> Iterator[Measured]:
    """Yield every convolution of every group for each library, and tell which one it is."""
    for library in libraries:
        for group, shapes in groups.items():
            for number, shape in enumerate(shapes, start=1):
                tell(f"{library.name} {what}{group} {number}/{len(shapes)} {shape.name}")
                yield Measured(library, group, shape)


def write_json(path: Path | None, benchmark: str, arguments: Mapping[str, Any], **content: Any) -> None:
    """Write a JSON file, unless `path` is None.

    Parameters
    ----------
    path : Path or None
    benchmark : str
        The command.
    arguments : mapping
        The options of the command.
    **content
        The other keys; dataclasses at any depth become dictionaries.
    """
    if path is not None:
        content = {"benchmark": benchmark, "arguments": arguments} | content
        path.write_text(json.dumps(content, indent=1, default=asdict) + "\n")


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """Tell on stderr what is being measured: in one changing line on a terminal, else in a line for each message."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: click.echo(message, err=True)
        return
    with console.status("") as status:
        yield status.update
