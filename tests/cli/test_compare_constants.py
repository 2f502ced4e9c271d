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
