"""The options that several commands take, and the checks of their values."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import click
import numpy as np

from convsv_adapters.cli.files import why_not_writable
from convsv_adapters.cli.output import import_for_option
from convsv_core.backend import Backend
from convsv_core.conv import Conv
from convsv_core.layers import Geometry, ReadOptions
from convsv_core.plugins import get_backend, one_line

__all__ = [
    "MODEL",
    "PLOT_FORMATS",
    "Check",
    "ModelOptions",
    "OneCall",
    "Scale",
    "add_options",
    "html_option",
    "input_range_option",
    "input_shape_option",
    "model_options",
    "number",
    "output_file",
    "plot_options",
    "shapes_by_input",
]

Check: TypeAlias = Callable[[click.Context, click.Parameter, Any], Any]
"""A callback of click, which returns the checked value of an option or raises `click.BadParameter`."""

MODEL = click.Path(exists=True, dir_okay=False, path_type=Path)
"""The type of an argument that names a model."""

Scale: TypeAlias = Literal["linear", "log"]
"""The choices of the axis of singular values in a figure."""

GEOMETRY_KEYS = tuple(field.name for field in dataclasses.fields(Geometry))
"""The keys that `--layer` takes for a layer."""

PLOT_FORMATS = (".png", ".pdf", ".svg")
"""The endings of the figures that can be written."""


class OneCall(click.Command):
    """A command whose call is about as many networks as it has arguments, and which says what to do with more."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments, and refuse more networks than the command takes."""
        ctx.allow_extra_args = True
        rest = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            names = " and ".join(one.human_readable_name for one in self.params if isinstance(one, click.Argument))
            ctx.fail(
                f"{' '.join(ctx.args)} is too much: one call takes {names}; "
                f"call {ctx.command_path} again for other files"
            )
        return rest


def number(*, zero: bool) -> Check:
    """Make a check for finite numbers that are positive, or also 0 where `zero` is true."""
    wanted = "a number that is not negative" if zero else "a positive number"

    def check(ctx: click.Context, param: click.Parameter, value: float) -> float:
        if not 0 <= value < math.inf or (value == 0 and not zero):  # click.FloatRange lets NaN pass
            raise click.BadParameter(f"{value}: wanted {wanted}")
        return value

    return check


