"""`convsv compare`, and `--linear` of the other commands, as a user calls them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from convsv_adapters.cli.compare import FIELDS
from torch import nn


@pytest.fixture
def models(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Linear(4, 5))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with torch.no_grad():
        model[2].weight.mul_(0.5)
        model[3].weight.mul_(0.9)
    state = {**model.state_dict(), "4.weight": torch.ones(1, 1, 3, 3)}
    torch.save(state, tmp_path / "b.pt")
    return tmp_path / "a.pt", tmp_path / "b.pt"


def test_the_table_and_the_json_of_compare(run, models):
    result = run("compare", *models, "--linear")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("0.weight", "2.weight", "3.weight"))]
    assert names == ["2.weight", "3.weight", "0.weight"]
    assert "Not compared: 4.weight (only in the second model)." in " ".join(result.stdout.split())
    document = json.loads(run("compare", *models, "--json", "-").stdout)
    assert list(document) == ["model", "other", "backend", "unmatched", "layers"]
    assert document["unmatched"] == [{"name": "4.weight", "model": "b", "reason": "only in the second model"}]
    assert [layer["name"] for layer in document["layers"]] == ["2.weight", "0.weight"]
    assert list(document["layers"][0]) == [field for field in FIELDS if field != "linear"]
    assert 0.5 <= document["layers"][0]["share"] <= 0.5 * 1.002
    ordered = run("compare", *models, "--linear", "--sort", "depth").stdout.splitlines()
    assert [line.split()[0] for line in ordered if line[1:8] == ".weight"] == [
        "0.weight",
        "2.weight",
        "3.weight",
    ]


def test_compare_without_a_common_layer_is_status_1(run, models, tmp_path):
    np.savez(tmp_path / "c.npz", **{"other.conv.weight": np.ones((2, 2, 3, 3))})
    result = run("compare", models[0], tmp_path / "c.npz")
    assert result.exit_code == 1
    assert "only in the first model" in " ".join(result.stdout.split())
    assert run("compare", models[0]).exit_code == 2
    assert run("compare", models[0], tmp_path / "none.pt").exit_code == 2


def test_linear_and_folded_columns_of_spectrum_and_norm(run, spectrum, norm, models):
    for call, key in ((spectrum, "operator_norm"), (norm, "upper")):
        plain, full = call(models[0])["layers"], call(models[0], "--linear")["layers"]
        assert [layer["name"] for layer in plain] == ["0.weight", "2.weight"]
        assert [layer["linear"] for layer in full] == [False, False, True]
        assert [layer["normalisation"] for layer in full] == ["1", None, None]
        # A normalisation that has seen nothing divides by sqrt(1): epsilon is not in the file, and taken as 0.
        assert full[0][key] * (1 - 1e-2) <= full[0]["folded_upper"] <= full[0][key] * (1 + 1e-1)
        assert full[1]["folded_upper"] is None
    for command in ("spectrum", "norm"):
        table = run(command, models[0], "--linear").stdout
        assert "5x4 dense" in table
        assert "norm." in table
        assert "3 layers." in table


def test_project_bounds_dense_layers_and_leaves_the_normalisation(run, models, tmp_path):
    result = run("project", models[0], "--bound", "0.3", "-o", tmp_path / "out.pt", "--linear", "--json", "-")
    assert result.exit_code == 0, result.output
    layers = json.loads(result.stdout)["layers"]
    assert [layer["norm_after"] <= 0.3 for layer in layers] == [True, True, True]
    assert layers[0]["folded_upper"] == pytest.approx(layers[0]["norm_after"], rel=1e-3)
    before, after = torch.load(models[0]), torch.load(tmp_path / "out.pt")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("1."))
    assert float(torch.linalg.matrix_norm(after["3.weight"].double(), 2)) <= 0.3
    only = run("project", models[0], "--bound", "0.3", "-o", tmp_path / "conv.pt")
    assert only.exit_code == 0
    assert torch.equal(torch.load(tmp_path / "conv.pt")["3.weight"], before["3.weight"])
