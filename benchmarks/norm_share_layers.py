"""Time the norm of one layer beside all of its singular values, in several libraries at once."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import convsv_core as convsv
from benchmarks.command import Size
from benchmarks.comparison import Effort
from benchmarks.layers import SUFFIXES, TRAINED, trained_layers
from benchmarks.libraries import Library
from benchmarks.norm_first_call import Layer
from benchmarks.shapes import Shape, square
from benchmarks.timing import Clock, Task, alternate, time_once
from convsv_core.backend import Array

__all__ = ["AMOUNTS", "BOUNDS", "COMPILED", "NORM", "SPECTRUM", "Amount", "ShareRow", "find", "measure"]

SPECTRUM, NORM, BOUNDS = "singular_values", "operator_norm", "norm_bounds"
COMPILED = "singular_values, compiled"

EXTENTS = {64: 56, 128: 28, 256: 14}
"""Extents of an input, by the largest number of channels that has them: those of the stages of a ResNet at 224."""

REQUIREMENTS = Path(__file__).resolve().parents[1] / "tests" / "networks.txt"
"""The list of wheels that hold trained networks: lines of ``name==version``."""


@dataclass(frozen=True)
class Amount:
    """Say how much is measured.

    Attributes
    ----------
    effort : Effort
    gaussian : tuple of (int, int)
        Channels and extents of the Gaussian layers.
    kernels : int
        Different kernels of each.
    most_channels : int
        Largest number of channels of a trained layer.
    first_call : Layer
        The layer whose first call is timed.
    """

    effort: Effort
    gaussian: tuple[tuple[int, int], ...]
    kernels: int
    most_channels: int
    first_call: Layer


AMOUNTS = {
    Size.FULL: Amount(Effort(repeats=3), tuple(EXTENTS.items()), 5, 1024, Layer(64, 56)),
    Size.QUICK: Amount(Effort(repeats=2), ((32, 28), (64, 14)), 2, 32, Layer(64, 28)),
    Size.TINY: Amount(Effort(repeats=2), ((4, 8),), 2, 8, Layer(4, 8)),
}


@dataclass(frozen=True)
class ShareRow:
    """Record one method on one layer in one library: an entry of ``rows`` in the JSON.

    Attributes
    ----------
    library, group, network, label, method : str
    seconds : float
        Median.
    times : list of float
        In the order they were taken, in turns with all others of the layer.
    share : float
        Time over that of `singular_values` in the same library: the median of the turns.
    over_numpy : float or None
        Time over that of the same result with NumPy: the median of the turns. None where NumPy was not measured.
    """

    library: str
    group: str
    network: str
    label: str
    method: str
    seconds: float
    times: list[float]
    share: float
    over_numpy: float | None


def find(places: Sequence[Path], size: Size) -> dict[str, list[Shape]]:
    """Return the layers to measure, by group.

    Parameters
    ----------
    places : sequence of Path
        As for `benchmarks.layers.find_layers`. Without any, the networks of the wheels in ``tests/networks.txt`` that
        are installed are read for `Size.FULL`, or else the network of the package.
    size : Size
    """
    amount = AMOUNTS[size]
    if not places and size is Size.FULL:
        places = list(_installed())
    groups: dict[str, list[Shape]] = {}
    for channels, extent in amount.gaussian:
        numbers = range(1, amount.kernels + 1)
        shapes = [square(f"Gaussian {number}", 3, channels, channels, extent) for number in numbers]
        groups[f"Gaussian, {channels} at {extent}"] = shapes
    layers = [_resized(shape) for shape in trained_layers(places) if _channels(shape) <= amount.most_channels]
    # A kernel that is longer than the input would wrap around.
    groups[TRAINED] = [shape for shape in layers if max(shape.taps) <= min(shape.extents)]
    return groups


def _installed() -> Iterator[Path]:
    """Yield the model files of the wheels that `REQUIREMENTS` lists, where these are installed."""
    for line in REQUIREMENTS.read_text().splitlines():
        name, pinned, _ = line.partition("==")
        if not pinned:
            continue
        try:
            wheel = distribution(name)
        except PackageNotFoundError:
            continue
        for file in sorted(wheel.files or ()):
            if file.suffix in SUFFIXES:
                yield Path(str(wheel.locate_file(file)))


def _channels(shape: Shape) -> int:
    return max(shape.inputs, shape.outputs)


def _resized(shape: Shape) -> Shape:
    """Return a trained layer at the extents that a ResNet has for so many channels."""
    fitting = (extent for channels, extent in EXTENTS.items() if _channels(shape) <= channels)
    return replace(shape, extents=(next(fitting, min(EXTENTS.values())),) * len(shape.taps))


def measure(libraries: Sequence[Library], group: str, shape: Shape, repeats: int, clock: Clock) -> list[ShareRow]:
    """Run every method of every library on one layer, in turns."""
    tasks = {(library.name, name): task for library in libraries for name, task in _tasks(library, shape).items()}
    for task in tasks.values():
        task()
    estimates = {key: time_once(task, clock) for key, task in tasks.items()}
    times = alternate(tasks, estimates, repeats, clock)

    def over(key: tuple[str, str], base: tuple[str, str]) -> float:
        return statistics.median(one / other for one, other in zip(times[key], times[base], strict=True))

    rows = []
    for library, method in times:
        same = "numpy", SPECTRUM if method == COMPILED else method
        rows.append(
            ShareRow(
                library=library,
                group=group,
                network=shape.network,
                label=shape.label,
                method=method,
                seconds=statistics.median(times[library, method]),
                times=times[library, method],
                share=over((library, method), (library, SPECTRUM)),
                over_numpy=over((library, method), same) if same in times else None,
            )
        )
    return rows


def _tasks(library: Library, shape: Shape) -> dict[str, Task]:
    """Return the methods of one library on one layer: each task ends when its result is there."""
    kernel = library.asarray(shape.kernel())

    def spectrum(kernel: Array) -> Array:
        return convsv.singular_values(kernel, shape.extents, shape.conv)

    tasks: dict[str, Task] = {
        SPECTRUM: lambda: library.wait(spectrum(kernel)),
        NORM: lambda: library.wait(convsv.operator_norm(kernel, shape.extents, shape.conv)),
        BOUNDS: lambda: library.wait(convsv.norm_bounds(kernel, shape.conv, input_shape=shape.extents).upper),
    }
    if library.backend.compiles:
        run = library.compile(spectrum, kernel).run
        tasks[COMPILED] = lambda: library.wait(run(kernel))
    return tasks
