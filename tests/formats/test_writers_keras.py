"""Tests of writing Keras files with other weights: what Keras loads from them is within the bound."""

from __future__ import annotations

import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras_models import dense_norms, weighted
from projected_files import BOUND, project, run

import convsv_core as convsv
from convsv_core.layers import ReadOptions
from convsv_core.reports import read_model, write_model

layers = keras.layers
SUFFIXES = [".keras", ".h5"]

pytestmark = pytest.mark.filterwarnings("ignore")


def every_kind():
    """Return a model with a layer of each kind whose norms are far above the bound, and one within it."""
    inner = keras.Sequential(
        [
            layers.Conv2DTranspose(5, 3, strides=2, name="up"),
            layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="deep"),
        ],
        name="inner",
    )
    images = keras.Input((9, 9, 2))
    x = layers.Conv2D(4, 3, padding="same", strides=2, name="plain")(images)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.SeparableConv2D(4, 3, depth_multiplier=2, name="separable")(inner(x))
    x = layers.Conv2D(6, 3, padding="same", groups=2, use_bias=False, name="grouped")(x)
    x = layers.Conv2D(4, 2, dtype="float16", dilation_rate=2, name="half")(x)
    x = layers.Conv2D(4, 1, dtype="float64", name="double")(x)
    x = layers.Conv2D(4, 3, name="small", kernel_initializer=keras.initializers.RandomNormal(stddev=1e-3))(x)
    model = keras.Model(images, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x)))
    for layer in weighted(model):
        if layer.name != "small":
            layer.set_weights([3 * weight for weight in layer.get_weights()])
    return model


def trained(model):
    """Give a model the state of an optimizer."""
    model.compile("adam", keras.losses.MeanSquaredError())
    rng = np.random.default_rng(0)
    model.fit(rng.random((2, *model.input_shape[1:])), rng.random((2, *model.output_shape[1:])), verbose=0)
    return model


