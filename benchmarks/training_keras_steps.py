"""Train copies of one network with Keras, and write the time of their steps as JSON.

The parent is `benchmarks.training_keras`, which names the backend of Keras in the environment of this process.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import keras
import numpy as np
from convsv_adapters.keras import constrain

from benchmarks.command import Size, progress
from benchmarks.timing import in_turns
from benchmarks.training_jax import BOUND, PLAIN, SETUPS, Row, Setup, make_row

__all__ = ["Training", "make_models", "measure"]


class Training:
    """Train one model on one batch by Keras's own trainer, and take the times of its steps."""

    def __init__(self, model: keras.Model, images: np.ndarray, labels: np.ndarray) -> None:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05, 0.9), loss)
        self.model, self._batch = model, (images, labels)
        self.times: list[float] = []
        self.first_seconds = self._timed()

    @property
    def compile_seconds(self) -> float:
        """Return how much longer the first step took than the median of the measured ones."""
        return self.first_seconds - statistics.median(self.times)

    def step(self) -> None:
        """Take one step and its time."""
        self.times.append(self._timed())

    def kernels(self) -> list[np.ndarray]:
        """Return the kernel of every convolution as the next forward pass uses it, in the layout HWIO."""
        self.model(self._batch[0][:1], training=True)  # SpectralNormalization divides the kernels here.
        return [np.asarray(weight.numpy()) for weight in self.model.trainable_variables if len(weight.shape) == 4]

    def _timed(self) -> float:
        started = time.perf_counter()
        self.model.train_on_batch(*self._batch)  # It returns the loss as a number, so that the step is over.
        return time.perf_counter() - started


def make_models(setup: Setup) -> dict[str, keras.Model]:
    """Return a model for each method, all with the same weights."""
    extents = (setup.extent, setup.extent)
    models = {
        PLAIN: _network(setup, lambda layer: layer),
        "constrain, circular": _network(setup, lambda layer: layer),
        "constrain, every size": _network(setup, lambda layer: layer),
        "SpectralNormalization": _network(setup, keras.layers.SpectralNormalization),
    }
    constrain(models["constrain, circular"], BOUND, circular=True, example_input=(1, *extents, setup.channels[0]))
    constrain(models["constrain, every size"], BOUND)
    return models


def _network(setup: Setup, wrap: Callable[[keras.layers.Layer], keras.layers.Layer]) -> keras.Model:
    """Return a classifier with random weights of He's variance, which depend on the place of a layer alone."""
    layers = [keras.Input((setup.extent, setup.extent, setup.channels[0]))]
    for seed, channels in enumerate(setup.channels[1:]):
        start = keras.initializers.HeNormal(seed)
        layers.append(
            wrap(keras.layers.Conv2D(channels, 3, padding="same", activation="relu", kernel_initializer=start))
        )
    start = keras.initializers.HeNormal(len(layers))
    return keras.Sequential(
        [*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, kernel_initializer=start)]
    )


def measure(setup: Setup, tell: Callable[[str], None]) -> list[Row]:
    """Take the first step of every method, and then the times of further steps in turns."""
    rng = np.random.default_rng(0)
    extents = (setup.extent, setup.extent)
    images = rng.normal(size=(setup.batch, *extents, setup.channels[0])).astype(np.float32)
    labels = rng.integers(0, 10, setup.batch)
    trained = {}
    for name, model in make_models(setup).items():
        tell(f"{keras.backend.backend()}: first step, {name}")
        trained[name] = Training(model, images, labels)
    for turn in range(setup.turns):
        tell(f"{keras.backend.backend()}: turn {turn + 1} of {setup.turns}")
        for name in in_turns(trained, turn):
            if sum(trained[name].times) < setup.limit:
                trained[name].step()
    plain = trained[PLAIN]
    return [make_row(name, one, plain, one.kernels(), extents) for name, one in trained.items()]


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr), progress() as tell:  # what Keras prints must not stand in the answer
        rows = measure(SETUPS[Size(sys.argv[1])], tell)
    print(json.dumps(rows, default=asdict))
