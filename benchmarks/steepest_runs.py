"""Record momenta of a training, measure directions for them, and time the steps of optimizers."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from convsv_adapters._layers import COLD_ITERATIONS
from convsv_adapters.torch import ConvMuon, conv_layers
from torch import Tensor, nn
from torch.nn import functional as F

import convsv_core as convsv
from benchmarks.steepest_setup import SteepestSetup
from benchmarks.timing import in_turns
from benchmarks.training_steps import geometry, start
from convsv_core.layers import lattice
from examples.muon import flattened_muon

__all__ = ["PLAIN", "DirectionRow", "Recorded", "StepRow", "direction_rows", "record", "step_rows"]

PLAIN = "SGD"
MOMENTUM = 0.95
"""Momentum of the recording, which is the default of `ConvMuon`."""

Make: TypeAlias = Callable[[nn.Module], list[torch.optim.Optimizer]]

OPTIMIZERS: Mapping[str, Make] = {
    PLAIN: lambda model: [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)],
    "AdamW": lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-4)],
    "Muon, flattened": lambda model: flattened_muon(model, 1e-3),
    "ConvMuon, flat": lambda model: [ConvMuon(model, lr=1e-3, method="flat")],
    "ConvMuon, polar": lambda model: [ConvMuon(model, lr=1e-3, method="polar")],
    "ConvMuon, exact": lambda model: [ConvMuon(model, lr=1e-3)],
    "ConvMuon, exact, 3 iterations": lambda model: [ConvMuon(model, lr=1e-3, iterations=3)],
}
"""The optimizers whose steps are timed, with rates so small that the network stays what it is."""

FLATTENED = "Muon, flattened"


class Recorded(NamedTuple):
    """Hold a layer's name and geometry, and its momenta of steps that follow each other."""

    name: str
    conv: convsv.Conv
    momenta: tuple[Tensor, ...]

    @property
    def before(self) -> Tensor:
        """The momentum of the last step but one."""
        return self.momenta[-2]

    @property
    def after(self) -> Tensor:
        """The momentum of the last step."""
        return self.momenta[-1]


@dataclass(frozen=True)
class DirectionRow:
    """Record one method on the layers of one shape and stride: an entry of ``directions`` in the JSON.

    Attributes
    ----------
    label : str
    count : int
        Layers that were measured.
    change : float
        Length of the momentum's change from the step before, in units of the momentum's length: mean over the layers.
    method : str
    share, least : float
        Inner product with the momentum over a proved upper bound of the optimum: the mean over the layers, and the
        least.
    seconds : float
        Mean processor time of a call, certificates and bounds included.
    """

    label: str
    count: int
    change: float
    method: str
    share: float
    least: float
    seconds: float


@dataclass(frozen=True)
class StepRow:
    """Record the steps of one optimizer: an entry of ``steps`` in the JSON.

    Attributes
    ----------
    optimizer : str
    seconds, own_seconds : float
        Time of a step of training, and of the optimizer in it: medians.
    to_plain, to_flattened : float
        The time of a step over that of stochastic gradient descent, and over that of the flattened Muon, in the same
        turn: medians.
    times : list of float
    """

    optimizer: str
    seconds: float
    own_seconds: float
    to_plain: float
    to_flattened: float
    times: list[float]


