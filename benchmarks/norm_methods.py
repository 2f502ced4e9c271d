"""``python -m benchmarks norm``: the certified norm beside other ways to it, time against true relative error."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import convsv_core as convsv
from benchmarks import tables
from benchmarks.baselines import Measured, TwoLines, matrices_at, polyphase
from benchmarks.command import comparison_options, networks_option, progress
from benchmarks.layers import RESNET, find_layers
from benchmarks.libraries import Function, Library, open_library
from benchmarks.machine import describe, load_average
from benchmarks.norm_baselines import gram_bounds, kernel_gram_bound, power_iteration, reshaped_norm, tensor_norm_bound
from benchmarks.shapes import Shape, select
from benchmarks.singular_values import Effort
from benchmarks.timing import alternate, time_once
from convsv_core.backend import Array

EFFORT = Effort(repeats=3, full_seconds=2.0, sample_seconds=0.5)
QUICK_EFFORT = Effort(repeats=1, full_seconds=0.2, sample_seconds=0.05)
SYMBOL_BYTES = 1 << 28
EXTENTS, QUICK_EXTENTS = (32, 56, 112, 224), (32, 56)
STEPS = (50, 500)
FEW_STEPS = 2
POWER_OPERATIONS, QUICK_POWER_OPERATIONS = 1e11, 1e10
"""Power iteration of no more multiplications is run in full: a count, so that no load on the machine decides."""

OURS, PAPER, OWN = "norm_bounds", "FFT + SVD", "own n"
RTOL, TRUE_RTOL, GRID_RTOL = 1e-3, 1e-6, 1e-4
LEAST_ERROR = 1e-9


@dataclass(frozen=True)
class Timed:
    """A method on one layer, ready to be timed: its value, and of what quantity the truth is.

    Attributes
    ----------
    value : float
        The certified upper bound of ours; what the method returns of the others.
    truth : float
    certified : str
        "both", "upper" or "".
    evaluations : int or None
        Of a block of the symbol; ours alone tells.
    """

    measured: Measured
    value: float | None
    truth: float
    certified: str = ""
    evaluations: int | None = None


@dataclass(frozen=True)
class NormRow:
    """One method on one layer in one library: an entry of ``rows`` in the JSON.

    Attributes
    ----------
    error : float or None
        ``value / truth - 1``, or None where the value would have taken too long. The truth is the norm over all
        frequencies for a method that has no input's extents, and for power iteration; else the norm on that
        circular grid.
    extrapolated : bool
        Whether the time was scaled up from a sample of the frequencies.
    ratio : float
        Its time over that of `norm_bounds` for every input size.
    """

    library: str
    group: str
    network: str
    label: str
    multiplicity: int
    method: str
    certified: str
    seconds: float
    times: list[float]
    extrapolated: bool
    value: float | None
    truth: float
    error: float | None
    evaluations: int | None
    ratio: float


@dataclass(frozen=True)
class NormSummary:
    """A method on a group of layers: an entry of ``summary`` in the JSON.

    Attributes
    ----------
    seconds : float
        Summed, every layer as often as its network holds it.
    ratio, median_ratio, least_ratio : float
        Of the summed times, and of the layers, to `norm_bounds`.
    median_error, largest_error, least_error : float
        Signed; median of the absolute errors.
    evaluations : str
        Median and largest number.
    """

    library: str
    group: str
    method: str
    certified: str
    count: int
    seconds: float
    extrapolated: int
    ratio: float
    median_ratio: float
    least_ratio: float
    median_error: float | None
    least_error: float | None
    largest_error: float | None
    evaluations: str


def measure(library: Library, group: str, shape: Shape, effort: Effort, *, quick: bool) -> list[NormRow]:
    """Run every method on one layer, in turns."""
    extents = [shape.extents] if group == RESNET else [(n, n) for n in (QUICK_EXTENTS if quick else EXTENTS)]
    methods = dict(_methods(library, shape, extents, effort, quick=quick))
    tasks = {(m, t): task for m, one in methods.items() for t, task in one.measured.tasks.items()}
    estimates = {" ".join(key): methods[key[0]].measured.estimates[key[1]] for key in tasks}
    found = alternate({" ".join(key): task for key, task in tasks.items()}, estimates, effort.repeats)
    times = {
        name: one.measured.combine({task: found[f"{name} {task}"] for task in one.measured.tasks})
        for name, one in methods.items()
    }
    ours = statistics.median(times[OURS])
    return [
        NormRow(
            library=library.name,
            group=group,
            network=shape.network,
            label=shape.label,
            multiplicity=shape.multiplicity,
            method=name,
            certified=one.certified,
            seconds=statistics.median(times[name]),
            times=times[name],
            extrapolated=one.measured.extrapolated,
            value=one.value,
            truth=one.truth,
            error=None if one.value is None else one.value / one.truth - 1,
            evaluations=one.evaluations,
            ratio=statistics.median(times[name]) / ours,
        )
        for name, one in methods.items()
    ]


def _methods(
    library: Library, shape: Shape, extents: Sequence[tuple[int, ...]], effort: Effort, *, quick: bool
) -> Iterator[tuple[str, Timed]]:
    wide = shape.kernel().astype(np.float64)
    truth = float(convsv.norm_bounds(wide, shape.conv, rtol=TRUE_RTOL).lower)
    kernel, folded = library.asarray(shape.kernel()), library.asarray(_undilated(shape))
    yield OURS, _ours(library, shape, None, truth)
    yield "reshaped matrix", _simple(library, reshaped_norm(library), kernel, truth)
    yield "tensor norm", _simple(library, tensor_norm_bound(library, folded.shape), folded, truth)
    yield "Gram, kernel", _simple(library, kernel_gram_bound(library), folded, truth, certified="upper")
    for number, size in enumerate(extents):
        at = f"n={size[0]}" if len(extents) > 1 else OWN
        sized = replace(shape, extents=size)
        bounds = convsv.norm_bounds(wide, shape.conv, input_shape=size, rtol=GRID_RTOL)
        yield f"{PAPER} {at}", _by_frequency(library, sized, effort, library.svdvals, bounds)
        if number in (1, len(extents) - 1):
            yield f"{OURS} {at}", _ours(library, sized, size, float(bounds.lower))
        if number == min(1, len(extents) - 1):
            gram = gram_bounds(library)
            yield f"Gram, FFT {at}", replace(_by_frequency(library, sized, effort, gram, bounds), certified="upper")
            for steps in STEPS:
                most = QUICK_POWER_OPERATIONS if quick else POWER_OPERATIONS
                yield f"power {steps} {at}", _power(library, sized, steps, kernel, truth, most)


def _undilated(shape: Shape) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The polyphase kernel; without a stride, the zeros between dilated taps do not change the norm."""
    if max(shape.stride) == 1:
        shape = replace(shape, dilation=(1,) * len(shape.taps))
    return polyphase(shape, shape.kernel())


