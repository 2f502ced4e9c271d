"""Measure `project` by every method, beside one clip-and-cut step and Dykstra's algorithm as it stands."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import convsv_core as convsv
from benchmarks.clip_baselines import plain_dykstra
from benchmarks.command import Measured, Size
from benchmarks.layers import GAUSSIAN, TRAINED, find_layers, fixed
from benchmarks.libraries import Library
from benchmarks.shapes import HostArray, Shape, square
from benchmarks.tables import LAYER, duration, figures, integers, ratio, signed, words
from benchmarks.timing import alternate, time_once
from convsv_core.backend import Array

__all__ = [
    "AMOUNTS",
    "COLUMNS",
    "EXPLANATION",
    "SHARE",
    "Amount",
    "Outcome",
    "ProjectionRow",
    "find_projected",
    "measure",
]

METHODS = ("dykstra", "alternating", "rescale", "newton-schulz")
NEAREST, WARM, PLAIN, ONE_STEP = METHODS[0], "dykstra, warm", "plain Dykstra", "clip once"
SHARE = 0.5
"""The bound, in units of the kernel's norm: a guess."""

CHANGE = 1e-3
"""Noise, relative to the kernel, that is added after the projection that a warm start comes from: a guess."""

PLAIN_ITERATIONS = 3000
"""Largest number of iterations of plain Dykstra: a guess, for speed."""

EXPLANATION = (
    "ratio: time over that of dykstra, medians of alternate runs; plain Dykstra runs once. distance: over that of "
    "dykstra. norm: of the result over the bound, less 1. converged: whether the method's own aim was reached; plain "
    "Dykstra's is the gap of dykstra."
)
COLUMNS = (
    *LAYER,
    words("method"),
    figures("time", lambda row: duration(row.seconds)),
    figures("ratio", lambda row: ratio(row.ratio)),
    integers("iterations"),
    figures("distance", lambda row: f"{row.distance_ratio:.5f}"),
    figures("norm", lambda row: signed(row.norm_ratio - 1)),
    figures("converged", lambda row: {True: "yes", False: "no", None: ""}[row.converged]),
)


@dataclass(frozen=True)
class Amount:
    """Say which layers are projected, and how far.

    Attributes
    ----------
    gaussians : sequence of Shape
    trained : int
        Layers of each trained network.
    extent : int
        Extent of their square inputs.
    gap : float
        Relative gap that `project` is asked for, and that plain Dykstra runs to.
    plain_operations : float
        Plain Dykstra ends when it has done so much work: the sum over frequencies and iterations of n^3, where n is
        the smaller side of a matrix.
    """

    gaussians: Sequence[Shape]
    trained: int
    extent: int
    gap: float
    plain_operations: float


AMOUNTS = {
    Size.FULL: Amount(
        [
            fixed(square("Gaussian", 3, 16, 16, 32)),
            fixed(square("Gaussian", 3, 32, 64, 16)),
            fixed(square("Gaussian", 3, 64, 64, 16)),
        ],
        trained=4,
        extent=16,
        gap=1e-4,
        plain_operations=1e10,
    ),
    Size.QUICK: Amount([fixed(square("Gaussian", 3, 8, 8, 12))], trained=4, extent=16, gap=1e-4, plain_operations=1e8),
    Size.TINY: Amount([fixed(square("Gaussian", 3, 4, 4, 6))], trained=1, extent=8, gap=1e-2, plain_operations=1e5),
}


@dataclass(frozen=True)
class ProjectionRow:
    """Record one method on one layer in one library: an entry of ``projections`` in the JSON.

    Attributes
    ----------
    ratio : float
        Time over that of "dykstra" without a state.
    iterations : int
    distance : float
        Frobenius norm of the operators' difference.
    distance_ratio : float
        Distance over that of "dykstra".
    norm_ratio : float
        Norm of the result over the bound: for `project` the certified norm, else the exact norm in float64.
    converged : bool or None
        Whether the method's own aim was reached; None for the single step.
    """

    library: str
    group: str
    network: str
    label: str
    method: str
    seconds: float
    times: list[float]
    ratio: float
    iterations: int
    distance: float
    distance_ratio: float
    norm_ratio: float
    converged: bool | None


@dataclass(frozen=True)
class Outcome:
    """Hold what a method answers: a kernel of NumPy, its norm, iterations, and whether the method's aim was reached."""

    kernel: HostArray
    norm: float
    iterations: int
    converged: bool | None


class _Method(NamedTuple):
    """Hold a method on one kernel: a function that is timed and returns a kernel, and one that returns the outcome."""

    run: Callable[[], Array]
    tell: Callable[[], Outcome]


