"""Train a residual network under SGD, AdamW and Muon, with four ways to take Muon's step for a convolution.

``python -m examples.muon`` trains on scikit-learn's digits, in minutes on one processor. With ``--cifar10 FOLDER`` it
trains on CIFAR-10. Each optimizer gets the same number of learning rates, and the same training to choose one of them
by, which uses a seed of its own. The best rate is then used with every seed. `examples/muon.md` says what came out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import torch
from convsv_adapters.torch import ConvMuon
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from examples.paper.data import Images, load
from examples.paper.resnet import RESNET_32, ResNet
from examples.paper.results import experiment_options, mean_and_deviation, write

__all__ = ["OPTIMIZERS", "Curve", "draw", "flattened_muon", "muon", "train"]

Optimizers: TypeAlias = list[torch.optim.Optimizer]

BATCH = 64
EPOCHS = 8
DIGITS = {"widths": (16, 32), "blocks": 1}
TINY = {"widths": (4, 4), "blocks": 1}
"""Arguments of the network for the digits, and for a try. Guesses, for a training of seconds."""

ADAMW_RATE = 3e-3
"""Learning rate of AdamW for the parameters that Muon does not move: the middle of the rates of AdamW itself."""

SEARCHED = 5
"""Learning rates that are tried for each optimizer. They are half a decade apart, about the middle one."""

SEARCH_SEED = 1000


def flattened_muon(model: nn.Module, lr: float) -> Optimizers:
    """Return torch's Muon on the flattened kernels and linear weights of a model, and AdamW for the rest."""
    weights = [one.weight for one in model.modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    flat = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]  # views of the same memory
    muon = torch.optim.Muon(flat, lr=lr, weight_decay=0.0)

    def read_gradients(*_: object) -> None:
        for view, weight in zip(flat, weights, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)

    muon.register_step_pre_hook(read_gradients)
    chosen = set(weights)
    rest = [one for one in model.parameters() if one not in chosen]
    return [muon, torch.optim.AdamW(rest, lr=ADAMW_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def _conv_muon(method: Any) -> Callable[[nn.Module, float], Optimizers]:
    return lambda model, lr: [ConvMuon(model, lr=lr, method=method, adamw_lr=ADAMW_RATE)]


@dataclass(frozen=True)
class Choice:
    """Hold a way to make an optimizer, and the middle of the learning rates that are tried."""

    make: Callable[[nn.Module, float], Optimizers]
    middle: float


OPTIMIZERS: Mapping[str, Choice] = {
    "SGD": Choice(lambda model, lr: [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)], 0.1),
    "AdamW": Choice(lambda model, lr: [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)], 3e-3),
    "Muon, flattened": Choice(flattened_muon, 0.03),
    "ConvMuon, flat": Choice(_conv_muon("flat"), 0.1),
    "ConvMuon, polar": Choice(_conv_muon("polar"), 0.1),
    "ConvMuon, exact": Choice(_conv_muon("exact"), 0.1),
}


@dataclass(frozen=True)
class Curve:
    """Record one training: an entry of ``runs`` in the JSON.

    Attributes
    ----------
    optimizer : str
    rate : float
        Learning rate of the first step. It falls linearly to 0.
    seed : int
    losses : list of float
        Mean training loss of each epoch.
    accuracy : float
        Share of the test images with the right class after the last step.
    seconds : float
        Processor time of the training.
    """

    optimizer: str
    rate: float
    seed: int
    losses: list[float]
    accuracy: float
    seconds: float


def train(name: str, rate: float, seed: int, images: Images, network: Mapping[str, Any], epochs: int) -> Curve:
    """Train a network under an optimizer of `OPTIMIZERS`."""
    torch.manual_seed(seed)
    model = ResNet(**network, channels=images.train_images.shape[1])
    optimizers = OPTIMIZERS[name].make(model, rate)
    count = len(images.train_images)
    steps = epochs * -(-count // BATCH)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 - step / steps) for one in optimizers]
    began = time.process_time()
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(count).split(BATCH):
            loss = F.cross_entropy(model(images.train_images[rows]), images.train_labels[rows])
            model.zero_grad()
            loss.backward()
            for one, schedule in zip(optimizers, schedules, strict=True):
                one.step()
                schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / count)
    seconds = time.process_time() - began
    model.eval()
    with torch.inference_mode():
        parts = [model(part).argmax(dim=1) for part in images.test_images.split(1024)]
        accuracy = float((torch.cat(parts) == images.test_labels).float().mean())
    return Curve(name, rate, seed, losses, accuracy, seconds)


def search(name: str, images: Images, network: Mapping[str, Any], epochs: int, count: int) -> list[Curve]:
    """Train with each of `count` learning rates."""
    exponents = np.arange(count) / 2 - (count - 1) / 4
    rates = [OPTIMIZERS[name].middle * 10.0**exponent for exponent in exponents]
    return [train(name, rate, SEARCH_SEED, images, network, epochs) for rate in rates]


def best_rate(curves: Sequence[Curve]) -> float:
    """Return the learning rate with the least loss in the last epoch."""
    finite = [one for one in curves if math.isfinite(one.losses[-1])]
    return min(finite, key=lambda one: one.losses[-1]).rate


def draw(runs: Sequence[Curve]) -> Figure:
    """Return the figure: the mean loss of each epoch, with a band from the least to the largest of the seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(one.optimizer for one in runs):
        losses = np.asarray([one.losses for one in runs if one.optimizer == name])
        epochs = np.arange(1, losses.shape[1] + 1)
        (line,) = axes.plot(epochs, losses.mean(axis=0), label=name)
        axes.fill_between(epochs, losses.min(axis=0), losses.max(axis=0), alpha=0.2, color=line.get_color())
    axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


@click.command()
@experiment_options
def muon(quick: bool, cifar10: Path | None, seeds: int, epochs: int | None, output: Path, threads: int) -> None:
    """Compare SGD, AdamW, Muon on flattened kernels, and steepest steps of three kinds."""
    images = load(cifar10, most=128 if quick else None)
    network = TINY if quick else DIGITS if cifar10 is None else RESNET_32
    epochs = epochs or (1 if quick else EPOCHS)
    searched: list[Curve] = []
    runs: list[Curve] = []
    for name in OPTIMIZERS:
        curves = search(name, images, network, epochs, 2 if quick else SEARCHED)
        searched += curves
        rate = best_rate(curves)
        runs += [train(name, rate, seed, images, network, epochs) for seed in range(seeds)]
        own = [one for one in runs if one.optimizer == name]
        loss = mean_and_deviation([one.losses[-1] for one in own])
        accuracy = mean_and_deviation([one.accuracy for one in own])
        seconds = mean_and_deviation([one.seconds for one in own])
        click.echo(
            f"{name:16s} rate {rate:.3g}  loss {loss[0]:.4f} +- {loss[1]:.4f}  "
            f"accuracy {accuracy[0]:.4f} +- {accuracy[1]:.4f}  {seconds[0]:.1f} s"
        )
    arguments = {"quick": quick, "cifar10": cifar10 is not None, "seeds": seeds, "epochs": epochs, "network": network}
    content = {"search": [asdict(one) for one in searched], "runs": [asdict(one) for one in runs]}
    write("muon", output, draw(runs), {**arguments, "batch": BATCH, "threads": threads}, content)


if __name__ == "__main__":
    muon(prog_name="python -m examples.muon")
