"""Measure `singular_values` on one convolution: its time beside the two lines, and its error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import convsv_core as convsv
from benchmarks.baselines import TwoLines, polyphase_places, prepare_dense, reference
from benchmarks.comparison import (
    CONVOLUTION,
    EPS,
    ERROR,
    Comparison,
    Effort,
    Sums,
    comparison_of,
    sum_columns,
    sums_of,
    time_columns,
)
from benchmarks.libraries import Library
from benchmarks.shapes import GROUPS, HostArray, Shape
from benchmarks.tables import duration, figures, integers, or_dash, percent, words
from benchmarks.timing import alternate, time_once
from convsv_core.backend import Array

__all__ = [
    "Error",
    "SpectrumRow",
    "decomposition_flops",
    "measure",
    "summarise",
    "visited_frequencies",
    "worst_error",
]

CLOSED_FORM_SIDE = 2
"""Matrices whose smaller side is at most this have closed forms, as the docstring of `singular_values` says."""

EXPLANATION = (
    "baseline: FFT of the zero-padded kernel, then the SVD without vectors at all frequencies, same library and "
    "dtype (float32). ratio: baseline / ours, medians of alternate runs. ~: extrapolated linearly from the SVDs of "
    "a uniform sample of the frequencies. error: largest difference of a singular value from a float64 SVD, in "
    "eps(float32) * sigma_max. peak: share of the speed of a large matrix product reached by the whole call, "
    "counting the operations of the decompositions alone. x: how often the network holds the convolution."
)
ROW_COLUMNS = (
    *CONVOLUTION,
    *time_columns("baseline"),
    ERROR,
    figures("peak", lambda row: or_dash(percent, row.peak_share)),
    figures("compile", lambda row: or_dash(duration, row.ours_compile_seconds)),
)
SUM_COLUMNS = (
    words("library"),
    words("each distinct convolution once", lambda one: one.group),
    integers("n", "count"),
    *sum_columns("baseline"),
)


class Error(NamedTuple):
    """Hold the error of singular values.

    Attributes
    ----------
    eps : float
        Largest difference from float64, in units of float32's eps times the largest singular value.
    frequencies : int
        Frequencies at which the values were compared.
    """

    eps: float
    frequencies: int


@dataclass(frozen=True, kw_only=True)
class SpectrumRow(Comparison):
    """Record what was measured of one convolution in one library: an entry of ``rows`` in the JSON.

    Attributes
    ----------
    kernel_shape, layout, input_shape, stride, dilation, groups
        The convolution.
    frequencies : int
    error_eps : float
        Largest difference of a singular value from float64, in units of float32's eps times the largest value.
    error_frequencies : int
        Frequencies compared for `error_eps`, of `frequencies`.
    peak_share : float or None
        Share of the speed of a large matrix product that the whole call reaches, if only the operations
        of the decompositions are counted. None for closed forms.
    ours_compile_seconds, baseline_compile_seconds : float or None
        None where nothing is compiled.
    dense_seconds : float or None
        Median time of the SVD of the whole matrix; None where it was not asked for.
    """

    kernel_shape: tuple[int, ...]
    layout: str
    input_shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    frequencies: int
    error_eps: float
    error_frequencies: int
    peak_share: float | None
    ours_compile_seconds: float | None
    baseline_compile_seconds: float | None
    dense_seconds: float | None

    @property
    def name(self) -> str:
        """Return the shape's own name."""
        return f"{self.network} {self.label}"


def measure(
    library: Library, shape: Shape, effort: Effort, *, dtype: str, peak: float, dense: bool = False
) -> SpectrumRow:
    """Measure one convolution.

    Parameters
    ----------
    library : Library
    shape : Shape
    effort : Effort
    dtype : str
        The dtype that matrices are decomposed in.
    peak : float
        Operations a second of a matrix product in that dtype.
    dense : bool, default False
        Whether to time the SVD of the whole matrix as well.
    """
    kernel = library.asarray(shape.kernel())

    def spectrum(array: Array) -> Array:
        return convsv.singular_values(array, shape.extents, shape.conv)

    run, compile_seconds = library.compile(spectrum, kernel)
    tasks = {"ours": lambda: library.wait(run(kernel))}
    estimates = {"ours": time_once(tasks["ours"])}
    error = worst_error(library, shape, run(kernel), effort.reference_seconds)
    baseline = TwoLines(library, shape, effort.full_seconds, effort.sample_seconds, effort.baseline_threads).prepare()
    if dense:
        tasks["dense"] = prepare_dense(library, shape)
        estimates["dense"] = time_once(tasks["dense"])
    times = alternate(tasks | baseline.tasks, estimates | baseline.estimates, effort.repeats)
    flops = decomposition_flops(shape, dtype)
    compared = comparison_of(times["ours"], baseline, times, library, shape)
    return SpectrumRow(
        **compared,
        kernel_shape=shape.kernel_shape,
        layout=shape.conv.layout,
        input_shape=shape.extents,
        stride=shape.stride,
        dilation=shape.dilation,
        groups=shape.groups,
        frequencies=math.prod(shape.grid),
        error_eps=error.eps,
        error_frequencies=error.frequencies,
        peak_share=None if flops is None else flops / compared["ours_seconds"] / peak,
        ours_compile_seconds=compile_seconds,
        baseline_compile_seconds=baseline.compile_seconds,
        dense_seconds=statistics.median(times["dense"]) if dense else None,
    )