def datasets(path):
    """Return every dataset of a file, as its dtype, its bytes and its attributes; and the attributes of the groups."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as weights:
            return _datasets(weights)
    return _datasets(path)


def _datasets(source):
    found = {}
    with h5py.File(source) as file:
        found["/"] = {name: str(value) for name, value in file.attrs.items()}
        file.visititems(
            lambda name, item: found.update(
                {
                    name: (
                        (str(item.dtype), item[()].tobytes(), item.chunks, item.compression)
                        if isinstance(item, h5py.Dataset)
                        else {key: str(value) for key, value in item.attrs.items()}
                    )
                }
            )
        )
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_keras_loads_a_model_within_the_bound(tmp_path, suffix):
    trained(every_kind()).save(path := tmp_path / f"m{suffix}")
    before = path.read_bytes()
    rows = project(path, out := tmp_path / f"out{suffix}", "--linear")
    assert path.read_bytes() == before
    changed = {name for name, row in rows.items() if row["distance"]}
    assert set(rows) - changed == {"small"}
    assert {"inner/up", "inner/deep", "separable/depthwise", "separable/pointwise", "head"} < changed
    loaded = keras.saving.load_model(out)
    norms = [norm for layer in weighted(loaded) for norm in dense_norms(layer, (7, 7))]
    assert len(norms) == len(rows)
    assert max(norms) <= BOUND * (1 + 1e-12)
    assert max(norms) > 0.5 * BOUND
    live = convsv.analyze(loaded, np.zeros((1, 9, 9, 2), np.float32), linear=True)
    assert len(live) == len(rows)
    assert all(layer.operator_norm <= BOUND * (1 + 1e-5) for layer in live)
    # Everything but these kernels is as it was: other weights, the optimizer, attributes, the configuration.
    old, new = datasets(path), datasets(out)
    assert list(old) == list(new)
    differing = {name for name in old if old[name] != new[name]}
    assert len(differing) == len(changed)
    assert not any("optimizer" in name or "norm" in name or "bias" in name for name in differing)
    # With the old weights put back it is the old file.
    options = ReadOptions(linear=True)
    kernels = {layer.stored.key: layer.kernel for layer in read_model(path, options)}
    write_model(out, kernels, tmp_path / f"back{suffix}")
    assert datasets(tmp_path / f"back{suffix}") == old
    if suffix == ".keras":
        with zipfile.ZipFile(path) as first, zipfile.ZipFile(out) as second:
            kinds = [[(m.filename, m.compress_type, m.date_time) for m in a.infolist()] for a in (first, second)]
            assert kinds[0] == kinds[1]
            assert [first.read(m) == second.read(m) for m in first.namelist()].count(False) == 1
    else:
        assert (tmp_path / "back.h5").read_bytes() == before


# ---- dtypes, compression, and layers that are refused --------------------------------------------------------------


def test_an_archive_of_bfloat16_and_mixed_policies_loads_within_the_bound(tmp_path):
    names = ("bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
    convolutions = [layers.Conv2D(4, 3, dtype=name, name=name, use_bias=False) for name in names]
    model = keras.Sequential([keras.Input((12, 12, 4)), *convolutions])
    for layer in weighted(model):
        layer.set_weights([5 * weight for weight in layer.weights])
    model.save(path := tmp_path / "m.keras")
    rows = project(path, tmp_path / "out.keras")
    assert all(row["distance"] for row in rows.values())
    loaded = keras.saving.load_model(tmp_path / "out.keras")
    assert [str(layer.kernel.dtype) for layer in loaded.layers] == ["bfloat16", "float16", "float32", "float32"]
    for layer in loaded.layers:
        assert BOUND / 2 < dense_norms(layer, (6, 6))[0] <= BOUND


def test_compressed_and_chunked_arrays_stay_so(tmp_path):
    model = keras.Sequential([keras.Input((9, 9, 3)), layers.Conv2D(8, 3, name="a"), layers.Conv2D(8, 3, name="b")])
    for layer in weighted(model):
        layer.set_weights([5 * weight for weight in layer.weights])
    model.save(tmp_path / "plain.h5")
    with h5py.File(tmp_path / "plain.h5") as old, h5py.File(tmp_path / "m.h5", "w") as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value
        new.copy(old["model_weights"], "model_weights")
        for name in "ab":
            group = new[f"model_weights/{name}"]
            (key,) = [key for key in group.attrs["weight_names"] if "kernel" in key]
            kernel = group[key][()]
            del group[key]
            group.create_dataset(key, data=kernel, chunks=(3, 3, kernel.shape[2], 4), compression="gzip", shuffle=True)
    project(tmp_path / "m.h5", tmp_path / "out.h5", "--only", "a")
    old, new = datasets(tmp_path / "m.h5"), datasets(tmp_path / "out.h5")
    (changed,) = [name for name in old if old[name] != new[name]]
    assert "/a/" in changed
    assert old[changed][2:] == new[changed][2:] == ((3, 3, 3, 4), "gzip")
    first, second = keras.saving.load_model(tmp_path / "out.h5").layers
    assert dense_norms(first, (7, 7))[0] <= BOUND < dense_norms(second, (7, 7))[0]


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantised_layers_are_refused_by_name_and_other_layers_are_written(tmp_path, mode):
    model = keras.Sequential([keras.Input((16, 4)), layers.Conv1D(8, 3, name="conv"), layers.Dense(8, name="head")])
    model.layers[0].set_weights([5 * weight for weight in model.layers[0].weights])
    model.layers[1].quantize(mode)
    model.save(path := tmp_path / "m.keras")
    out = tmp_path / "out.keras"
    result = run("project", path, "--bound", BOUND, "-o", out, "--method", "rescale", "--linear")
    assert (result.exit_code, "for head;" in result.stderr, "quantisation" in result.stdout) == (1, True, True)
    assert not out.exists()
    project(path, out)
    assert dense_norms(keras.saving.load_model(out).layers[0], (7,))[0] <= BOUND


def test_arrays_that_lie_in_another_file_are_neither_read_nor_written(tmp_path):
    model = keras.Sequential([keras.Input((9, 9, 3)), layers.Conv2D(8, 3, name="a")])
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file, h5py.File(tmp_path / "other.h5", "w") as other:
        group = file["model_weights/a"]
        (key,) = [key for key in group.attrs["weight_names"] if "kernel" in key]
        other["kernel"] = group[key][()]
        del group[key]
        group[key] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/kernel")
    before = (tmp_path / "other.h5").read_bytes()
    result = run("project", tmp_path / "m.h5", "--bound", 0.1, "-o", tmp_path / "out.h5")
    assert (result.exit_code, "lie in another file" in result.stderr) == (1, True)
    assert (tmp_path / "other.h5").read_bytes() == before
    assert not (tmp_path / "out.h5").exists()


# ---- batch normalisations ------------------------------------------------------------------------------------------


KINDS = ["sequential", "functional", "without scale", "activation", "another axis", "an output too", "used twice"]
KINDS += ["called twice"]


def normalised(kind):
    """Return a model with a normalisation behind its first convolution, and whether nothing else takes its output."""
    conv = layers.Conv2D(4, 3, use_bias=False, name="conv", activation="relu" if kind == "activation" else None)
    norm = layers.BatchNormalization(
        epsilon=0.01, scale=kind != "without scale", axis=1 if kind == "another axis" else -1, name="norm"
    )
    if kind in ("sequential", "without scale", "activation", "another axis"):
        model = keras.Sequential([keras.Input((9, 9, 3)), conv, norm])
    else:
        images = keras.Input((9, 9, 3))
        inner = conv(images)
        outputs = {
            "functional": lambda: norm(inner),
            "an output too": lambda: [norm(inner), inner],
            "used twice": lambda: norm(inner) + inner,
            "called twice": lambda: norm(inner) + conv(images),
        }[kind]()
        model = keras.Model(images, outputs)
    rng = np.random.default_rng(0)
    norm.set_weights([rng.uniform(0.5, 3, size=weight.shape) for weight in norm.weights])
    return model, kind in ("sequential", "functional", "without scale")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_with_the_normalisation_behind(tmp_path, kind, suffix):
    model, folds = normalised(kind)
    model.save(path := tmp_path / f"m{suffix}")
    rows = project(path, tmp_path / f"out{suffix}")
    if not folds:
        assert rows["conv"].get("folded_upper") is None
        return
    loaded = keras.saving.load_model(tmp_path / f"out{suffix}")
    count = 5 * 5 * 3
    pair = keras.Sequential([keras.Input((5, 5, 3)), loaded.get_layer("conv"), loaded.get_layer("norm")])
    images = np.concatenate([np.zeros((1, 5, 5, 3)), np.eye(count).reshape(count, 5, 5, 3)])
    outputs = keras.ops.convert_to_numpy(pair(images, training=False)).reshape(count + 1, -1)
    truth = np.linalg.norm(outputs[1:] - outputs[:1], 2)
    assert truth <= rows["conv"]["folded_upper"] * (1 + 1e-5)
    assert rows["conv"]["folded_upper"] <= 1.5 * truth
