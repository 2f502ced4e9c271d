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
from benchmarks.tables import duration
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

METHODS = (PLAIN, SPECTRAL_NORM, PARAMETRIZATION, PENALTY, PROJECT, PAPER_CLIP)
"""Methods in the order in which they are measured: those that may take longest come last."""

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
        reserve = clock.left() * (1 - 1 / (len(amount.networks) - place))
        yield from _measure(library, network, amount, clock, reserve)


def _measure(library: Library, network: Network, amount: Amount, clock: Clock, reserve: float) -> Iterator[StepRow]:
    """Yield the rows of one network, and leave `reserve` seconds of the section, about.

    A method takes its steps in turns with plain ones and has an equal part of the time that is left, so that its row
    is there before the next method begins.
    """
    if not clock.begins(network.name, reserve):
        return
    known = make_methods(SETUPS[Size.TINY])  # the set-up only says how often other methods project
    names = [name for name in METHODS if network.paper_clip or name != PAPER_CLIP]
    model = make_network(network).to(library.device)
    batches = make_batches(network.batch, network.extent, library.device)
    plain = Training(model, batches, known[PLAIN], BOUND)
    for place, method in enumerate(names):
        name = f"{network.name} {method}"
        if not clock.begins(name, reserve):
            continue
        until = clock.left() - (clock.left() - reserve) / (len(names) - place)
        try:
            one = plain if method == PLAIN else Training(model, batches, known[method], BOUND)
            first = one.step().seconds
            times = _steps({PLAIN: plain, method: one}, method, first, amount, clock, until)
            if times[method]:
                norm = _norm(method, one, clock, until)
                yield _row(library, network, method, first, times[method], times[PLAIN], norm)
            else:
                clock.left_out.append(f"{name} after a first step of {duration(first)}")
        except Exception as error:  # a library may raise anything on a device, and the other methods go on
            clock.fail(name, error)


def _steps(
    trainings: dict[str, Training], method: str, first: float, amount: Amount, clock: Clock, until: float
) -> dict[str, list[float]]:
    """Return the times of steps of each training, in turns, while more than `until` seconds of the section are left.

    There is one turn at least, unless the section has no time for a step like the last one of `method`.
    """
    last = first
    for _ in range(amount.settle):
        if clock.left() - last > until:
            last = trainings[method].step().seconds
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for turn in range(amount.turns):
        if clock.left() - last < (until if turn else 0.0):
            break
        for name in in_turns(trainings, turn):
            times[name].append(trainings[name].step().seconds)
    return times


def _norm(method: str, training: Training, clock: Clock, until: float) -> float | None:
    """Return the certified norm over the bound of a method that promises one, where its time suffices."""
    if method not in CERTIFIED:
        return None
    norms = []
    for layer in training.layers:
        if clock.left() <= until:
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
        plain_times=plain,
    )
