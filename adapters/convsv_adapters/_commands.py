"""The commands of `convsv`. Results go to stdout, progress and messages to stderr."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import importlib.resources
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import click
import numpy as np

from convsv_adapters import _table
from convsv_adapters._files import replacing, write_whole
from convsv_adapters._many_options import LOCAL, ManyOptions, many_options
from convsv_adapters._progress import tracked
from convsv_adapters.formats.errors import one_line
from convsv_core._projection.project import METHODS, ProjectionMethod
from convsv_core.backend import Backend
from convsv_core.conv import Conv
from convsv_core.layers import Layer, ModelError, ReadOptions
from convsv_core.plugins import backends, get_backend
from convsv_core.reports import (
    BOUNDS,
    Bounds,
    ProjectionReport,
    Row,
    bounds_reports,
    layer_reports,
    project_layers,
    read_model,
    write_model,
)
from convsv_core.reports.tasks import TaskOptions

BUNDLED = "digits.onnx"
PLOT_FORMATS = (".png", ".pdf", ".svg")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="convsv")
def convsv() -> None:
    """Exact singular values of convolutional layers."""


# ---- options -----------------------------------------------------------------------------------------


class InputShape(click.ParamType[tuple[str, tuple[int, ...]]]):
    """``3,224,224`` or ``name=1,3,224,224``: a name, which may be empty, and a shape."""

    name = "shape"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[int, ...]]:
        """Parse one option."""
        if isinstance(value, tuple):
            return value
        name, _, numbers = value.rpartition("=")
        try:
            shape = tuple(int(number) for number in numbers.split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            self.fail(f"{value!r}: wanted positive integers as in 3,224,224 or name=1,3,224,224", param, ctx)
        return name, shape


def _check_layout(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        try:
            Conv(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


def _check_output(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse at once what could not be written after minutes of work."""
    if value is None or str(value) == "-":
        return value
    if value.is_dir():
        raise click.BadParameter(f"{value} is a directory")
    if not value.absolute().parent.is_dir():
        raise click.BadParameter(f"{value}: there is no directory {value.parent}")
    if param.name == "plot" and value.suffix.lower() not in PLOT_FORMATS:
        raise click.BadParameter(f"{value}: wanted a name that ends in {', '.join(PLOT_FORMATS)}")
    return value


