"""What `convsv` is measured against: the two lines of the paper, and the dense matrix.

The two lines are an FFT of the kernel padded with zeros to the input's extents, and a batched SVD without
vectors of the matrices at all frequencies. Where they do not apply as they stand they are given what they
need, at no charge: a strided convolution as its polyphase kernel, without the classes of input elements that
no tap reads; a dilated one with zeros between its taps; groups as one more batch axis. Source: Sedghi, Gupta
and Long, *The Singular Values of Convolutional Layers*, ICLR 2019, listing in section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from threadpoolctl import ThreadpoolController

from benchmarks.libraries import Function, Library
from benchmarks.shapes import Shape
from benchmarks.timing import Task, time_once
from convsv_core.backend import Array

HostArray: TypeAlias = np.ndarray[Any, Any]

SYMBOL_BYTES = 2 << 30
"""Largest symbol, in complex64, that the two lines are run on in full; they hold it several times over."""

SAMPLE_BYTES = 1 << 28
"""Largest sample of matrices, in complex64."""

PROBE_SECONDS = 0.1
"""A sample that takes this long tells how long the whole takes."""

PROBES = 3
"""Runs of such a sample, of which the shortest counts: the scheduler only ever adds time."""


def polyphase(shape: Shape, kernel: HostArray) -> HostArray:
    """The kernel of the equivalent convolution of stride 1: shape (*extents, groups, columns, rows).

    A tap at position t of a layer with stride s reads the class ``t mod s`` of the input's elements at the
    offset ``t // s``. Columns are the classes that some tap reads, times the input channels of a group.
    Offsets that wrap round the input are added, so that cropping to the grid loses none.
    """
    ndim = len(shape.taps)
    kernel = kernel.reshape(*kernel.shape[:-1], shape.groups, -1)
    kernel = np.moveaxis(kernel, -2, ndim)
    extents, classes, places = _polyphase_places(shape)
    folded = np.zeros((*extents, *classes, *kernel.shape[ndim:]), kernel.dtype)
    for tap, place in places.items():
        folded[place] += kernel[tap]
    folded = np.moveaxis(folded, 2 * ndim, ndim)
    return np.ascontiguousarray(folded.reshape(*extents, shape.groups, -1, kernel.shape[-1]))


def from_polyphase(shape: Shape, folded: HostArray) -> HostArray:
    """The kernel whose taps are those of a polyphase kernel; where several fell on one place, each gets all of it."""
    ndim = len(shape.taps)
    extents, classes, places = _polyphase_places(shape)
    rows = folded.shape[-1]
    folded = folded.reshape(*extents, shape.groups, *classes, -1, rows)
    folded = np.moveaxis(folded, ndim, 2 * ndim)
    kernel = np.empty((*shape.taps, *folded.shape[2 * ndim :]), folded.dtype)
    for tap, place in places.items():
        kernel[tap] = folded[place]
    return np.moveaxis(kernel, ndim, -2).reshape(shape.kernel_shape)


def _polyphase_places(
    shape: Shape,
) -> tuple[tuple[int, ...], tuple[int, ...], dict[tuple[int, ...], tuple[int, ...]]]:
    """Extents of the polyphase kernel, classes along each axis, and at which offset and class each tap stands."""
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
    return tuple(extents), tuple(classes), places


def matrices_at(kernel: HostArray, grid: tuple[int, ...], frequencies: HostArray) -> HostArray:
    """The symbol of a polyphase kernel at some frequencies, in double precision, from its definition.

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
    """Return `wanted` of `count` frequencies chosen uniformly, ascending; always the same ones."""
    if wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(count).choice(count, wanted, replace=False))


@dataclass
class Measured:
    """How a baseline is to be timed.

    Attributes
    ----------
    tasks : dict of str to callable
        What is timed.
    estimates : dict of str to float
        Seconds that each took at its first run, or is expected to.
    weights : dict of str to float
        The baseline's time is the sum of the tasks' times with these weights: 1 for what is run in full.
    sampled : int
        Frequencies whose SVDs are timed.
    compile_seconds : float or None
        None where nothing is compiled.
    """

    tasks: dict[str, Task]
    estimates: dict[str, float]
    weights: dict[str, float]
    sampled: int
    extrapolated: bool
    compile_seconds: float | None = None

    def combine(self, times: dict[str, list[float]]) -> list[float]:
        """Seconds of the whole baseline in each turn."""
        parts = [[self.weights[name] * t for t in times[name]] for name in self.tasks]
        return [sum(turn) for turn in zip(*parts, strict=True)]