def find_projected(places: Sequence[Path], size: Size) -> dict[str, list[Shape]]:
    """Return the layers to project, by group: Gaussian ones, and a few of each trained network, at a small input."""
    amount = AMOUNTS[size]
    trained = find_layers(places, size)[TRAINED]
    groups: dict[str, list[Shape]] = {GAUSSIAN: [*amount.gaussians], TRAINED: []}
    for network in dict.fromkeys(shape.network for shape in trained):
        held = [shape for shape in trained if shape.network == network and max(shape.stride) == 1]
        few = min(amount.trained, len(held))
        for place in range(few):
            groups[TRAINED].append(replace(held[place * len(held) // few], extents=(amount.extent, amount.extent)))
    return groups


def measure(layer: Measured, amount: Amount, repeats: int) -> list[ProjectionRow]:
    """Project one layer by every method, in turns, and by plain Dykstra once."""
    library, group, shape = layer
    before = shape.kernel()
    kernel = _changed(before)
    bound = SHARE * float(convsv.operator_norm(kernel, shape.extents, shape.conv))
    methods = dict(_methods(library, shape, before, kernel, bound, amount.gap))
    tasks = {name: partial(_run, library, method) for name, method in methods.items()}
    estimates = {name: time_once(task) for name, task in tasks.items()}
    outcomes = {name: method.tell() for name, method in methods.items()}
    times = alternate(tasks, estimates, repeats)
    found: list[Outcome] = []
    times[PLAIN] = [time_once(lambda: found.append(_plain(shape, kernel, bound, amount)))]
    outcomes[PLAIN] = found[0]
    ours, nearest = statistics.median(times[NEAREST]), _distance(shape, kernel, outcomes[NEAREST].kernel)
    rows = []
    for name, outcome in outcomes.items():
        distance = _distance(shape, kernel, outcome.kernel)
        rows.append(
            ProjectionRow(
                library=library.name,
                group=group,
                network=shape.network,
                label=shape.label,
                method=name,
                seconds=statistics.median(times[name]),
                times=times[name],
                ratio=statistics.median(times[name]) / ours,
                iterations=outcome.iterations,
                distance=distance,
                distance_ratio=distance / nearest,
                norm_ratio=outcome.norm / bound,
                converged=outcome.converged,
            )
        )
    return rows


def _run(library: Library, method: _Method) -> None:
    library.wait(method.run())


def _changed(kernel: HostArray) -> HostArray:
    noise = np.random.default_rng(0).standard_normal(kernel.shape)
    share = CHANGE * float(np.linalg.norm(kernel)) / float(np.linalg.norm(noise))
    return (kernel + share * noise).astype(kernel.dtype)


def _methods(
    library: Library, shape: Shape, before: HostArray, kernel: HostArray, bound: float, gap: float
) -> Iterator[tuple[str, _Method]]:
    """Yield the name of every method, and the method on this kernel."""
    array = library.asarray(kernel)

    def projection(**options: Any) -> _Method:
        def run() -> convsv.Projection:
            return convsv.project(array, shape.extents, shape.conv, bound, rtol=gap, **options)

        def tell() -> Outcome:
            found = run()
            kernel = library.backend.to_numpy(found.kernel)
            return Outcome(kernel, float(found.norm), found.iterations, bool(found.converged))

        return _Method(lambda: run().kernel, tell)

    for method in METHODS:
        yield method, projection(method=method)
    state = convsv.project(library.asarray(before), shape.extents, shape.conv, bound, rtol=gap).state
    yield WARM, projection(state=state)

    def step() -> Array:
        return convsv.clip(array, shape.extents, shape.conv, bound)

    def tell() -> Outcome:
        clipped = library.backend.to_numpy(step())
        return Outcome(clipped, _norm(shape, clipped), 1, None)

    yield ONE_STEP, _Method(step, tell)


def _plain(shape: Shape, kernel: HostArray, bound: float, amount: Amount) -> Outcome:
    each = math.prod(shape.grid) * min(shape.inputs, shape.outputs) ** 3
    most = max(1, min(PLAIN_ITERATIONS, round(amount.plain_operations / each)))
    found = plain_dykstra(shape, kernel, bound, amount.gap, most)
    return Outcome(found.kernel, _norm(shape, found.kernel), found.iterations, found.gap <= amount.gap)


def _norm(shape: Shape, kernel: HostArray) -> float:
    return float(convsv.operator_norm(kernel.astype(np.float64), shape.extents, shape.conv))


def _distance(shape: Shape, kernel: HostArray, other: HostArray) -> float:
    """Return the Frobenius norm of the difference of the operators."""
    change = other.astype(np.float64) - kernel.astype(np.float64)
    return float(convsv.frobenius_norm(change, shape.extents, shape.conv))
