"""One training run with PyTorch, with a bound on the operator norms or without; and how well it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from convsv_adapters.torch import ConvLayer, StepProjection, conv_layers
from torch import Tensor, nn
from torch.nn import functional as F

from convsv_core import Conv, operator_norm
from examples.paper.resnet import ResNet

if TYPE_CHECKING:
    from examples.paper.data import Images

__all__ = ["Recipe", "Trained", "accuracy", "attacked", "circular_conv", "circular_norms", "make_model", "train"]

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
EVALUATED = 1000
"""Test images that go through the network together."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes
    ----------
    widths, blocks, batch_norm
        Of the `ResNet`.
    epochs, batch : int
    learning_rate : float
        At the beginning; it falls to zero along a cosine.
    bound : float or None
        Of the norm of each layer's circular convolution, the paper's operator; None for no bound.
    every : int
        Steps from one projection to the next. The last step is always followed by one.
    method : str
        As for `convsv_core.project`: to the nearest kernel, unless it is another.
    seed : int
        Of the initial weights and the order of the images.
    """

    widths: tuple[int, ...] = (8, 16, 32)
    blocks: int = 1
    batch_norm: bool = True
    epochs: int = 12
    batch: int = 64
    learning_rate: float = 0.1
    bound: float | None = None
    every: int = 1
    method: str = "dykstra"
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A trained network, in evaluation mode.

    Attributes
    ----------
    model : ResNet
    layers : list of ConvLayer
        Its convolutions, with the extents that the images have there.
    steps : int
        Fewer than asked for where the loss became infinite or NaN, which ends the training.
    diverged : bool
    seconds, projection_seconds : float
        Of the process, not of the clock, so that other programs do not count: the steps without the projections, and
        those.
    """

    model: ResNet
    layers: list[ConvLayer]
    steps: int
    diverged: bool
    seconds: float
    projection_seconds: float


Watch = Callable[[int, Sequence[ConvLayer]], None]


def make_model(images: Images, recipe: Recipe) -> ResNet:
    """The network with the random weights of the recipe's seed."""
    torch.manual_seed(recipe.seed)
    channels = images.train_images.shape[1]
    return ResNet(recipe.widths, recipe.blocks, channels=channels, batch_norm=recipe.batch_norm)


def train(images: Images, recipe: Recipe, watch: Watch | None = None) -> Trained:
    """Train a network by stochastic gradient descent with momentum.

    The moments of batch normalisation are then taken anew, over the training images: those it kept are of the weights
    before the last projection.

    Parameters
    ----------
    images : Images
    recipe : Recipe
    watch : callable, optional
        Called with the number of the step and the layers after each step of the optimizer, before the weights are
        projected.
    """
    model = make_model(images, recipe)
    layers = conv_layers(model, images.train_images[:1])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    batches = (
        len(images.train_images) // recipe.batch
    )  # whole ones: batch normalisation would keep a small one's moments
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * batches)
    # What project_after_step(optimizer, model, ...) does, here apart from the optimizer so that its time can be told.
    projection = None
    if recipe.bound is not None:
        options = {"method": recipe.method, "headroom": 0.0, "circular": True, "layers": layers}
        projection = StepProjection(model, recipe.bound, recipe.every, **options)
    steps, seconds, projection_seconds = 0, 0.0, 0.0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images.train_images))
        for rows in order[: batches * recipe.batch].split(recipe.batch):
            began = time.process_time()
            loss = F.cross_entropy(model(images.train_images[rows]), images.train_labels[rows])
            if not torch.isfinite(loss):
                return Trained(model.eval(), layers, steps, True, seconds, projection_seconds)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds += time.process_time() - began
            steps += 1
            if watch is not None:
                watch(steps, layers)
            if projection is not None:
                began = time.process_time()
                if not projection.step() and steps == recipe.epochs * batches:
                    projection.project()
                projection_seconds += time.process_time() - began
    torch.optim.swa_utils.update_bn(images.train_images.split(recipe.batch), model)
    return Trained(model.eval(), layers, steps, False, seconds, projection_seconds)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the network gives their label; none where its logits are not finite."""
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in images.split(EVALUATED)])
    right = (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)
    return float(right.double().mean())


def attacked(model: nn.Module, images: Tensor, labels: Tensor, size: float) -> Tensor:
    """Images each pixel of which has moved by `size`, within [0, 1], to where the loss grows.

    Source: Goodfellow, Shlens and Szegedy, *Explaining and Harnessing Adversarial Examples*, ICLR 2015.
    """
    moved = []
    for part, some in zip(images.split(EVALUATED), labels.split(EVALUATED), strict=True):
        part = part.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(part), some), part)
        moved.append((part.detach() + size * gradient.sign()).clamp(0, 1))
    return torch.cat(moved)


def circular_conv(layer: ConvLayer) -> Conv:
    """The paper's operator of a layer: its circular convolution."""
    return Conv("OIHW", stride=layer.conv.stride, dilation=layer.conv.dilation, groups=layer.conv.groups)


def circular_norms(layers: Sequence[ConvLayer]) -> list[float]:
    """Norm of each layer's circular convolution at its own extents."""
    return [float(operator_norm(layer.weight.detach(), layer.input_shape, circular_conv(layer))) for layer in layers]
