"""The training of `examples.paper.frameworks` in JAX, with equinox and optax."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from convsv_adapters.equinox import conv_layers
from convsv_adapters.optax import operator_norm_bound

from examples.paper.training import MOMENTUM

__all__ = ["run"]

if TYPE_CHECKING:
    from examples.paper.frameworks import Problem

STEPS = 10
"""Iterations of each projection, which starts from the dual variables of the previous one. A guess."""


class Block(eqx.Module):
    """A residual block of `examples.paper.resnet`, for one image."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    stride: int = eqx.field(static=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the block's output."""
        y = self.second(jax.nn.relu(self.first(x)))
        shortcut = x[:, :: self.stride, :: self.stride]
        return jax.nn.relu(y + jnp.pad(shortcut, ((0, y.shape[0] - x.shape[0]), (0, 0), (0, 0))))


class ResNet(eqx.Module):
    """`examples.paper.resnet.ResNet` without batch normalisation, for one image."""

    stem: eqx.nn.Conv2d
    blocks: list[Block]
    head: eqx.nn.Linear

    def __call__(self, image: jax.Array) -> jax.Array:
        """Return the logits."""
        x = jax.nn.relu(self.stem(image))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def run(problem: Problem) -> dict[str, np.ndarray]:
    """Train, and return each convolution's kernel (OIHW) by its name."""
    recipe = problem.recipe
    model = _model(problem)
    optimizer = optax.sgd(recipe.learning_rate, momentum=MOMENTUM)
    if recipe.bound is not None:
        layers = conv_layers(model, jax.ShapeDtypeStruct(problem.images.shape[1:], jnp.float32))
        bound = operator_norm_bound(recipe.bound, layers, method=recipe.method, steps=STEPS, circular=True)
        optimizer = optax.chain(optimizer, bound)

    @eqx.filter_jit
    def step(model: ResNet, state: optax.OptState, images: jax.Array, labels: jax.Array) -> tuple:
        def loss(model: ResNet) -> jax.Array:
            logits = jax.vmap(model)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradient = eqx.filter_grad(loss)(model)
        parameters = eqx.filter(model, eqx.is_array)
        updates, state = optimizer.update(gradient, state, parameters)
        return eqx.apply_updates(model, updates), state

    state = optimizer.init(eqx.filter(model, eqx.is_array))
    for batch in problem.batches:
        model, state = step(model, state, jnp.asarray(problem.images[batch]), jnp.asarray(problem.labels[batch]))
    return {layer.name: np.asarray(_at(model, layer.name).weight) for layer in problem.layers}


def _model(problem: Problem) -> ResNet:
    """Return the network with the problem's initial weights, whose names are paths of attributes."""
    widths = problem.recipe.widths
    key = jax.random.key(0)

    def conv(inputs: int, outputs: int, stride: int) -> eqx.nn.Conv2d:
        return eqx.nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, key=key)

    blocks = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise([widths[0], *widths])):
        for place in range(problem.recipe.blocks):
            entering = place == 0
            stride = 2 if number and entering else 1
            first = conv(inputs if entering else outputs, outputs, stride)
            blocks.append(Block(first, conv(outputs, outputs, 1), stride))
    stem = conv(problem.images.shape[1], widths[0], 1)
    model = ResNet(stem, blocks, eqx.nn.Linear(widths[-1], 10, key=key))
    for name, value in problem.weights.items():
        path, _, attribute = name.rpartition(".")

        def parameter(model: ResNet, path: str = path, attribute: str = attribute) -> jax.Array:
            return getattr(_at(model, path), attribute)

        shape = parameter(model).shape  # equinox keeps biases of convolutions as (outputs, 1, 1)
        model = eqx.tree_at(parameter, model, jnp.asarray(value.reshape(shape)))
    return model


def _at(model: ResNet, path: str) -> eqx.Module:
    """Return the part of a model that a name such as ``blocks.0.first`` stands for."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model
