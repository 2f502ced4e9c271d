"""ONNX models as graphs of maps: every operator against onnxruntime, and the certificate against Jacobians."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from random_networks import largest_jacobian

from convsv_core import lipschitz
from convsv_core._network.jacobian import linearize
from convsv_core._network.patterns import simplify
from convsv_core.layers import ModelError
from convsv_core.networks import network_graph

ort = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(0)
X = (1, 4, 6, 5)


def numbers(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def integers(*values):
    return np.asarray(values, np.int64)


def model_of(nodes, constants, shape, *, opset=18, outputs=("y",), kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def one(op, *extra, shape=X, opset=18, outputs=1, first=True, **attributes):
    """Return a model with one node, whose further inputs are constants, or absent where they are None."""
    names = ["" if value is None else f"c{index}" for index, value in enumerate(extra)]
    constants = {name: value for name, value in zip(names, extra, strict=True) if name}
    results = ["y", *(f"y{index}" for index in range(1, outputs))]
    node = helper.make_node(op, ["x", *names] if first else [*names, "x"], results, name="node", **attributes)
    return model_of([node], constants, shape, opset=opset, outputs=results)


CASES = {
    **{
        op: one(op)
        for op in (
            *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "HardSigmoid", "Sigmoid", "Softplus", "Softsign", "Tanh"),
            *("Abs", "Erf", "Sin", "Cos", "Atan", "Asinh", "Exp", "Neg", "Identity", "HardSwish", "Mish"),
            *("GlobalAveragePool", "GlobalMaxPool", "Flatten", "Transpose", "Softmax", "LogSoftmax"),
        )
    },
    "Gelu": one("Gelu", opset=20),
    "Gelu tanh": one("Gelu", opset=20, approximate="tanh"),
    "PRelu": one("PRelu", numbers(4, 1, 1)),
    "Clip 6": one("Clip", opset=6, min=-0.3, max=0.4),
    "Clip 13": one("Clip", np.float32(-0.3), np.float32(0.4)),
    "Clip without a low end": one("Clip", None, np.float32(0.4)),
    "Shrink": one("Shrink", lambd=0.3, bias=0.3),
    "Pow": one("Pow", np.float32(2)),
    "Pow 3": one("Pow", np.float32(3)),
    "Softmax 11": one("Softmax", opset=11, axis=2),
    "Add": one("Add", numbers(4, 1, 1)),
    "Sub": one("Sub", numbers(5), first=False),
    "Mul that repeats": one("Mul", numbers(3, 4, 6, 5)),
    "Div": one("Div", numbers(4, 6, 1)),
    "Max": one("Max", np.float32(0.1)),
    "Min": one("Min", numbers(5)),
    "Where": one("Where", RNG.random((6, 5)) < 0.5, numbers(1), first=False),
    "MatMul": one("MatMul", numbers(5, 3)),
    "MatMul on the left": one("MatMul", numbers(4, 3, 6), first=False),
    "MatMul by a vector": one("MatMul", numbers(5)),
    "Gemm": one("Gemm", numbers(3, 5), numbers(3), shape=(1, 5), transB=1, alpha=0.7, beta=0.3),
    "Gemm transA": one("Gemm", numbers(4, 3), shape=(4, 2), transA=1),
    "Gemm on the left": one("Gemm", numbers(2, 3), shape=(2, 4), transA=1, first=False),
    "Conv": one("Conv", numbers(6, 2, 3, 3), numbers(6), group=2, pads=[1, 0, 1, 2], strides=[2, 1]),
    "Conv dilated": one("Conv", numbers(2, 4, 3, 2), dilations=[2, 3], pads=[2, 1, 2, 2]),
    "Conv SAME_LOWER": one("Conv", numbers(2, 4, 2, 2), auto_pad="SAME_LOWER", strides=[2, 2]),
    "Conv 1-D": one("Conv", numbers(2, 4, 3), shape=(1, 4, 9)),
    "Conv 3-D": one("Conv", numbers(2, 2, 2, 3, 1), shape=(1, 2, 4, 5, 3), pads=[0, 1, 0, 0, 1, 1]),
    "ConvTranspose": one(
        "ConvTranspose", numbers(4, 3, 3, 3), strides=[2, 1], pads=[1, 0, 0, 1], output_padding=[1, 0]
    ),
    "ConvTranspose groups": one("ConvTranspose", numbers(4, 1, 2, 2), numbers(2), group=2, strides=[2, 2]),
    "BatchNormalization": one(
        "BatchNormalization", numbers(4), numbers(4), numbers(4), np.abs(numbers(4)), epsilon=0.1
    ),
    "InstanceNormalization": one("InstanceNormalization", numbers(4), numbers(4), epsilon=0.01),
    "LayerNormalization": one("LayerNormalization", numbers(6, 5), numbers(6, 5), axis=2, epsilon=0.1),
    "GroupNormalization": one("GroupNormalization", numbers(4), numbers(4), num_groups=2, opset=21),
    "LRN": one("LRN", size=3, alpha=0.5, bias=1.5),
    "AveragePool": one("AveragePool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 0]),
    "AveragePool that counts": one("AveragePool", kernel_shape=[3, 2], pads=[1, 1, 1, 0], count_include_pad=1),
    "AveragePool SAME": one("AveragePool", kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
    "AveragePool ceil": one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, opset=19),
    "MaxPool": one("MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    "MaxPool ceil": one("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "MaxPool dilated": one("MaxPool", kernel_shape=[2, 2], dilations=[2, 3]),
    "ReduceMean": one("ReduceMean", integers(1, -1)),
    "ReduceMean 13": one("ReduceMean", opset=13, axes=[2, 3], keepdims=0),
    "ReduceSum of all": one("ReduceSum", keepdims=0),
    "ReduceSum of none": one("ReduceSum", noop_with_empty_axes=1),
    "ReduceMax": one("ReduceMax", integers(2)),
    "ReduceMin": one("ReduceMin", integers(2), keepdims=0),
    "ReduceL1": one("ReduceL1", integers(3)),
    "ReduceL2": one("ReduceL2", integers(3)),
    "ReduceLogSumExp": one("ReduceLogSumExp", integers(3)),
    "ReduceSumSquare": one("ReduceSumSquare", integers(3)),
    "CumSum": one("CumSum", np.asarray(2), exclusive=1, reverse=1),
    "Trilu": one("Trilu", np.asarray(1), upper=0),
    "Reshape": one("Reshape", integers(0, -1, 5)),
    "Squeeze": one("Squeeze", integers(0)),
    "Unsqueeze": one("Unsqueeze", integers(1, 3)),
    "Transpose to the last": one("Transpose", perm=[0, 2, 3, 1]),
    "Expand": one("Expand", integers(3, 4, 1, 1)),
    "Tile": one("Tile", integers(1, 2, 1, 3)),
    "Concat with a constant": one("Concat", numbers(1, 2, 6, 5), axis=1),
    "Slice": one("Slice", integers(1, -2), integers(3, -100), integers(1, 2), integers(1, -2)),
    "Slice 9": one("Slice", opset=9, starts=[1, -3], ends=[10, -1], axes=[1, 2]),
    "Split": one("Split", integers(1, 3), axis=1, outputs=2),
    "Split 11": one("Split", opset=11, axis=2, split=[2, 4], outputs=2),
    "Split by number": one("Split", axis=2, num_outputs=2, outputs=2),
    "Gather": one("Gather", np.asarray([[0, -1], [2, 2]]), axis=1),
    "Gather one": one("Gather", np.asarray(1), axis=2),
    "Pad 10": one("Pad", opset=10, pads=[0, 0, 1, 0, 0, 0, 2, 1], mode="edge"),
    "Pad": one("Pad", integers(0, 0, 1, -1, 0, 0, 2, 3), np.float32(0.5)),
    "Pad reflect": one("Pad", integers(0, 0, 2, 1, 0, 0, 2, 3), mode="reflect"),
    "DepthToSpace": one("DepthToSpace", blocksize=2, shape=(1, 8, 2, 3)),
    "DepthToSpace CRD": one("DepthToSpace", blocksize=2, mode="CRD", shape=(1, 8, 2, 3)),
    "SpaceToDepth": one("SpaceToDepth", blocksize=2, shape=(1, 2, 4, 6)),
    "Upsample": one("Upsample", np.asarray([1, 1, 2, 3], np.float32), opset=9),
    "Upsample linear": one("Upsample", np.asarray([1, 1, 2, 2], np.float32), opset=9, mode="linear"),
    "Dropout": one("Dropout", opset=11),
    "Dropout 13": one("Dropout", np.float32(0.5)),
}
"""Models of one operator each, by what they test."""

for method, where in (
    ("nearest", "asymmetric"),
    ("nearest", "half_pixel"),
    ("linear", "half_pixel"),
    ("linear", "align_corners"),
    ("linear", "pytorch_half_pixel"),
    ("linear", "asymmetric"),
    ("cubic", "half_pixel"),
    ("cubic", "align_corners"),
):
    for size in ((9, 3), (3, 10)):
        CASES[f"Resize {method} {where} {size}"] = one(
            "Resize", None, None, integers(1, 4, *size), mode=method, coordinate_transformation_mode=where
        )
    scales = np.asarray([1, 1, 1.7, 0.6], np.float32)
    if method != "cubic":
        CASES[f"Resize {method} {where} by scales"] = one(
            "Resize", None, scales, mode=method, coordinate_transformation_mode=where
        )
for rounding in ("floor", "ceil", "round_prefer_ceil"):
    CASES[f"Resize {rounding}"] = one("Resize", None, None, integers(1, 4, 4, 9), nearest_mode=rounding)


def run(model, x):
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.astype(np.float32)})


def shape_of(model):
    return tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)


@pytest.mark.parametrize("name", CASES)
def test_operators_compute_what_onnxruntime_computes(name):
    model = CASES[name]
    x = numbers(*shape_of(model))
    graph = network_graph(model)
    values = linearize(graph, {"x": x}).values
    for output, expected in zip(model.graph.output, run(model, x), strict=True):
        assert values[output.name].shape == expected.shape == graph[output.name].shape
        np.testing.assert_allclose(values[output.name], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_operators_have_a_bound_above_their_jacobians(name):
    graph = network_graph(CASES[name])
    ranged = name in ("Exp", "Pow", "Pow 3", "ReduceSumSquare")
    box = (-1.0, 1.0) if ranged else None
    found = lipschitz(graph, input_range=box, lower=False)
    assert math.isfinite(found.upper), found.missing
    assert largest_jacobian(graph, 0, box) <= found.upper


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Mean", "MatMul", "Concat"])
def test_two_branches(op):
    square = (1, 2, 4, 4)
    attributes = {"axis": 1} if op == "Concat" else {}
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["a"]),
        helper.make_node("Softplus", ["x"], ["b"]),
        helper.make_node(op, ["a", "b"], ["y"], **attributes),
    ]
    model = model_of(nodes, {}, square)
    graph, x = network_graph(model), numbers(*square)
    np.testing.assert_allclose(linearize(graph, {"x": x}).values["y"], run(model, x)[0], rtol=1e-4)
    found = lipschitz(graph, input_range=(-1, 1))
    assert largest_jacobian(graph, 0, (-1.0, 1.0)) <= found.upper
    alone = lipschitz(graph)
    assert math.isfinite(alone.upper) is (op not in ("Mul", "Div", "MatMul"))


# ---- shapes and whole networks -----------------------------------------------------


def test_shapes_that_the_model_computes_are_constants():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Mul", ["n", "one"], ["m"]),
        helper.make_node("Concat", ["m", "rest"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["r"]),
        helper.make_node("Gemm", ["r", "w"], ["y"], name="fc"),
    ]
    constants = {"zero": integers(0), "one": integers(1), "rest": integers(-1), "w": np.eye(24, 3, dtype=np.float32)}
    model = model_of(nodes, constants, ("batch", 2, 4, 3))
    found = lipschitz(model)
    assert [node.op for node in found.nodes] == ["Input", "Reshape", "Gemm"]
    assert found.upper == pytest.approx(1)
    assert lipschitz(model, output="fc").output == "y"


def test_free_axes_need_a_shape(tmp_path):
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, ("n", 3, "h", "w"))
    path = tmp_path / "free.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"give the shape of the input, x=1,3,\?,\?"):
        lipschitz(path)
    assert lipschitz(model, -np.ones((1, 3, 4, 4), np.float32), search=1).lower == 0
    for given in (np.ones((1, 3, 4, 4)), {"x": np.ones((1, 3, 4, 4))}):
        assert lipschitz(path, given, search=1).lower == pytest.approx(1)
    with pytest.raises(ModelError, match="does not fit"):
        lipschitz(model, np.zeros((1, 2, 4, 4), np.float32))


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (helper.make_node("LSTM", ["x", "w", "w"], ["y"], hidden_size=2), "a recurrent cell"),
        (helper.make_node("FusedConv", ["x", "w"], ["y"], domain="com.microsoft"), "fused by onnxruntime"),
        (helper.make_node("Mine", ["x"], ["y"], domain="my.own"), "custom"),
        (helper.make_node("Floor", ["x"], ["y"]), "its values jump"),
        (helper.make_node("GridSample", ["x", "x"], ["y"]), "no rule for the operator GridSample"),
        (helper.make_node("Pow", ["x", "x"], ["y"]), "depends on the input"),
        (
            helper.make_node("BatchNormalization", ["x", "w", "w", "w", "w"], ["y", "m", "v"], training_mode=1),
            "training mode",
        ),
    ],
)
def test_nodes_without_a_rule_are_named(node, reason):
    before = helper.make_node("Mul", ["z", "two"], ["x"], name="before")
    model = model_of([before, node], {"w": numbers(4), "two": np.float32(2)}, (1, 4, 2, 2))
    model.graph.input[0].name = "z"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    found = lipschitz(model)
    assert found.upper == math.inf
    (missing,) = found.missing
    assert (missing.name, reason in missing.reason) == ("y", True), missing
    assert missing.log10_before == pytest.approx(math.log10(2))


def test_control_flow_and_integer_inputs_are_named():
    body = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["b"])],
        "then",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    found = lipschitz(model_of(nodes, {"zero": np.float32(0)}, (2, 3)))
    assert any("control flow" in missing.reason for missing in found.missing)
    embedding = helper.make_node("Gather", ["w", "x"], ["y"])
    found = lipschitz(model_of([embedding], {"w": numbers(5, 3)}, (1, 4), kind=TensorProto.INT64))
    assert found.upper == math.inf
    assert any("not of floating numbers" in missing.reason for missing in found.missing)


def test_a_small_network_with_every_pattern():
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "g", "b", "m", "v"], ["n1"]),
        helper.make_node("Sigmoid", ["n1"], ["s1"]),
        helper.make_node("Mul", ["n1", "s1"], ["silu"]),
        helper.make_node("Conv", ["silu", "w2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "silu"], ["sum"]),
        helper.make_node("GlobalAveragePool", ["sum"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["y"]),
    ]
    constants = {
        "w1": numbers(4, 3, 3, 3),
        "w2": numbers(4, 4, 3, 3) / 40,
        "w3": numbers(4, 2),
        "g": numbers(4),
        "b": numbers(4),
        "m": numbers(4),
        "v": np.abs(numbers(4)),
    }
    model = model_of(nodes, constants, (1, 3, 8, 8))
    found = lipschitz(model)
    graph = simplify(network_graph(model))
    assert found.lower <= largest_jacobian(graph, 0) * 3
    assert largest_jacobian(graph, 0) <= found.upper
    assert found.log10_upper < found.log10_product
    assert [block.name for block in found.blocks] == ["sum"]
    assert found.blocks[0].branch_upper < 1