@dataclass(eq=False)
class TwoLines:
    """The paper's two lines on one convolution, in one library.

    Where the whole run is estimated to take longer than `limit` seconds, only the SVDs of a uniform sample of
    the frequencies are timed, with the whole FFT, and their time is scaled up linearly. Where the symbol
    is larger than `symbol_bytes` so is the FFT's, from a slice of the columns.

    Parameters
    ----------
    library : Library
    shape : Shape
    limit : float
        Seconds up to which the lines are run in full.
    sample_seconds : float
        Seconds that a sample's SVDs are to take.
    threads : int or None
        Threads that BLAS and OpenMP may use for the lines; None for the libraries' defaults.
    values : function, optional
        The second line: from the matrices in the last two axes; the SVD without vectors by default.
    symbol_bytes : int
        See above.
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
        """The first line: what is timed as a whole where the second is sampled."""
        return self.library.fft(kernel, self.shape.grid)

    def prepare(self) -> Measured:
        """Decide what can be run in full, and compile and run once what is to be timed."""
        kernel, total = self.kernel, math.prod(self.shape.grid)
        columns = kernel.shape[-2]
        symbol_bytes = 8 * total * math.prod(kernel.shape[-3:])
        taken = columns if symbol_bytes <= self.symbol_bytes else max(1, columns * self.symbol_bytes // symbol_bytes)
        first = np.ascontiguousarray(kernel[..., :taken, :])
        fft, fft_seconds, fft_compile = self._ready(self.transform, first)
        fft_seconds *= columns / taken
        seconds = self._probe(total)
        if taken == columns and fft_seconds + total * seconds <= self.limit:
            array = self.library.asarray(kernel)
            run, compiled = self.library.compile(self, array)
            return Measured(
                {"two lines": self._task(run, array)},
                {"two lines": fft_seconds + total * seconds},
                {"two lines": 1.0},
                sampled=total,
                extrapolated=False,
                compile_seconds=compiled,
            )
        count = min(total, max(2, round(self.sample_seconds / seconds)), self._affordable())
        svd, svd_seconds, svd_compile = self._ready(self._values, self._matrices(total, count))
        return Measured(
            {"fft": fft, "svd": svd},
            {"fft": fft_seconds, "svd": svd_seconds},
            {"fft": columns / taken, "svd": total / count},
            sampled=count,
            extrapolated=True,
            compile_seconds=None if svd_compile is None else svd_compile + (fft_compile or 0.0),
        )

    def _probe(self, total: int) -> float:
        """Seconds that the SVDs of one frequency take within a batch."""
        count = 1
        while True:
            count = min(count, total, self._affordable())
            run, _, _ = self._ready(self._values, self._matrices(total, count))
            seconds = min(time_once(run) for _ in range(PROBES))
            if seconds >= PROBE_SECONDS or count == min(total, self._affordable()):
                return seconds / count
            count *= 4

    def _matrices(self, total: int, count: int) -> HostArray:
        matrices = matrices_at(self.kernel, self.shape.grid, sample(total, count))
        return matrices.astype(np.complex64)

    def _affordable(self) -> int:
        return max(1, SAMPLE_BYTES // (8 * math.prod(self.kernel.shape[-3:])))

    def _ready(self, function: Function, argument: HostArray) -> tuple[Task, float, float | None]:
        """Compile and run a function of one array: the task, seconds of its first run, seconds of compilation."""
        array = self.library.asarray(argument)
        run, compiled = self.library.compile(function, array)

        task = self._task(run, array)
        return task, time_once(task), compiled

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
    """Return the SVD without vectors of the operator's whole matrix, whose making is not timed, run once."""
    host = dense_matrix(shape)
    matrix = library.asarray(host)
    run, _ = library.compile(library.svdvals, matrix)

    def task() -> None:
        library.wait(run(matrix))

    task()
    return task


def dense_matrix(shape: Shape) -> HostArray:
    """The whole matrix of a convolution of stride 1 without groups, in float32.

    Columns are ``(*position, input)``, rows ``(*position, output)``. Offsets count from the first tap: how
    the layer is padded only permutes the rows.
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


def reference(shape: Shape, seconds: float) -> tuple[HostArray, HostArray]:
    """Singular values by the two lines in double precision, at every frequency if that takes `seconds` at most.

    Returns
    -------
    frequencies : numpy.ndarray of int, shape (count,)
        Places in the grid: all of them, or a uniform sample and frequency 0.
    values : numpy.ndarray of float64, shape (count, groups * values)
        Descending along the last axis.
    """
    kernel, total = polyphase(shape, shape.kernel()), math.prod(shape.grid)
    first = matrices_at(kernel, shape.grid, np.arange(1))
    one = min(time_once(lambda: _discard(np.linalg.svd(first, compute_uv=False))) for _ in range(3))
    affordable = max(1, 2 * SAMPLE_BYTES // first.nbytes)
    chosen = sample(total, min(max(3, round(seconds / one)), affordable))
    chosen = np.union1d(chosen, [0])
    values = np.linalg.svd(matrices_at(kernel, shape.grid, chosen), compute_uv=False)
    return chosen, -np.sort(-values.reshape(len(chosen), -1), axis=-1)


def _discard(result: object) -> None:
    """Make a task of an expression."""
