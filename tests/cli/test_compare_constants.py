"""Tests of ``convsv compare --lipschitz``."""

from __future__ import annotations

import json

import torch
from torch import nn


def test_the_constants_of_both_files(run, tmp_path) -> None:
    bounded = tmp_path / "bounded.onnx"
    assert run("project", "--bound", 8, "--method", "rescale", "-o", bounded).exit_code == 0
    result = run("compare", bounded, bounded, "--lipschitz", "--json", "-")
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)["log10_lipschitz"]
    assert first == second
    assert 0 < first < 7 * 0.95


def test_weights_without_a_graph_are_named(run, tmp_path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(nn.Conv2d(1, 1, 3).state_dict(), weights)
    result = run("compare", weights, weights, "--lipschitz")
    assert result.exit_code == 1
    assert "weights.pt" in result.stderr


def test_the_distance_of_the_outputs(run, tmp_path) -> None:
    bounded = tmp_path / "bounded.onnx"
    assert run("project", "--bound", 8, "--method", "rescale", "-o", bounded).exit_code == 0
    result = run("compare", bounded, bounded, "--input-range", "0,1", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["output_difference"] == 0
    other = tmp_path / "other.onnx"
    assert run("project", "--bound", 7.9, "--method", "rescale", "-o", other).exit_code == 0
    found = run("compare", bounded, other, "--input-range", "0,1")
    assert "For inputs in the range the outputs are at most" in " ".join(found.stdout.split())
    assert run("compare", bounded, other, "--input-range", "1,0").exit_code == 2
