"""Run the baselines of `singular_values`: the two lines of the paper, and the SVD of the dense matrix.

The two lines are an FFT of the kernel padded with zeros to the input's extents, and a batched SVD without
vectors of the matrices at all frequencies. Some convolutions need more, which is not timed: a strided one gets its
polyphase kernel, without the classes of input elements that no tap reads; a dilated one gets zeros between its
taps; groups are one more batch axis. Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional
Layers*, ICLR 2019, listing in section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from benchmarks.libraries import Function, Library
from benchmarks.shapes import HostArray, Shape
from benchmarks.timing import Task, WeightedTasks, time_once
from convsv_core.backend import Array

__all__ = [
    "Polyphase",
    "Reference",
    "TwoLines",
    "dense_matrix",
    "from_polyphase",
    "matrices_at",
    "polyphase",
    "polyphase_places",
    "prepare_dense",
    "reference",
    "sample",
]

SYMBOL_BYTES = 2 << 30
"""Largest symbol, in complex64, that the two lines run on in full: a guess, as they hold it several times over."""

SAMPLE_BYTES = 1 << 28
"""Largest sample of matrices, in bytes of complex64: a guess."""

PROBE_SECONDS = 0.1
"""A sample whose SVDs take this long is large enough to estimate the time of all SVDs: a guess."""

PROBES = 3
"""Runs of such a sample, of which the shortest counts, as other load only ever adds time: a guess."""


class Polyphase(NamedTuple):
    """Say where the taps of a strided convolution stand in its polyphase kernel.

    Attributes
    ----------
    extents : tuple of int
        Spatial extents of the polyphase kernel.
    classes : tuple of int
        Classes of input elements that some tap reads, along each axis.
    places : mapping of tuple of int to tuple of int
        For each tap its offset along each axis, then its class along each axis.
    """

    extents: tuple[int, ...]
    classes: tuple[int, ...]
    places: Mapping[tuple[int, ...], tuple[int, ...]]


class Reference(NamedTuple):
    """Hold singular values in float64 at some frequencies.

    Attributes
    ----------
    frequencies : numpy.ndarray of int, shape (count,)
        Places in the grid: all of them, or a uniform sample and frequency 0.
    values : numpy.ndarray of float64, shape (count, groups * values)
        Descending along the last axis.
    """

    frequencies: HostArray
    values: HostArray


class _Ready(NamedTuple):
    """Hold a task that has run once, the seconds of that run, and the seconds of its compilation."""

    task: Task
    seconds: float
    compile_seconds: float | None


def polyphase(shape: Shape, kernel: HostArray) -> HostArray:
    """Return the kernel of the equivalent convolution of stride 1: shape (*extents, groups, columns, rows).

    A tap at position t of a layer with stride s reads the class ``t mod s`` of the input's elements at the
    offset ``t // s``. Columns are the classes that some tap reads, times the input channels of a group.
    Taps whose offsets wrap round the input to the same place are added, so that cropping to the grid loses none.
    """
    ndim = len(shape.taps)
    kernel = kernel.reshape(*kernel.shape[:-1], shape.groups, -1)
    kernel = np.moveaxis(kernel, -2, ndim)
    extents, classes, places = polyphase_places(shape)
    folded = np.zeros((*extents, *classes, *kernel.shape[ndim:]), kernel.dtype)
    for tap, place in places.items():
        folded[place] += kernel[tap]
    folded = np.moveaxis(folded, 2 * ndim, ndim)
    return np.ascontiguousarray(folded.reshape(*extents, shape.groups, -1, kernel.shape[-1]))


def from_polyphase(shape: Shape, folded: HostArray) -> HostArray:
    """Return the kernel whose taps a polyphase kernel holds; taps that were added each get the whole sum."""
    ndim = len(shape.taps)
    extents, classes, places = polyphase_places(shape)
    rows = folded.shape[-1]
    folded = folded.reshape(*extents, shape.groups, *classes, -1, rows)
    folded = np.moveaxis(folded, ndim, 2 * ndim)
    kernel = np.empty((*shape.taps, *folded.shape[2 * ndim :]), folded.dtype)
    for tap, place in places.items():
        kernel[tap] = folded[place]
    return np.moveaxis(kernel, ndim, -2).reshape(shape.kernel_shape)


def polyphase_places(shape: Shape) -> Polyphase:
    """Return where each tap stands in the polyphase kernel."""
    along, extents, classes = [], [], []
    for taps, stride, dilation, grid in zip(shape.taps, shape.stride, shape.dilation, shape.grid, strict=True):
        pairs = [divmod(tap * dilation, stride) for tap in range(taps)]
        residues = sorted({r for _, r in pairs})
        along.append([(q % grid, residues.index(r)) for q, r in pairs])
        extents.append(1 + max(q for q, _ in along[-1]))
        classes.append(len(residues))
    places = {}
    for index in np.ndindex(*shape.taps):
        chosen = [axis[tap] for axis, tap in zip(along, index, strict=True)]
        places[index] = (*(q for q, _ in chosen), *(r for _, r in chosen))
    return Polyphase(tuple(extents), tuple(classes), places)


def matrices_at(kernel: HostArray, grid: tuple[int, ...], frequencies: HostArray) -> HostArray:
    """Return the symbol of a polyphase kernel at some frequencies, in double precision, from its definition.

    Parameters
    ----------
    kernel : numpy.ndarray, shape (*extents, groups, columns, rows)
    grid : tuple of int
    frequencies : numpy.ndarray of int, shape (count,)
        Places in the grid, in row-major order.

    Returns
    -------
    numpy.ndarray, shape (count, groups, columns, rows), complex128
    """
    ndim = len(grid)
    taps = kernel.reshape(math.prod(kernel.shape[:ndim]), -1)
    offsets = np.indices(kernel.shape[:ndim]).reshape(ndim, -1)
    held = taps.any(axis=1)
    taps, offsets = taps[held].astype(np.float64), offsets[:, held]
    indices = np.unravel_index(frequencies, grid)
    turns = np.zeros((len(frequencies), offsets.shape[1]))
    for index, offset, extent in zip(indices, offsets, grid, strict=True):
        turns += np.outer(index, offset) % extent / extent
    angles = -2 * np.pi * turns
    result = np.empty((len(frequencies), taps.shape[1]), np.complex128)
    result.real, result.imag = np.cos(angles) @ taps, np.sin(angles) @ taps
    return result.reshape(len(frequencies), *kernel.shape[ndim:])


def sample(count: int, wanted: int) -> HostArray:
    """Return `wanted` of `count` frequencies, chosen uniformly by a fixed seed, ascending."""
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(count).choice(count, wanted, replace=False))


@dataclass(eq=False)
class TwoLines:
    """Run the paper's two lines on one convolution, in one library.

    Where the whole run is estimated to take longer than `limit` seconds, the whole FFT is timed, and the SVDs of a
    uniform sample of the frequencies, whose time is scaled up linearly. Where the symbol is larger than
    `symbol_bytes`, the FFT is timed on a slice of the columns, and its time is scaled up as well.

    Parameters
    ----------
    library : Library
    shape : Shape
    limit : float
        Seconds up to which the lines are run in full.
    sample_seconds : float
        Seconds that the SVDs of a sample take, about.
    threads : int or None
        Threads that BLAS and OpenMP may use for the lines; None for the libraries' defaults.
    values : function, optional
        The second line: a function of the matrices in the last two axes, by default the SVD without vectors.
    symbol_bytes : int
        Largest symbol, in complex64, that the lines run on in full.
    """

    library: Library
    shape: Shape
    limit: float
    sample_seconds: float
    threads: int | None = None
    values: Function | None = None
    symbol_bytes: int = SYMBOL_BYTES
    kernel: HostArray = field(init=False)
    _values: Function = field(init=False)

    def __post_init__(self) -> None:
        self._values = self.values or self.library.svdvals
        self.kernel = polyphase(self.shape, self.shape.kernel())

    def __call__(self, kernel: Array) -> Array:
        """Run both lines."""
        return self._values(self.transform(kernel))

    def transform(self, kernel: Array) -> Array:
        """Run the first line, which is timed as a whole where the second line is sampled."""
        return self.library.fft(kernel, self.shape.grid)

    def prepare(self) -> WeightedTasks:
        """Decide what can run in full, then compile and run once every part that will be timed."""
        kernel, total = self.kernel, math.prod(self.shape.grid)
        columns = kernel.shape[-2]
        symbol_bytes = 8 * total * math.prod(kernel.shape[-3:])
        taken = columns if symbol_bytes <= self.symbol_bytes else max(1, columns * self.symbol_bytes // symbol_bytes)
        first = np.ascontiguousarray(kernel[..., :taken, :])
        fft = self._ready(self.transform, first)
        fft_seconds = fft.seconds * columns / taken
        seconds = self._probe(total)
        if taken == columns and fft_seconds + total * seconds <= self.limit:
            array = self.library.asarray(kernel)
            run, compiled = self.library.compile(self, array)
            expected = fft_seconds + total * seconds
            task = self._task(run, array)
            return WeightedTasks.whole("two lines", task, expected, sampled=total, compile_seconds=compiled)
        count = min(total, max(2, round(self.sample_seconds / seconds)), self._affordable())
        svd = self._ready(self._values, self._matrices(total, count))
        return WeightedTasks(
            {"fft": fft.task, "svd": svd.task},
            {"fft": fft_seconds, "svd": svd.seconds},
            {"fft": columns / taken, "svd": total / count},
            sampled=count,
            extrapolated=True,
            compile_seconds=None if svd.compile_seconds is None else svd.compile_seconds + (fft.compile_seconds or 0.0),
        )

    def _probe(self, total: int) -> float:
        """Return the seconds that the SVDs of one frequency take within a batch."""
        count = 1
        while True:
            count = min(count, total, self._affordable())
            task = self._ready(self._values, self._matrices(total, count)).task
            seconds = min(time_once(task) for _ in range(PROBES))
            if seconds >= PROBE_SECONDS or count == min(total, self._affordable()):
                return seconds / count
            count *= 4

    def _matrices(self, total: int, count: int) -> HostArray:
        matrices = matrices_at(self.kernel, self.shape.grid, sample(total, count))
        return matrices.astype(np.complex64)

    def _affordable(self) -> int:
        return max(1, SAMPLE_BYTES // (8 * math.prod(self.kernel.shape[-3:])))

    def _ready(self, function: Function, argument: HostArray) -> _Ready:
        """Compile a function of one array, and run it once."""
        array = self.library.asarray(argument)
        run, compiled = self.library.compile(function, array)
        task = self._task(run, array)
        return _Ready(task, time_once(task), compiled)

    def _task(self, run: Function, array: Array) -> Task:
        def task() -> None:
            self.library.wait(run(array))

        if self.threads is None:
            return task
        pools, threads = ThreadpoolController(), self.threads

        def limited() -> None:
            with pools.limit(limits=threads):
                task()

        return limited


def prepare_dense(library: Library, shape: Shape) -> Task:
    """Return a task that has run once: the SVD without vectors of the operator's whole matrix, which is made before."""
    matrix = library.asarray(dense_matrix(shape))
    run = library.compile(library.svdvals, matrix).run

    def task() -> None:
        library.wait(run(matrix))

    task()
    return task


