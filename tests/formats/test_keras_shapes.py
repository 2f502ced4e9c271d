"""Tests of the shapes of layers in Keras files that state the shape of the network's input alone."""

from __future__ import annotations

import json

import h5py
import keras
import pytest
from convsv_adapters.formats.keras_shapes import ShapeMisfit, input_names, inputs_of_layers
from keras_models import random_model
from projected_files import run

from convsv_core.layers import ModelError, ReadOptions
from convsv_core.reports import read_model

layers = keras.layers


def branches(extents=(33, 30)):
    """Return a functional model with classes of every rule."""
    images = keras.Input((*extents, 3), name="images")
    x = layers.Conv2D(8, 3, strides=2, padding="same")(images)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    a = layers.DepthwiseConv2D(3, depth_multiplier=2, dilation_rate=2)(x)
    a = layers.ZeroPadding2D(((1, 2), (3, 0)))(a)
    a = layers.UpSampling2D((2, 1))(layers.Cropping2D(1)(a))
    a = layers.Conv2D(8, 3, name="a_last")(a)
    b = layers.Conv2DTranspose(8, 3, strides=2, padding="same")(x)
    b = layers.Conv2DTranspose(4, 4, strides=3, output_padding=1)(layers.MaxPooling2D(2, strides=1)(b))
    b = layers.SeparableConv2D(5, 3, strides=2)(layers.AveragePooling2D(3, padding="same")(b))
    inner = keras.Sequential([keras.Input((None, None, 8)), layers.Conv2D(8, 1), layers.Conv2D(8, 3)], name="inner")
    c = layers.Concatenate()([layers.Conv2D(8, 3)(x), inner(x)])
    c = layers.Add()([c, layers.Conv2D(1, 1)(c)])
    c = layers.Conv2D(4, 3, strides=2, name="c_last")(layers.Permute((2, 1, 3))(c))
    d = layers.GlobalAveragePooling2D()(c)
    d = layers.Reshape((2, 2, 1))(layers.Dense(4)(d))
    d = layers.Conv2D(2, 2, name="d_last")(layers.Multiply()([d, layers.GlobalMaxPooling2D(keepdims=True)(d)]))
    e = layers.Conv1D(3, 2, padding="causal", name="e_last")(layers.Reshape((-1, 2))(layers.Flatten()(d)))
    return keras.Model(images, [a, b, c, e])


def sequence():
    return keras.Sequential(
        [
            keras.Input((6, 12, 12, 2)),
            layers.TimeDistributed(layers.Conv2D(4, 3, strides=2)),
            layers.Conv3D(2, (1, 3, 3)),
            layers.Lambda(lambda x: x),
            layers.Conv3D(2, 1, name="behind"),
        ]
    )


def channels_first():
    images = keras.Input((3, 20, 17))
    options = {"data_format": "channels_first"}
    x = layers.Conv2D(4, 3, padding="same", strides=2, **options)(images)
    x = layers.ZeroPadding2D(2, **options)(layers.MaxPooling2D(2, **options)(x))
    return keras.Model(images, layers.Conv2D(5, 3, **options)(x))


def of_keras_2(config):
    """Return a configuration as Keras 2 wrote it: no shapes but those of inputs, and nodes as lists."""

    def tensors(value):
        if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
            return [[*value["config"]["keras_history"], {}]]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [tensor for part in parts for tensor in tensors(part)]

    found = {key: value for key, value in config.items() if key not in ("build_config", "module", "registered_name")}
    if "inbound_nodes" in found:
        found["inbound_nodes"] = [tensors(node) for node in found["inbound_nodes"]]
    inner = found["config"]
    if isinstance(inner.get("layers"), list):
        inner["layers"] = [of_keras_2(layer) for layer in inner["layers"]]
    if "batch_shape" in inner:
        inner["batch_input_shape"] = inner.pop("batch_shape")
    return found


def live_inputs(model, prefix=""):
    """Return the shape that each layer of a live model takes, by its path; the layers of nested models as built."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from live_inputs(layer, f"{prefix}{layer.name}/")
        elif isinstance(layer, layers.TimeDistributed):
            shape = layer.input.shape
            yield f"{prefix}{layer.name}/{layer.layer.name}", (shape[0], *shape[2:])
        elif not isinstance(layer, layers.InputLayer) and not isinstance(layer.input, list):
            yield f"{prefix}{layer.name}", tuple(layer.input.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("make", [branches, sequence, *(lambda seed=seed: random_model(seed) for seed in range(12))])
def test_shapes_are_those_of_the_live_model(make, older):
    model = make()
    config = json.loads(model.to_json())
    found = inputs_of_layers(of_keras_2(config) if older else config, {})
    open_ones = 0
    for name, shape in live_inputs(model):
        if name == "behind":  # a Lambda has no rule, so nothing behind it has a shape
            assert name not in found
            open_ones += 1
            continue
        if "/" in name and None in shape[1:]:  # a nested model that was built with free extents
            assert None not in found[name][1:]
            continue
        assert found[name] == shape, name
    assert open_ones <= 1


def test_shapes_of_channels_first():
    model = channels_first()
    found = inputs_of_layers(of_keras_2(json.loads(model.to_json())), {})
    for name, shape in live_inputs(model):
        assert found[name] == shape


@pytest.mark.parametrize(
    ("given", "extents"),
    [((20, 24, 3), (20, 24)), ((1, 20, 24, 3), (20, 24)), ((3, 20, 24), (20, 24)), ((20, 24), (20, 24))],
)
def test_a_given_shape_is_that_of_the_network_s_input(tmp_path, given, extents):
    model = branches((None, None))
    model.save(tmp_path / "m.keras")
    live = dict(live_inputs(branches(extents)))
    for options in ({"": given}, {"images": given}):
        found = {layer.name: layer for layer in read_model(tmp_path / "m.keras", ReadOptions(options))}
        assert found["a_last"].input_shape == live["a_last"][1:3] != extents
        assert found["c_last"].input_shape == live["c_last"][1:3]
        assert all(layer.input_shape is not None for layer in found.values())


def test_a_shape_that_does_not_fit_is_refused(tmp_path):
    model = branches((None, None))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match=r"input 'images' is \?x\?x\?x3 in the model, which 20,24,5 does not fit"):
        read_model(tmp_path / "m.keras", ReadOptions({"": (20, 24, 5)}))
    with pytest.raises(ModelError, match="no convolution is called 'other', and no input"):
        read_model(tmp_path / "m.keras", ReadOptions({"other": (20, 24, 3)}))
    config = json.loads(branches().to_json())
    assert input_names(config) == ["images"]
    with pytest.raises(ShapeMisfit, match=r"is \?x33x30x3 in the model"):
        inputs_of_layers(config, {"": (32, 30, 3)})


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_gives_figures_of_a_file_of_keras_2(tmp_path):
    model = branches()
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        config = of_keras_2(json.loads(file.attrs["model_config"]))
        file.attrs["model_config"] = json.dumps(config)
    result = run("spectrum", tmp_path / "m.h5", "--json", "-")
    rows = {row["name"]: row for row in json.loads(result.stdout)["layers"]}
    live = dict(live_inputs(model))
    assert result.exit_code == 0
    assert tuple(rows["a_last"]["input_shape"]) == live["a_last"][1:3]
    assert all(row["operator_norm"] > 0 for row in rows.values())