def worst_error(library: Library, shape: Shape, values: Array, seconds: float) -> Error:
    """Compare singular values in float32 with float64.

    Where the reference has every frequency, all of `values` are compared with it. Else
    `frequency_singular_values` is compared with it at a sample of the frequencies, and `values` with all of
    `frequency_singular_values`.
    """
    found = library.backend.to_numpy(values).astype(np.float64)
    chosen, wanted = reference(shape, seconds)
    largest = max(float(wanted.max()), float(found.max()))
    total = math.prod(shape.grid)
    if len(chosen) == total:
        return Error(_largest_difference(found, _descending(wanted, len(found))) / (EPS * largest), total)

    def by_frequency(array: Array) -> Array:
        return convsv.frequency_singular_values(array, shape.extents, shape.conv)

    kernel = library.asarray(shape.kernel())
    run = library.compile(by_frequency, kernel).run
    listed = library.backend.to_numpy(run(kernel)).reshape(total, -1)
    sampled = listed[chosen].astype(np.float64)
    padded = np.zeros_like(sampled)  # input elements that no tap reads add zeros
    padded[:, : wanted.shape[1]] = wanted
    difference = max(_largest_difference(found, _descending(listed, len(found))), _largest_difference(sampled, padded))
    return Error(difference / (EPS * largest), len(chosen))


def decomposition_flops(shape: Shape, dtype: str) -> float | None:
    """Return the least real operations of a kernel's decompositions by the standard algorithms.

    Let a visited frequency have a block of m x n for each group, where n is the smaller side.

    - In double precision, the eigenvalues of the Gram matrix take the reduction to tridiagonal form: 16/3 n^3,
      which is 4/3 n^3 in complex arithmetic at 4 real operations each.
    - In single precision, the singular values take the reduction to bidiagonal form: 16 m n^2 - 16/3 n^3, or
      8 m n^2 + 8 n^3 with QR first, where that is less.

    Operations of second order in n are left out, and so is all work that makes the matrices. Half of the operations
    of a reduction are matrix-vector products, which run at the speed of memory or cache. So this algorithm cannot
    reach a share of 1. The result is None for blocks with closed forms.
    """
    columns = shape.inputs // shape.groups * math.prod(polyphase_places(shape).classes)
    n, m = sorted((shape.outputs // shape.groups, columns))
    if n <= CLOSED_FORM_SIDE:
        return None
    each = 16 / 3 * n**3 if dtype == "complex128" else min(16 * m * n**2 - 16 / 3 * n**3, 8 * m * n**2 + 8 * n**3)
    return visited_frequencies(shape) * shape.groups * each


def visited_frequencies(shape: Shape) -> int:
    """Return how many frequencies `convsv` visits for a real kernel.

    The singular values repeat along an axis where the grid and the differences of the offsets of each class share a
    divisor. Of one period, each pair of conjugate frequencies is visited once.
    """
    periods = []
    for taps, stride, dilation, grid in zip(shape.taps, shape.stride, shape.dilation, shape.grid, strict=True):
        first: dict[int, int] = {}
        step = grid
        for tap in range(taps):
            offset, residue = divmod(tap * dilation, stride)
            step = math.gcd(step, offset - first.setdefault(residue, offset))
        periods.append(grid // step)
    self_conjugate = math.prod(2 - period % 2 for period in periods)
    return (math.prod(periods) + self_conjugate) // 2


def summarise(rows: Sequence[SpectrumRow]) -> list[Sums]:
    """Return sums by library and group, entries of ``summary`` in the JSON.

    Each distinct convolution counts once. A group of which some rows are missing sums the rows there are.
    """
    summaries = []
    for library in dict.fromkeys(row.library for row in rows):
        for group, shapes in GROUPS.items():
            names = {shape.name for shape in shapes}
            members = [row for row in rows if row.library == library and row.name in names]
            if members:
                summaries.append(Sums(**sums_of(members, [1] * len(members), library=library, group=group)))
    return summaries


def _descending(values: HostArray, length: int) -> HostArray:
    """Return all of `values`, descending, with zeros behind them up to `length`."""
    result = np.zeros(length)
    result[: values.size] = -np.sort(-values.reshape(-1))
    return result


def _largest_difference(one: HostArray, other: HostArray) -> float:
    return float(np.max(np.abs(one - other)))
