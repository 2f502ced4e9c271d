"""Tests of the command `convsv project`: its report, and the files that it leaves behind when it fails."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from convsv_adapters.cli import files, request
from projected_files import BOUND, project, run, weights, within


@pytest.fixture
def model(tmp_path):
    np.savez(tmp_path / "m.npz", a=weights(4, 4, 3, 3), b=weights(4, 4, 3, 3, norm=0.1))
    return tmp_path / "m.npz"


def test_the_network_that_ships(tmp_path):
    result = run("project", "--bound", 3, "-o", tmp_path / "digits.onnx", "--method", "rescale")
    assert (result.exit_code, result.stderr) == (0, "")
    for word in ("before", "after", "distance", "block1.pointwise", "6 of 7 convolutions changed", "by rescale"):
        assert word in " ".join(result.stdout.split())
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("block1.pointwise")]
    assert row[-2:] == ["0", "yes"]
    assert row[-5] == row[-4]
    layers = json.loads(run("norm", tmp_path / "digits.onnx", "--json", "-").stdout)["layers"]
    after = {layer["name"]: layer["upper"] for layer in layers}
    document = run("project", tmp_path / "digits.onnx", "--bound", 3, "-o", tmp_path / "b.onnx", "--json", "-").stdout
    document = json.loads(document)
    assert list(document) == ["model", "backend", "output", "bound", "method", "layers"]
    assert (document["bound"], document["method"]) == (3, "dykstra")
    assert list(document["layers"][0])[-6:] == [
        "norm_before",
        "norm_after",
        "distance",
        "iterations",
        "converged",
        "note",
    ]
    for layer in document["layers"]:
        assert layer["distance"] == 0
        assert layer["norm_before"] == layer["norm_after"] == after[layer["name"]] <= 3
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "digits.onnx").read_bytes()


def test_dykstra_moves_a_kernel_less_than_rescaling(model, tmp_path):
    near = run("project", model, "--bound", BOUND, "-o", tmp_path / "near.npz", "--json", "-")
    far = project(model, tmp_path / "far.npz")
    assert within(tmp_path / "near.npz")
    near = {layer["name"]: layer for layer in json.loads(near.stdout)["layers"]}
    assert near["a"]["distance"] < 0.95 * far["a"]["distance"]


def test_an_existing_file_is_replaced_with_force_alone(model):
    before = model.read_bytes()
    result = run("project", model, "--bound", BOUND, "-o", model)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert model.read_bytes() == before
    model.chmod(0o640)
    project(model, model, "--force")
    assert stat.S_IMODE(model.stat().st_mode) == 0o640
    assert within(model)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions and links")
def test_permissions_and_links(model, tmp_path):
    model.chmod(0o600)
    project(model, tmp_path / "new.npz")
    assert stat.S_IMODE((tmp_path / "new.npz").stat().st_mode) == 0o600
    (tmp_path / "other.npz").write_bytes(b"")
    (tmp_path / "other.npz").chmod(0o644)
    (tmp_path / "link.npz").symlink_to(tmp_path / "other.npz")
    project(model, tmp_path / "link.npz", "--force")
    assert (tmp_path / "link.npz").is_symlink()
    assert within(tmp_path / "other.npz")
    assert stat.S_IMODE((tmp_path / "other.npz").stat().st_mode) == 0o644


@pytest.mark.parametrize("stage", ["write", "disk", "check"])
def test_a_failure_midway_leaves_the_old_file_and_nothing_else(model, monkeypatch, stage):
    before = model.read_bytes()

    def half(path, kernels, target):
        Path(target).write_bytes(before[:100])
        raise OSError(28, "No space left on device", str(target))

    def full(path):
        raise OSError(28, "No space left on device")

    def other(path, kernels, target):
        shutil.copyfile(path, target)

    if stage == "disk":
        monkeypatch.setattr(files, "_to_disk", full)
    else:
        monkeypatch.setattr(request, "write_model", half if stage == "write" else other)
    message = project(model, model, "--force", status=1)
    assert ("would change" if stage == "check" else "No space left on device") in " ".join(message.split())
    assert model.read_bytes() == before
    assert os.listdir(model.parent) == ["m.npz"]


def test_a_crash_midway_leaves_the_old_file(model, monkeypatch):
    before = model.read_bytes()

    def interrupted(path, kernels, target):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(request, "write_model", interrupted)
    assert run("project", model, "--bound", BOUND, "-o", model, "--force").exit_code != 0
    assert model.read_bytes() == before
    assert os.listdir(model.parent) == ["m.npz"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.npz"], "--bound"),
        (["--bound", "1"], "--output"),
        (["--bound", "nan", "-o", "out.npz"], "wanted a number that is not negative"),
        (["--bound", "-1", "-o", "out.npz"], "wanted a number that is not negative"),
        (["--bound", "inf", "-o", "out.npz"], "wanted a number that is not negative"),
        (["--bound", "1", "-o", "no/such/folder/out.npz"], "there is no directory"),
        (["--bound", "1", "-o", "."], "is a directory"),
        (["--bound", "1", "-o", os.devnull, "--force"], "is no file"),
        (["--bound", "1", "-o", "out.npz", "--method", "guess"], "'guess' is not one of"),
        (["--bound", "1", "-o", "out.npz", "--only", "c*"], "no convolution is called 'c*'"),
    ],
)
def test_a_wrong_call_is_status_2(model, arguments, message, monkeypatch):
    monkeypatch.chdir(model.parent)
    result = run("project", model, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
    assert os.listdir(model.parent) == ["m.npz"]
