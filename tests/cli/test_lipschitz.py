"""`convsv lipschitz`, as a user calls it."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import KERNEL_OF_3, conv, save, value

KEYS = ["model", "output", "log10_upper", "upper", "log10_product", "lower", "nodes", "blocks"]
NODE_KEYS = ["name", "op", "log10_factor", "log10_upper", "note"]
BLOCK_KEYS = ["name", "branch_upper", "smallest_singular_value", "largest_singular_value"]


@pytest.fixture
def gated(tmp_path):
    """Return a model with a product of activations behind a convolution."""
    nodes = [
        conv("x", "w", "a", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["a"], ["p"]),
        helper.make_node("Sigmoid", ["p"], ["g"]),
        helper.make_node("Mul", ["a", "g"], ["y"]),
    ]
    return save(tmp_path / "gated.onnx", nodes, inputs=[value("x", ["n", 3, 8, 8])], weights={"w": KERNEL_OF_3})


def test_the_network_that_ships(run):
    result = run("lipschitz")
    assert (result.exit_code, result.stderr) == (0, "")
    for word in ("digits.onnx", "stem.out", "Gemm", "block block1.add.out", "upper: 10^", "lower: "):
        assert word in result.stdout
    document = json.loads(run("lipschitz", "--json", "-").stdout)
    assert list(document) == KEYS
    assert (document["model"], document["output"]) == ("digits.onnx", "logits")
    assert all(list(node) == NODE_KEYS for node in document["nodes"])
    assert [list(block) for block in document["blocks"]] == [BLOCK_KEYS] * 2
    assert document["lower"] < document["upper"] < 10 ** document["log10_product"]
    assert math.log10(document["upper"]) == pytest.approx(document["log10_upper"])


def test_a_node_without_a_bound_is_an_answer(run, gated):
    result = run("lipschitz", gated, "--json", "-")
    assert result.exit_code == 1
    assert "no bound for y (Mul)" in result.stderr
    assert "the bound up to it is 10^" in result.stderr
    document = json.loads(result.stdout)
    assert (document["upper"], document["log10_upper"]) == (None, None)
    last = document["nodes"][-1]
    assert (last["name"], last["log10_factor"]) == ("y", None)
    assert "product of activations" in last["note"]
    assert document["nodes"][1]["log10_upper"] > 0


def test_ranges_outputs_and_files(run, gated, tmp_path):
    path = tmp_path / "figures.json"
    result = run("lipschitz", gated, "--input-range", "0,1", "--no-lower", "--json", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "lower: unknown" in result.stdout
    document = json.loads(path.read_text())
    assert document["upper"] > 1
    assert document["lower"] is None
    stopped = json.loads(run("lipschitz", gated, "--output", "a", "--json", "-").stdout)
    assert stopped["output"] == "a"
    assert stopped["upper"] > stopped["lower"] > 0.5 * stopped["upper"]


def test_wrong_calls(run, gated, tmp_path, kernels):
    for arguments in (
        ["--output", "nothing"],
        ["--input-range", "1"],
        ["--input-range", "2,1"],
        ["--input-range", "0,inf"],
    ):
        result = run("lipschitz", gated, *arguments)
        assert result.exit_code == 2, arguments
        assert arguments[0] in result.stderr
    result = run("lipschitz", gated, "--input-shape", "3,8,8", "--input-shape", "3,8,8")
    assert (result.exit_code, "given twice" in result.stderr) == (2, True)
    result = run("lipschitz", gated, "--input-shape", "4,8,8")
    assert (result.exit_code, "does not fit" in result.stderr) == (1, True)
    result = run("lipschitz", kernels)
    assert (result.exit_code, "weights alone" in result.stderr) == (1, True)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x01\x12")
    assert run("lipschitz", broken).exit_code == 1


def test_free_axes_need_a_shape(run, tmp_path):
    path = save(
        tmp_path / "free.onnx",
        [conv("x", "w", "y")],
        inputs=[value("x", ["n", 3, "h", "w"])],
        weights={"w": KERNEL_OF_3},
    )
    result = run("lipschitz", path)
    assert (result.exit_code, "--input-shape" in result.stderr) == (1, True)
    assert run("lipschitz", path, "--input-shape", "3,9,9").exit_code == 0


def test_a_network_in_training_mode_is_refused(run, tmp_path):
    node = helper.make_node("BatchNormalization", ["x", "s", "s", "s", "s"], ["y", "m", "v"], training_mode=1)
    path = save(tmp_path / "training.onnx", [node], weights={"s": np.ones(4, np.float32)})
    assert onnx.load(path).graph.node
    result = run("lipschitz", path)
    assert result.exit_code == 1
    assert "training mode" in result.stderr
