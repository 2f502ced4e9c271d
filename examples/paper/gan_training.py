"""A Wasserstein GAN of small images, with a critic bounded by the step hook or by spectral normalisation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from convsv_adapters.torch import project_after_step
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from convsv_core.training import ProjectionMethod

if TYPE_CHECKING:
    from examples.paper.data import Images

__all__ = ["Gan", "GanRecipe", "Generator", "make_critic", "train_gan"]

SLOPE = 0.2
"""The slope of the critic's activations for negative numbers, as Radford, Metz and Chintala chose it for DCGAN."""

BETAS = (0.0, 0.9)
"""Decay rates of Adam's moments, as Gulrajani et al. chose them for Wasserstein GANs."""


@dataclass(frozen=True)
class GanRecipe:
    """The two networks to train, and the way to train them.

    Attributes
    ----------
    width : int
        Channels of the critic's first convolution. The other two, and the generator's first map, have twice as many.
    latents : int
        Length of the vectors from which images are generated.
    epochs, batch : int
        An epoch shows the critic every training image once. Only whole batches are used.
    critic_steps : int
        Steps of the critic for one of the generator.
    learning_rate : float
        Adam's, for both networks.
    spectral_norm : bool
        Whether `torch.nn.utils.parametrizations.spectral_norm` is on every layer of the critic, in its default form.
    network_bound : float or None
        The bound of the critic's Lipschitz constant, as for `project_after_step`.
    method, max_iterations
        As for `project_after_step`.
    seed : int
        The seed of the initial weights, of the order of the images and of the latents.

    The learning rate and the critic's steps are the best of four pairs (rates of 0.001 and 0.003, 1 and 3 steps) by the
    energy distance after 48 epochs, as a mean of spectral normalisation and the hook, for one seed that no result uses.
    The other defaults are guesses.
    """

    width: int = 8
    latents: int = 16
    epochs: int = 48
    batch: int = 64
    critic_steps: int = 1
    learning_rate: float = 1e-3
    spectral_norm: bool = False
    network_bound: float | None = None
    method: ProjectionMethod = "rescale"
    max_iterations: int = 10
    seed: int = 0


class Generator(nn.Module):
    """A map from latents to images: float32 (n, latents) to (n, channels, side, side) in [0, 1]; the side is even."""

    def __init__(self, recipe: GanRecipe, channels: int, side: int) -> None:
        super().__init__()
        self.latents = recipe.latents
        self.layers = nn.Sequential(
            nn.Linear(recipe.latents, 2 * recipe.width * (side // 2) ** 2),
            nn.ReLU(),
            nn.Unflatten(1, (2 * recipe.width, side // 2, side // 2)),
            nn.ConvTranspose2d(2 * recipe.width, recipe.width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(recipe.width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Return one image a vector."""
        images: Tensor = self.layers(latents)
        return images

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """Return `count` images of normal latents."""
        return self(torch.randn(count, self.latents, generator=random))


@dataclass(frozen=True)
class Gan:
    """The two networks, as they are after some steps of training.

    Attributes
    ----------
    generator : Generator
    critic : torch.nn.Module
        It returns one number an image: (n, channels, side, side) to (n, 1).
    steps : int
        The critic's steps so far.
    seconds : float
        Processor time of all steps and projections so far.
    """

    generator: Generator
    critic: nn.Module
    steps: int = 0
    seconds: float = 0.0


def make_critic(recipe: GanRecipe, channels: int, side: int) -> nn.Sequential:
    """Return a critic of three convolutions and a linear layer, without normalisation; the side is even."""
    width = recipe.width
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Flatten(),
        nn.Linear(2 * width * (side // 2) ** 2, 1),
    )


def train_gan(images: Images, recipe: GanRecipe, watch: Callable[[Gan], None], watches: int) -> Gan:
    """Train a generator and a critic with the loss of Wasserstein GANs: the difference of the critic's means.

    The critic's bound holds from before the first step. Runs that differ in the bound alone begin with the same
    weights, and see the same batches and latents.

    Parameters
    ----------
    images : Images
        The generator and the critic are trained on the training part; labels are not used.
    recipe : GanRecipe
    watch : callable
        A function that is called at the beginning, at equal distances and at the end. It must leave the networks as
        they are. They are in training mode.
    watches : int
        The number of equal distances.

    Source: Arjovsky, Chintala and Bottou, *Wasserstein Generative Adversarial Networks*, ICML 2017.
    """
    torch.manual_seed(recipe.seed)
    real, (channels, side) = images.train_images, images.train_images.shape[1:3]
    generator, critic = Generator(recipe, channels, side), make_critic(recipe, channels, side)
    if recipe.spectral_norm:
        for layer in critic:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                spectral_norm(layer)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=recipe.learning_rate, betas=BETAS) for network in (generator, critic)
    ]
    if recipe.network_bound is not None:
        projection = project_after_step(
            optimizers[1],
            critic,
            network_bound=recipe.network_bound,
            example_input=real[:1],
            method=recipe.method,
            max_iterations=recipe.max_iterations,
        )
        projection.project()
    # Spectral normalisation draws vectors of its own from PyTorch's default generator.
    random = torch.Generator().manual_seed(recipe.seed)
    batches = len(real) // recipe.batch
    total, steps, seconds = recipe.epochs * batches, 0, 0.0
    marks = {round(total * number / watches) for number in range(1, watches + 1)}
    watch(Gan(generator, critic))
    for _ in range(recipe.epochs):
        order = torch.randperm(len(real), generator=random)
        for rows in order[: batches * recipe.batch].split(recipe.batch):
            began = time.process_time()
            with torch.no_grad():
                generated = generator.sample(len(rows), random)
            _descend(optimizers[1], critic(generated).mean() - critic(real[rows]).mean())
            steps += 1
            if steps % recipe.critic_steps == 0:
                _descend(optimizers[0], -critic(generator.sample(len(rows), random)).mean())
            seconds += time.process_time() - began
            if steps in marks:
                watch(Gan(generator, critic, steps, seconds))
    return Gan(generator, critic, steps, seconds)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