def _ours(library: Library, shape: Shape, input_shape: tuple[int, ...] | None, truth: float) -> Timed:
    kernel = library.asarray(shape.kernel())

    def task() -> None:
        convsv.norm_bounds(kernel, shape.conv, input_shape=input_shape, rtol=RTOL)

    bounds = convsv.norm_bounds(kernel, shape.conv, input_shape=input_shape, rtol=RTOL)
    return Timed(_whole(task), float(bounds.upper), truth, "both" if bounds.converged else "", bounds.evaluations)


def _simple(library: Library, function: Function, argument: Array, truth: float, certified: str = "") -> Timed:
    run, compiled = library.compile(function, argument)
    value = float(run(argument))
    return Timed(_whole(lambda: library.wait(run(argument)), compiled), value, truth, certified)


def _power(library: Library, shape: Shape, steps: int, kernel: Array, truth: float, most: float) -> Timed:
    """Power iteration; where it takes far too long only the first steps are timed, and its value is not known."""
    outputs = math.prod(math.ceil(n / s) for n, s in zip(shape.extents, shape.stride, strict=True))
    if 2 * steps * outputs * math.prod(kernel.shape) <= most:
        return _simple(library, power_iteration(library, shape, steps), kernel, truth)
    few = _simple(library, power_iteration(library, shape, FEW_STEPS), kernel, truth)
    scaled = replace(few.measured, weights={"": steps / FEW_STEPS}, extrapolated=True)
    return replace(few, measured=scaled, value=None)


def _whole(task: Function, compile_seconds: float | None = None) -> Measured:
    """What is timed in full."""
    return Measured(
        {"": task}, {"": time_once(task)}, {"": 1.0}, 0, extrapolated=False, compile_seconds=compile_seconds
    )


