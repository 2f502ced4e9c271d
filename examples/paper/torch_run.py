"""The training of `examples.paper.frameworks` in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from convsv_adapters.torch import conv_layers, project_after_step
from torch.nn import functional as F

from examples.paper.resnet import ResNet
from examples.paper.training import MOMENTUM

__all__ = ["run"]

if TYPE_CHECKING:
    from examples.paper.frameworks import Problem


def run(problem: Problem) -> dict[str, np.ndarray]:
    """Train, and return each convolution's kernel (OIHW) by its name."""
    recipe = problem.recipe
    images, labels = torch.from_numpy(problem.images), torch.from_numpy(problem.labels)
    model = ResNet(recipe.widths, recipe.blocks, channels=images.shape[1], batch_norm=False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in problem.weights.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=MOMENTUM)
    if recipe.bound is not None:
        options = {"method": recipe.method, "headroom": 0.0, "circular": True, "example_input": images[:1]}
        project_after_step(optimizer, model, recipe.bound, **options)
    for batch in problem.batches:
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {layer.name: layer.weight.detach().numpy() for layer in conv_layers(model)}
