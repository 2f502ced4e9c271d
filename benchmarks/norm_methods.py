"""Measure the norm of one convolution by every method: its time, and its error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

import convsv_core as convsv
from benchmarks.baselines import TwoLines, matrices_at, polyphase
from benchmarks.command import Measured, Size
from benchmarks.comparison import Effort
from benchmarks.layers import RESNET
from benchmarks.libraries import Function, Library
from benchmarks.norm_baselines import gram_bounds, kernel_gram_bound, power_iteration, reshaped_norm, tensor_norm_bound
from benchmarks.shapes import HostArray, Shape
from benchmarks.timing import Task, WeightedTasks, alternate, time_once
from convsv_core.backend import Array

__all__ = ["AMOUNTS", "OURS", "PAPER", "RTOL", "Amount", "Method", "NormRow", "measure"]

OURS, PAPER, OWN = "norm_bounds", "FFT + SVD", "own n"
RTOL = 1e-3
"""Relative gap that `norm_bounds` is asked for: a guess."""

TRUE_RTOL = 1e-6
"""Relative gap of the bounds in float64 that are taken for the true norm: a guess, far below `RTOL`."""

GRID_RTOL = 1e-4
"""Relative gap of the bounds in float64 on a grid: a guess.

A method that sees a grid is evaluated at the frequency of the largest norm there, so that this gap does not count.
"""

SYMBOL_BYTES = 1 << 28
"""Largest symbol, in complex64, that a method runs on in full: a guess, for speed."""

STEPS = (50, 500)
"""Steps of power iteration: guesses."""

FEW_STEPS = 2
"""Steps of power iteration that are timed where all of them would take too long: a guess."""


@dataclass(frozen=True)
class Amount:
    """Say how thoroughly a layer is measured.

    Attributes
    ----------
    effort : Effort
    extents : tuple of int
        Extents of the square inputs; the layers of ResNet-18 have their own.
    power_operations : float
        Power iteration of no more multiplications runs in full. This is a count and not a time, so that load on the
        machine does not decide.
    """

    effort: Effort
    extents: tuple[int, ...]
    power_operations: float


AMOUNTS = {
    Size.FULL: Amount(Effort(repeats=3, full_seconds=2.0, sample_seconds=0.5), (32, 56, 112, 224), 1e11),
    Size.QUICK: Amount(Effort(repeats=1, full_seconds=0.2, sample_seconds=0.05), (32, 56), 1e10),
    Size.TINY: Amount(Effort(repeats=1, full_seconds=0.02, sample_seconds=0.005), (8, 16), 1e9),
}


@dataclass(frozen=True)
class Method:
    """Hold a method on one layer, ready to be timed.

    Attributes
    ----------
    measured : WeightedTasks
    value : float or None
        Upper bound of ours; the value that another method returns. None where that would take too long.
    truth : float
        The true value of the quantity that the method bounds or estimates.
    certified : str
        "both" where both bounds are proved, "upper" where the value is an upper bound, else "".
    evaluations : int or None
        Evaluations of a block of the symbol, which ours alone tells.
    """

    measured: WeightedTasks
    value: float | None
    truth: float
    certified: str = ""
    evaluations: int | None = None


@dataclass(frozen=True)
class NormRow:
    """Record one method on one layer in one library: an entry of ``rows`` in the JSON.

    Attributes
    ----------
    error : float or None
        ``value / truth - 1``, or None where the value would have taken too long. For power iteration, and for a
        method without an input size, the truth is the norm over all frequencies. Else it is the norm on the circular
        grid.
    extrapolated : bool
        Whether the time was scaled up from a sample of the frequencies.
    ratio : float
        Time over that of `norm_bounds` for every input size.
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


