"""`project` by every method, beside one clip-and-cut step and Dykstra's algorithm as it stands."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import convsv_core as convsv
from benchmarks.baselines import HostArray
from benchmarks.clip_baselines import plain_dykstra
from benchmarks.comparison import Effort
from benchmarks.layers import GAUSSIAN, TRAINED, find_layers, fixed
from benchmarks.libraries import Library
from benchmarks.shapes import Shape, square
from benchmarks.timing import alternate, time_once
from convsv_core._projection.projection import ProjectionMethod
from convsv_core.backend import Array

METHODS: tuple[ProjectionMethod, ...] = ("dykstra", "alternating", "rescale", "newton-schulz")
NEAREST, WARM, PLAIN, ONE_STEP = METHODS[0], "dykstra, warm", "plain Dykstra", "clip once"
SHARE = 0.5
"""The bound, in units of the kernel's norm."""

GAP = 1e-4
"""Relative gap that `project` is asked for, and that plain Dykstra runs to."""

CHANGE = 1e-3
"""Noise, relative to the kernel, between the projection that a warm start comes from and the one it is for."""

PLAIN_OPERATIONS, QUICK_PLAIN_OPERATIONS = 1e10, 1e8
"""Plain Dykstra ends when n^3 summed over frequencies and iterations is this, n the smaller side of a matrix."""

PLAIN_ITERATIONS = 3000
EXTENT, FEW = 16, 4
GAUSSIANS = [
    fixed(square("Gaussian", 3, 16, 16, 32)),
    fixed(square("Gaussian", 3, 32, 64, EXTENT)),
    fixed(square("Gaussian", 3, 64, 64, EXTENT)),
]
QUICK_GAUSSIANS = [fixed(square("Gaussian", 3, 8, 8, 12))]


@dataclass(frozen=True)
class ProjectionRow:
    """One method on one layer in one library: an entry of ``projections`` in the JSON.

    Attributes
    ----------
    ratio : float
        Its time over that of "dykstra" without a state.
    iterations : int
    distance : float
        Frobenius norm of the operators' difference.
    distance_ratio : float
        To that of "dykstra".
    norm_ratio : float
        Norm of the result over the bound: the certified one of `project`, else the exact one in float64.
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
    """What a method answers: a kernel of NumPy, its norm, iterations, and whether its aim was reached."""

    kernel: HostArray
    norm: float
    iterations: int
    converged: bool | None


def find_projected(places: Sequence[Path], *, quick: bool) -> dict[str, list[Shape]]:
    """The layers to project, by group: Gaussian ones, and of each trained network a few, at a small input."""
    trained = find_layers(places, quick=quick)[TRAINED]
    groups: dict[str, list[Shape]] = {GAUSSIAN: [*(QUICK_GAUSSIANS if quick else GAUSSIANS)], TRAINED: []}
    for network in dict.fromkeys(shape.network for shape in trained):
        held = [shape for shape in trained if shape.network == network and max(shape.stride) == 1]
        for place in range(min(FEW, len(held))):
            chosen = held[place * len(held) // min(FEW, len(held))]
            groups[TRAINED].append(dataclasses.replace(chosen, extents=(EXTENT, EXTENT)))
    return groups


def measure(library: Library, group: str, shape: Shape, effort: Effort, *, quick: bool) -> list[ProjectionRow]:
    """Project one layer by every method, in turns; plain Dykstra once."""
    before = shape.kernel()
    kernel = _changed(before)
    bound = SHARE * float(convsv.operator_norm(kernel, shape.extents, shape.conv))
    methods = dict(_methods(library, shape, before, kernel, bound))
    tasks = {name: (lambda run=run: library.wait(run())) for name, (run, _) in methods.items()}
    estimates = {name: time_once(task) for name, task in tasks.items()}
    outcomes = {name: tell() for name, (_, tell) in methods.items()}
    times = alternate(tasks, estimates, effort.repeats)
    most = QUICK_PLAIN_OPERATIONS if quick else PLAIN_OPERATIONS
    found: list[Outcome] = []
    times[PLAIN] = [time_once(lambda: found.append(_plain(shape, kernel, bound, most)))]
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


def _changed(kernel: HostArray) -> HostArray:
    noise = np.random.default_rng(0).standard_normal(kernel.shape)
    share = CHANGE * float(np.linalg.norm(kernel)) / float(np.linalg.norm(noise))
    return (kernel + share * noise).astype(kernel.dtype)


def _methods(
    library: Library, shape: Shape, before: HostArray, kernel: HostArray, bound: float
) -> Iterator[tuple[str, tuple[Callable[[], Array], Callable[[], Outcome]]]]:
    """By name: what is timed, which returns the kernel; and what tells the outcome."""
    array = library.asarray(kernel)

    def projection(**options: Any) -> tuple[Callable[[], Array], Callable[[], Outcome]]:
        def run() -> convsv.Projection:
            return convsv.project(array, shape.extents, shape.conv, bound, rtol=GAP, **options)

        def tell() -> Outcome:
            found = run()
            kernel = library.backend.to_numpy(found.kernel)
            return Outcome(kernel, float(found.norm), found.iterations, bool(found.converged))

        return (lambda: run().kernel), tell

    for method in METHODS:
        yield method, projection(method=method)
    state = convsv.project(library.asarray(before), shape.extents, shape.conv, bound, rtol=GAP).state
    yield WARM, projection(state=state)

    def step() -> Array:
        return convsv.clip(array, shape.extents, shape.conv, bound)

    def tell() -> Outcome:
        clipped = library.backend.to_numpy(step())
        return Outcome(clipped, _norm(shape, clipped), 1, None)

    yield ONE_STEP, (step, tell)


def _plain(shape: Shape, kernel: HostArray, bound: float, operations: float) -> Outcome:
    each = math.prod(shape.grid) * min(shape.inputs, shape.outputs) ** 3
    most = max(1, min(PLAIN_ITERATIONS, round(operations / each)))
    found = plain_dykstra(shape, kernel, bound, GAP, most)
    return Outcome(found.kernel, _norm(shape, found.kernel), found.iterations, found.gap <= GAP)


def _norm(shape: Shape, kernel: HostArray) -> float:
    return float(convsv.operator_norm(kernel.astype(np.float64), shape.extents, shape.conv))


def _distance(shape: Shape, kernel: HostArray, other: HostArray) -> float:
    """Of the operators."""
    change = other.astype(np.float64) - kernel.astype(np.float64)
    return float(convsv.frobenius_norm(change, shape.extents, shape.conv))
