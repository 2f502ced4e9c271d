"""Measure `clip`, and the check of a feasible kernel by `project`, beside the paper's clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

import convsv_core as convsv
from benchmarks.clip_baselines import PaperClip, paper_clip
from benchmarks.command import Measured, Size
from benchmarks.comparison import (
    CONVOLUTION,
    EPS,
    ERROR,
    Comparison,
    Effort,
    Sums,
    comparison_of,
    group_by,
    sum_columns,
    sums_of,
    time_columns,
)
from benchmarks.libraries import Library, open_library
from benchmarks.shapes import GROUPS, RESNET_32, HostArray, Shape, square
from benchmarks.tables import figures, integers, percent, words
from benchmarks.timing import alternate, time_once
from convsv_core.backend import Array

__all__ = [
    "CLIP",
    "CLIP_GROUPS",
    "EXPLANATION",
    "ROW_COLUMNS",
    "SUM_COLUMNS",
    "ClipRow",
    "ClipSums",
    "measure",
    "summarise",
]

RESNET_32_GROUP, SMALL_GROUP = "ResNet-32", "small shapes"
CLIP_GROUPS: Mapping[Size, Mapping[str, list[Shape]]] = {
    Size.FULL: {name: GROUPS[name] for name in (RESNET_32_GROUP, "ResNet-50 3x3 and 7x7", "ResNet-50 1x1")},
    Size.QUICK: {
        RESNET_32_GROUP: [RESNET_32[0], RESNET_32[1], RESNET_32[4]],
        SMALL_GROUP: [
            square("small", 7, 3, 32, 56, stride=2, times=0),
            square("small", 3, 96, 96, 14, times=0, groups=96),
            square("small", 1, 64, 32, 14, times=0),
        ],
    },
    Size.TINY: {
        RESNET_32_GROUP: [square("tiny", 3, 3, 4, 8), square("tiny", 3, 4, 4, 8, times=10)],
        SMALL_GROUP: [square("tiny", 3, 3, 8, 8, stride=2, times=0), square("tiny", 1, 8, 4, 6, times=0)],
    },
}
"""Layers by group; those of `RESNET_32_GROUP` are also checked."""

CLIP, CHECK = "clip", "check"
EXCEEDING = {"half exceed": 0.5, "2 % exceed": 0.98}
"""Cases of `clip`; the bound is this quantile of the norms at the frequencies."""

ALL_EXCEED, ALL_SHARE = "all exceed", 0.9
"""The case whose bound is this share of the least norm at a frequency."""

FEASIBLE = (0.5, 0.9, 0.99)
"""Norms of the kernels that are checked, as shares of the bound."""

PROJECTED, PROJECTED_SHARE = "just projected", 0.5
"""The case of a kernel that `project` has returned; the bound is this share of the norm before."""

PROJECTED_ITERATIONS = 50
"""Iterations of that projection: a guess.

They leave the norm at the bound over many frequencies, as does the limit, which may need 1,000.
"""

ANY_SIZE = ", any size"
SYMBOL_BYTES = 1 << 28
"""Largest symbol, in complex64, that the paper's clip runs on in full: a guess, for speed."""

LAYER_SECONDS = 40.0
"""A layer whose repeats would take longer is measured fewer times: a guess."""

EXPLANATION = (
    "paper: FFT of the zero-padded kernel, SVD with vectors at all frequencies, minimum, back and cut; same library "
    "and dtype (float32). ratio: paper / ours, medians of alternate runs; in sums, a layer as often as its network "
    "holds it. above: share of the frequencies whose norm exceeds the bound. ~: extrapolated from a sample of the "
    "frequencies. error: largest difference of a tap from the paper's clip in float64, in eps(float32) * norm."
)
ROW_COLUMNS = (
    *CONVOLUTION,
    words("question"),
    words("case"),
    figures("above", lambda row: percent(row.share)),
    *time_columns("paper"),
    ERROR,
)
SUM_COLUMNS = (
    words("library"),
    words("group"),
    words("question"),
    words("case"),
    integers("x", "count"),
    *sum_columns("paper"),
)


@dataclass(frozen=True, kw_only=True)
class ClipRow(Comparison):
    """Record one case of one layer in one library: an entry of ``clip`` in the JSON.

    The baseline is the paper's clip, whose time does not depend on the bound.

    Attributes
    ----------
    group : str
    question : str
        "clip" or "check".
    case : str
        The name of the bound, or of the feasible kernel.
    share : float
        Share of the frequencies that have a norm above the bound.
    error_eps : float or None
        For `clip`, the largest difference of a tap from the paper's clip in float64, in units of float32's eps times
        the kernel's norm; None where that would take too long. For a check, the difference from the kernel itself.
    """

    group: str
    question: str
    case: str
    share: float
    error_eps: float | None