def output_file(*suffixes: str, folder: bool = False, either: bool = False) -> Check:
    """Make a check for a path that can be written, so that a wrong one is refused before minutes of work.

    Parameters
    ----------
    *suffixes : str
        The endings that the name may have. Any ending will do if none is given.
    folder : bool, default False
        Whether the path is a folder of Parquet files, and not a file.
    either : bool, default False
        Whether the path may be a file or a folder.
    """

    def check(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
        if value is None:
            return value
        if str(value) == "-":
            if getattr(param.type, "allow_dash", False):
                return value
            raise click.BadParameter("this file cannot go to stdout: give a name other than -")
        if value.is_dir() and not (folder or either):
            raise click.BadParameter(f"{value} is a directory")
        if value.exists() and not value.is_dir() and folder:
            raise click.BadParameter(f"{value} is a file; the table is a folder of Parquet files: give another name")
        if not value.absolute().parent.is_dir():
            raise click.BadParameter(f"{value}: there is no directory {value.parent}")
        if suffixes and value.suffix.lower() not in suffixes:
            raise click.BadParameter(f"{value}: wanted a name that ends in {', '.join(suffixes)}")
        if reason := why_not_writable(value):
            raise click.ClickException(f"{value}: {reason}")
        return value

    return check


def add_options(command: Callable[..., Any], options: Sequence[Callable[[Any], Any]]) -> Callable[..., Any]:
    """Return the command with these options of click, which its help lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


# ---- the options of every command that reads a network ------------------------------------------------


@dataclass(frozen=True)
class ModelOptions:
    """The options that say how to read a network, and with which array library to compute.

    Attributes
    ----------
    read_options : ReadOptions
    backend_name : str
    device : str or None
        The default device of the array library if None.
    dtype : str or None
        float64 for kernels that are stored so, and float32 for others, if None.
    """

    read_options: ReadOptions
    backend_name: str
    device: str | None
    dtype: str | None

    def backend(self) -> Backend:
        """Return the backend. An unknown backend, device or dtype is reported as an error of the command line."""
        name, device, dtype = self.backend_name, self.device, self.dtype
        try:
            backend = get_backend(name)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--backend") from None
        if reason := backend.unavailable():
            raise click.ClickException(f"the backend {name} is not available: {reason}")
        try:
            backend.asarray(np.zeros(1, np.float32), device=device)
        except Exception as error:  # each library has an exception of its own for a device that it lacks
            raise click.BadParameter(f"{name} on {device}: {one_line(error)}", param_hint="--device") from None
        if dtype is not None and dtype not in (known := backend.dtypes(device)):
            raise click.BadParameter(f"{name} has {', '.join(known)} here, not {dtype}", param_hint="--dtype")
        return backend


def model_options(
    sort_keys: Iterable[str], argument: Callable[[Any], Any] | None = None, default_sort: str = "depth"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a decorator that gives a command a model, `options` as `ModelOptions`, `json_path` and `sort`.

    Parameters
    ----------
    sort_keys : iterable of str
        The orders that the command's table can have.
    argument : callable, optional
        The click argument in place of that for one model, which is called `model`.
    default_sort : str, default "depth"
        The order of the table without ``--sort``.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gathered(
            *,
            input_shapes: Sequence[tuple[str, tuple[int, ...]]],
            layout: str | None,
            network: str | None,
            geometries: Sequence[tuple[str, Geometry]],
            backend_name: str,
            device: str | None,
            dtype: str | None,
            linear: bool,
            **others: Any,
        ) -> Any:
            shapes = shapes_by_input(input_shapes)
            patterns = [pattern for pattern, _ in geometries]
            if repeated := {pattern for pattern in patterns if patterns.count(pattern) > 1}:
                raise click.UsageError(f"--layer is given twice for {min(repeated)}")
            read_options = ReadOptions(shapes, layout, network, dict(geometries), linear)
            return command(options=ModelOptions(read_options, backend_name, device, dtype), **others)

        sort = click.option(
            "--sort",
            type=click.Choice(list(sort_keys)),
            default=default_sort,
            show_default=True,
            help="Order of the table: depth begins at the input, name is alphabetical, and the others show the most "
            "remarkable layers first.",
        )
        first = argument or click.argument("model", required=False, type=MODEL)
        return add_options(gathered, [first, *_MODEL_OPTIONS, sort])

    return decorate


def shapes_by_input(input_shapes: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input from the values of `input_shape_option`; report a name that is given twice."""
    names = [name for name, _ in input_shapes]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise click.UsageError(f"--input-shape is given twice for {min(repeated) or 'the first input'}")
    return dict(input_shapes)


def _input_shape(value: str) -> tuple[str, tuple[int, ...]]:
    """Read ``3,224,224`` or ``name=1,3,224,224``: a name, which may be empty, and a shape."""
    name, _, numbers = value.rpartition("=")
    try:
        shape = tuple(int(extent) for extent in numbers.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise click.BadParameter(f"{value!r}: wanted positive integers as in 3,224,224 or name=1,3,224,224")
    return name, shape


def _geometry(value: str) -> tuple[str, Geometry]:
    """Read ``NAME:groups=4,stride=2x1,transposed=true``: a name or a pattern, and the geometry of its layers."""
    name, _, facts = value.rpartition(":")
    wanted = f"wanted NAME:groups=4,stride=2,padding=1x0,dilation=2,transposed=true, and got {value!r}"
    stated: dict[str, int | tuple[int, ...] | bool] = {}
    for fact in facts.split(","):
        key, _, number = fact.partition("=")
        if key in stated or key not in GEOMETRY_KEYS:
            problem = "is given twice" if key in stated else f"is none of {', '.join(GEOMETRY_KEYS)}"
            raise click.BadParameter(f"{key!r} {problem}: {wanted}")
        numbers = number.split("x")
        if key == "transposed" and number in ("true", "false"):
            stated[key] = number == "true"
        elif key != "transposed" and all(part.isdecimal() for part in numbers):
            extents = tuple(map(int, numbers))
            stated[key] = extents if len(extents) > 1 else extents[0]
        else:
            raise click.BadParameter(f"{key}={number}: {wanted}")
        if key == "groups" and not (isinstance(stated[key], int) and stated[key]):
            raise click.BadParameter(f"{key}={number}: wanted one positive integer")
    if not name:
        raise click.BadParameter(wanted)
    return name, Geometry(**stated)  # type: ignore[arg-type]


def _check_layout(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            Conv(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


def _input_range(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float] | None:
    """Read ``0,1``: the least and the largest value of the input's elements."""
    if value is None:
        return None
    try:
        low, high = map(float, value.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not -math.inf < low <= high < math.inf:
        raise click.BadParameter(f"{value!r}: wanted the least and the largest value, as in 0,1")
    return low, high


def input_range_option(use: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option for the range of an input's elements; `use` says in the help what it serves."""
    return click.option(
        "--input-range",
        metavar="LOW,HIGH",
        callback=_input_range,
        help=f"The least and the largest value of the input's elements. {use}",
    )


input_shape_option = click.option(
    "--input-shape",
    "input_shapes",
    type=_input_shape,
    metavar="SHAPE",
    multiple=True,
    help="Shape of the network's input, as 3,224,224 or name=1,3,48,320. Give it once for each input. For files "
    "that hold only weights: the extents of every layer, or of the layer with this name.",
)
"""The option `--input-shape`, whose values `shapes_by_input` gathers."""

_MODEL_OPTIONS = (
    input_shape_option,
    click.option(
        "--layout", callback=_check_layout, help="Layout of the kernels in files whose format does not fix it, as HWIO."
    ),
    click.option(
        "--network",
        metavar="PATH",
        help="Read only this network of a checkpoint that holds several, as netG. By default all of them are read.",
    ),
    click.option(
        "--layer",
        "geometries",
        type=_geometry,
        metavar="NAME:FACTS",
        multiple=True,
        help="Geometry of a layer in files that hold only weights, as 'conv1.weight:groups=4,stride=2x1'. FACTS are "
        f"{', '.join(GEOMETRY_KEYS)}. NAME may be a pattern, as 'up*'. May be given more than once.",
    ),
    click.option(
        "--linear",
        is_flag=True,
        help="List dense layers too, which are convolutions of one tap on one pixel. In files that hold only weights: "
        "the matrices whose names or biases say that they are dense layers.",
    ),
    click.option(
        "--backend", "backend_name", default="numpy", show_default=True, help="Array library to compute with."
    ),
    click.option("--device", help="Device to compute on, as cuda:0."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64"]),
        help="Dtype to compute in.  [default: float64 for kernels stored so, else float32]",
    ),
    click.option(
        "--json",
        "json_path",
        type=click.Path(path_type=Path, allow_dash=True),
        callback=output_file(),
        help="Write the figures to this file, or with - to stdout in place of the table.",
    ),
)


# ---- the options of the files for people ---------------------------------------------------------------------


def plot_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `plot`, the file of a figure or None, and `scale`, the figure's axis."""
    formats = ", ".join(PLOT_FORMATS)
    options = [
        click.option(
            "--plot",
            type=click.Path(path_type=Path),
            callback=output_file(*PLOT_FORMATS),
            help=f"Draw the singular values, or the norms of many models over the steps, in a file of this name "
            f"({formats}).",
        ),
        click.option(
            "--scale",
            type=click.Choice(typing.get_args(Scale)),
            help="Axis of the singular values or norms in the figure of --plot.  [default: linear; log for many models "
            "whose largest norm would flatten the others]",
        ),
    ]
    return add_options(command, options)


def html_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `html`, the file of a page for a browser or None."""
    check = output_file(".html", ".htm")

    def checked(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
        if value is not None:  # a library that is missing is reported before minutes of work
            import_for_option("convsv_core.reports.page", "--html", "html")
        return check(ctx, param, value)

    option = click.option(
        "--html",
        type=click.Path(path_type=Path),
        callback=checked,
        help="Write a report to read in a browser, without a network: figures, images of the layers, and a table that "
        "sorts and filters.",
    )
    return option(command)
