"""Train under every way to hold the norms of convolutions, a step of each in turn."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from convsv_adapters.torch import ConvLayer, StepProjection, conv_layers, operator_norm, penalty
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import convsv_core as convsv
from benchmarks.baselines import from_polyphase, polyphase
from benchmarks.clip_baselines import PaperClip
from benchmarks.libraries import open_library
from benchmarks.shapes import HostArray, convolution
from benchmarks.timing import in_turns
from benchmarks.training_setup import Setup
from examples.paper.resnet import ResNet
from examples.paper.training import circular_norms

__all__ = [
    "PAPER_CLIP",
    "PARAMETRIZATION",
    "PENALTY",
    "PLAIN",
    "PROJECT",
    "SPECTRAL_NORM",
    "Held",
    "MethodTimes",
    "Snapshot",
    "StepTime",
    "Training",
    "TrainingRow",
    "certified_norms",
    "geometry",
    "make_batches",
    "make_methods",
    "make_row",
    "measure",
    "measure_first",
    "start",
    "weights_of",
]

Batches: TypeAlias = list[tuple[Tensor, Tensor]]
Snapshot: TypeAlias = list[Tensor]

PLAIN, PROJECT, PARAMETRIZATION, PENALTY = "plain step", "project", "parametrization", "penalty"
SPECTRAL_NORM, PAPER_CLIP = "spectral_norm of PyTorch", "clip of the paper"
PENALTY_WEIGHT = 1e-3
"""Weight of the penalty in the loss: a guess; it does not change the time."""

FIRST_STEPS = 10
"""Steps after the random weights that count as the first ones: a guess; the spectra are flat for six to eight."""

BATCHES = 8
"""Distinct batches that the training repeats: a guess."""


@dataclass(frozen=True)
class Held:
    """Describe a way to hold the norms of one model: a term of the loss, and a function to call after a step."""

    loss: Callable[[], Tensor | float] = lambda: 0.0
    after: Callable[[], object] | None = None
    period: int = 1


Method: TypeAlias = Callable[[nn.Module, list[ConvLayer], float], Held]
"""A function of a model, its convolutions and the bound."""


class StepTime(NamedTuple):
    """Hold the times of one step.

    Attributes
    ----------
    seconds : float
        Time of the whole step.
    own_seconds : float
        Time after the optimizer, as part of it.
    before : list of Tensor
        The weights after the optimizer; empty where the method does nothing then.
    """

    seconds: float
    own_seconds: float
    before: Snapshot


@dataclass
class MethodTimes:
    """Hold the times of one method.

    Attributes
    ----------
    period : int
    layers : list of ConvLayer
        The convolutions, with the weights that the method ended with.
    seconds, own_seconds : list of float
        Times of each measured step, as in `StepTime`.
    moved : list of int
        Layers whose weights the method changed after the optimizer, for each step; empty where it does nothing then.
    snapshots : list
        The weights before each projection, from the first one on, for `PROJECT` alone.
    """

    period: int
    layers: list[ConvLayer]
    seconds: list[float] = field(default_factory=list)
    own_seconds: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingRow:
    """Record one method at one bound: an entry of ``rows`` in the JSON.

    Attributes
    ----------
    case : str
        The layers whose norms exceed the bound at first.
    bound : float
    method : str
    period : int
        Steps from one projection to the next.
    steps : int
        Measured steps.
    seconds, own_seconds : float
        Time of a step, and its part after the optimizer: medians over periods.
    overhead : float
        Time of a period over that of the plain steps of the same turns, less 1: median over the periods.
    quartiles : tuple of float
        Quartiles of the same ratios.
    moved : float or None
        Layers whose weights a projection changed, on average; None where nothing follows the optimizer.
    norm, circular_norm : float
        Largest norm of a layer after the last step over the bound: certified for its own padding and every input
        size, and of the paper's operator.
    times, own_times : list of float
        Times of every measured step, in the order of the turns.
    """

    case: str
    bound: float
    method: str
    period: int
    steps: int
    seconds: float
    own_seconds: float
    overhead: float
    quartiles: tuple[float, float]
    moved: float | None
    norm: float
    circular_norm: float
    times: list[float]
    own_times: list[float]


def make_methods(setup: Setup) -> dict[str, Method]:
    """Return the methods that are measured, by name."""

    def project(every: int = 1, **options: Any) -> Method:
        def make(model: nn.Module, layers: list[ConvLayer], bound: float) -> Held:
            projection = StepProjection(model, bound, every, layers=layers, **options)
            return Held(after=projection.step, period=every)

        return make

    def parametrize(model: nn.Module, layers: list[ConvLayer], bound: float) -> Held:
        for layer in layers:
            operator_norm(layer.module, bound=bound)
        return Held()

    def reshaped(model: nn.Module, layers: list[ConvLayer], bound: float) -> Held:
        for layer in layers:
            spectral_norm(layer.module)
        return Held()

    def penalise(model: nn.Module, layers: list[ConvLayer], bound: float) -> Held:
        return Held(loss=lambda: PENALTY_WEIGHT * penalty(model, "norm_hinge", layers=layers, bound=bound))

    return {
        PLAIN: lambda model, layers, bound: Held(),
        PROJECT: project(),
        f"project, every {setup.every}": project(every=setup.every),
        "project, circular": project(circular=True),
        f"project, circular, every {setup.every}": project(every=setup.every, circular=True),
        "project, circular, nearest": project(circular=True, method="dykstra"),
        PARAMETRIZATION: parametrize,
        PENALTY: penalise,
        SPECTRAL_NORM: reshaped,
        PAPER_CLIP: lambda model, layers, bound: Held(after=_clips(layers, bound)),
    }


def measure_first(setup: Setup, methods: Mapping[str, Method], bound: float) -> dict[str, MethodTimes]:
    """Train from random weights under each method, and measure the first `FIRST_STEPS` steps."""
    first = replace(setup, free_steps=0, settle=0, every=FIRST_STEPS, turns=FIRST_STEPS)
    model, batches = start(first)
    return measure(model, batches, first, {name: methods[name] for name in methods if "every" not in name}, bound)


def start(setup: Setup) -> tuple[ResNet, Batches]:
    """Return the network after some plain steps, and its batches."""
    torch.manual_seed(0)
    model = ResNet(setup.widths, setup.blocks)
    batches = make_batches(setup.batch, setup.extent)
    training = Training(model, batches, lambda *_: Held(), 0.0)
    for _ in range(setup.free_steps):
        training.step()
    return training.model, batches


def make_batches(batch: int, extent: int, device: str | None = None) -> Batches:
    """Return batches of noise around one image for each of ten classes, with their labels."""
    size = (3, extent, extent)
    classes = torch.randn(10, *size)
    labels = [torch.randint(10, (batch,)) for _ in range(BATCHES)]
    return [((classes[some] + torch.randn(batch, *size)).to(device), some.to(device)) for some in labels]


class Training:
    """Train a copy of a network under one method, by stochastic gradient descent as the paper does."""

    def __init__(self, model: nn.Module, batches: Batches, method: Method, bound: float) -> None:
        self.model, self.batches = copy.deepcopy(model), batches
        self.layers = conv_layers(self.model, batches[0][0])
        self.held = method(self.model, self.layers, bound)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.steps = 0
        self._wait = open_library("torch").wait

    def step(self) -> StepTime:
        """Run one step."""
        began = time.perf_counter()
        images, labels = self.batches[self.steps % len(self.batches)]
        loss = F.cross_entropy(self.model(images), labels) + self.held.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._wait(loss)
        plain = time.perf_counter() - began
        self.steps += 1
        if self.held.after is None:
            return StepTime(plain, 0.0, [])
        before = weights_of(self.layers)
        self._wait(loss)
        began = time.perf_counter()
        self.held.after()
        self._wait(loss)
        own = time.perf_counter() - began
        return StepTime(plain + own, own, before)


def weights_of(layers: Sequence[ConvLayer]) -> Snapshot:
    """Return copies of the weights."""
    return [layer.weight.detach().clone() for layer in layers]


def measure(
    model: nn.Module, batches: Batches, setup: Setup, methods: Mapping[str, Method], bound: float
) -> dict[str, MethodTimes]:
    """Train under each method, a step of each in turn, every other turn backwards.

    A method whose measured steps have taken `setup.limit` leaves out the other turns, so that its lists are shorter:
    their entries are those of the first turns. The plain steps are taken in all turns.
    """
    trainings = {name: Training(model, batches, method, bound) for name, method in methods.items()}
    found = {name: MethodTimes(one.held.period, one.layers) for name, one in trainings.items()}
    for name, one in trainings.items():
        spent = 0.0
        for step in range(setup.settle * one.held.period):
            if step % one.held.period == 0 and spent > setup.limit:
                break
            taken = one.step()
            spent += taken.seconds
            if name == PROJECT:
                found[name].snapshots.append(taken.before)
    for turn in range(setup.turns):
        for name in in_turns(trainings, turn):
            one, times = trainings[name], found[name]
            over = name != PLAIN and turn % times.period == 0 and sum(times.seconds) > setup.limit
            if over or len(times.seconds) < turn:
                continue
            taken = one.step()
            times.seconds.append(taken.seconds)
            times.own_seconds.append(taken.own_seconds)
            if taken.before:
                after = [layer.weight for layer in one.layers]
                times.moved.append(sum(not torch.equal(b, a) for b, a in zip(taken.before, after, strict=True)))
            if name == PROJECT:
                times.snapshots.append(taken.before)
    return found


def geometry(layer: ConvLayer) -> convsv.Conv:
    """Return the geometry of a layer of `ResNet`, all of whose convolutions a `Conv` expresses."""
    assert layer.conv is not None
    return layer.conv


def certified_norms(layers: Sequence[ConvLayer]) -> list[float]:
    """Return the certified upper bound of each layer's norm with its own padding, for every input size."""
    return [float(convsv.norm_bounds(layer.weight.detach(), geometry(layer)).upper) for layer in layers]