def _check_positive(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not 0 < value < math.inf:  # NaN too, which click.FloatRange lets pass
        raise click.BadParameter(f"{value}: wanted a positive number")
    return value


Command = TypeVar("Command", bound=Callable[..., Any])
R = TypeVar("R", bound=Row)
InputShapes: TypeAlias = Sequence[tuple[str, tuple[int, ...]]]


MODEL = click.Path(exists=True, dir_okay=False, path_type=Path)
_one_model = click.argument("model", required=False, type=MODEL)


def _model_options(view: _table.View, argument: Callable[[Any], Any] = _one_model) -> Callable[[Command], Command]:
    """What every command takes that looks at a network; gathered in a `Request`, and `sort` for its table."""
    options = (
        argument,
        click.option(
            "--input-shape",
            "input_shapes",
            type=InputShape(),
            multiple=True,
            help="Shape of the network's input, as 3,224,224 or name=1,3,48,320; once for each input. For files "
            "that hold only weights: extents of every layer, or of the layer named.",
        ),
        click.option(
            "--layout", callback=_check_layout, help="Layout of kernels in files that do not fix it, as HWIO."
        ),
        click.option("--backend", "backend_name", default="numpy", show_default=True, help="Array library."),
        click.option("--device", help="Where to compute, as cuda:0."),
        click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Default: float64 if stored so."),
        click.option(
            "--json",
            "json_path",
            type=click.Path(path_type=Path, allow_dash=True),
            callback=_check_output,
            help="Write the figures to a file, or with - to stdout in place of the table.",
        ),
        click.option(
            "--sort",
            type=click.Choice(list(view.sort_keys)),
            default="depth",
            show_default=True,
            help="Order of the table: from the input on, or the most remarkable first.",
        ),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _settings(
    many: ManyOptions,
    bounds: Bounds,
    input_shapes: InputShapes,
    layout: str | None,
    backend_name: str,
    device: str | None,
    dtype: str | None,
) -> TaskOptions:
    """What workers need to know; theirs may have libraries and devices that this machine lacks."""
    if many.scheduler == LOCAL:
        _backend(backend_name, device, dtype)
    return TaskOptions(_read_options(input_shapes, layout), backend_name, bounds, dtype, device)


def _read_options(input_shapes: InputShapes, layout: str | None) -> ReadOptions:
    names = [name for name, _ in input_shapes]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise click.UsageError(f"--input-shape is given twice for {min(repeated) or 'the first input'}")
    return ReadOptions(dict(input_shapes), layout)


def _only(models: Sequence[str]) -> Path | None:
    """The one model that there may be."""
    if len(models) > 1:
        raise click.UsageError(f"{len(models)} models: give --scheduler and --out too, as --scheduler local")
    try:
        return MODEL.convert(models[0], None, None) if models else None
    except click.BadParameter as error:
        hint = ": of many models by a pattern, --scheduler and --out are wanted" if glob.has_magic(models[0]) else ""
        raise click.BadParameter(f"{error.message}{hint}", param_hint="'[MODEL]...'") from None


def _import(module: str, option: str, extra: str) -> Any:
    """A module of this package whose libraries are wanted for one option only."""
    try:
        return importlib.import_module(f"convsv_adapters.{module}")
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{option} needs {error.name}: pip install 'convsv[{extra}]'") from None


@dataclass(frozen=True)
class Request:
    """The options that commands share, checked: a network, and the library to look at it with."""

    model: Path | None
    backend: Backend
    device: str | None
    dtype: str | None
    read_options: ReadOptions

    @classmethod
    def of(
        cls,
        model: Path | None,
        input_shapes: InputShapes,
        layout: str | None,
        backend_name: str,
        device: str | None,
        dtype: str | None,
    ) -> Request:
        """From the values of `_model_options`."""
        options = _read_options(input_shapes, layout)
        return cls(model, _backend(backend_name, device, dtype), device, dtype, options)

    @property
    def label(self) -> str:
        """The model, as in titles."""
        return self.model.name if self.model is not None else f"{BUNDLED} (comes with convsv)"

    def layers(self) -> list[Layer]:
        """Every convolution of the network, of which there is one at least."""
        with _model_file(self.model) as path:
            try:
                layers = read_model(path, self.read_options)
            except ModelError as error:
                raise click.ClickException(str(error)) from None
        if not layers:
            raise click.ClickException(f"{self.label}: no convolution found")
        return layers

    def write(self, layers: Sequence[Layer], reports: Sequence[ProjectionReport], output: Path) -> None:
        """Write the network with the projected kernels, and read it again before it takes its place."""
        kernels = {
            layer.stored.key: report.kernel
            for layer, report in zip(layers, reports, strict=True)
            if layer.stored is not None and report.kernel is not None
        }
        wanted = [kernels.get(layer.stored.key, layer.kernel) if layer.stored else layer.kernel for layer in layers]
        try:
            with _model_file(self.model) as path, replacing(output, like=path) as partial:
                write_model(path, kernels, partial)
                written = [layer.kernel for layer in read_model(partial, self.read_options)]
                for layer, kernel, found in zip(layers, wanted, written, strict=True):
                    if not np.array_equal(np.asarray(kernel), np.asarray(found), equal_nan=kernel is not None):
                        raise ModelError(
                            f"{path}: {layer.name} would change with the weights of others: project these by --only"
                        )
        except ModelError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            raise click.ClickException(f"{error.filename or output}: {error.strerror or error}") from None

    def publish(
        self,
        reports: Sequence[Row],
        fields: Sequence[str],
        view: _table.View,
        sort: str,
        json_path: Path | None,
        files: Mapping[Path, Callable[[], bytes]] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the files, the table or the JSON, which says `about` the whole what that maps to."""
        model = str(self.model) if self.model is not None else BUNDLED
        document = as_json(model, self.backend.name, reports, fields, about)
        to_stdout = json_path is not None and str(json_path) == "-"
        try:
            if json_path is not None and not to_stdout:
                write_whole(json_path, f"{document}\n".encode())
            for path, content in (files or {}).items():
                write_whole(path, content())
        except OSError as error:
            raise click.ClickException(f"{error.filename}: {error.strerror or error}") from None
        if to_stdout:
            click.echo(document)
        else:
            _table.show(reports, f"{self.label}, with {self.backend.name}", view, sort)


def _leave(reports: Sequence[Row]) -> None:
    """Say how many layers have no figures, and leave with status 1 if none has."""
    without = sum(report.norm is None for report in reports)
    if without:
        click.echo(f"{without} of {len(reports)} convolutions have no figures; their notes say why.", err=True)
    if without == len(reports):
        raise click.exceptions.Exit(1)


# ---- convsv spectrum, convsv norm ------------------------------------------------------------------------


@convsv.command()
@_model_options(_table.SPECTRUM, click.argument("models", metavar="[MODEL]...", nargs=-1))
@click.option(
    "--bounds",
    type=click.Choice(BOUNDS),
    default="upper",
    show_default=True,
    help="Certified bounds of the norm with the layer's own padding. upper: by the supremum over all frequencies. "
    "both: the exact norm too, which takes seconds a layer.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    callback=_check_output,
    help=f"Write the singular values, or of many models the norms over the steps, as a figure "
    f"({', '.join(PLOT_FORMATS)}).",
)
@many_options
def spectrum(
    models: Sequence[str],
    many: ManyOptions | None,
    json_path: Path | None,
    sort: str,
    plot: Path | None,
    bounds: Bounds,
    **options: Any,
) -> None:
    """Singular values of every convolution of a trained network.

    MODEL is an ONNX model, a PyTorch state dict, a safetensors file or an .npz archive; without it, a small
    network that comes with convsv. The operator is the circular one at the layer's extents, whatever padding the
    layer has: norm is its largest singular value, min its smallest, cond. their quotient, stable rank the sum of
    the squares by the largest. reshaped norm is that of the kernel as a matrix, factor how often it goes into norm.

    lower and upper (norm_lower and norm_upper in the JSON) are certified bounds of another norm: that of the layer
    with the padding it declares. Under zero padding upper holds for every input size; as a rule it is the least
    such number to within 1 %. lower is the norm at the layer's own extents, less its rounding, and is found with
    --bounds both.

    With --scheduler and --out, MODEL are many models: files, and quoted patterns such as 'run/*.safetensors', that
    all workers can read. Every layer of every model is a row of the table. A model's run is its folder, from the
    folder of the table, and its step the number behind "step" in the file's name, or else the last number there; a
    name without a number leaves it to that of a folder such as checkpoint-500. q05 is the value that 5 % of the
    singular values do not exceed. A second call computes what is missing or has changed. --json tells how many models
    there were, and which failed.

    The exit status is 0 if some layer has figures, and of many models some of each; 1 if none has or something failed;
    2 for a wrong call.
    """
    plots = None if plot is None else _import("_plot", "--plot", "cli")
    if many is not None:
        if sort != "depth":
            raise click.UsageError("--sort is for the table of one model")
        settings = _settings(many, bounds, **options)
        _import("_many", "--scheduler", "many").ManyRequest(models, many, settings).run(json_path, plot)
        return
    request = Request.of(_only(models), **options)
    layers = request.layers()
    rows = layer_reports(layers, request.backend, bounds=bounds, dtype=request.dtype, device=request.device)
    reports = list(tracked(rows, len(layers)))
    files = {}
    if plot is not None and plots is not None:
        files[plot] = lambda: plots.draw(reports, request.label, plot.suffix[1:].lower())
    request.publish(reports, SPECTRUM_FIELDS, _table.spectrum_view(bounds), sort, json_path, files)
    _leave(reports)


@convsv.command()
@_model_options(_table.NORM)
@click.option(
    "--rtol",
    type=float,
    callback=_check_positive,
    default=1e-3,
    show_default=True,
    help="Relative gap between the bounds.",
)
def norm(json_path: Path | None, sort: str, rtol: float, **options: Any) -> None:
    """Certified bounds of the norm of every convolution, for every input size.

    MODEL is as for `convsv spectrum`. The bounds hold for zero, valid and circular padding; a layer that repeats
    pixels in another way is listed without them. An input shape matters to no bound; it is needed only where a
    model must be run to find its layers.

    The exit status is 0 if some layer has figures, 1 if none has or something failed, 2 for a wrong call.
    """
    request = Request.of(**options)
    layers = request.layers()
    rows = bounds_reports(layers, request.backend, rtol=rtol, dtype=request.dtype, device=request.device)
    reports = list(tracked(rows, len(layers)))
    request.publish(reports, NORM_FIELDS, _table.NORM, sort, json_path)
    _leave(reports)


# ---- convsv project --------------------------------------------------------------------------------------


def _check_bound(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not 0 <= value < math.inf:
        raise click.BadParameter(f"{value}: wanted a number that is not negative")
    return value


@convsv.command("project")
@_model_options(_table.projection_view(1.0, "dykstra"))
@click.option("--bound", type=float, callback=_check_bound, required=True, help="Largest norm of a layer.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    callback=_check_output,
    required=True,
    help="File to write the network to, in its own format.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="dykstra",
    show_default=True,
    help="dykstra: to the nearest kernel. alternating, newton-schulz: to some near one. rescale: by a factor.",
)
@click.option(
    "--rtol",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-2,
    show_default=True,
    help="dykstra: gap between the squared distance and that of the nearest kernel; others: excess to stop at.",
)
@click.option(
    "--max-iterations",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="After so many a layer is scaled to the bound as it is.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Project only the layers whose names match, as 'block1.*'; may be given more than once.",
)
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists, even if it is MODEL.")
def project_network(
    json_path: Path | None,
    sort: str,
    bound: float,
    output: Path,
    method: ProjectionMethod,
    rtol: float,
    max_iterations: int,
    only: Sequence[str],
    force: bool,
    **options: Any,
) -> None:
    """Project every convolution of a trained network onto a bound of its norm.

    MODEL is as for `convsv spectrum`. It is written to OUTPUT in its own format with other weights and nothing else
    changed. Each layer's norm, with its own padding and for every input size, is then at most the bound, which
    is certified of the weights as they are stored. Layers that are within it already keep theirs bit for bit. Where
    reflected or repeated pixels make the norm depend on the extents, these are the ones that the input shape gives.

    Nothing is written unless every layer, or every one named by --only, is shown to be within the bound. What can
    not be replaced are weights that the file does not store as such: quantised, normalised, computed by nodes.

    The exit status is 0 if OUTPUT was written, 1 if a layer stays above the bound or something failed, 2 for a wrong
    call.
    """
    if os.path.lexists(output) and not force:
        raise click.BadParameter(f"{output} exists: give another, or --force to replace it", param_hint="--output")
    if output.exists() and not output.is_file():
        raise click.BadParameter(f"{output} is no file", param_hint="--output")
    request = Request.of(**options)
    layers = request.layers()
    if lost := [pattern for pattern in only if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers)]:
        raise click.BadParameter(f"no convolution is called {lost[0]!r}", param_hint="--only")
    rows = project_layers(
        layers,
        request.backend,
        bound,
        method=method,
        rtol=rtol,
        max_iterations=max_iterations,
        selected=lambda name: not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only),
        dtype=request.dtype,
        device=request.device,
    )
    reports = list(tracked(rows, len(layers)))
    failed = [report.name for report in reports if report.failed]
    if not failed:
        request.write(layers, reports, output)
    about = {"output": None if failed else str(output), "bound": bound, "method": method}
    request.publish(reports, PROJECT_FIELDS, _table.projection_view(bound, method), sort, json_path, about=about)
    if failed:
        names = ", ".join(failed[:3]) + (f" and {len(failed) - 3} more" if len(failed) > 3 else "")
        raise click.ClickException(f"{output} was not written: no norm of at most {bound:g} for {names}; see the notes")


def _backend(name: str, device: str | None, dtype: str | None) -> Backend:
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


@contextlib.contextmanager
def _model_file(model: Path | None) -> Iterator[Path]:
    if model is not None:
        yield model
    else:
        bundled = importlib.resources.files("convsv_adapters") / "data" / BUNDLED
        with importlib.resources.as_file(bundled) as path:
            yield path


GEOMETRY_FIELDS = ("name", "kernel_shape", "layout", "stride", "dilation", "groups")
SPECTRUM_FIELDS = (
    *GEOMETRY_FIELDS,
    "input_shape",
    "operator_norm",
    "smallest_singular_value",
    "condition_number",
    "stable_rank",
    "norm_lower",
    "norm_upper",
    "reshaped_norm",
    "note",
)
NORM_FIELDS = (
    *GEOMETRY_FIELDS,
    "lower",
    "upper",
    "frequency",
    "evaluations",
    "converged",
    "reshaped_norm",
    "note",
)


PROJECT_FIELDS = (*GEOMETRY_FIELDS, "norm_before", "norm_after", "distance", "iterations", "converged", "note")


def as_json(
    model: str,
    backend: str,
    reports: Sequence[Row],
    fields: Sequence[str],
    about: Mapping[str, Any] | None = None,
) -> str:
    """Write the named fields of reports as JSON, with null for a figure that could not be had or that is infinite.

    JSON has no infinity. A condition number is infinite if and only if `smallest_singular_value` is 0,
    and the note then says that the operator is singular.
    A transposed convolution has `transposed` in its note. `norm_lower` and `norm_upper` are null too where
    ``--bounds`` did not ask for them.
    """
    rows = [{field: _json_value(getattr(report, field)) for field in fields} for report in reports]
    for report, row in zip(reports, rows, strict=True):
        if report.transposed:
            row["note"] = "; ".join(filter(None, ("transposed", report.note)))
    document = {"model": model, "backend": backend, **(about or {}), "layers": rows}
    return json.dumps(document, indent=2, allow_nan=False)


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- convsv backends, convsv conformance -----------------------------------------------------------------


@convsv.command("backends")
def list_backends() -> None:
    """Array libraries that a plugin brings, and which of them can be used here."""
    _table.show_backends(backends())


@convsv.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def conformance(arguments: tuple[str, ...]) -> None:
    """Check backends against the dense matrix; see convsv conformance --help."""
    from convsv_conformance.__main__ import main

    main(args=list(arguments), prog_name="convsv conformance")
