"""Tests of writing models in several files: the same files in a folder of their own, within the bound, or nothing."""

from __future__ import annotations

import json
import os
import tracemalloc

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from convsv_adapters.cli.files import replacing_together
from projected_files import BOUND, project, run, within
from torch import nn
from wrapped_networks import dense_norm

from convsv_core.layers import ModelError, ReadOptions
from convsv_core.reports import files_of_model, read_model, write_model

INDEX = {True: "model.safetensors.index.json", False: "pytorch_model.bin.index.json"}
FORMATS = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])


def network():
    """Return a network with tied weights, several dtypes, a normalisation and a layer within the bound."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.ConvTranspose2d(8, 6, 3).half(),
        nn.Conv2d(6, 8, 3).bfloat16(),
        nn.Conv2d(8, 8, 3).double(),
        nn.Conv2d(8, 8, 3),
        nn.Linear(40, 30),
    )
    model[3].weight = model[2].weight
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(3)
        model[7].weight.mul_(1e-3)
    return model


def saved(folder, safe, model=None):
    """Save a network in several files, and return its index."""
    folder.mkdir()
    huggingface_hub.save_torch_model(model or network(), folder, max_shard_size=5000, safe_serialization=safe)
    assert len(os.listdir(folder)) > 3
    return folder / INDEX[safe]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(index):
    """Return what a loader takes from the files of an index: every tensor of every file, by name."""
    found = {}
    for shard in dict.fromkeys(json.loads(index.read_text())["weight_map"].values()):
        path = index.parent / shard
        is_safe = path.suffix == ".safetensors"
        found |= safetensors.torch.load_file(path) if is_safe else torch.load(path, weights_only=True)
    return found


@FORMATS
@pytest.mark.parametrize("named", [True, False], ids=["index", "folder"])
def test_the_files_are_written_and_loaded_into_the_module(tmp_path, safe, named):
    index = saved(tmp_path / "m", safe)
    before = contents(tmp_path / "m")
    (tmp_path / "out").mkdir()
    rows = project(index, tmp_path / "out" / "other.json" if named else tmp_path / "out", "--linear")
    new = tmp_path / "out" / ("other.json" if named else index.name)
    assert contents(tmp_path / "m") == before
    changed = {name for name, row in rows.items() if row["distance"]}
    assert set(rows) - changed == {"7.weight"}
    assert within(new)
    # The index is the same, and so is a file without a kernel that changed.
    assert sorted(os.listdir(tmp_path / "out")) == sorted((set(before) - {index.name}) | {new.name})
    assert new.read_bytes() == index.read_bytes()
    old_tensors, new_tensors = tensors(index), tensors(new)
    assert {name for name in old_tensors if not torch.equal(old_tensors[name], new_tensors[name])} == changed
    assert [t.dtype for t in old_tensors.values()] == [t.dtype for t in new_tensors.values()]
    model = network()
    keys = model.load_state_dict(new_tensors, strict=False)
    assert (keys.unexpected_keys, set(keys.missing_keys) <= {"3.weight"}) == ([], True)
    for index_, layer in enumerate(model[:8]):
        if layer.weight.ndim == 4:
            norm = dense_norm(layer.weight.detach().double().numpy(), isinstance(layer, nn.ConvTranspose2d))
            assert norm <= BOUND * (1 + 1e-12), index_
    assert np.linalg.norm(model[8].weight.detach().double().numpy(), 2) <= BOUND
    if not safe:  # PyTorch's files keep tied tensors tied
        assert new_tensors["2.weight"].data_ptr() == new_tensors["3.weight"].data_ptr()
        return
    # With the old weights put back they are the old files.
    kernels = {layer.stored.key: layer.kernel for layer in read_model(index, ReadOptions(linear=True))}
    (tmp_path / "back").mkdir()
    write_model(new, kernels, tmp_path / "back" / index.name)
    assert contents(tmp_path / "back") == before


PLACES = [
    ("m", "which are not replaced"),
    ("m/other.json", "which are not replaced"),
    ("link", "which are not replaced"),
    ("full", "exists: give another, or --force"),
    ("full/other.json", "exists: give another, or --force"),
    ("file", "is a file, and"),
    ("none/other.json", "there is no directory"),
    ("none/folder", "there is no directory"),
    ("blocked", "is a directory"),
]


@pytest.mark.parametrize("place", PLACES, ids=[place for place, _ in PLACES])
def test_a_place_that_is_no_place_is_found_before_the_work(tmp_path, place, monkeypatch):
    index = saved(tmp_path / "m", True)
    (shard, *_) = files_of_model(index)[1:]
    (tmp_path / "link").symlink_to(tmp_path / "m")
    for name in ("full", "blocked"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / shard.name).write_bytes(b"mine")
    (tmp_path / "blocked" / shard.name).mkdir()
    (tmp_path / "file").write_bytes(b"mine")
    before = contents(tmp_path / "m")
    monkeypatch.setattr("convsv_adapters.cli.project.project_layers", None)
    force = [] if "full" in place[0] else ["--force"]
    result = run("project", index, "--bound", BOUND, "-o", tmp_path / place[0], *force)
    assert (result.exit_code, result.stdout) == (2, "")
    assert place[1] in " ".join(result.stderr.split())
    assert contents(tmp_path / "m") == before
    assert (tmp_path / "full" / shard.name).read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["blocked", "file", "full", "link", "m"]


def test_files_that_exist_are_replaced_with_force(tmp_path):
    index = saved(tmp_path / "m", True)
    project(index, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for shard in files_of_model(tmp_path / "out" / index.name)[1:]:  # links to the input are replaced, not followed
        shard.unlink()
        shard.symlink_to(tmp_path / "m" / shard.name)
    first = contents(tmp_path / "m")
    project(index, tmp_path / "out", "--force")
    assert contents(tmp_path / "m") == first
    assert contents(tmp_path / "out") == {**before, "notes.txt": b"mine"}


@FORMATS
def test_a_layer_that_is_refused_leaves_nothing(tmp_path, safe):
    model = network()
    model.append(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    index = saved(tmp_path / "m", safe, model)
    result = run("project", index, "--bound", BOUND, "-o", tmp_path / "out", "--method", "rescale")
    assert (result.exit_code, "9.weight" in result.stderr) == (1, True)
    assert os.listdir(tmp_path) == ["m"]
    rows = project(index, tmp_path / "out", "--only", "[0-8].*")
    assert sum(bool(row["distance"]) for row in rows.values()) == (5 if safe else 6)


def test_no_index_stands_beside_files_that_are_half_replaced(tmp_path, monkeypatch):
    names = ["index.json", "a.bin", "b.bin"]
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(folder)
    targets, like = ([tmp_path / folder / name for name in names] for folder in ("old", "new"))
    with pytest.raises(OSError, match="no space"), replacing_together(targets, like):
        raise OSError("no space")
    assert {path.read_text() for path in (tmp_path / "old").iterdir()} == {"old"}
    replace, moved = os.replace, []

    def fail(source, target):
        moved.append(target.name)
        if target.name == "b.bin":
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)

    def write():
        with replacing_together(targets, like) as partial:
            for name in names:
                (partial.parent / name).write_text("new")

    with pytest.raises(OSError, match="no space"):
        write()
    assert moved == ["a.bin", "b.bin"]
    assert sorted(os.listdir(tmp_path / "old")) == ["a.bin", "b.bin"]


@FORMATS
def test_files_are_read_one_after_the_other_without_the_matrices(tmp_path, safe):
    large = {f"embed{index}.weight": torch.zeros(1000, 1000) for index in range(4)}
    (tmp_path / "m").mkdir()
    state = {**large, "conv.weight": torch.ones(4, 4, 3, 3)}
    huggingface_hub.save_torch_state_dict(state, tmp_path / "m", max_shard_size=4_100_000, safe_serialization=safe)
    read_model(tmp_path / "m" / INDEX[safe])
    tracemalloc.start()
    (layer,) = read_model(tmp_path / "m" / INDEX[safe])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert layer.kernel.shape == (4, 4, 3, 3)
    assert peak < 2_000_000  # a matrix takes 4 MB


def test_an_index_and_files_that_disagree(tmp_path):
    kernel = torch.ones(4, 4, 3, 3)
    for name, names in {"a": ["x.weight", "steps"], "b": ["y.weight"]}.items():
        state = {key: torch.tensor(3) if key == "steps" else kernel for key in names}
        safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    index = {"x.weight": "a.safetensors", "steps": "a.safetensors", "y.weight": "b.safetensors"}
    path = tmp_path / "m.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert read_model(path).left_out == ()
    path.write_text(json.dumps({"weight_map": {**index, "z.weight": "b.safetensors", "y.weight": "a.safetensors"}}))
    assert [part.path for part in read_model(path).left_out] == ["y.weight", "z.weight"]
    safetensors.torch.save_file({"x.weight": kernel}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"x\.weight is in two of its files, a\.safetensors and b\.safetensors"):
        read_model(path)
    with pytest.raises(ModelError, match="wanted a target in another folder"):
        write_model(path, {}, tmp_path / "new.json")