def measure(layer: Measured, amount: Amount) -> list[NormRow]:
    """Run every method on one layer, in turns."""
    library, group, shape = layer
    extents = [shape.extents] if group == RESNET else [(n, n) for n in amount.extents]
    methods = dict(_methods(library, shape, extents, amount))
    tasks, estimates = {}, {}
    for name, method in methods.items():
        for part, task in method.measured.tasks.items():
            tasks[f"{name} {part}"] = task
            estimates[f"{name} {part}"] = method.measured.estimates[part]
    found = alternate(tasks, estimates, amount.effort.repeats)
    times = {
        name: method.measured.combine({part: found[f"{name} {part}"] for part in method.measured.tasks})
        for name, method in methods.items()
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
            certified=method.certified,
            seconds=statistics.median(times[name]),
            times=times[name],
            extrapolated=method.measured.extrapolated,
            value=method.value,
            truth=method.truth,
            error=None if method.value is None else method.value / method.truth - 1,
            evaluations=method.evaluations,
            ratio=statistics.median(times[name]) / ours,
        )
        for name, method in methods.items()
    ]


def _methods(
    library: Library, shape: Shape, extents: Sequence[tuple[int, ...]], amount: Amount
) -> Iterator[tuple[str, Method]]:
    """Yield the name of every method, and the method ready to be timed."""
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
        yield f"{PAPER} {at}", _by_frequency(library, sized, amount.effort, library.svdvals, bounds)
        if number in (1, len(extents) - 1):
            yield f"{OURS} {at}", _ours(library, sized, size, float(bounds.lower))
        if number == min(1, len(extents) - 1):
            yield f"Gram, FFT {at}", _by_frequency(library, sized, amount.effort, gram_bounds(library), bounds)
            for steps in STEPS:
                yield f"power {steps} {at}", _power(library, sized, steps, kernel, truth, amount.power_operations)


def _undilated(shape: Shape) -> HostArray:
    """Return the polyphase kernel; at stride 1 without the dilation, which then does not change the norm."""
    if max(shape.stride) == 1:
        shape = replace(shape, dilation=(1,) * len(shape.taps))
    return polyphase(shape, shape.kernel())


def _ours(library: Library, shape: Shape, input_shape: tuple[int, ...] | None, truth: float) -> Method:
    kernel = library.asarray(shape.kernel())

    def task() -> None:
        convsv.norm_bounds(kernel, shape.conv, input_shape=input_shape, rtol=RTOL)

    bounds = convsv.norm_bounds(kernel, shape.conv, input_shape=input_shape, rtol=RTOL)
    return Method(_whole(task), float(bounds.upper), truth, "both" if bounds.converged else "", bounds.evaluations)


def _simple(library: Library, function: Function, argument: Array, truth: float, certified: str = "") -> Method:
    run, compiled = library.compile(function, argument)
    value = float(run(argument))
    return Method(_whole(lambda: library.wait(run(argument)), compiled), value, truth, certified)


def _power(library: Library, shape: Shape, steps: int, kernel: Array, truth: float, most: float) -> Method:
    """Return power iteration; where it takes too long, only the first steps are timed, and the value is None."""
    outputs = math.prod(math.ceil(n / s) for n, s in zip(shape.extents, shape.stride, strict=True))
    if 2 * steps * outputs * math.prod(kernel.shape) <= most:
        return _simple(library, power_iteration(library, shape, steps), kernel, truth)
    few = _simple(library, power_iteration(library, shape, FEW_STEPS), kernel, truth)
    scaled = replace(few.measured, weights={"": steps / FEW_STEPS}, extrapolated=True)
    return replace(few, measured=scaled, value=None)


def _whole(task: Task, compile_seconds: float | None = None) -> WeightedTasks:
    return WeightedTasks.whole("", task, time_once(task), compile_seconds=compile_seconds)


def _by_frequency(
    library: Library, shape: Shape, effort: Effort, values: Function, bounds: convsv.NormBounds
) -> Method:
    """Return a method that visits all frequencies; its value is taken at the frequency of the largest norm."""
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
    return Method(lines.prepare(), value, float(bounds.lower), "upper")
