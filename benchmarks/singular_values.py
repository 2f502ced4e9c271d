"""One convolution, measured: ours beside the two lines, and the error of our values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import convsv_core as convsv
from benchmarks.baselines import HostArray, TwoLines, prepare_dense, reference
from benchmarks.libraries import Library
from benchmarks.machine import decomposition_flops
from benchmarks.shapes import GROUPS, Shape
from benchmarks.timing import alternate, time_once
from convsv_core.backend import Array

EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Effort:
    """How much is spent on each convolution.

    Attributes
    ----------
    repeats : int
        Measurements of which the median is taken.
    full_seconds : float
        A baseline that is estimated to take longer is sampled and extrapolated.
    sample_seconds : float
        Time of such a sample.
    reference_seconds : float
        Time of the SVDs in float64 that the error is taken against.
    baseline_threads : int or None
        Threads that BLAS and OpenMP may use for the baseline; None for the libraries' defaults.
    """

    repeats: int = 5
    full_seconds: float = 10.0
    sample_seconds: float = 2.0
    reference_seconds: float = 2.0
    baseline_threads: int | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one convolution in one library: an entry of ``rows`` in the JSON.

    Attributes
    ----------
    library, network, label : str
    kernel_shape, layout, input_shape, stride, dilation, groups
        The convolution.
    multiplicity : int
        How often the network holds it.
    ours_seconds, baseline_seconds : float
        Medians.
    ours_times, baseline_times : list of float
        In the order they were taken, alternately.
    ratio : float
        ``baseline_seconds / ours_seconds``.
    extrapolated : bool
        Whether the baseline's time was scaled up from `baseline_frequencies` of `frequencies`.
    error_eps : float
        Largest difference of a singular value from float64, in units of float32's eps times the largest value.
    error_frequencies : int
        Frequencies compared for it, of `frequencies`.
    peak_share : float or None
        Share of the speed of a large matrix product that the whole call reaches, if only the operations
        of the decompositions are counted. None for closed forms.
    ours_compile_seconds, baseline_compile_seconds : float or None
        None where nothing is compiled.
    dense_seconds : float or None
        Median time of the SVD of the whole matrix, where that was asked for.
    """

    library: str
    network: str
    label: str
    kernel_shape: tuple[int, ...]
    layout: str
    input_shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    multiplicity: int
    frequencies: int
    ours_seconds: float
    baseline_seconds: float
    ratio: float
    ours_times: list[float]
    baseline_times: list[float]
    extrapolated: bool
    baseline_frequencies: int
    error_eps: float
    error_frequencies: int
    peak_share: float | None
    ours_compile_seconds: float | None
    baseline_compile_seconds: float | None
    dense_seconds: float | None

    @property
    def name(self) -> str:
        """The shape's own name."""
        return f"{self.network} {self.label}"


@dataclass(frozen=True)
class Summary:
    """A group of rows: an entry of ``summary`` in the JSON.

    Attributes
    ----------
    ratio : float
        Summed times of the baseline over summed times of ours, each convolution counted once.
    least_ratio : float
        The smallest ratio of one convolution, which is `least`.
    worst_error_eps : float
    extrapolated : int
        How many of `count` baselines were.
    """

    library: str
    group: str
    count: int
    ours_seconds: float
    baseline_seconds: float
    ratio: float
    least_ratio: float
    least: str
    worst_error_eps: float
    extrapolated: int


