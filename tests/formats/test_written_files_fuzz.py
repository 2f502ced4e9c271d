"""Random models in several files and random Keras models: no figure is false, and written files are within bounds."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import safetensors.torch
import torch
from keras_models import dense_norms, random_model, weighted
from projected_files import BOUND, run
from wrapped_networks import dense_norm, random_case

from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend
from convsv_core.reports import layer_reports, read_model

pytestmark = pytest.mark.filterwarnings("ignore")


def halves(quick, thorough):
    return pytest.mark.parametrize(
        "seeds",
        [
            pytest.param(range(quick), id="quick"),
            pytest.param(range(quick, thorough), id="thorough", marks=pytest.mark.thorough),
        ],
    )


def split(folder, state, rng):
    """Save a state dict in several files, in one of the two formats, and return the index."""
    folder.mkdir()
    is_safe, count = bool(rng.random() < 0.5), int(rng.integers(1, 4))
    shards = [{} for _ in range(count)]
    index = {}
    for name, tensor in state.items():
        number = int(rng.integers(count))
        shards[number][name] = tensor.contiguous().clone() if is_safe else tensor
        index[name] = f"m-{number}.{'safetensors' if is_safe else 'bin'}"
    for number, shard in enumerate(shards):
        path = folder / f"m-{number}.{'safetensors' if is_safe else 'bin'}"
        if shard:
            (safetensors.torch.save_file if is_safe else torch.save)(shard, path)
    path = folder / "m.index.json"
    path.write_text(json.dumps({"metadata": {"by": "hand"}, "weight_map": index}))
    return path


def loaded(index):
    """Return the tensors of every file of an index."""
    found = {}
    for shard in set(json.loads(index.read_text())["weight_map"].values()):
        path = index.parent / shard
        is_safe = path.suffix == ".safetensors"
        found |= safetensors.torch.load_file(path) if is_safe else torch.load(path, weights_only=True)
    return found


@halves(20, 300)
def test_random_networks_in_several_files(tmp_path, seeds):
    for seed in seeds:
        case, rng = random_case(seed), np.random.default_rng(seed)
        network = case.networks[0]
        names = {name.rpartition("/")[2]: name for name in case.weights if case.owners[name][0] is network}
        state = {f"{network.prefix}{name}": tensor for name, tensor in network.module.state_dict().items()}
        state = {name: tensor.clone() for name, tensor in state.items()} if rng.random() < 0.5 else state
        index = split(tmp_path / f"m{seed}", state, rng)
        before = loaded(index)
        layers = read_model(index, ReadOptions({"": (5,)}))
        for report in layer_reports(layers, get_backend("numpy")):
            if report.operator_norm is not None:
                name = names[report.name]
                truth = dense_norm(case.weights[name], name in case.transposed)
                precision = 0.02 if "16" in str(case.dtype(name)) else 1e-4
                assert report.operator_norm == pytest.approx(truth, rel=precision), (seed, name)
        written = [layer.name for layer in layers if layer.stored is not None]
        only = [option for name in written for option in ("--only", name)]
        out = tmp_path / f"out{seed}"
        result = run("project", index, "--bound", BOUND, "-o", out, "--method", "rescale", *only)
        if not written:
            continue
        assert result.exit_code == 0, (seed, result.output)
        after = loaded(out / index.name)
        network.module.load_state_dict({name.removeprefix(network.prefix): after[name] for name in state})
        for name in written:
            norm = dense_norm(case.live_weight(names[name]), names[name] in case.transposed)
            assert norm <= BOUND * (1 + 1e-10), (seed, name)
        kept = [name for name in state if name.removeprefix(network.prefix) not in written]
        assert all(torch.equal(after[name], before[name]) for name in kept), seed


@halves(12, 150)
def test_random_keras_models(tmp_path, seeds):
    for seed in seeds:
        model = random_model(seed)
        brain = any("bfloat16" in str(weight.dtype) for weight in model.weights)
        suffix = [".keras", ".weights.h5", ".keras" if brain else ".h5"][seed % 3]  # Keras loads no bfloat16 from .h5
        path, out = tmp_path / f"m{seed}{suffix}", tmp_path / f"out{seed}{suffix}"
        (model.save_weights if suffix == ".weights.h5" else model.save)(path)
        before = [np.array(keras.ops.convert_to_numpy(weight)) for weight in model.weights]
        listed = read_model(path, ReadOptions(linear=True))
        assert all(layer.stored is not None for layer in listed), (seed, listed)
        result = run("project", path, "--bound", BOUND, "-o", out, "--method", "rescale", "--linear")
        assert result.exit_code == 0, (seed, result.output)
        if suffix == ".weights.h5":
            model.load_weights(out)
        else:
            model = keras.saving.load_model(out)
        rank = len(model.input_shape) - 2
        norms = [norm for layer in weighted(model) for norm in dense_norms(layer, (6,) * rank)]
        assert len(norms) == len(listed), seed
        assert max(norms) <= BOUND * (1 + 1e-10), (seed, norms)
        for weight, old in zip(model.weights, before, strict=True):
            if "kernel" not in weight.name:
                assert np.array_equal(keras.ops.convert_to_numpy(weight), old), (seed, weight.path)
