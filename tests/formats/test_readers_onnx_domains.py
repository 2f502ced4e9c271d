"""Tests of operators of other domains than ONNX's own, and of sparse initialisers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_models import KERNEL, conv, save
from projected_files import run

from convsv_core.plugins import get_backend
from convsv_core.reports import bounds_reports, read_model

rng = np.random.default_rng(0)


def test_a_model_of_onnxruntimes_optimiser_has_the_reason_and_is_not_projected(tmp_path):
    weights = {name: rng.normal(size=(16, 16, 3, 3)).astype(np.float32) for name in "ab"}
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 16, 8, 8])
    nodes = [conv("x", "a", "m", pads=[1] * 4), conv("m", "b", "y", pads=[1] * 4)]
    path = save(tmp_path / "m.onnx", nodes, inputs=[value], weights=weights)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = {(node.domain, node.op_type) for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    if ("com.microsoft.nchwc", "Conv") not in operators:
        pytest.skip("this machine's onnxruntime puts no kernels into blocks")
    layers = read_model(tmp_path / "optimised.onnx")
    assert [layer.kernel for layer in layers] == [None, None]
    assert all("com.microsoft.nchwc.Conv is not supported" in layer.note for layer in layers)
    result = run("project", tmp_path / "optimised.onnx", "--bound", 1, "-o", tmp_path / "out.onnx")
    assert result.exit_code == 1
    assert layers[0].name in result.stderr
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("kind", "domain"),
    [("Conv", "com.microsoft.nchwc"), ("NhwcConv", "com.microsoft"), ("QLinearConv", "com.microsoft"), ("Conv", "own")],
)
def test_the_domain_is_a_part_of_an_operators_name(tmp_path, kind, domain):
    node = helper.make_node(kind, ["x", "w"], ["y"], domain=domain)
    (layer,) = read_model(save(tmp_path / "m.onnx", [node], weights={"w": KERNEL}))
    assert (layer.kernel, layer.stored) == (None, None)
    assert f"{domain}.{kind} is not supported" in layer.note


@pytest.mark.parametrize("kind", ["Identity", "Pad", "Constant"])
def test_nodes_of_other_domains_are_not_taken_for_onnxs_own(tmp_path, kind):
    inner = {
        "Identity": [helper.make_node("Identity", ["w"], ["k"], domain="own"), conv("x", "k", "y")],
        "Pad": [helper.make_node("Pad", ["x"], ["p"], domain="own", pads=[0, 0, 1, 1] * 2), conv("p", "w", "y")],
        "Constant": [
            helper.make_node("Constant", [], ["k"], domain="own", value=numpy_helper.from_array(KERNEL)),
            conv("x", "k", "y"),
        ],
    }[kind]
    (layer,) = read_model(save(tmp_path / "m.onnx", inner, weights={"w": KERNEL}))
    if kind == "Pad":
        assert layer.conv.padding == ((0, 0), (0, 0))
    else:
        assert (layer.kernel, layer.stored) == (None, None)


def test_the_convolution_of_a_fused_node(tmp_path):
    node = helper.make_node("FusedConv", ["x", "w"], ["y"], domain="com.microsoft", activation="Relu", pads=[1] * 4)
    path = save(tmp_path / "m.onnx", [node], weights={"w": KERNEL})
    (layer,) = read_model(path)
    np.testing.assert_array_equal(layer.kernel, KERNEL)
    assert layer.conv.padding == ((1, 1), (1, 1))
    result = run("project", path, "--bound", 1, "-o", tmp_path / "out.onnx", "--method", "rescale")
    assert result.exit_code == 0
    (report,) = bounds_reports(read_model(tmp_path / "out.onnx"), get_backend("numpy"))
    assert report.upper <= 1


@pytest.mark.parametrize("by_axis", [True, False])
def test_sparse_initialisers_are_read_and_not_written(tmp_path, by_axis):
    kernel = np.where(rng.random(KERNEL.shape) < 0.3, KERNEL, 0).astype(np.float32)
    places = np.flatnonzero(kernel)
    indices = np.stack(np.unravel_index(places, kernel.shape), 1) if by_axis else places
    values = numpy_helper.from_array(kernel.ravel()[places], "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices.astype(np.int64)), kernel.shape)
    path = save(tmp_path / "m.onnx", [conv("x", "w", "y")])
    model = onnx.load(path)
    model.graph.sparse_initializer.append(sparse)
    onnx.save(model, path)
    (layer,) = read_model(path)
    np.testing.assert_array_equal(layer.kernel, kernel)
    assert (layer.stored, layer.input_shape) == (None, (8, 8))
    result = run("project", path, "--bound", 0.01, "-o", tmp_path / "out.onnx")
    assert (result.exit_code, " y;" in result.stderr) == (1, True)
