"""Tests of the Keras adapter: linear layers, and batch normalisations in inference mode, within a bound."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from convsv_adapters.keras import OperatorNorm, OperatorNormProjection, constrain, conv_layers
from keras import layers as L

BOUND = 0.5
TRAINS = pytest.mark.skipif(keras.backend.backend() == "numpy", reason="Keras does not train on NumPy")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    keras.utils.set_random_seed(0)


def network() -> keras.Model:
    """Return a network with a normalisation that stands alone, and three that follow a layer."""
    inputs = keras.Input((6, 6, 2))
    x = L.BatchNormalization(name="alone")(inputs)
    x = L.BatchNormalization(name="first_norm")(L.Conv2D(3, 3, padding="same", name="first")(x))
    x = L.SeparableConv2D(4, 3, name="separable")(L.ReLU()(x))
    y = L.BatchNormalization(name="separable_norm")(x)
    x = L.Flatten()(L.Add()([x, y]))
    x = L.BatchNormalization(name="dense_norm")(L.Dense(5, name="dense")(x))
    return keras.Model(inputs, L.Dense(2, name="last")(L.Activation("tanh")(x)))


def dense_norm(model: keras.Model, *names: str) -> float:
    """Return the norm of some layers of a model in a row, in inference mode, from their values at unit images."""
    layers = [model.get_layer(name) for name in names]
    shape = tuple(layers[0].input.shape[1:])
    points = np.concatenate([np.zeros((1, *shape)), np.eye(int(np.prod(shape))).reshape(-1, *shape)])
    x: Any = keras.ops.convert_to_tensor(points, "float32")
    for layer in layers:
        x = layer(x, training=False) if isinstance(layer, L.BatchNormalization) else layer(x)
    values = np.asarray(keras.ops.convert_to_numpy(x), np.float64).reshape(len(points), -1)
    return float(np.linalg.norm(values[1:] - values[0], 2))


@TRAINS
def test_each_layer_and_its_normalisation_are_within_the_bound_after_an_epoch() -> None:
    model = network()
    for layer in conv_layers(model, linear=True):
        layer.variable.assign(3 * layer.variable.value)
    model.compile("sgd", "mse")
    callback = OperatorNormProjection(BOUND, every=2, linear=True, batch_norm="fold")
    images = np.random.default_rng(0).normal(size=(32, 6, 6, 2)).astype("float32")
    history = model.fit(3 * images, np.zeros((32, 2), "float32"), 8, epochs=2, verbose=0, callbacks=[callback])
    assert history.history["operator_norm"][-1] <= BOUND
    kernel = {layer.part if "separable" in layer.name else layer.module.name: layer for layer in conv_layers(model)}
    pairs = {
        model.get_layer("alone").gamma.path: ("alone",),
        kernel["first"].name: ("first", "first_norm"),
        model.get_layer("dense").kernel.path: ("dense", "dense_norm"),
        model.get_layer("last").kernel.path: ("last",),
    }
    assert callback.norms.keys() == {*pairs, kernel["depthwise"].name, kernel["pointwise"].name}
    for path, names in pairs.items():
        assert dense_norm(model, *names) <= callback.norms[path] * (1 + 1e-5)
        assert callback.norms[path] <= BOUND
    # The output of the separable layer is used with its normalisation and without it.
    assert dense_norm(model, "separable") <= BOUND**2
    assert dense_norm(model, "separable", "separable_norm") <= BOUND**2
    assert max(callback.norms.values()) >= 0.99 * BOUND
    assert OperatorNormProjection.from_config(callback.get_config()).get_config() == callback.get_config()


@TRAINS
def test_constraints_bound_dense_kernels() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, activation="relu"), L.Dense(2)])
    assert [layer.linear for layer in constrain(model, BOUND, linear=True)] == [True, True]
    assert OperatorNorm.from_config(model.layers[0].kernel_constraint.get_config()).geometry.linear
    model.compile(keras.optimizers.SGD(1.0), "mse")
    rng = np.random.default_rng(0)
    model.fit(rng.normal(size=(16, 4)), 9 * rng.normal(size=(16, 2)), verbose=0)
    norms = [np.linalg.norm(keras.ops.convert_to_numpy(layer.kernel), 2) for layer in model.layers]
    assert max(norms) <= BOUND
    assert max(norms) >= 0.95 * BOUND


def test_activations_and_other_axes_are_no_part_of_a_layer() -> None:
    inputs = keras.Input((6, 6, 3))
    x = L.BatchNormalization(name="behind_relu")(L.Conv2D(3, 3, activation="relu", name="conv")(inputs))
    x = L.BatchNormalization(axis=1, name="rows")(L.Conv2D(4, 1, name="other")(x))
    model = keras.Model(inputs, x)
    norms = OperatorNormProjection(BOUND, batch_norm="fold").project(model)
    gammas = {model.get_layer(name).gamma.path for name in ("behind_relu", "rows")}
    assert norms.keys() == {layer.name for layer in conv_layers(model)} | gammas


def test_what_cannot_be_bounded_is_named() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = L.Conv2D(2, 3), L.BatchNormalization(name="hidden")

        def call(self, x: Any) -> Any:
            return self.norm(self.conv(x))

    own = Own()
    own(np.zeros((1, 4, 4, 1), "float32"))
    callback = OperatorNormProjection(BOUND, batch_norm="fold")
    with pytest.raises(ValueError, match="'hidden' is in no graph"):
        callback.project(own)
    plain = keras.Sequential([keras.Input((4, 4, 1)), L.Conv2D(2, 3), L.BatchNormalization(scale=False, name="bare")])
    with pytest.raises(ValueError, match="'bare' has no scale"):
        callback.project(plain)
    with pytest.raises(ValueError, match="batch_norm='bare'"):
        OperatorNormProjection(BOUND, batch_norm="bare")  # type: ignore[arg-type]
    einsum = keras.Sequential([keras.Input((4, 3)), L.EinsumDense("abc,cd->abd", (None, 5))])
    with pytest.raises(ValueError, match="may map several axes"):
        constrain(einsum, BOUND, linear=True)
    with pytest.raises(ValueError, match="linear=True, and the kernel has shape"):
        OperatorNorm(linear=True)(keras.Variable(np.ones((3, 2, 2), "float32")))