def make_row(case: str, bound: float, method: str, found: MethodTimes, plain: MethodTimes) -> TrainingRow:
    """Return the figures of one method beside the plain steps of the same turns."""
    period, steps = found.period, len(found.seconds)
    taken, own = (_by_period(times, period) for times in (found.seconds, found.own_seconds))
    overheads = taken / _by_period(plain.seconds[:steps], period) - 1
    moved = found.moved[period - 1 :: period]
    low, high = np.percentile(overheads, [25, 75])
    return TrainingRow(
        case=case,
        bound=bound,
        method=method,
        period=period,
        steps=steps,
        seconds=float(np.median(taken)) / period,
        own_seconds=float(np.median(own)) / period,
        overhead=float(np.median(overheads)),
        quartiles=(float(low), float(high)),
        moved=statistics.mean(moved) if moved else None,
        norm=max(certified_norms(found.layers)) / bound,
        circular_norm=max(circular_norms(found.layers)) / bound,
        times=found.seconds,
        own_times=found.own_seconds,
    )


def _by_period(times: Sequence[float], period: int) -> HostArray:
    """Return the sums over whole periods."""
    return np.asarray(times).reshape(-1, period).sum(axis=1)


def _clips(layers: Sequence[ConvLayer], bound: float) -> Callable[[], None]:
    """Return the paper's clip of every layer at its own extents."""
    library = open_library("torch", str(layers[0].weight.device))
    clips = []
    for layer in layers:
        outputs, inputs, *taps = layer.weight.shape
        assert layer.input_shape is not None  # the layers were found by a run of the model
        shape = convolution("", tuple(taps), inputs, outputs, layer.input_shape, geometry(layer).strides)
        clips.append((layer.weight, shape, PaperClip(library, shape, limit=0.0, sample_seconds=0.0, bound=bound)))

    def after() -> None:
        with torch.no_grad():
            for weight, shape, clip in clips:
                kernel = np.ascontiguousarray(weight.permute(2, 3, 1, 0).cpu().numpy())
                clipped = clip(library.asarray(polyphase(shape, kernel))).cpu().numpy()
                weight.copy_(torch.from_numpy(from_polyphase(shape, clipped)).permute(3, 2, 0, 1))

    return after
