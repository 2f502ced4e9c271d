"""Tests of the Keras adapter on each backend of Keras: the layers that it finds, and their norms after training.

Keras has one backend a process. This one has that of `conftest.py`; the last test runs the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from convsv_adapters.keras import (
    ConvLayer,
    OperatorNorm,
    OperatorNormPenalty,
    OperatorNormProjection,
    analyze,
    constrain,
    conv_layers,
    penalize,
)
from keras import layers as L
from keras import ops

import convsv_core as convsv

BACKEND = keras.backend.backend()
TRAINS = pytest.mark.skipif(BACKEND == "numpy", reason="Keras does not train on NumPy")
EPS = float(np.finfo("float32").eps)
BOUND = 0.5

GEOMETRIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "causal": (lambda: L.Conv1D(3, 4, padding="causal", dilation_rate=2, use_bias=False), (13, 2)),
    "same, odd extents": (lambda: L.Conv1D(3, 3, strides=2, padding="same", use_bias=False), (13, 2)),
    "valid, grouped": (lambda: L.Conv2D(4, 3, groups=2, use_bias=False), (7, 6, 4)),
    "same, strided": (lambda: L.Conv2D(3, 4, strides=2, padding="same", use_bias=False), (8, 6, 2)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2, padding="same", use_bias=False), (7, 6, 3)),
    "depthwise, 1-D": (lambda: L.DepthwiseConv1D(4, strides=2, use_bias=False), (12, 3)),
    "3-D": (lambda: L.Conv3D(2, 2, padding="same", use_bias=False), (4, 3, 4, 2)),
    "transposed": (lambda: L.Conv2DTranspose(3, 4, strides=2, padding="same", use_bias=False), (4, 5, 2)),
    "transposed, odd": (lambda: L.Conv1DTranspose(3, 3, strides=2, padding="same", use_bias=False), (6, 2)),
    "transposed, whole": (lambda: L.Conv1DTranspose(3, 4, strides=2, use_bias=False), (6, 2)),
    "transposed, valid": (lambda: L.Conv1DTranspose(3, 3, strides=3, use_bias=False), (6, 2)),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    keras.utils.set_random_seed(0)


def network() -> keras.Sequential:
    """Return a network with norms above the bound, and one layer of each kind."""
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            L.Conv2D(6, 3, padding="same", activation="relu"),
            L.SeparableConv2D(6, 3, strides=2, padding="same"),
            L.DepthwiseConv2D(3),
            L.Conv2DTranspose(4, 4, strides=2),
            L.Flatten(),
            L.Dense(3),
        ]
    )


def small_network() -> keras.Sequential:
    """Return a network with one convolution, for tests that take a compiler long."""
    return keras.Sequential([keras.Input((12, 12, 3)), L.Conv2D(4, 3, padding="same"), L.Flatten(), L.Dense(3)])


def images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 12, 12, 3)).astype("float32"), rng.integers(0, 3, 32)


def host(array: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(array), float)


def certified(layer: ConvLayer) -> float:
    """Return the certified norm for every input size, computed in float64."""
    return float(convsv.norm_bounds(host(layer.kernel), layer.conv).upper)


def fit(model: keras.Model, *callbacks: keras.callbacks.Callback, rate: float = 0.2) -> Any:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss)
    return model.fit(*images(), epochs=2, batch_size=8, verbose=0, callbacks=list(callbacks))


def dense(layer: keras.layers.Layer, shape: tuple[int, ...]) -> np.ndarray:
    """Return the matrix of a layer, from its outputs for each basis image."""
    basis = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    outputs = host(layer(basis))
    return outputs.reshape(len(basis), -1).T


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_geometry_is_that_of_the_layer(name: str) -> None:
    make, shape = GEOMETRIES[name]
    layer = make()
    layer.build((None, *shape))
    layer.set_weights([np.random.default_rng(3).normal(size=layer.get_weights()[0].shape)])
    matrix = dense(layer, shape)
    (found,) = conv_layers(layer, (1, *shape))
    assert found.input_shape == shape[:-1]
    norm = float(np.linalg.norm(matrix, 2))
    assert norm <= certified(found)
    exact = float(convsv.operator_norm(host(found.kernel), found.input_shape, found.conv))
    assert norm == pytest.approx(exact, rel=64 * EPS)
    if not found.conv.transposed:
        return
    assert norm >= 0.8 * certified(found)
    # If the axes of channels were exchanged, the norm would differ and the test would fail.
    swapped = convsv.Conv(found.conv.layout.replace("OI", "IO"), found.conv.stride, transposed=True)
    assert abs(float(convsv.norm_bounds(host(found.kernel), swapped).lower) / norm - 1) > 0.02


def test_a_separable_layer_has_two_kernels_and_its_norm_is_within_their_product() -> None:
    shape = (8, 7, 3)
    layer = L.SeparableConv2D(4, 3, strides=2, depth_multiplier=2, padding="same", use_bias=False)
    matrix = dense(layer, shape)
    depthwise, pointwise = conv_layers(layer, (1, *shape))
    assert (depthwise.part, depthwise.kernel_shape, depthwise.conv.groups) == ("depthwise", (3, 3, 1, 6), 3)
    assert (pointwise.part, pointwise.kernel_shape, pointwise.input_shape) == ("pointwise", (1, 1, 6, 4), (4, 4))
    product = certified(depthwise) * certified(pointwise)
    assert 0.3 * product <= float(np.linalg.norm(matrix, 2)) <= product


def test_extents_come_from_shapes_in_nested_shared_and_subclassed_models() -> None:
    shared = L.Conv2D(3, 3, padding="same")
    inputs = keras.Input((None, None, 3))
    x = shared(inputs)
    x = keras.Sequential([L.MaxPool2D(2), shared, L.Conv2D(2, 3)])(x)
    model = keras.Model(inputs, x)
    first, second = conv_layers(model, (1, 16, 12, 3))
    assert first.input_shapes == ((16, 12), (8, 6))
    assert second.input_shapes == ((8, 6),)
    assert [layer.input_shapes for layer in conv_layers(model)] == [(), ()]

    class Network(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.conv = L.Conv1D(4, 3)

        def call(self, inputs: Any, training: bool = False) -> Any:
            return self.conv(inputs["signal"])

    subclassed = Network()
    batch = {"signal": np.zeros((1, 9, 2), "float32")}
    subclassed(batch)
    (found,) = conv_layers(subclassed, batch)
    assert found.input_shape == (9,)
    assert "call" not in vars(subclassed.conv)


@pytest.mark.skipif(BACKEND != "torch", reason="the order of the axes is Keras's affair: one backend stands for all")
def test_a_report_takes_its_extents_from_the_declared_input() -> None:
    functional = keras.Input((12, 10, 3))
    model = keras.Model(functional, L.Conv2D(4, 3, strides=2)(L.Conv2D(2, 3)(functional)))
    first, second = analyze(model)
    assert (first.input_shape, second.input_shape) == ((12, 10), (10, 8))
    assert first.operator_norm == pytest.approx(analyze(model, (1, 12, 10, 3))[0].operator_norm)
    subclassed = analyze(Unbound())
    assert [report.input_shape for report in subclassed] == [None]


def test_free_axes_get_extents_that_the_report_states() -> None:
    one, other = keras.Input((None, 3), name="one"), keras.Input((None, None, 2), name="other")
    image = L.GlobalMaxPooling2D()(L.Conv2D(2, 3, strides=2, padding="valid")(other))
    model = keras.Model({"one": one, "other": other}, [L.Conv1D(2, 5)(one), image])
    reports = {report.kernel_shape: report for report in analyze(model)}
    assert reports[5, 3, 2].input_shape == (128,)
    assert reports[3, 3, 2, 2].input_shape == (128, 128)
    for report in reports.values():
        assert report.operator_norm is not None
        assert "(1, 128, 3) and (1, 128, 128, 2); an example_input gives others" in report.note
    assert {report.note for report in analyze(keras.Sequential([keras.Input((8, 3)), L.Conv1D(2, 3)]))} == {""}


def test_a_recurrent_convolution_is_listed_with_the_reason() -> None:
    model = keras.Sequential([keras.Input((4, 8, 8, 1)), L.ConvLSTM2D(2, 3), L.Conv2D(3, 3, use_bias=False)])
    kernel, recurrent, plain = analyze(model)
    assert (kernel.kernel_shape, recurrent.kernel_shape) == ((3, 3, 1, 8), (3, 3, 2, 8))
    for report in (kernel, recurrent):
        assert "a recurrent convolution (ConvLSTM2D)" in report.note
        assert report.operator_norm is None
    assert plain.input_shape == (6, 6)
    assert len(conv_layers(model)) == 1


class Unbound(keras.Model):  # type: ignore[misc]
    """A model without a declared input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = L.Conv1D(2, 3)
        self.conv.build((1, 9, 3))

    def call(self, x: Any) -> Any:
        return self.conv(x)


