"""Tests of Keras files that hold weights alone: the class of a layer is told by the file, or the layer has a reason."""

from __future__ import annotations

import h5py
import keras
import numpy as np
import pytest
from keras_models import dense_norms, weighted
from projected_files import BOUND, project, run

from convsv_core.layers import Geometry, ModelError, ReadOptions
from convsv_core.reports import read_model

layers = keras.layers

pytestmark = pytest.mark.filterwarnings("ignore")


def every_kind(**facts):
    """Return a model of layers with stride 1 and enough padding, whose classes the file tells."""
    inner = [layers.Conv2DTranspose(5, 3, padding="same"), layers.DepthwiseConv2D(3, depth_multiplier=2)]
    model = keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            layers.Conv2D(4, 3, name="stem"),
            layers.BatchNormalization(),
            keras.Sequential(inner, name="inner"),
            layers.SeparableConv2D(6, 3, **facts),
            layers.Conv2D(4, 2, dtype="float16"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    for layer in weighted(model):
        layer.set_weights([4 * weight for weight in layer.weights])
    return model


def test_weights_are_written_and_loaded_into_the_model(tmp_path):
    model = every_kind()
    model.compile("adam", "mse")
    model.fit(np.ones((2, 9, 9, 3)), np.ones((2, 3)), verbose=0)
    model.save_weights(path := tmp_path / "m.weights.h5")
    before = path.read_bytes()
    rows = project(path, out := tmp_path / "out.weights.h5", "--linear")
    assert len(rows) == 7
    assert all(row["distance"] for row in rows.values())
    assert "left out optimizer" in run("norm", path).stderr
    assert path.read_bytes() == before
    model.load_weights(out)
    norms = [norm for layer in weighted(model) for norm in dense_norms(layer, (6, 6))]
    assert len(norms) == 7
    assert BOUND / 2 < max(norms) <= BOUND


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_kernels_are_those_of_the_whole_model(tmp_path, use_bias):
    model = every_kind(use_bias=use_bias)
    model.save_weights(tmp_path / "m.weights.h5")
    model.save(tmp_path / "m.keras")
    options = ReadOptions(linear=True)
    alone, whole = (read_model(tmp_path / name, options) for name in ("m.weights.h5", "m.keras"))
    for layer in whole:
        (other,) = [one for one in alone if one.kernel is not None and np.array_equal(one.kernel, layer.kernel)]
        assert (other.conv.layout, other.conv.groups) == (layer.conv.layout, layer.conv.groups)
        assert other.conv.transposed == layer.conv.transposed


@keras.saving.register_keras_serializable("test_keras_weights")
class TripledConv2D(layers.Conv2D):
    def call(self, inputs):
        return 3 * super().call(inputs)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv2d = TripledConv2D(4, 3)
        self.plain = layers.Conv2D(4, 3)
        self.blocks = [layers.DepthwiseConv2D(3, name="mine"), layers.DepthwiseConv2D(3)]
        self.wrapped = layers.SpectralNormalization(layers.Conv2D(4, 3))
        self.each = layers.TimeDistributed(layers.Conv2D(4, 3))

    def call(self, images):
        images = self.plain(self.conv2d(images))
        for block in self.blocks:
            images = block(images)
        images = self.wrapped(images)
        return self.each(keras.ops.expand_dims(images, 1))


def test_a_class_that_nothing_tells_has_the_reason(tmp_path):
    model = Subclassed()
    model(np.zeros((1, 14, 14, 3), np.float32))
    model.save_weights(path := tmp_path / "m.weights.h5")
    found = {layer.name: layer for layer in read_model(path)}
    known = [name for name, layer in found.items() if layer.kernel is not None]
    assert known == [f"{model.plain.name}/kernel", f"{model.blocks[1].name}/kernel"]
    assert len(found) == 7  # the spectral normalisation keeps the kernel a second time
    assert all("nothing in the file says" in layer.note for layer in found.values() if layer.kernel is None)
    result = run("project", path, "--bound", 0.1, "-o", tmp_path / "out.weights.h5")
    assert (result.exit_code, "mine/kernel" in result.stderr) == (1, True)
    stated = read_model(path, ReadOptions(layers={"mine/kernel": Geometry(stride=2)}))
    (layer,) = [layer for layer in stated if layer.name == "mine/kernel"]
    assert (layer.conv.strides, layer.conv.layout, layer.conv.groups) == ((2, 2), "HWIO", 1)


def test_geometry_is_stated_but_not_against_the_class(tmp_path):
    every_kind().save_weights(path := tmp_path / "m.weights.h5")
    layer = read_model(path, ReadOptions(layers={"stem*": Geometry(stride=2, padding=1)}))[-1]
    assert (layer.name, layer.conv.strides, layer.conv.padding) == ("stem/kernel", (2, 2), ((1, 1), (1, 1)))
    for pattern, geometry in [
        ("depthwise*", Geometry(groups=2)),
        ("depthwise*", Geometry(transposed=True)),
        ("conv2d_transpose*", Geometry(transposed=False)),
    ]:
        with pytest.raises(ModelError, match="has another geometry"):
            read_model(path, ReadOptions(layers={pattern: geometry}))
    with pytest.raises(ModelError, match="no kernel is called"):
        read_model(path, ReadOptions(layers={"none": Geometry(groups=2)}))


def test_arrays_that_are_not_those_of_the_class_have_the_reason(tmp_path):
    every_kind().save_weights(path := tmp_path / "m.weights.h5")
    with h5py.File(path, "r+") as file:
        (place,) = [name for name in file["layers"] if name.startswith("separable")]
        bias = file[f"layers/{place}/vars/2"]
        assert bias.shape == (6,)
        del file[f"layers/{place}/vars/2"]
        file[f"layers/{place}/vars/2"] = np.zeros(5, np.float32)
    notes = [layer.note for layer in read_model(path) if layer.kernel is None]
    assert len(notes) == 2
    assert all("its arrays have other forms" in note for note in notes)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantised_dense_layers_have_the_reason(tmp_path, mode):
    model = keras.Sequential([keras.Input((16,)), layers.Dense(8)])
    model.quantize(mode)
    model.save_weights(path := tmp_path / "m.weights.h5")
    (layer,) = read_model(path, ReadOptions(linear=True))
    assert (layer.kernel, "quantised" in layer.note) == (None, True)
    assert read_model(path) == []


def test_weights_of_the_format_before_keras_3(tmp_path):
    """Write what Keras 2 wrote: a group for each layer, and variables whose names end in ":0"."""
    rng = np.random.default_rng(0)
    arrays = {
        "stem": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "deep": {"depthwise_kernel": (3, 3, 4, 2)},
        "up": {"kernel": (3, 3, 5, 8), "bias": (5,)},
        "open": {"kernel": (3, 3, 5, 4)},
        "strange": {"kernel": (3, 3, 4, 4), "recurrent_kernel": (3, 3, 4, 4), "bias": (4,)},
        "head": {"kernel": (16, 3), "bias": (3,)},
    }
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in arrays]
        file.attrs["keras_version"] = b"2.15.0"
        for name, shapes in arrays.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{variable}:0".encode() for variable in shapes]
            for variable, shape in shapes.items():
                group[f"{name}/{variable}:0"] = rng.normal(size=shape).astype(np.float32)
    found = read_model(tmp_path / "m.h5")
    assert [layer.name for layer in found] == [
        "stem/kernel",
        "deep/depthwise_kernel",
        "up/kernel",
        "open/kernel",
        "strange/kernel",
        "strange/recurrent_kernel",
    ]
    convs = [layer.conv for layer in found[:4]]
    assert [conv.layout for conv in convs] == ["HWIO", "HWIO", "HWOI", "HWIO"]
    assert ([conv.groups for conv in convs], [conv.transposed for conv in convs]) == (
        [1, 4, 1, 1],
        [False, False, True, False],
    )
    assert "layout HWIO," in found[3].note
    assert [layer.kernel for layer in found[4:]] == [None, None]
    rows = project(tmp_path / "m.h5", tmp_path / "out.h5", "--only", "[duo]*p*/*", "--only", "head/*", "--linear")
    changed = ["deep/depthwise_kernel", "up/kernel", "open/kernel", "head/kernel"]
    assert [name for name, row in rows.items() if row["distance"]] == changed
