"""Train ResNet-32 and ResNet-50 with PyTorch on one device, under every way to bound the norms, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.accelerator_setup import Amount, Clock, Network, StepRow
from benchmarks.command import Size
from benchmarks.libraries import Library
from benchmarks.timing import in_turns
from benchmarks.training_setup import SETUPS
from benchmarks.training_steps import (
    PAPER_CLIP,
    PARAMETRIZATION,
    PENALTY,
    PLAIN,
    PROJECT,
    SPECTRAL_NORM,
    Training,
    certified_norms,
    make_batches,
    make_methods,
)
from examples.paper.resnet import BottleneckResNet, ResNet

__all__ = ["make_network", "measure_training"]

BOUND = 1.0
"""Bound of the norms in the paper."""

METHODS = (PLAIN, PROJECT, PARAMETRIZATION, PENALTY, SPECTRAL_NORM, PAPER_CLIP)

CERTIFIED = (PROJECT, PARAMETRIZATION)
"""Methods that promise a norm within the bound for every input size."""


def make_network(network: Network) -> nn.Module:
    """Return a network with random weights, the same in every run."""
    torch.manual_seed(0)
    if isinstance(network.blocks, int):
        return ResNet(network.widths, network.blocks)
    return BottleneckResNet(network.widths, network.blocks)


def measure_training(library: Library, amount: Amount, clock: Clock) -> Iterator[StepRow]:
    """Yield the rows of every network; a network has an equal part of the time that is left."""
    for place, network in enumerate(amount.networks):
        end = clock.left() * (1 - 1 / (len(amount.networks) - place))
        yield from _measure(library, network, amount, clock, end)


def _measure(library: Library, network: Network, amount: Amount, clock: Clock, end: float) -> list[StepRow]:
    """Return the rows of one network; it leaves `end` seconds of the section, about."""
    if not clock.begins(network.name):
        return []
    known = make_methods(SETUPS[Size.TINY])  # the set-up only says how often other methods project
    trainings: dict[str, Training] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    model = make_network(network).to(library.device)
    batches = make_batches(network.batch, network.extent, library.device)
    for method in METHODS:
        name = f"{network.name} {method}"
        if method == PAPER_CLIP and not network.paper_clip:
            continue
        if not clock.begins(name, end):
            continue
        try:
            one = Training(model, batches, known[method], BOUND)
            first[method] = last[method] = one.step().seconds
            for _ in range(amount.settle):
                if clock.left() - end > last[method]:
                    last[method] = one.step().seconds
            trainings[method], times[method] = one, []
        except Exception as error:  # a library may raise anything on a device, and the other methods go on
            clock.fail(name, error)
    for turn in range(amount.turns):
        if clock.left() - end < sum(last[method] for method in trainings):
            break
        for method in in_turns(trainings, turn):
            times[method].append(trainings[method].step().seconds)
    plain = times.get(PLAIN)
    if not plain:
        clock.left_out.append(f"{network.name}, measured steps")
        return []
    return [
        _row(library, network, method, first[method], times[method], plain, _norm(method, one, clock))
        for method, one in trainings.items()
    ]


def _norm(method: str, training: Training, clock: Clock) -> float | None:
    """Return the certified norm over the bound of a method that promises one, where there is time."""
    if method not in CERTIFIED:
        return None
    norms = []
    for layer in training.layers:
        if clock.left() <= 0:
            return None
        norms += certified_norms([layer])
    return max(norms) / BOUND


def _row(
    library: Library,
    network: Network,
    method: str,
    first: float,
    times: list[float],
    plain: list[float],
    norm: float | None,
) -> StepRow:
    added: Any = np.asarray(times) / np.asarray(plain) - 1
    low, high = np.percentile(added, [25, 75])
    return StepRow(
        library=library.name,
        network=network.name,
        method=method,
        bound=BOUND,
        first_seconds=first,
        seconds=statistics.median(times),
        overhead=float(np.median(added)),
        quartiles=(float(low), float(high)),
        norm=norm,
        times=times,
    )
