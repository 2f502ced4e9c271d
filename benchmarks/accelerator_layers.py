"""Measure every method on one layer after the other, beside the lines of the paper in the same library and run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

import convsv_core as convsv
from benchmarks.accelerator_setup import DERIVATIVES, LAYERS, Amount, Clock, MethodRow
from benchmarks.baselines import TwoLines, polyphase_places
from benchmarks.clip_baselines import PaperClip
from benchmarks.comparison import EPS, comparison_of
from benchmarks.libraries import Function, Library
from benchmarks.machine import product_peak
from benchmarks.shapes import HostArray, Shape
from benchmarks.singular_values import decomposition_flops, visited_frequencies
from benchmarks.timing import WeightedTasks, alternate, time_once
from convsv_core import penalties
from convsv_core.backend import Array

__all__ = ["Peak", "gram_flops", "measure_derivatives", "measure_layers", "measure_peak"]

SHARE = 0.5
"""Bound of clip and project, in units of the kernel's norm: a guess, below the norms at most frequencies."""

SMALLEST_SIDE, LARGEST_SIDE = 64, 8192
"""Sides of the matrices whose product is timed: guesses. The largest one takes 0.5 GB in complex64."""

TWO_LINES, PAPER_CLIP, LINES_GRADIENT = "FFT + SVD", "clip of the paper", "FFT + SVD, gradient"


class Peak(NamedTuple):
    """Hold the speed of a matrix product: real operations a second, and the side and dtype of the matrices."""

    flops: float
    side: int
    dtype: str


class _Ready(NamedTuple):
    """Hold a function to be timed, which returns an array, and the seconds of its compilation, if it is compiled."""

    run: Callable[[], Array]
    compile_seconds: float | None


@dataclass(frozen=True)
class _Method:
    """Describe a method on one layer.

    Attributes
    ----------
    name : str
    make : callable
        Returns the function to be timed.
    operations : float or None
    truth : numpy.ndarray or None
        The result in float64, that the error is taken against.
    """

    name: str
    make: Callable[[], _Ready]
    operations: float | None = None
    truth: HostArray | None = None


def measure_peak(library: Library, dtype: str, seconds: float) -> Peak:
    """Return the speed of a complex matrix product: the sides double until a product takes `seconds`."""
    side = SMALLEST_SIDE
    while True:
        flops = product_peak(library, dtype, side, repeats=3)
        if 8 * side**3 / flops >= seconds or side >= LARGEST_SIDE:
            return Peak(flops, side, dtype)
        side *= 2