def _by_frequency(library: Library, shape: Shape, effort: Effort, values: Function, bounds: convsv.NormBounds) -> Timed:
    """A method that looks at all frequencies; its value is that at the frequency of the largest norm."""
    lines = TwoLines(
        library,
        shape,
        effort.full_seconds,
        effort.sample_seconds,
        effort.baseline_threads,
        values=values,
        symbol_bytes=SYMBOL_BYTES,
    )
    turns = [round(-angle * n / (2 * math.pi)) % n for angle, n in zip(bounds.frequency, shape.grid, strict=True)]
    place = np.asarray([np.ravel_multi_index(turns, shape.grid)])
    matrices = library.asarray(matrices_at(lines.kernel, shape.grid, place).astype(np.complex64))
    value = float(np.max(library.backend.to_numpy(values(matrices))))
    return Timed(lines.prepare(), value, float(bounds.lower), "upper")


def summarise(rows: Sequence[NormRow]) -> list[NormSummary]:
    """One summary for each library, group and method."""
    keys = dict.fromkeys((row.library, row.group, row.method) for row in rows)
    return [_summarise([row for row in rows if (row.library, row.group, row.method) == key], rows) for key in keys]


def _summarise(members: Sequence[NormRow], rows: Sequence[NormRow]) -> NormSummary:
    first = members[0]
    ours = [row for row in rows if (row.library, row.group, row.method) == (first.library, first.group, OURS)]
    seconds, base = (sum(row.seconds * row.multiplicity for row in listed) for listed in (members, ours))
    errors = [row.error for row in members if row.error is not None]
    spent = [row.evaluations for row in members if row.evaluations is not None]
    return NormSummary(
        library=first.library,
        group=first.group,
        method=first.method,
        certified=min((row.certified for row in members), key=len),
        count=sum(row.multiplicity for row in members),
        seconds=seconds,
        extrapolated=sum(row.extrapolated for row in members),
        ratio=seconds / base,
        median_ratio=statistics.median(row.ratio for row in members),
        least_ratio=min(row.ratio for row in members),
        median_error=statistics.median(map(abs, errors)) if errors else None,
        least_error=min(errors, default=None),
        largest_error=max(errors, default=None),
        evaluations=f"{statistics.median(spent):.0f} / {max(spent)}" if spent else "",
    )


def draw(path: Path, rows: Sequence[NormRow]) -> None:
    """Write the figure: time against the absolute error, one plot a library and group."""
    panels = list(dict.fromkeys((row.library, row.group) for row in rows))
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _draw(axes, ", ".join(panel), [row for row in rows if (row.library, row.group) == panel])
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, title: str, rows: Sequence[NormRow]) -> None:
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        points = [
            (row.seconds, max(abs(row.error), LEAST_ERROR))
            for row in rows
            if row.method == method and row.error is not None
        ]
        if not points:
            continue
        marker = "o" if method.startswith(OURS) else "s" if method.startswith(PAPER) else "^"
        axes.loglog(*zip(*points, strict=True), marker, color=f"C{number % 10}", markersize=5, alpha=0.7, label=method)
    axes.set(xlabel="seconds", ylabel="relative error of the norm", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


@click.command()
@comparison_options(plot="Draw time against error")
@networks_option
def norm(
    quick: bool,
    backends: Sequence[str],
    device: str | None,
    only: str | None,
    repeats: int | None,
    json_path: Path | None,
    plot: Path | None,
    networks: Sequence[Path],
) -> None:
    """Time norm_bounds against other ways to the norm, and tell how wrong each is.

    On the dense layers of trained networks, on Gaussian kernels, and on ResNet-18 with random weights.
    """
    default = QUICK_EFFORT if quick else EFFORT
    effort = replace(default, repeats=repeats or default.repeats)
    load_before = load_average()
    libraries = [open_library(name, device) for name in dict.fromkeys(backends)]
    rows: list[NormRow] = []
    groups = {group: select(shapes, only) for group, shapes in find_layers(networks, quick=quick).items()}
    if not any(groups.values()):
        raise click.BadParameter(f"{only!r} is in the name of no layer", param_hint="--only")
    with progress() as tell:
        for library in libraries:
            for group, shapes in groups.items():
                for number, shape in enumerate(shapes, start=1):
                    tell(f"{library.name} {group} {number}/{len(shapes)} {shape.name}")
                    rows.extend(measure(library, group, shape, effort, quick=quick))
    machine = describe(libraries) | {"load_average": [load_before, load_average()]}
    summaries = summarise(rows)
    tables.show_machine(machine, {})
    tables.show_norms(rows)
    tables.show_norm_summary(summaries)
    if plot is not None:
        draw(plot, rows)
    if json_path is not None:
        content = {
            "benchmark": "norm",
            "arguments": {"quick": quick, "only": only, "device": device, "rtol": RTOL} | asdict(effort),
            "machine": machine,
            "rows": [asdict(row) for row in rows],
            "summary": [asdict(summary) for summary in summaries],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")
