"""`clip`, and the check of a feasible kernel by `project`, beside the paper's clip."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import convsv_core as convsv
from benchmarks.baselines import HostArray
from benchmarks.clip_baselines import PaperClip, paper_clip
from benchmarks.libraries import Library, open_library
from benchmarks.shapes import GROUPS, RESNET_32, Shape, square
from benchmarks.singular_values import EPS, Effort
from benchmarks.timing import Task, alternate, time_once
from convsv_core.backend import Array

RESNET_32_GROUP, SMALL_GROUP = "ResNet-32", "small shapes"
CLIP_GROUPS: dict[str, list[Shape]] = {
    name: GROUPS[name] for name in (RESNET_32_GROUP, "ResNet-50 3x3 and 7x7", "ResNet-50 1x1")
}
QUICK_CLIP_GROUPS: dict[str, list[Shape]] = {
    RESNET_32_GROUP: [RESNET_32[0], RESNET_32[1], RESNET_32[4]],
    SMALL_GROUP: [
        square("small", 7, 3, 32, 56, stride=2, times=0),
        square("small", 3, 96, 96, 14, times=0, groups=96),
        square("small", 1, 64, 32, 14, times=0),
    ],
}

CLIP, CHECK = "clip", "check"
EXCEEDING = {"half exceed": 0.5, "2 % exceed": 0.98}
"""Cases of `clip`, with the quantile of the norms at the frequencies that is the bound."""

ALL_EXCEED, ALL_SHARE = "all exceed", 0.9
"""The case whose bound is this share of the least norm at a frequency."""

FEASIBLE = (0.5, 0.9, 0.99)
"""Norms of the kernels that are checked, as shares of the bound."""

PROJECTED, PROJECTED_SHARE = "just projected", 0.5
"""The case of a kernel that `project` has returned, from this bound in units of its norm before."""

PROJECTED_ITERATIONS = 50
"""Which leave the norm at the bound over many frequencies, like the limit that 1,000 may be needed for."""

ANY_SIZE = ", any size"
SYMBOL_BYTES = 1 << 28
LAYER_SECONDS = 40.0
"""A layer whose repeats would take longer is measured fewer times."""


@dataclass(frozen=True)
class StepRow:
    """One case of one layer in one library: an entry of ``clip`` in the JSON.

    Attributes
    ----------
    question : str
        "clip" or "check".
    case : str
        Which bound, or which feasible kernel.
    share : float
        Of the frequencies, how many have a norm above the bound.
    ours_seconds, baseline_seconds : float
        Medians; the baseline is the paper's clip, whose time does not depend on the bound.
    extrapolated : bool
        Whether the baseline's time was scaled up from `baseline_frequencies` frequencies.
    error_eps : float or None
        Of `clip`, largest difference of a tap from the paper's clip in float64, in units of float32's eps times the
        kernel's norm; None where that would take too long. Of a check, 0 for an unchanged kernel.
    """

    library: str
    group: str
    question: str
    case: str
    network: str
    label: str
    multiplicity: int
    share: float
    ours_seconds: float
    baseline_seconds: float
    ratio: float
    ours_times: list[float]
    baseline_times: list[float]
    extrapolated: bool
    baseline_frequencies: int
    error_eps: float | None


@dataclass(frozen=True)
class StepSummary:
    """A case on a group of layers: an entry of ``clip_summary`` in the JSON.

    Attributes
    ----------
    count : int
        Layers, each as often as its network holds it.
    ratio : float
        Of the times summed over these.
    least_ratio : float
        The smallest one of a layer, which is `least`.
    """

    library: str
    group: str
    question: str
    case: str
    count: int
    ours_seconds: float
    baseline_seconds: float
    ratio: float
    least_ratio: float
    least: str
    worst_error_eps: float | None
    extrapolated: int


@dataclass(frozen=True)
class Case:
    """Ours on one kernel and bound, ready to be timed."""

    question: str
    name: str
    share: float
    bound: float
    task: Task
    result: Callable[[], Array]
    kernel: Array


def measure(library: Library, group: str, shape: Shape, effort: Effort) -> list[StepRow]:
    """Run every case of one layer and the paper's clip, in turns."""
    baseline = PaperClip(library, shape, effort.full_seconds, effort.sample_seconds, symbol_bytes=SYMBOL_BYTES)
    measured = baseline.prepare()
    kernel = shape.kernel()
    norms = np.asarray(convsv.frequency_singular_values(kernel, shape.extents, shape.conv)).max(axis=-1).reshape(-1)
    cases = list(_clips(library, shape, kernel, norms))
    if group == RESNET_32_GROUP:
        cases += _checks(library, shape, kernel, float(norms.max()))
    ours = {f"{case.question} {case.name}": case for case in cases}
    estimates = {name: time_once(case.task) for name, case in ours.items()} | measured.estimates
    repeats = max(1, min(effort.repeats, round(LAYER_SECONDS / sum(estimates.values()))))
    times = alternate({name: case.task for name, case in ours.items()} | measured.tasks, estimates, repeats)
    theirs = measured.combine({name: times[name] for name in measured.tasks})
    return [
        StepRow(
            library=library.name,
            group=group,
            question=case.question,
            case=case.name,
            network=shape.network,
            label=shape.label,
            multiplicity=shape.multiplicity,
            share=case.share,
            ours_seconds=statistics.median(times[name]),
            baseline_seconds=statistics.median(theirs),
            ratio=statistics.median(theirs) / statistics.median(times[name]),
            ours_times=times[name],
            baseline_times=theirs,
            extrapolated=measured.extrapolated,
            baseline_frequencies=measured.sampled,
            error_eps=_error(library, shape, case, float(norms.max()), sampled=measured.extrapolated),
        )
        for name, case in ours.items()
    ]