def dense_matrix(shape: Shape) -> HostArray:
    """Return the whole matrix of a convolution of stride 1 without groups, in float32.

    Columns are ``(*position, input)``, rows ``(*position, output)``. Offsets count from the first tap, since
    padding only permutes the rows.
    """
    kernel, grid = shape.kernel(), shape.grid
    count, ndim = math.prod(grid), len(grid)
    matrix = np.zeros((count, shape.outputs, count, shape.inputs), np.float32)
    positions = np.indices(grid).reshape(ndim, -1)
    for index in np.ndindex(*shape.taps):
        offsets = np.asarray(index)[:, None] * np.asarray(shape.dilation)[:, None]
        read = np.ravel_multi_index(tuple((positions + offsets) % np.asarray(grid)[:, None]), grid)
        matrix[np.arange(count), :, read, :] += kernel[index].T
    return matrix.reshape(count * shape.outputs, count * shape.inputs)


def reference(shape: Shape, seconds: float) -> Reference:
    """Return singular values by the two lines in double precision.

    They are at every frequency if that takes at most `seconds`, else at a sample of them.
    """
    kernel, total = polyphase(shape, shape.kernel()), math.prod(shape.grid)
    first = matrices_at(kernel, shape.grid, np.arange(1))
    one = min(time_once(lambda: np.linalg.svd(first, compute_uv=False)) for _ in range(3))
    affordable = max(1, 2 * SAMPLE_BYTES // first.nbytes)
    chosen = sample(total, min(max(3, round(seconds / one)), affordable))
    chosen = np.union1d(chosen, [0])
    values = np.linalg.svd(matrices_at(kernel, shape.grid, chosen), compute_uv=False)
    return Reference(chosen, -np.sort(-values.reshape(len(chosen), -1), axis=-1))
