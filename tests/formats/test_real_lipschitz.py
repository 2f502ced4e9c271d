"""The certificate on networks that others designed: RapidOCR's where installed, and onnx's with random weights."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from convsv_core import lipschitz
from convsv_core._network.jacobian import linearize
from convsv_core.networks import network_graph

ort = pytest.importorskip("onnxruntime")
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
OCR = [
    ("ch_ppocr_mobile_v2.0_cls_infer.onnx", (1, 3, 48, 48)),
    ("ch_PP-OCRv4_rec_infer.onnx", (1, 3, 48, 48)),
    ("ch_PP-OCRv4_det_infer.onnx", (1, 3, 64, 64)),
]
"""The networks of RapidOCR, which have gates, attention and normalisations in parts."""


@pytest.mark.parametrize(("file", "shape"), OCR)
def test_networks_of_rapidocr(file, shape):
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("rapidocr_onnxruntime is not installed")
    path = Path(spec.submodule_search_locations[0]) / "models" / file
    x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    graph = network_graph(path, x)
    values = linearize(graph, {graph.inputs[0].name: x}).values
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for name, expected in zip(graph.outputs, session.run(list(graph.outputs), {graph.inputs[0].name: x}), strict=True):
        np.testing.assert_allclose(values[name], expected, rtol=1e-3, atol=1e-6 + 1e-4 * np.abs(expected).max())
    alone = lipschitz(path, x, lower=False)
    assert alone.upper == math.inf
    assert all("product of activations" in missing.reason for missing in alone.missing)
    assert math.isfinite(alone.missing[0].log10_before)
    ranged = lipschitz(path, x, input_range=(-1, 1))
    assert 0 < ranged.lower <= ranged.upper < math.inf
    assert ranged.log10_upper < ranged.log10_product


def with_random_weights(path):
    """Return a light model with random weights in place of its constants."""
    model, rng = onnx.load(path), np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    variances = {node.input[4] for node in model.graph.node if node.op_type == "BatchNormalization"}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = tuple(int(extent) for extent in shapes[node.input[0]])
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 1.0
        weights = rng.normal(size=shape) * scale
        weights = rng.uniform(0.5, 1.5, shape) if node.output[0] in variances else weights
        model.graph.initializer.append(numpy_helper.from_array(weights.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "logits"), [("squeezenet", "pool10_1"), ("shufflenet", "gpu_0/pred_1")])
def test_networks_with_random_weights(name, logits):
    model = with_random_weights(LIGHT / f"light_{name}.onnx")
    names = {output for node in model.graph.node for output in node.output}
    found = lipschitz(model, output=logits if logits in names else None)
    assert found.missing == ()
    assert found.lower <= found.upper
    assert found.log10_upper <= found.log10_product
    assert name != "shufflenet" or found.log10_upper < found.log10_product - 5