def gram_flops(shape: Shape) -> float | None:
    """Return the real operations of the Gram matrices of all visited frequencies; None for closed forms.

    A frequency has a block of m x n for each group, where n is the smaller side. Its Gram matrix of side n is a
    product of ``8 m n^2`` operations. Nothing else that a norm takes is counted.
    """
    if decomposition_flops(shape, "complex64") is None:
        return None
    columns = shape.inputs // shape.groups * math.prod(polyphase_places(shape).classes)
    n, m = sorted((shape.outputs // shape.groups, columns))
    return 8.0 * m * n**2 * visited_frequencies(shape) * shape.groups


def measure_layers(library: Library, amount: Amount, clock: Clock, peak: Peak) -> Iterator[MethodRow]:
    """Yield the rows of the spectrum and norms of every layer, then those of clip and project.

    Each of these has an equal part of the time. `project` comes last: in JAX it compiles for tens of seconds, and a
    process that is ended there has told the other rows.
    """
    seconds, count = (amount.effort.full_seconds, amount.effort.sample_seconds), len(amount.shapes)
    for place, shape in enumerate(amount.shapes):
        own = clock.part(2 * count - place)
        if not own.begins(f"{shape.name} spectrum and norms"):
            continue
        truth = np.asarray(convsv.singular_values(shape.kernel().astype(np.float64), shape.extents, shape.conv))
        lines = partial(TwoLines, library, shape, *seconds)
        values = _values_methods(library, shape, truth, peak.dtype)
        yield from _measure(library, shape, LAYERS, values, TWO_LINES, lines, amount, own, peak)
    for place, shape in enumerate(amount.shapes):
        own = clock.part(count - place)
        if not own.begins(f"{shape.name} clip and project"):
            continue
        bound = SHARE * _true_norm(shape)
        clips = partial(PaperClip, library, shape, *seconds, bound=bound)
        changes = _change_methods(library, shape, bound, amount.iterations)
        yield from _measure(library, shape, LAYERS, changes, PAPER_CLIP, clips, amount, own, peak)


def _true_norm(shape: Shape) -> float:
    """Return the norm of a layer, by NumPy in float64."""
    return float(convsv.operator_norm(shape.kernel().astype(np.float64), shape.extents, shape.conv))


def measure_derivatives(library: Library, amount: Amount, clock: Clock) -> Iterator[MethodRow]:
    """Yield the rows of norms with their gradients; each layer has an equal part of the time."""
    make = {"torch": _torch_gradients, "jax": _jax_gradients}[library.name]
    gradient = {"torch": _torch_norm_gradient, "jax": _jax_norm_gradient}[library.name]
    for place, shape in enumerate(amount.shapes):
        own = clock.part(len(amount.shapes) - place)
        if not own.begins(shape.name):
            continue
        lines = partial(
            TwoLines,
            library,
            shape,
            amount.effort.full_seconds,
            amount.effort.sample_seconds,
            values=gradient(library),
        )
        methods = make(library, shape, SHARE * _true_norm(shape))
        yield from _measure(library, shape, DERIVATIVES, methods, LINES_GRADIENT, lines, amount, own)


def _measure(
    library: Library,
    shape: Shape,
    section: str,
    methods: list[_Method],
    baseline_name: str,
    make_baseline: Callable[[], TwoLines],
    amount: Amount,
    clock: Clock,
    peak: Peak | None = None,
) -> Iterator[MethodRow]:
    """Yield a row for each method, timed in turns with the baseline, which is prepared once."""
    names = [f"{shape.name} {method.name}" for method in methods]
    if not clock.begins(f"{shape.name} {baseline_name}"):
        clock.left_out.extend(names)
        return
    try:
        baseline = make_baseline().prepare()
    except Exception as error:  # a library may raise anything on a device, and the other measurements go on
        clock.fail(f"{shape.name} {baseline_name}", error)
        clock.left_out.extend(names)
        return
    for name, method in zip(names, methods, strict=True):
        if not clock.begins(name):
            continue
        try:
            yield _row(library, shape, section, method, baseline_name, baseline, amount, clock, peak)
        except Exception as error:  # as above
            clock.fail(name, error)


def _row(
    library: Library,
    shape: Shape,
    section: str,
    method: _Method,
    baseline_name: str,
    baseline: WeightedTasks,
    amount: Amount,
    clock: Clock,
    peak: Peak | None = None,
) -> MethodRow:
    began = time.perf_counter()
    ready = method.make()
    result = ready.run()
    library.wait(result)
    first = time.perf_counter() - began

    def task() -> None:
        library.wait(ready.run())

    estimates = {"ours": time_once(task)} | baseline.estimates
    repeats = clock.repeats(amount.effort.repeats, sum(estimates.values()))
    times = alternate({"ours": task} | baseline.tasks, estimates, repeats)
    compared = comparison_of(times["ours"], baseline, times, library, shape)
    seconds = compared["ours_seconds"]
    return MethodRow(
        **compared,
        section=section,
        method=method.name,
        baseline=baseline_name,
        first_seconds=first,
        compile_seconds=ready.compile_seconds,
        baseline_compile_seconds=baseline.compile_seconds,
        operations=method.operations,
        peak_share=None if method.operations is None or peak is None else method.operations / seconds / peak.flops,
        error_eps=None if method.truth is None else _error(library, result, method.truth),
    )


def _error(library: Library, result: Array, truth: HostArray) -> float:
    """Return the largest difference, in units of `EPS` times the largest true value."""
    difference = np.abs(library.backend.to_numpy(result).astype(np.float64) - truth)
    return float(difference.max() / (EPS * truth.max()))


def _compiled(library: Library, function: Function, *arrays: Array) -> _Ready:
    run, seconds = library.compile(function, *arrays)
    return _Ready(lambda: run(*arrays), seconds)


def _values_methods(library: Library, shape: Shape, truth: HostArray, dtype: str) -> list[_Method]:
    """Return the spectrum and the norms.

    Parameters
    ----------
    library, shape
    truth : numpy.ndarray
        The true singular values, descending.
    dtype : str
        The dtype that matrices are decomposed in. Gram matrices of float32 kernels are made in complex64, so that
        their operations are counted only where the speed of a matrix product was measured in that dtype, too.
    """
    kernel, extents, conv = library.asarray(shape.kernel()), shape.extents, shape.conv

    def spectrum(array: Array) -> Array:
        return convsv.singular_values(array, extents, conv)

    def norm(array: Array) -> Array:
        return convsv.operator_norm(array, extents, conv)

    def upper_bound(array: Array) -> Array:
        return convsv.norm_upper_bound(array, conv)

    flops, largest = decomposition_flops(shape, dtype), truth.max(keepdims=True)
    grams = gram_flops(shape) if dtype == "complex64" else None
    return [
        _Method("singular_values", partial(_compiled, library, spectrum, kernel), flops, truth),
        _Method("operator_norm", partial(_compiled, library, norm, kernel), grams, largest),
        _Method("norm_upper_bound", partial(_compiled, library, upper_bound, kernel)),
    ]


def _change_methods(library: Library, shape: Shape, bound: float, iterations: int) -> list[_Method]:
    """Return clip, which is compiled where the library compiles, and project, which reads values and is not."""
    kernel, extents, conv = library.asarray(shape.kernel()), shape.extents, shape.conv
    limit = library.asarray(np.asarray(bound, np.float32))

    def projected(**options: str | int) -> _Ready:
        return _Ready(lambda: convsv.project(kernel, extents, conv, bound, **options).kernel, None)

    return [
        _Method("clip", partial(_compiled, library, lambda a, c: convsv.clip(a, extents, conv, c), kernel, limit)),
        _Method("project, rescale", partial(projected, method="rescale")),
        _Method(f"project, {iterations} of dykstra", partial(projected, method="dykstra", max_iterations=iterations)),
    ]


def _torch_gradients(library: Library, shape: Shape, bound: float) -> list[_Method]:
    """Return the parametrization, the penalty and PyTorch's `spectral_norm`: the weight's norm and its gradient."""
    import torch
    from convsv_adapters.torch import conv_layers

    from benchmarks.command import Size
    from benchmarks.training_setup import SETUPS
    from benchmarks.training_steps import PARAMETRIZATION, PENALTY, SPECTRAL_NORM, make_methods

    known = make_methods(SETUPS[Size.TINY])  # the set-up only says how often a projection runs

    def make(name: str) -> _Ready:
        layer = torch.nn.Conv2d(
            shape.inputs,
            shape.outputs,
            shape.taps,
            padding="same",
            groups=shape.groups,
            bias=False,
            device=library.device,
        )
        weight = library.backend.to_numpy(library.asarray(shape.kernel())).transpose(3, 2, 0, 1)
        with torch.no_grad():
            layer.weight.copy_(library.asarray(np.ascontiguousarray(weight)))
        model = torch.nn.Sequential(layer)
        layers = conv_layers(model, torch.zeros(1, shape.inputs, *shape.extents, device=library.device))
        held = known[name](model, layers, bound)
        parameter = next(model.parameters())

        def run() -> Array:
            model.zero_grad()
            (layer.weight.square().sum() + held.loss()).backward()
            return parameter.grad

        return _Ready(run, None)

    return [_Method(name, partial(make, name)) for name in (PARAMETRIZATION, PENALTY, SPECTRAL_NORM)]


def _torch_norm_gradient(library: Library) -> Function:
    """Return the function from matrices to the gradient of their largest singular value."""

    def gradient(matrices: Array) -> Array:
        matrices = matrices.detach().requires_grad_()
        library.svdvals(matrices).max().backward()
        return matrices.grad

    return gradient


def _jax_gradients(library: Library, shape: Shape, bound: float) -> list[_Method]:
    """Return the gradient of the penalty, compiled."""
    import jax

    kernel, extents, conv = library.asarray(shape.kernel()), shape.extents, shape.conv
    function = jax.grad(lambda array: penalties.norm_hinge(array, extents, conv, bound))
    return [_Method("penalty", partial(_compiled, library, function, kernel))]


def _jax_norm_gradient(library: Library) -> Function:
    """Return the function from matrices to the gradient of their largest singular value."""
    import jax

    gradient: Function = jax.grad(lambda matrices: library.svdvals(matrices).max())
    return gradient