def _clips(library: Library, shape: Shape, kernel: HostArray, norms: np.ndarray) -> Iterator[Case]:
    bounds = {ALL_EXCEED: ALL_SHARE * float(norms.min())}
    if max(shape.taps) > 1:
        bounds = {name: float(np.quantile(norms, at)) for name, at in EXCEEDING.items()} | bounds
    array = library.asarray(kernel)
    for name, bound in bounds.items():
        limit = library.asarray(np.asarray(bound, np.float32))
        run, _ = library.compile(lambda a, c: convsv.clip(a, shape.extents, shape.conv, c), array, limit)

        def result(run: Callable[..., Array] = run, limit: Array = limit) -> Array:
            return run(array, limit)

        def task(result: Callable[[], Array] = result) -> None:
            library.wait(result())

        yield Case(CLIP, name, float(np.mean(norms > bound)), bound, task, result, array)


def _checks(library: Library, shape: Shape, kernel: HostArray, norm: float) -> Iterator[Case]:
    array, limit = library.asarray(kernel), PROJECTED_SHARE * norm
    cases: list[tuple[str, Array, tuple[int, ...] | None, float]] = [
        (f"norm {share:g}", array, shape.extents, norm / share) for share in FEASIBLE
    ]
    for input_shape, ending in ((shape.extents, ""), (None, ANY_SIZE)):
        projected = convsv.project(array, input_shape, shape.conv, limit, max_iterations=PROJECTED_ITERATIONS).kernel
        cases.append((PROJECTED + ending, projected, input_shape, limit))
    everywhere = float(convsv.norm_bounds(kernel, shape.conv).upper)
    cases.append((f"norm {FEASIBLE[1]:g}{ANY_SIZE}", array, None, everywhere / FEASIBLE[1]))
    for name, feasible, input_shape, bound in cases:

        def result(
            feasible: Array = feasible, input_shape: tuple[int, ...] | None = input_shape, bound: float = bound
        ) -> Array:
            return convsv.project(feasible, input_shape, shape.conv, bound).kernel

        def task(result: Callable[[], Array] = result) -> None:
            library.wait(result())

        yield Case(CHECK, name, 0.0, bound, task, result, feasible)


def _error(library: Library, shape: Shape, case: Case, norm: float, *, sampled: bool) -> float | None:
    if case.question == CLIP and sampled:
        return None
    found = library.backend.to_numpy(case.result()).astype(np.float64)
    wanted = library.backend.to_numpy(case.kernel).astype(np.float64)
    if case.question == CLIP:
        wanted = paper_clip(open_library("numpy"), shape, wanted, float(np.float32(case.bound)))
    return float(np.abs(found - wanted).max()) / (EPS * norm)


def summarise(rows: Sequence[StepRow]) -> list[StepSummary]:
    """One summary for each library, group and case."""
    keys = dict.fromkeys((row.library, row.group, row.question, row.case) for row in rows)
    return [
        _summarise([row for row in rows if (row.library, row.group, row.question, row.case) == key]) for key in keys
    ]


def _summarise(members: Sequence[StepRow]) -> StepSummary:
    first, least = members[0], min(members, key=lambda row: row.ratio)
    times = [max(1, row.multiplicity) for row in members]
    ours = sum(n * row.ours_seconds for n, row in zip(times, members, strict=True))
    theirs = sum(n * row.baseline_seconds for n, row in zip(times, members, strict=True))
    errors = [row.error_eps for row in members if row.error_eps is not None]
    return StepSummary(
        library=first.library,
        group=first.group,
        question=first.question,
        case=first.case,
        count=sum(times),
        ours_seconds=ours,
        baseline_seconds=theirs,
        ratio=theirs / ours,
        least_ratio=least.ratio,
        least=least.label,
        worst_error_eps=max(errors, default=None),
        extrapolated=sum(row.extrapolated for row in members),
    )
