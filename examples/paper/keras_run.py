"""The training of `examples.paper.frameworks` in Keras, on the backend that KERAS_BACKEND names."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import keras
import numpy as np
from convsv_adapters.keras import OperatorNorm
from keras import layers, ops

from examples.paper.training import MOMENTUM

__all__ = ["run"]

if TYPE_CHECKING:
    from examples.paper.frameworks import Problem

CHANNELS_LAST = (2, 3, 1, 0)
"""The transposition of a kernel from PyTorch's layout, OIHW, to Keras's, HWIO."""


def run(problem: Problem) -> dict[str, np.ndarray]:
    """Train, and return each convolution's kernel (OIHW) by its name."""
    recipe = problem.recipe
    images = np.ascontiguousarray(np.moveaxis(problem.images, 1, -1))
    model = _model(problem, images.shape[1:])
    model.compile(
        keras.optimizers.SGD(recipe.learning_rate, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    for batch in problem.batches:
        model.train_on_batch(images[batch], problem.labels[batch])
    return {
        layer.name: np.transpose(_layer(model, layer.name).get_weights()[0], (3, 2, 0, 1)) for layer in problem.layers
    }


def _model(problem: Problem, shape: tuple[int, ...]) -> keras.Model:
    """Return `examples.paper.resnet.ResNet` without batch normalisation, with the problem's initial weights."""
    widths = problem.recipe.widths
    image = keras.Input(shape)
    extents = {layer.name: layer.extents for layer in problem.layers}

    def conv(name: str, outputs: int, stride: int) -> keras.Layer:
        """Return a convolution with one pixel of zeros on each side.

        Keras's "same" would put both pixels on one side where there is a stride. The padded input is larger than the
        input whose circular operator is bounded, so the constraint is given the extents of the latter.
        """
        bound, method = problem.recipe.bound, problem.recipe.method
        constraint = bound and OperatorNorm(bound, method, strides=stride, input_shape=extents[name])
        layer = layers.Conv2D(outputs, 3, strides=stride, name=_keras_name(name), kernel_constraint=constraint)
        return keras.Sequential([layers.ZeroPadding2D(1), layer], name=f"padded_{_keras_name(name)}")

    x = ops.relu(conv("stem", widths[0], 1)(image))
    blocks = itertools.count()
    for stage, (inputs, outputs) in enumerate(itertools.pairwise([widths[0], *widths])):
        for place in range(problem.recipe.blocks):
            name, stride = f"blocks.{next(blocks)}", 2 if stage and place == 0 else 1
            y = conv(f"{name}.second", outputs, 1)(ops.relu(conv(f"{name}.first", outputs, stride)(x)))
            added = outputs - inputs if place == 0 else 0
            shortcut = ops.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, added)))
            x = ops.relu(shortcut + y)
    x = layers.Dense(10, name="head")(ops.mean(x, axis=(1, 2)))
    model = keras.Model(image, x)
    for layer in problem.layers:
        kernel, bias = (problem.weights[f"{layer.name}.{name}"] for name in ("weight", "bias"))
        _layer(model, layer.name).set_weights([np.transpose(kernel, CHANNELS_LAST), bias])
    model.get_layer("head").set_weights([problem.weights["head.weight"].T, problem.weights["head.bias"]])
    return model


def _layer(model: keras.Model, name: str) -> keras.Layer:
    return model.get_layer(f"padded_{_keras_name(name)}").get_layer(_keras_name(name))


def _keras_name(name: str) -> str:
    return name.replace(".", "_")