def test_channels_first() -> None:
    layer = L.Conv2D(4, 3, data_format="channels_first")
    layer.build((None, 2, 8, 6))
    (found,) = conv_layers(layer, (1, 2, 8, 6))
    assert (found.input_shape, found.kernel_shape) == ((8, 6), (3, 3, 2, 4))


@TRAINS
@pytest.mark.parametrize("method", ["rescale", "dykstra"])
def test_the_constraint_holds_after_training(method: str) -> None:
    if BACKEND == "jax" and method == "dykstra":
        model = keras.Sequential(
            [keras.Input((12, 12, 3)), L.Conv2D(3, 3), L.Flatten(), L.Dense(3)]
        )  # compiles longest
    else:
        model = network()
    found = constrain(model, BOUND, method=method, steps=3)
    assert max(certified(layer) for layer in found) > BOUND
    fit(model)
    norms = [certified(layer) for layer in found]
    assert max(norms) <= BOUND
    assert max(norms) >= 0.9 * BOUND


def test_a_class_with_a_convolution_of_its_own_has_no_figure() -> None:
    class Scaled(keras.layers.Conv2D):  # type: ignore[misc]
        def convolution_op(self, inputs: Any, kernel: Any) -> Any:
            return super().convolution_op(inputs, 3 * kernel)

    model = keras.Sequential([keras.Input((8, 8, 3)), Scaled(4, 3)])
    (report,) = convsv.analyze(model)
    assert (report.operator_norm, "not known" in report.note) == (None, True)
    with pytest.warns(UserWarning, match="forward pass of its own"):
        constrain(model, BOUND)