def compare(library: Library, shape: Shape, effort: Effort, *, dtype: str, peak: float, dense: bool = False) -> Row:
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
    error, compared = worst_error(library, shape, run(kernel), effort.reference_seconds)
    baseline = TwoLines(library, shape, effort.full_seconds, effort.sample_seconds, effort.baseline_threads).prepare()
    if dense:
        tasks["dense"] = prepare_dense(library, shape)
        estimates["dense"] = time_once(tasks["dense"])
    times = alternate(tasks | baseline.tasks, estimates | baseline.estimates, effort.repeats)
    ours, theirs = statistics.median(times["ours"]), baseline.combine(times)
    flops = decomposition_flops(shape, dtype)
    return Row(
        library=library.name,
        network=shape.network,
        label=shape.label,
        kernel_shape=shape.kernel_shape,
        layout=shape.conv.layout,
        input_shape=shape.extents,
        stride=shape.stride,
        dilation=shape.dilation,
        groups=shape.groups,
        multiplicity=shape.multiplicity,
        frequencies=math.prod(shape.grid),
        ours_seconds=ours,
        baseline_seconds=statistics.median(theirs),
        ratio=statistics.median(theirs) / ours,
        ours_times=times["ours"],
        baseline_times=theirs,
        extrapolated=baseline.extrapolated,
        baseline_frequencies=baseline.sampled,
        error_eps=error,
        error_frequencies=compared,
        peak_share=None if flops is None else flops / ours / peak,
        ours_compile_seconds=compile_seconds,
        baseline_compile_seconds=baseline.compile_seconds,
        dense_seconds=statistics.median(times["dense"]) if dense else None,
    )


def worst_error(library: Library, shape: Shape, values: Array, seconds: float) -> tuple[float, int]:
    """Compare singular values in float32 with float64.

    Where the reference has every frequency, all of `values` are compared with it. Else
    `frequency_singular_values` is compared with it at a sample of the frequencies, and `values` with all of
    `frequency_singular_values`.

    Returns
    -------
    error : float
        In units of float32's eps times the largest singular value.
    frequencies : int
        How many the reference has.
    """
    found = library.backend.to_numpy(values).astype(np.float64)
    chosen, wanted = reference(shape, seconds)
    largest = max(float(wanted.max()), float(found.max()))
    total = math.prod(shape.grid)
    if len(chosen) == total:
        return _largest_difference(found, _descending(wanted, len(found))) / (EPS * largest), total

    def by_frequency(array: Array) -> Array:
        return convsv.frequency_singular_values(array, shape.extents, shape.conv)

    kernel = library.asarray(shape.kernel())
    run, _ = library.compile(by_frequency, kernel)
    listed = library.backend.to_numpy(run(kernel)).reshape(total, -1)
    sampled = listed[chosen].astype(np.float64)
    padded = np.zeros_like(sampled)  # the zeros of input elements that no tap reads
    padded[:, : wanted.shape[1]] = wanted
    difference = max(_largest_difference(found, _descending(listed, len(found))), _largest_difference(sampled, padded))
    return difference / (EPS * largest), len(chosen)


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Sum the rows by library and group; a group of which some rows are missing sums those there are."""
    summaries = []
    for library in dict.fromkeys(row.library for row in rows):
        for group, shapes in GROUPS.items():
            names = {shape.name for shape in shapes}
            members = [row for row in rows if row.library == library and row.name in names]
            if members:
                summaries.append(_sum(library, group, members))
    return summaries


def _sum(library: str, group: str, rows: Sequence[Row]) -> Summary:
    ours, theirs = sum(row.ours_seconds for row in rows), sum(row.baseline_seconds for row in rows)
    least = min(rows, key=lambda row: row.ratio)
    return Summary(
        library=library,
        group=group,
        count=len(rows),
        ours_seconds=ours,
        baseline_seconds=theirs,
        ratio=theirs / ours,
        least_ratio=least.ratio,
        least=least.label,
        worst_error_eps=max(row.error_eps for row in rows),
        extrapolated=sum(row.extrapolated for row in rows),
    )


def _descending(values: HostArray, count: int) -> HostArray:
    """All of `values`, descending, and zeros up to `count`."""
    result = np.zeros(count)
    result[: values.size] = -np.sort(-values.reshape(-1))
    return result


def _largest_difference(one: HostArray, other: HostArray) -> float:
    return float(np.max(np.abs(one - other)))
