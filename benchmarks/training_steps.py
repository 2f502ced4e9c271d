"""Steps of training under every way to hold the norms of convolutions, in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from convsv_adapters.torch import ConvLayer, StepProjection, conv_layers, operator_norm, penalty
from torch import Tensor, nn
from torch.nn import functional as F

import convsv_core as convsv
from benchmarks.baselines import from_polyphase, polyphase
from benchmarks.clip_baselines import PaperClip
from benchmarks.libraries import open_library
from benchmarks.shapes import Shape
from examples.paper.resnet import ResNet

Batches: TypeAlias = list[tuple[Tensor, Tensor]]
Snapshot: TypeAlias = list[Tensor]

PLAIN, PROJECT = "plain step", "project"
PENALTY_WEIGHT = 1e-3
BATCHES = 8


@dataclass(frozen=True)
class Setup:
    """How much is trained and measured.

    Attributes
    ----------
    widths, blocks
        Of the `ResNet`.
    batch, extent : int
        Images of a step, and their pixels along an axis.
    free_steps : int
        Plain steps from the random weights to those that every method starts from.
    settle : int
        Periods of each method before it is measured: the first projection has the longest way.
    every : int
        Period of the method that projects seldom.
    turns : int
        Measured steps, a multiple of `every`.
    limit : float
        Seconds of measured steps after which a method sits out, at the end of a period; and of those before them.
    """

    widths: tuple[int, ...]
    blocks: int
    batch: int
    extent: int
    free_steps: int
    settle: int
    every: int
    turns: int
    limit: float


@dataclass(frozen=True)
class Held:
    """A way to hold the norms, made for one model: what it adds to the loss, and does after a step."""

    loss: Callable[[], Tensor | float] = lambda: 0.0
    after: Callable[[], object] | None = None
    period: int = 1


@dataclass
class Measured:
    """Times of one method.

    Attributes
    ----------
    period : int
    seconds, own_seconds : list of float
        Of each measured step, and of what follows the optimizer in it.
    moved : list of int
        Layers whose weights that changed, where there is such a thing.
    snapshots : list
        The weights before each projection, from the first on; of `PROJECT` alone.
    layers : list of ConvLayer
        With the weights that the method ended with.
    """

    period: int
    layers: list[ConvLayer]
    seconds: list[float] = field(default_factory=list)
    own_seconds: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)


def make_methods(setup: Setup) -> dict[str, Callable[[nn.Module, list[ConvLayer], float], Held]]:
    """What is measured, by name, from a model, its convolutions and the bound."""

    def project(every: int = 1, **options: Any) -> Callable[[nn.Module, list[ConvLayer], float], Held]:
        def make(model: nn.Module, layers: list[ConvLayer], bound: float) -> Held:
            projection = StepProjection(model, bound, every, layers=layers, **options)
            return Held(after=projection.step, period=every)

        return make

    def parametrize(model: nn.Module, layers: list[ConvLayer], bound: float) -> Held:
        for layer in layers:
            operator_norm(layer.module, bound=bound)
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
        "parametrization": parametrize,
        "penalty": penalise,
        "clip of the paper": lambda model, layers, bound: Held(after=_clips(layers, bound)),
    }


def start(setup: Setup) -> tuple[ResNet, Batches]:
    """The network after some plain steps, and the batches it is trained on: noise around one image a class."""
    torch.manual_seed(0)
    model = ResNet(setup.widths, setup.blocks)
    size = (3, setup.extent, setup.extent)
    classes = torch.randn(10, *size)
    labels = [torch.randint(10, (setup.batch,)) for _ in range(BATCHES)]
    batches = [(classes[some] + torch.randn(setup.batch, *size), some) for some in labels]
    training = Training(model, batches, lambda *_: Held(), 0.0)
    for _ in range(setup.free_steps):
        training.step()
    return training.model, batches


class Training:
    """A copy of a network, trained by stochastic gradient descent as the paper's is, under one method."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        method: Callable[[nn.Module, list[ConvLayer], float], Held],
        bound: float,
    ) -> None:
        self.model, self.batches = copy.deepcopy(model), batches
        self.layers = conv_layers(self.model, batches[0][0])
        self.held = method(self.model, self.layers, bound)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.steps = 0

    def step(self) -> tuple[float, float, Snapshot]:
        """One step: its seconds, those of what follows the optimizer among them, and the weights before that."""
        began = time.perf_counter()
        images, labels = self.batches[self.steps % len(self.batches)]
        loss = F.cross_entropy(self.model(images), labels) + self.held.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        plain = time.perf_counter() - began
        self.steps += 1
        if self.held.after is None:
            return plain, 0.0, []
        before = weights_of(self.layers)
        began = time.perf_counter()
        self.held.after()
        own = time.perf_counter() - began
        return plain + own, own, before


def weights_of(layers: Sequence[ConvLayer]) -> Snapshot:
    """Copies of the weights."""
    return [layer.weight.detach().clone() for layer in layers]


def measure(
    model: nn.Module, batches: Batches, setup: Setup, methods: Mapping[str, Callable[..., Held]], bound: float
) -> dict[str, Measured]:
    """Train under each method, a step of each in turn, every other turn backwards.

    A method whose measured steps have taken `setup.limit` sits out the other turns, so that its lists are shorter:
    their entries are those of the first turns. The plain steps are taken in all of them.
    """
    trainings = {name: Training(model, batches, method, bound) for name, method in methods.items()}
    found = {name: Measured(one.held.period, one.layers) for name, one in trainings.items()}
    for name, one in trainings.items():
        spent = 0.0
        for step in range(setup.settle * one.held.period):
            if step % one.held.period == 0 and spent > setup.limit:
                break
            seconds, _, before = one.step()
            spent += seconds
            if name == PROJECT:
                found[name].snapshots.append(before)
    for turn in range(setup.turns):
        for name in list(trainings)[:: -1 if turn % 2 else 1]:
            one, times = trainings[name], found[name]
            spent = name != PLAIN and turn % times.period == 0 and sum(times.seconds) > setup.limit
            if spent or len(times.seconds) < turn:
                continue
            seconds, own, before = one.step()
            times.seconds.append(seconds)
            times.own_seconds.append(own)
            if before:
                after = [layer.weight for layer in one.layers]
                times.moved.append(sum(not torch.equal(b, a) for b, a in zip(before, after, strict=True)))
            if name == PROJECT:
                times.snapshots.append(before)
    return found


def certified_norms(layers: Sequence[ConvLayer]) -> list[float]:
    """Certified upper bound of each layer's norm with its own padding, for every input size."""
    return [float(convsv.norm_bounds(layer.weight.detach(), layer.conv).upper) for layer in layers]


def _clips(layers: Sequence[ConvLayer], bound: float) -> Callable[[], None]:
    """The paper's clip of every layer at its own extents, each frequency's matrix decomposed with its vectors."""
    library = open_library("torch")
    clips = []
    for layer in layers:
        outputs, inputs, *taps = layer.weight.shape
        stride = layer.conv.strides
        shape = Shape("", tuple(taps), inputs, outputs, layer.input_shape, stride, (1,) * len(stride))
        clips.append((layer.weight, shape, PaperClip(library, shape, limit=0.0, sample_seconds=0.0, bound=bound)))

    def after() -> None:
        with torch.no_grad():
            for weight, shape, clip in clips:
                kernel = np.ascontiguousarray(weight.permute(2, 3, 1, 0).numpy())
                clipped = clip(torch.from_numpy(polyphase(shape, kernel))).numpy()
                weight.copy_(torch.from_numpy(from_polyphase(shape, clipped)).permute(3, 2, 0, 1))

    return after