@TRAINS
def test_the_callback_projects_and_logs() -> None:
    model = network() if BACKEND == "torch" else small_network()
    callback = OperatorNormProjection(BOUND, every=2)
    history = fit(model, callback)
    assert history.history["operator_norm"][-1] == max(callback.norms.values()) <= BOUND
    for layer in conv_layers(model):
        assert certified(layer) <= callback.norms[layer.name] * (1 + 1e-3)
        assert certified(layer) <= BOUND


@TRAINS
def test_the_circular_operator_is_bounded_where_it_is_asked_for() -> None:
    model = small_network()
    (found,) = constrain(model, BOUND, circular=True, example_input=(1, 12, 12, 3))
    fit(model)
    norm = float(convsv.operator_norm(host(found.kernel), (12, 12), convsv.Conv("HWIO")))
    assert 0.99 * BOUND <= norm <= BOUND


def test_every_backend_brings_a_kernel_to_the_same_place() -> None:
    rng = np.random.default_rng(1)
    for geometry, shape in (
        ({"strides": 2}, (3, 3, 4, 6)),
        ({"depthwise": True}, (3, 3, 4, 2)),
        ({"transposed": True, "strides": 2}, (4, 4, 3, 2)),
        ({"input_shape": (8,), "dilation_rate": 2}, (3, 2, 2)),
    ):
        kernel = rng.normal(size=shape).astype("float32")
        variable = keras.Variable(kernel)
        constraint = OperatorNorm(BOUND, **geometry)
        found = constraint(variable)
        conv = constraint.geometry.conv(shape)
        assert keras.backend.standardize_dtype(found.dtype) == "float32"
        assert tuple(found.shape) == shape
        # Every library returns the kernel times one number.
        share = host(found).ravel()[0] / kernel.ravel()[0]
        np.testing.assert_allclose(host(found), share * kernel.astype(float), rtol=16 * EPS)
        reference = kernel.astype(float).reshape(host(constraint.geometry.kernel(variable)).shape)
        extents = constraint.geometry.input_shape
        norm = (
            float(convsv.norm_bounds(reference, conv, rtol=1e-6).upper)
            if extents is None
            else float(convsv.operator_norm(reference, extents, conv))
        )
        assert 0.985 * BOUND <= share * norm <= BOUND * (1 + 1e-6)


@TRAINS
def test_the_penalty_is_the_core_s_and_lowers_the_norms() -> None:
    model = small_network()
    (found,) = penalize(model, "norm_hinge", 0.05, circular=True, example_input=(1, 12, 12, 3), bound=0.1)
    before = float(convsv.operator_norm(host(found.kernel), (12, 12), convsv.Conv("HWIO")))
    assert float(ops.convert_to_numpy(model.losses[0])) == pytest.approx(0.05 * (before - 0.1) ** 2, rel=1e-4)
    fit(model)
    assert float(convsv.operator_norm(host(found.kernel), (12, 12), convsv.Conv("HWIO"))) < before