@dataclass(frozen=True, kw_only=True)
class ClipSums(Sums):
    """Sum up a case on a group of layers, each as often as its network holds it: an entry of ``clip_summary``."""

    question: str
    case: str


class _Case(NamedTuple):
    """Hold ours on one kernel and bound, ready to be timed."""

    question: str
    name: str
    share: float
    bound: float
    result: Callable[[], Array]
    kernel: Array


class _Check(NamedTuple):
    """Name a feasible kernel, and the input size and bound that it is checked for."""

    name: str
    kernel: Array
    input_shape: tuple[int, ...] | None
    bound: float


def measure(layer: Measured, effort: Effort) -> list[ClipRow]:
    """Run every case of one layer and the paper's clip, in turns."""
    library, group, shape = layer
    paper = PaperClip(library, shape, effort.full_seconds, effort.sample_seconds, symbol_bytes=SYMBOL_BYTES)
    baseline = paper.prepare()
    kernel = shape.kernel()
    norms = np.asarray(convsv.frequency_singular_values(kernel, shape.extents, shape.conv)).max(axis=-1).reshape(-1)
    norm = float(norms.max())
    cases = list(_clips(library, shape, kernel, norms))
    if group == RESNET_32_GROUP:
        cases += _checks(library, shape, kernel, norm)
    ours = {f"{case.question} {case.name}": case for case in cases}
    tasks = {name: partial(_run, library, case) for name, case in ours.items()}
    estimates = {name: time_once(task) for name, task in tasks.items()} | baseline.estimates
    repeats = max(1, min(effort.repeats, round(LAYER_SECONDS / sum(estimates.values()))))
    times = alternate(tasks | baseline.tasks, estimates, repeats)
    return [
        ClipRow(
            **comparison_of(times[name], baseline, times, library, shape),
            group=group,
            question=case.question,
            case=case.name,
            share=case.share,
            error_eps=_error(library, shape, case, norm, sampled=baseline.extrapolated),
        )
        for name, case in ours.items()
    ]


def _run(library: Library, case: _Case) -> None:
    library.wait(case.result())


def _clips(library: Library, shape: Shape, kernel: HostArray, norms: HostArray) -> Iterator[_Case]:
    bounds = {ALL_EXCEED: ALL_SHARE * float(norms.min())}
    if max(shape.taps) > 1:
        bounds = {name: float(np.quantile(norms, at)) for name, at in EXCEEDING.items()} | bounds
    array = library.asarray(kernel)
    for name, bound in bounds.items():
        limit = library.asarray(np.asarray(bound, np.float32))
        run = library.compile(lambda a, c: convsv.clip(a, shape.extents, shape.conv, c), array, limit).run
        yield _Case(CLIP, name, float(np.mean(norms > bound)), bound, partial(run, array, limit), array)


def _checks(library: Library, shape: Shape, kernel: HostArray, norm: float) -> Iterator[_Case]:
    array, limit = library.asarray(kernel), PROJECTED_SHARE * norm
    checks = [_Check(f"norm {share:g}", array, shape.extents, norm / share) for share in FEASIBLE]
    for input_shape, ending in ((shape.extents, ""), (None, ANY_SIZE)):
        projected = convsv.project(array, input_shape, shape.conv, limit, max_iterations=PROJECTED_ITERATIONS).kernel
        checks.append(_Check(PROJECTED + ending, projected, input_shape, limit))
    everywhere = float(convsv.norm_bounds(kernel, shape.conv).upper)
    checks.append(_Check(f"norm {FEASIBLE[1]:g}{ANY_SIZE}", array, None, everywhere / FEASIBLE[1]))
    for check in checks:
        yield _Case(CHECK, check.name, 0.0, check.bound, partial(_project, shape, check), check.kernel)


def _project(shape: Shape, check: _Check) -> Array:
    return convsv.project(check.kernel, check.input_shape, shape.conv, check.bound).kernel


def _error(library: Library, shape: Shape, case: _Case, norm: float, *, sampled: bool) -> float | None:
    if case.question == CLIP and sampled:
        return None
    found = library.backend.to_numpy(case.result()).astype(np.float64)
    wanted = library.backend.to_numpy(case.kernel).astype(np.float64)
    if case.question == CLIP:
        wanted = paper_clip(open_library("numpy"), shape, wanted, float(np.float32(case.bound)))
    return float(np.abs(found - wanted).max()) / (EPS * norm)


def summarise(rows: Sequence[ClipRow]) -> list[ClipSums]:
    """Return one summary for each library, group and case."""
    return [
        ClipSums(
            **sums_of(
                members,
                [max(1, row.multiplicity) for row in members],
                library=library,
                group=group,
                question=question,
                case=case,
            )
        )
        for (library, group, question, case), members in group_by(rows, "library", "group", "question", "case").items()
    ]
