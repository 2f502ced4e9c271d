"""Tests of Keras files: figures of the file are those of the live model."""

from __future__ import annotations

import json
import zipfile

import convsv_adapters.keras as adapter
import h5py
import keras
import numpy as np
import pytest
from projected_files import run

from convsv_core.layers import ModelError, ReadOptions
from convsv_core.plugins import get_backend
from convsv_core.reports import layer_reports, read_model

layers = keras.layers


def functional():
    inner = keras.Sequential(
        [layers.Conv2DTranspose(5, 3, strides=2, padding="same"), layers.Conv2D(6, 3, dilation_rate=2)], name="inner"
    )
    images = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, padding="same", strides=2, name="conv10")(images)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="conv9")(x)
    x = layers.BatchNormalization()(x)
    x = layers.SeparableConv2D(4, 3, name="conv11")(x)
    x = layers.Conv2D(8, 3, padding="same", groups=2, use_bias=False)(inner(x))
    return keras.Model(images, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def sequential():
    return keras.Sequential(
        [
            keras.Input((20, 3)),
            layers.Conv1D(4, 5, padding="causal"),
            layers.Conv1DTranspose(4, 3, strides=2),
            layers.SeparableConv1D(5, 3, use_bias=False),
        ]
    )


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", [functional, sequential])
@pytest.mark.filterwarnings("ignore")
def test_the_figures_are_those_of_the_live_model(tmp_path, make, suffix):
    model = make()
    model.save(tmp_path / f"m{suffix}")
    found = read_model(tmp_path / f"m{suffix}")
    live = adapter.conv_layers(model, (1, *model.input_shape[1:]))
    assert len(found) == len(live)
    for layer, other in zip(found, live, strict=True):
        np.testing.assert_array_equal(layer.kernel, keras.ops.convert_to_numpy(other.kernel))
        if layer.input_shape is not None:
            assert layer.input_shape == other.input_shape
            assert layer.conv == other.conv
        else:
            assert suffix == ".h5"
            assert (layer.conv.layout, layer.conv.stride, layer.conv.groups) == (
                other.conv.layout,
                other.conv.stride,
                other.conv.groups,
            )
        assert layer.stored.dtype == "float32"
    if suffix == ".keras":
        assert all(layer.input_shape for layer in found)
    reports = list(layer_reports(found, get_backend("numpy"), bounds="upper"))
    assert all(report.norm_upper is not None for report in reports)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore")
def test_recurrent_and_wrapped_convolutions(tmp_path, suffix):
    model = keras.Sequential(
        [
            keras.Input((4, 12, 12, 3)),
            layers.ConvLSTM2D(4, 3, return_sequences=True),
            layers.TimeDistributed(layers.Conv2D(3, 3)),
            layers.TimeDistributed(layers.SpectralNormalization(layers.Conv2D(3, 3))),
            layers.Conv3D(2, (1, 3, 3)),
        ]
    )
    model.save(tmp_path / f"m{suffix}")
    recurrent, wrapped, normalised, last = read_model(tmp_path / f"m{suffix}")
    assert (recurrent.kernel, "recurrent" in recurrent.note) == (None, True)
    np.testing.assert_array_equal(wrapped.kernel, keras.ops.convert_to_numpy(model.layers[1].layer.kernel))
    assert (normalised.kernel, "SpectralNormalization" in normalised.note) == (None, True)
    assert last.kernel.shape == (1, 3, 3, 3, 2)


@keras.saving.register_keras_serializable("test_keras_files")
class ScaledConv2D(layers.Conv2D):
    def call(self, inputs):
        return 3 * super().call(inputs)


@keras.saving.register_keras_serializable("test_keras_files")
class Filters(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(3, 3, shape[-1], 4))

    def call(self, inputs):
        return keras.ops.conv(inputs, self.kernel)


def test_classes_that_are_not_keras_s_own_have_the_reason(tmp_path):
    model = keras.Sequential([keras.Input((9, 9, 3)), ScaledConv2D(4, 3), Filters(), layers.Conv2D(2, 3)])
    model.save(tmp_path / "m.keras")
    scaled, filters, plain = read_model(tmp_path / "m.keras")
    assert (scaled.kernel, "ScaledConv2D" in scaled.note) == (None, True)
    assert (filters.kernel, "Filters" in filters.note) == (None, True)
    assert plain.kernel is not None


def test_channels_first_and_extents_that_are_open(tmp_path):
    model = keras.Sequential(
        [keras.Input((None, None, 3)), layers.Conv2D(4, 3, padding="same", name="a"), layers.Conv2D(4, 3, name="b")]
    )
    model.save(tmp_path / "m.keras")
    first, second = read_model(tmp_path / "m.keras", ReadOptions({"": (12, 10, 3), "b": (7, 5)}))
    assert (first.input_shape, second.input_shape) == ((12, 10), (7, 5))
    first, _ = read_model(tmp_path / "m.keras")
    assert (first.input_shape, first.note) == (None, "extents unknown: give the shape of the layer's input by its name")
    with pytest.raises(ModelError, match="no convolution is called 'c'"):
        read_model(tmp_path / "m.keras", ReadOptions({"c": (7, 5)}))


def test_files_that_cannot_be_read(tmp_path):
    model = sequential()
    model.save(tmp_path / "m.keras")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["kernel"] = np.ones((3, 3, 4, 4))
    with pytest.raises(ModelError, match="no weights where Keras keeps them"):
        read_model(tmp_path / "other.h5")
    (tmp_path / "junk.h5").write_bytes(b"junk")
    (tmp_path / "junk.keras").write_bytes(b"junk")
    for name in ("junk.h5", "junk.keras"):
        with pytest.raises(ModelError, match="not a Keras model, or a damaged one"):
            read_model(tmp_path / name)
    result = run("project", tmp_path / "junk.keras", "--bound", 0.1, "-o", tmp_path / "out.keras")
    assert result.exit_code == 1
    assert not (tmp_path / "out.keras").exists()


def test_arrays_of_another_layer_are_not_taken(tmp_path):
    model = keras.Sequential([keras.Input((9, 9, 3)), layers.Conv2D(4, 3, name="a")])
    model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    config["config"]["layers"][1]["config"]["name"] = "b"
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(tmp_path / "n.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    (layer,) = read_model(tmp_path / "n.keras")
    assert (layer.kernel, "those of a" in layer.note) == (None, True)


def test_the_format_before_keras_3(tmp_path):
    """Write what Keras 2 wrote: names that end in ":0", and input shapes without a build configuration."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype(np.float32)
    config = {
        "name": "conv",
        "strides": [2, 2],
        "padding": "valid",
        "data_format": "channels_last",
        "dilation_rate": [1, 1],
        "groups": 1,
        "use_bias": True,
        "batch_input_shape": [None, 8, 8, 3],
    }
    model = {"class_name": "Sequential", "config": {"layers": [{"class_name": "Conv2D", "config": config}]}}
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(model)
        group = file.create_group("model_weights").create_group("conv")
        group.attrs["weight_names"] = [b"conv/kernel:0", b"conv/bias:0"]
        group["conv/kernel:0"], group["conv/bias:0"] = kernel, np.zeros(4, np.float32)
    (layer,) = read_model(tmp_path / "m.h5")
    np.testing.assert_array_equal(layer.kernel, kernel)
    assert (layer.conv.strides, layer.input_shape) == ((2, 2), (8, 8))
