"""One training run with PyTorch, with or without a bound on the operator norms, and the tests of its result."""

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
"""Constants of the optimizer, as He et al. chose them for CIFAR-10."""

EVALUATED = 1000
"""Test images in a batch. A guess."""


@dataclass(frozen=True)
class Recipe:
    """The network to train, and the way to train it.

    Attributes
    ----------
    widths, blocks, batch_norm
        Arguments of `ResNet`.
    epochs, batch : int
    learning_rate : float
        The rate at the first step; it falls to zero along a cosine.
    bound : float or None
        The bound of each layer's operator norm, of its circular convolution as in the paper; None for no bound.
    every : int
        Steps from one projection to the next. A projection always follows the last step.
    method : str
        As for `convsv_core.project`; "dykstra" finds the nearest kernel.
    everywhere : bool
        Whether the bound is also one of the linear layer, and of each convolution together with the batch normalisation
        behind it, with its own padding.
    network_bound : float or None
        The bound of the Lipschitz constant of the whole network, in place of `bound`, by `everywhere`'s layers.
    logit_scale : float
        The loss takes the logits times this number. A bounded network cannot enlarge them by itself.
    seed : int
        The seed of the initial weights and of the order of the images.
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
    everywhere: bool = False
    network_bound: float | None = None
    logit_scale: float = 1.0
    seed: int = 0

    @property
    def layers_alone(self) -> bool:
        """Whether the bound is one of the convolutions alone, or there is none."""
        return self.network_bound is None and not (self.everywhere and self.bound is not None)


@dataclass(frozen=True)
class Trained:
    """A trained network, in evaluation mode.

    Attributes
    ----------
    model : ResNet
    layers : list of ConvLayer
        The convolutions of the model, with the extents of their inputs.
    steps : int
        The steps taken. The training ends early when the loss is infinite or NaN.
    diverged : bool
    seconds, projection_seconds : float
        Processor time of all steps without the projections, and of the projections. Unlike the time on the clock,
        it leaves out other programs.
    """

    model: ResNet
    layers: list[ConvLayer]
    steps: int
    diverged: bool
    seconds: float
    projection_seconds: float


Watch = Callable[[int, Sequence[ConvLayer]], None]


def make_model(images: Images, recipe: Recipe) -> ResNet:
    """Return the network with random weights from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    channels = images.train_images.shape[1]
    return ResNet(recipe.widths, recipe.blocks, channels=channels, batch_norm=recipe.batch_norm)


def train(images: Images, recipe: Recipe, watch: Watch | None = None) -> Trained:
    """Train a network by stochastic gradient descent with momentum.

    After the last projection, the moments of batch normalisation are computed again over the training images, because
    those gathered during training belong to earlier weights. With these, the test error was 69 % where projections to
    a bound of 0.5 came every 50 steps.

    Parameters
    ----------
    images : Images
    recipe : Recipe
    watch : callable, optional
        A function that is called after each step of the optimizer, before a projection, with the number of the step
        and the layers.
    """
    model = make_model(images, recipe)
    layers = conv_layers(model, images.train_images[:1])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    # Only whole batches are used: a small one would spoil the moments of batch normalisation.
    batches = len(images.train_images) // recipe.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * batches)
    # `project_after_step` would do the same, but inside the optimizer's step, where its time cannot be measured.
    projection = _projection(model, images, layers, recipe)
    steps, seconds, projection_seconds = 0, 0.0, 0.0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images.train_images))
        for rows in order[: batches * recipe.batch].split(recipe.batch):
            began = time.process_time()
            logits = recipe.logit_scale * model(images.train_images[rows])
            loss = F.cross_entropy(logits, images.train_labels[rows])
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
    if projection is not None and not recipe.layers_alone:
        projection.project()  # the new moments change the scale of batch normalisation
    return Trained(model.eval(), layers, steps, False, seconds, projection_seconds)


def _projection(model: ResNet, images: Images, layers: list[ConvLayer], recipe: Recipe) -> StepProjection | None:
    """Return the projection of a recipe, or None without a bound."""
    if recipe.layers_alone:
        if recipe.bound is None:
            return None
        options = {"method": recipe.method, "headroom": 0.0, "circular": True, "layers": layers}
        return StepProjection(model, recipe.bound, recipe.every, **options)
    options = {"method": recipe.method, "example_input": images.train_images[:1]}
    if recipe.network_bound is None:
        options |= {"bound": recipe.bound, "linear": True, "batch_norm": "fold"}
    else:
        options |= {"network_bound": recipe.network_bound}
    return StepProjection(model, every=recipe.every, **options)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of the images that get the right label; an image with a logit that is not finite does not."""
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in images.split(EVALUATED)])
    right = (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)
    return float(right.double().mean())


def attacked(model: nn.Module, images: Tensor, labels: Tensor, size: float) -> Tensor:
    """Return the images after an attack: each pixel moves by `size`, within [0, 1], in the direction of larger loss.

    Source: Goodfellow, Shlens and Szegedy, *Explaining and Harnessing Adversarial Examples*, ICLR 2015.
    """
    moved = []
    for part, some in zip(images.split(EVALUATED), labels.split(EVALUATED), strict=True):
        part = part.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(part), some), part)
        moved.append((part.detach() + size * gradient.sign()).clamp(0, 1))
    return torch.cat(moved)


def circular_conv(layer: ConvLayer) -> Conv:
    """Return the circular convolution of a layer, which is the paper's operator."""
    return Conv("OIHW", stride=layer.conv.stride, dilation=layer.conv.dilation, groups=layer.conv.groups)


def circular_norms(layers: Sequence[ConvLayer]) -> list[float]:
    """Return the operator norm of each layer's circular convolution at its own extents."""
    return [float(operator_norm(layer.weight.detach(), layer.input_shape, circular_conv(layer))) for layer in layers]