def test_a_saved_model_keeps_its_constraints_and_regularizers(tmp_path: Path) -> None:
    model = network()
    constrain(model, BOUND)
    penalize(model, "orthogonality", 0.01)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one, other in zip(conv_layers(model), conv_layers(loaded), strict=True):
        np.testing.assert_array_equal(host(one.kernel), host(other.kernel))
        for attribute in ("constraint", "regularizer"):
            first, second = (getattr(layer.variable, attribute) for layer in (one, other))
            assert second.get_config() == first.get_config()
    for thing in (
        OperatorNorm(2.0, "dykstra", 5, strides=(2, 1), input_shape=(8, 8)),
        OperatorNormPenalty("schatten", 0.1, {"p": 4}, groups=2),
        OperatorNormProjection(3.0, 5, circular=True),
    ):
        config = keras.saving.serialize_keras_object(thing)
        assert config["module"] == "convsv_adapters.keras"  # a path that stays, in files that are kept
        assert keras.saving.deserialize_keras_object(config).get_config() == thing.get_config()


@pytest.mark.skipif(BACKEND != "torch", reason="seconds of compilation: one backend stands for all")
def test_an_application_is_read_and_projected() -> None:
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=4)
    reports = analyze(model, (1, 32, 32, 3))
    assert len(reports) == 52
    assert all(report.operator_norm is not None and report.operator_norm > 0 for report in reports)
    assert reports[0].input_shape == (32, 32)
    assert {report.groups for report in reports} > {1, 16}
    norms = OperatorNormProjection(1.0).project(model)
    assert len(norms) == 52
    assert max(norms.values()) <= 1.0
    assert all(report.operator_norm <= 1.0 for report in analyze(model, (1, 32, 32, 3)))


def test_bad_calls_get_a_clear_error() -> None:
    with pytest.raises(TypeError, match=r"wanted a keras\.Model"):
        conv_layers(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not built"):
        conv_layers(keras.Sequential([L.Conv2D(2, 3)]))
    for call in (constrain, penalize):
        with pytest.raises(ValueError, match="no convolution"):
            call(L.Dense(2))
    model = network()
    with pytest.raises(ValueError, match="extents of the layer"):
        constrain(model, 1.0, circular=True)
    assert all(layer.variable.constraint is None for layer in conv_layers(model))
    constrain(model, 1.0)
    with pytest.raises(ValueError, match="has a constraint"):
        constrain(model, 1.0)
    for bound in (0, -1, float("nan"), True):
        with pytest.raises(ValueError, match="bound="):
            OperatorNorm(bound)
    with pytest.raises(ValueError, match="method='clip'"):
        OperatorNorm(1.0, "clip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind='nuclear'"):
        OperatorNormPenalty("nuclear")
    with pytest.raises(ValueError, match="depthwise=True"):
        OperatorNorm(depthwise=True, groups=2)
    with pytest.raises(ValueError, match="3 to 5 axes"):
        OperatorNorm()(keras.Variable(np.ones((2, 2), "float32")))
    with pytest.raises(TypeError, match="float16"):
        OperatorNorm()(keras.Variable(np.ones((3, 2, 2)), dtype="float16"))


@pytest.mark.skipif(BACKEND != "torch", reason="the process that has started this one runs the others")
@pytest.mark.parametrize(
    ("other", "chosen"),
    [
        ("jax", "geometry or callback or circular or bad_calls"),
        pytest.param("jax", "", marks=pytest.mark.thorough),
        ("numpy", ""),
        ("tensorflow", ""),
    ],
)
def test_on_another_backend(other: str, chosen: str) -> None:
    environment = os.environ | {"KERAS_BACKEND": other}
    if other == "tensorflow":
        # Keras cannot be imported without TensorFlow there. A stand-in module tells only its backend.
        code = (
            "import sys, types; keras = types.ModuleType('keras'); "
            "keras.backend = types.SimpleNamespace(backend=lambda: 'tensorflow'); sys.modules['keras'] = keras; "
            "import convsv_adapters.keras"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "KERAS_BACKEND to one of these" in run.stderr.splitlines()[-1]
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", chosen, __file__]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