def record(setup: SteepestSetup) -> list[Recorded]:
    """Train with stochastic gradient descent, and return Nesterov's momenta of the recorded steps."""
    model, batches = start(setup.training)
    layers = conv_layers(model)
    weights = [layer.module.weight for layer in layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    buffers = [torch.zeros_like(weight) for weight in weights]
    found: list[list[Tensor]] = []
    for step in range(setup.recorded):
        images, labels = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for buffer, gradient in zip(buffers, gradients, strict=True):
            buffer.lerp_(gradient, 1 - MOMENTUM)
        found.append([gradient.lerp(buffer, MOMENTUM) for buffer, gradient in zip(buffers, gradients, strict=True)])
        optimizer.step()
    return [
        Recorded(layer.name, lattice(geometry(layer)), tuple(momenta))
        for layer, *momenta in zip(layers, *found, strict=True)
    ]


def direction_rows(recorded: list[Recorded], setup: SteepestSetup) -> list[DirectionRow]:
    """Measure every method on the layers of each shape and stride."""
    groups: dict[str, list[Recorded]] = {}
    for one in recorded:
        groups.setdefault(_label(one), []).append(one)
    rows = []
    for label, members in groups.items():
        found: dict[str, list[tuple[float, float]]] = {}
        chosen = members[: setup.layers]
        for one in chosen:
            for method, pair in _measure(one, setup).items():
                found.setdefault(method, []).append(pair)
        change = statistics.mean(float((one.after - one.before).norm() / one.after.norm()) for one in chosen)
        for method, pairs in found.items():
            shares = [share for share, _ in pairs]
            seconds = statistics.mean(seconds for _, seconds in pairs)
            rows.append(DirectionRow(label, len(chosen), change, method, statistics.mean(shares), min(shares), seconds))
    return rows


def _measure(one: Recorded, setup: SteepestSetup) -> dict[str, tuple[float, float]]:
    """Return the share of the optimum and the processor time of each method on one layer."""
    extents = tuple(setup.extent * stride for stride in one.conv.strides)

    def search(gradient: Tensor, **options: Any) -> tuple[convsv.SteepestDirection, float]:
        began = time.process_time()
        found = convsv.steepest_direction(gradient, extents, one.conv, **options)
        return found, time.process_time() - began

    # The first call for a shape plans its frequencies and loads libraries, which no method should pay for.
    search(one.after, rtol=1e-9, max_iterations=1)
    results = {"flat": search(one.after, method="flat"), "polar": search(one.after, method="polar")}
    for count in setup.counts:
        results[f"exact, {count} iterations"] = search(one.after, rtol=1e-9, max_iterations=count)
    results["exact, to 0.99"] = search(one.after)
    before, _ = search(one.before)
    for count in setup.warm:
        results[f"exact, warm, {count} iterations"] = search(
            one.after, rtol=1e-9, max_iterations=count, state=before.state
        )
    for count in setup.chained:
        found, _ = search(one.momenta[0], max_iterations=COLD_ITERATIONS)
        for momentum in one.momenta[1:]:
            found, seconds = search(momentum, rtol=1e-9, max_iterations=count, state=found.state)
        results[f"exact, every step, {count} iterations"] = found, seconds
    upper = min(float(found.upper) for found, _ in results.values())
    return {name: (float(found.alignment) / upper, seconds) for name, (found, seconds) in results.items()}


def step_rows(setup: SteepestSetup) -> list[StepRow]:
    """Time the steps of each optimizer, a step of each in turn."""
    network, batches = start(setup.training)
    models = {name: copy.deepcopy(network) for name in OPTIMIZERS}
    optimizers = {name: make(models[name]) for name, make in OPTIMIZERS.items()}
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    own: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for turn in range(setup.settle + setup.turns):
        images, labels = batches[turn % len(batches)]
        for name in in_turns(OPTIMIZERS, turn):
            began = time.perf_counter()
            loss = F.cross_entropy(models[name](images), labels)
            models[name].zero_grad()
            loss.backward()
            stepped = time.perf_counter()
            for one in optimizers[name]:
                one.step()
            ended = time.perf_counter()
            if turn >= setup.settle:
                times[name].append(ended - began)
                own[name].append(ended - stepped)
    return [
        StepRow(
            name,
            statistics.median(times[name]),
            statistics.median(own[name]),
            *(
                statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
                for base in (PLAIN, FLATTENED)
            ),
            times[name],
        )
        for name in OPTIMIZERS
    ]


def _label(one: Recorded) -> str:
    outputs, inputs, *taps = one.after.shape
    stride = max(one.conv.strides)
    return f"{'x'.join(map(str, taps))} {inputs}->{outputs}" + (f" s{stride}" if stride > 1 else "")
