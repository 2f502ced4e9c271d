"""Reading ONNX: geometry, extents and weights, wherever a graph keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from convsv_adapters.formats.onnx import layers as onnx_layers
from onnx import TensorProto, helper, numpy_helper

from convsv_core.analysis import read_model
from convsv_core.layers import ModelError, ReadOptions

rng = np.random.default_rng(0)
W33 = rng.normal(size=(4, 4, 3, 3)).astype(np.float32)
W33_IN3 = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)


def value(name, shape=None, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def save(path, nodes, *, inputs, weights=(), opset=17, value_info=(), ir=8):
    initializers = [numpy_helper.from_array(array, name) for name, array in dict(weights).items()]
    graph = helper.make_graph(
        nodes, "net", inputs, [value(name) for name in ["y"]], initializers, value_info=value_info
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    onnx.save(model, path)
    return path


def read(path, *shapes, **named):
    options = ReadOptions(dict.fromkeys([""], *shapes) if shapes else named)
    return read_model(Path(path), options)


def output_extents(path, **feeds):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [result.shape[2:] for result in session.run(None, feeds)]


def conv(source, weight, target, **attributes):
    return helper.make_node("Conv", [source, weight], [target], name=target, **attributes)


# ---- geometry ------------------------------------------------------------------------------------------


def test_attributes_become_the_geometry(tmp_path):
    weights = {"w": rng.normal(size=(6, 2, 3, 4)).astype(np.float32)}
    node = conv("x", "w", "y", strides=[2, 1], dilations=[1, 3], group=2, pads=[1, 0, 2, 5])
    path = save(tmp_path / "m.onnx", [node], inputs=[value("x", [1, 4, 12, 10])], weights=weights)
    (layer,) = read(path)
    assert layer.input_shape == (12, 10)
    assert (layer.conv.layout, layer.conv.strides, layer.conv.dilations, layer.conv.groups) == (
        "OIHW",
        (2, 1),
        (1, 3),
        2,
    )
    assert layer.conv.padding == ((1, 2), (0, 5))
    assert layer.conv.padding_mode == "zeros"
    np.testing.assert_array_equal(layer.kernel, weights["w"])


@pytest.mark.parametrize(("rank", "layout"), [(1, "OIW"), (2, "OIHW"), (3, "OIDHW")])
def test_every_number_of_axes(tmp_path, rank, layout):
    weights = {"w": np.ones((2, 3, *(3,) * rank), np.float32)}
    path = save(tmp_path / "m.onnx", [conv("x", "w", "y")], inputs=[value("x", [1, 3, *(8,) * rank])], weights=weights)
    (layer,) = read(path)
    assert layer.conv.layout == layout
    assert layer.input_shape == (8,) * rank


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_auto_pad_is_what_onnxruntime_does(tmp_path, auto_pad, stride):
    weights = {"w": rng.normal(size=(1, 1, 4, 3)).astype(np.float32)}
    nodes = [conv("x", "w", "y", auto_pad=auto_pad, strides=[stride, stride])]
    path = save(tmp_path / "auto.onnx", nodes, inputs=[value("x", [1, 1, 11, 8])], weights=weights)
    (layer,) = read(path)
    (top, bottom), (left, right) = layer.conv.padding
    nodes = [conv("x", "w", "y", pads=[top, left, bottom, right], strides=[stride, stride])]
    explicit = save(tmp_path / "pads.onnx", nodes, inputs=[value("x", [1, 1, 11, 8])], weights=weights)
    image = rng.normal(size=(1, 1, 11, 8)).astype(np.float32)
    results = [onnxruntime.InferenceSession(str(p)).run(None, {"x": image})[0] for p in (path, explicit)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 0, 1, 2]},
        {"pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {"output_shape": [10, 9]},
        {"auto_pad": "SAME_UPPER"},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
    ],
)
def test_transposed_padding_gives_the_extents_of_onnxruntime(tmp_path, attributes):
    weights = {"w": rng.normal(size=(3, 2, 3, 3)).astype(np.float32)}
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], **attributes)
    path = save(tmp_path / "m.onnx", [node], inputs=[value("x", [1, 3, 5, 4])], weights=weights)
    (layer,) = read(path)
    assert layer.conv.transposed
    assert layer.conv.layout == "IOHW"
    assert layer.input_shape == (5, 4)
    extents = tuple(
        2 * (n - 1) + 3 - before - after
        for n, (before, after) in zip(layer.input_shape, layer.conv.padding, strict=True)
    )
    assert (extents,) == tuple(output_extents(path, x=np.ones((1, 3, 5, 4), np.float32)))


def test_float16_bfloat16_and_missing_names(tmp_path):
    half = W33_IN3.astype(np.float16)
    bf16 = helper.make_tensor("b", TensorProto.BFLOAT16, (4, 4, 3, 3), W33.ravel().tolist())
    nodes = [
        helper.make_node("Conv", ["x", "h"], ["a"]),
        helper.make_node("Cast", ["a"], ["c"], to=TensorProto.BFLOAT16),
        helper.make_node("Conv", ["c", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", [1, 3, 9, 9], TensorProto.FLOAT16)],
        [value("y", None, TensorProto.BFLOAT16)],
        [numpy_helper.from_array(half, "h"), bf16],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)]), tmp_path / "m.onnx")
    first, second = read(tmp_path / "m.onnx")
    assert first.kernel.dtype == np.float16
    assert second.kernel.dtype == np.float32
    np.testing.assert_allclose(second.kernel, W33, rtol=2**-8)
    assert (first.name, second.name) == ("a", "y")
    assert second.input_shape == (7, 7)


def test_every_convolution_is_listed_also_those_not_supported(tmp_path):
    nodes = [
        helper.make_node("DeformConv", ["x", "w", "offset"], ["a"], name="deform"),
        conv("a", "dynamic", "b"),
        conv("b", "nowhere", "y"),
    ]
    inputs = [value("x", [1, 4, 8, 8]), value("offset", [1, 18, 6, 6]), value("dynamic", [4, 4, 1, 1])]
    deform, dynamic, nowhere = read(save(tmp_path / "m.onnx", nodes, inputs=inputs, weights={"w": W33}, opset=19))
    assert "DeformConv is not supported" in deform.note
    assert "computed at run time" in dynamic.note
    assert "defined nowhere" in nowhere.note
    assert deform.kernel is dynamic.kernel is nowhere.kernel is None


def test_names_tell_layers_apart(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="same"),
        helper.make_node("Conv", ["a", "w"], ["y"], name="same"),
    ]
    path = save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 4, 9, 9])], weights={"w": W33})
    assert [layer.name for layer in read(path)] == ["same", "same#2"]


# ---- extents --------------------------------------------------------------------------------------------


def two_convolutions(path, shape, **options):
    nodes = [conv("x", "w1", "a", strides=[2, 2], pads=[1, 1, 1, 1]), conv("a", "w2", "y")]
    return save(path, nodes, inputs=[value("x", shape)], weights={"w1": W33_IN3, "w2": W33}, **options)


def test_a_free_batch_is_one_and_stale_shapes_are_dropped(tmp_path):
    stale = [value("a", ["N", 4, 999, 999])]
    path = two_convolutions(tmp_path / "m.onnx", ["N", 3, 20, 12], value_info=stale)
    assert [layer.input_shape for layer in read(path)] == [(20, 12), (10, 6)]


@pytest.mark.parametrize("given", [(3, 20, 12), (1, 3, 20, 12), (20, 12, 3), (1, 20, 12, 3), (7, 3, 20, 12)])
def test_input_shape_with_or_without_batch_and_channels_last(tmp_path, given):
    path = two_convolutions(tmp_path / "m.onnx", ["N", 3, "H", "W"])
    assert [layer.input_shape for layer in read(path, given)] == [(20, 12), (10, 6)]


def test_free_extents_are_marked_with_how_to_give_them(tmp_path):
    path = two_convolutions(tmp_path / "m.onnx", ["N", 3, -1, "W"])
    for layer in read(path):
        assert layer.input_shape is None
        assert "x=1,3,?,?" in layer.note
        assert layer.kernel is not None


def test_input_shapes_by_name(tmp_path):
    nodes = [conv("x", "w1", "a"), conv("z", "w1", "b"), helper.make_node("Add", ["a", "b"], ["y"])]
    inputs = [value("x", ["N", 3, "H", "W"]), value("z", ["N", 3, "H", "W"])]
    path = save(tmp_path / "m.onnx", nodes, inputs=inputs, weights={"w1": W33_IN3})
    layers = read(path, x=(1, 3, 9, 8), z=(1, 3, 5, 4))
    assert [layer.input_shape for layer in layers] == [(9, 8), (5, 4)]
    with pytest.raises(ModelError, match="no input is called 'q'; its inputs are x, z"):
        read(path, q=(1, 3, 9, 8))


@pytest.mark.parametrize("given", [(4, 20, 12), (1, 1, 3, 20, 12), (20,)])
def test_an_input_shape_that_the_model_contradicts(tmp_path, given):
    path = two_convolutions(tmp_path / "m.onnx", ["N", 3, "H", "W"])
    with pytest.raises(ModelError, match=r"input 'x' is \?x3x\?x\? in the model"):
        read(path, given)


def test_channels_last_network(tmp_path):
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), conv("t", "w", "y")]
    path = save(tmp_path / "m.onnx", nodes, inputs=[value("x", ["N", "H", "W", 3])], weights={"w": W33_IN3})
    (layer,) = read(path, (20, 12, 3))
    assert layer.input_shape == (20, 12)


def unknown_to_inference(path):
    """A network whose inner extents depend on values: five rows for each that an input asks for."""
    nodes = [
        conv("x", "w1", "a", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["rows", "five"], ["stop"]),
        helper.make_node("Slice", ["a", "zero", "stop", "axis"], ["cut"]),
        conv("cut", "w2", "y", pads=[1, 1, 1, 1]),
    ]
    weights = {
        "w1": W33_IN3,
        "w2": W33,
        "five": np.asarray([5]),
        "zero": np.asarray([0]),
        "axis": np.asarray([2]),
    }
    inputs = [value("x", ["N", 3, 8, 6]), value("rows", [1], TensorProto.INT64)]
    return save(path, nodes, inputs=inputs, weights=weights)


def test_running_the_network_finds_what_inference_does_not(tmp_path):
    layers = read(unknown_to_inference(tmp_path / "m.onnx"))
    assert [layer.input_shape for layer in layers] == [(8, 6), (5, 6)]


def test_without_onnxruntime_unknown_extents_are_marked(tmp_path, monkeypatch):
    def no_onnxruntime(*arguments):
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr(onnx_layers, "run_for_shapes", no_onnxruntime)
    first, second = read(unknown_to_inference(tmp_path / "m.onnx"))
    assert first.input_shape == (8, 6)
    assert second.input_shape is None
    assert "onnxruntime is not installed" in second.note


def test_a_network_that_does_not_run_is_marked(tmp_path):
    nodes = [helper.make_node("Unheard", ["x"], ["a"], domain="org.example"), conv("a", "w", "y")]
    graph = helper.make_graph(
        nodes, "net", [value("x", [1, 4, 8, 8])], [value("y")], [numpy_helper.from_array(W33, "w")]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("org.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    (layer,) = read(tmp_path / "m.onnx")
    assert layer.input_shape is None
    assert "running fails" in layer.note
    assert "\n" not in layer.note


# ---- padding by nodes of its own ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "padding_mode"), [("constant", "zeros"), ("reflect", "reflect"), ("edge", "replicate")]
)
def test_a_pad_node_is_part_of_the_padding(tmp_path, mode, padding_mode):
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["p"], mode=mode),
        helper.make_node("Identity", ["p"], ["i"]),
        conv("i", "w", "y", strides=[2, 2]),
    ]
    weights = {"w": W33_IN3, "pads": np.asarray([0, 0, 1, 0, 0, 0, 2, 1])}
    (layer,) = read(save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 3, 8, 8])], weights=weights))
    assert layer.input_shape == (8, 8)
    assert layer.conv.padding == ((1, 2), (0, 1))
    assert layer.conv.padding_mode == padding_mode
    assert layer.note == ""


def test_pads_that_nodes_compute_and_that_add_to_the_layers_own(tmp_path):
    nodes = [
        helper.make_node("Concat", ["half", "half"], ["pads"], axis=0),
        helper.make_node("Pad", ["x", "pads"], ["p"]),
        conv("p", "w", "y", pads=[1, 1, 1, 1]),
    ]
    weights = {"w": W33_IN3, "half": np.asarray([0, 0, 1, 2])}
    (layer,) = read(save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 3, 8, 8])], weights=weights))
    assert layer.input_shape == (8, 8)
    assert layer.conv.padding == ((2, 2), (3, 3))


@pytest.mark.parametrize(
    ("pads", "fill", "mode", "own"),
    [
        ([0, 0, -1, 0, 0, 0, 0, 0], 0.0, "constant", 0),
        ([0, 0, 1, 1, 0, 0, 1, 1], 5.0, "constant", 0),
        ([0, 1, 0, 0, 0, 0, 0, 0], 0.0, "constant", 0),
        ([0, 0, 1, 1, 0, 0, 1, 1], 0.0, "reflect", 1),
    ],
)
def test_a_pad_node_that_is_no_padding_is_left_and_noted(tmp_path, pads, fill, mode, own):
    nodes = [
        helper.make_node("Pad", ["x", "pads", "fill"], ["p"], mode=mode),
        conv("p", "w", "y", pads=[own] * 4),
    ]
    weights = {"pads": np.asarray(pads), "fill": np.asarray(fill, np.float32)}
    weights["w"] = W33 if pads[1] else W33_IN3
    (layer,) = read(save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 3, 8, 8])], weights=weights))
    assert layer.input_shape == tuple(8 + pads[a] + pads[4 + a] for a in (2, 3))
    assert layer.conv.padding == ((own, own),) * 2
    assert "Pad node" in layer.note


# ---- where weights are ------------------------------------------------------------------------------------


def test_weights_in_constants_behind_identity_and_folded(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W33_IN3)),
        helper.make_node("Identity", ["c"], ["i"]),
        helper.make_node("Identity", ["i"], ["ii"]),
        conv("x", "ii", "a"),
        helper.make_node("Transpose", ["t"], ["tt"], perm=[3, 2, 0, 1]),
        conv("a", "tt", "y"),
    ]
    weights = {"t": np.ascontiguousarray(W33.transpose(2, 3, 1, 0))}
    first, second = read(save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 3, 9, 9])], weights=weights))
    np.testing.assert_array_equal(first.kernel, W33_IN3)
    np.testing.assert_array_equal(second.kernel, W33)
    assert second.input_shape == (7, 7)


def test_quantised_weights(tmp_path):
    stored = rng.integers(-9, 9, size=(4, 3, 3, 3), dtype=np.int8)
    scale, zero = np.asarray([0.5, 1, 2, 4], np.float32), np.asarray([1, 0, 2, 3], np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"], axis=0),
        conv("x", "w", "y"),
        helper.make_node("ConvInteger", ["xi", "q", "", "zero0"], ["yi"], name="integer"),
        helper.make_node("QLinearConv", ["xi", "s", "z", "q", "scale", "zero", "s", "z"], ["yq"], name="linear"),
    ]
    inputs = [value("x", [1, 3, 8, 8]), value("xi", [1, 3, 8, 8], TensorProto.UINT8)]
    weights = {"q": stored, "scale": scale, "zero": zero, "zero0": np.asarray(2, np.int8)}
    weights |= {"s": np.asarray(1, np.float32), "z": np.asarray(0, np.uint8)}
    path = save(tmp_path / "m.onnx", nodes, inputs=inputs, weights=weights)
    behind, integer, linear = read(path)
    true = (stored - zero[:, None, None, None].astype(float)) * scale[:, None, None, None]
    np.testing.assert_allclose(behind.kernel, true)
    np.testing.assert_allclose(linear.kernel, true)
    np.testing.assert_allclose(integer.kernel, stored - 2.0)
    assert "without a scale" in integer.note
    assert [layer.input_shape for layer in (behind, integer, linear)] == [(8, 8)] * 3


def branches():
    """An `If` whose branches see the weights around it and hold some of their own."""
    inner = numpy_helper.from_array(2 * W33, "inner")
    then = helper.make_graph([conv("a", "w2", "t1"), conv("t1", "inner", "t2")], "then", [], [value("t2")], [inner])
    constant = helper.make_node("Constant", [], ["own"], value=numpy_helper.from_array(3 * W33))
    other = helper.make_graph([constant, conv("a", "own", "e1", pads=[1] * 4)], "else", [], [value("e1")])
    return helper.make_node("If", ["flag"], ["y"], name="if", then_branch=then, else_branch=other)


def test_both_branches_of_an_if(tmp_path):
    nodes = [conv("x", "w1", "a"), branches()]
    inputs = [value("x", ["N", 3, "H", "W"]), value("flag", [], TensorProto.BOOL)]
    path = save(tmp_path / "m.onnx", nodes, inputs=inputs, weights={"w1": W33_IN3, "w2": W33})
    layers = read(path, (3, 10, 12))
    # ONNX keeps a node's attributes in the order of their names.
    found = {layer.name: layer for layer in layers}
    assert set(found) == {"a", "if/then/t1", "if/then/t2", "if/else/e1"}
    assert layers[0].name == "a"
    assert {name: layer.input_shape for name, layer in found.items()} == {
        "a": (10, 12),
        "if/then/t1": (8, 10),
        "if/then/t2": (6, 8),
        "if/else/e1": (8, 10),
    }
    np.testing.assert_array_equal(found["if/then/t2"].kernel, 2 * W33)
    np.testing.assert_array_equal(found["if/else/e1"].kernel, 3 * W33)


def counter():
    return value("i", [], TensorProto.INT64), value("cond", [], TensorProto.BOOL)


def loop(padding, trips=3):
    body = helper.make_graph(
        [conv("state", "w2", "next", pads=[padding] * 4), helper.make_node("Identity", ["cond"], ["again"])],
        "body",
        [*counter(), value("state", ["a", "b", "c", "d"])],
        [value("again", [], TensorProto.BOOL), value("next", ["a", "b", "c", "d"])],
    )
    nodes = [
        conv("x", "w1", "a", pads=[1] * 4),
        helper.make_node("Loop", ["trips", "yes", "a"], ["b"], name="loop", body=body),
        conv("b", "w2", "y"),
    ]
    weights = {"w1": W33_IN3, "w2": W33, "trips": np.asarray(trips), "yes": np.asarray(True)}
    return nodes, weights


def test_a_loop_that_keeps_its_extents(tmp_path):
    nodes, weights = loop(padding=1)
    path = save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 3, 10, 12])], weights=weights)
    layers = read(path)
    assert [layer.name for layer in layers] == ["a", "loop/body/next", "y"]
    assert [layer.input_shape for layer in layers] == [(10, 12)] * 3


def test_a_loop_that_changes_its_extents(tmp_path):
    nodes, weights = loop(padding=0)
    path = save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 3, 10, 12])], weights=weights)
    _, inside, after = read(path)
    assert inside.input_shape == (10, 12)
    assert "3 different extents" in inside.note
    assert after.input_shape == (4, 6)


def test_a_branch_inside_a_loop_is_probed(tmp_path):
    then = helper.make_graph([conv("state", "w2", "t")], "then", [], [value("t")])
    other = helper.make_graph([helper.make_node("Identity", ["state"], ["e"])], "else", [], [value("e")])
    body = helper.make_graph(
        [
            helper.make_node("If", ["cond"], ["next"], name="if", then_branch=then, else_branch=other),
            helper.make_node("Identity", ["cond"], ["again"]),
        ],
        "body",
        [*counter(), value("state")],
        [value("again", [], TensorProto.BOOL), value("next")],
    )
    nodes = [helper.make_node("Loop", ["trips", "yes", "x"], ["y"], name="loop", body=body)]
    weights = {"w2": W33, "trips": np.asarray(2), "yes": np.asarray(True)}
    (layer,) = read(save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 4, 10, 12])], weights=weights))
    assert layer.name == "loop/body/if/then/t"
    assert layer.input_shape == (10, 12)
    assert "2 different extents" in layer.note


def test_a_scan_over_frames(tmp_path):
    body = helper.make_graph([conv("frame", "w", "out")], "body", [value("frame")], [value("out")])
    nodes = [helper.make_node("Scan", ["x"], ["y"], name="scan", body=body, num_scan_inputs=1, scan_input_axes=[1])]
    path = save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 5, 4, 8, 6])], weights={"w": W33})
    (layer,) = read(path)
    assert layer.input_shape == (8, 6)


def test_functions_of_the_model_are_opened(tmp_path):
    body = [helper.make_node("Conv", ["a", "b"], ["c"], name="inner")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Block", ["a", "b"], ["c"], body, opsets[:1])
    graph = helper.make_graph(
        [helper.make_node("Block", ["x", "w"], ["y"], domain="local")],
        "net",
        [value("x", [1, 4, 9, 9])],
        [value("y")],
        [numpy_helper.from_array(W33, "w")],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    (layer,) = read(tmp_path / "m.onnx")
    assert layer.input_shape == (9, 9)
    np.testing.assert_array_equal(layer.kernel, W33)


# ---- files -------------------------------------------------------------------------------------------------


def with_external_data(folder):
    path = two_convolutions(folder / "m.onnx", [1, 3, 20, 12])
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data(tmp_path):
    first, _ = read(with_external_data(tmp_path))
    np.testing.assert_array_equal(first.kernel, W33_IN3)


def test_external_data_missing_or_truncated(tmp_path):
    path = with_external_data(tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"weights\.bin, is truncated"):
        read(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"weights\.bin, is missing"):
        read(path)


def test_running_a_network_with_external_data(tmp_path):
    path = unknown_to_inference(tmp_path / "m.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    assert [layer.input_shape for layer in read(path)] == [(8, 6), (5, 6)]


def test_a_model_is_known_by_its_content(tmp_path):
    path = two_convolutions(tmp_path / "m.onnx", [1, 3, 20, 12]).rename(tmp_path / "no_suffix")
    assert len(read(path)) == 2


@pytest.mark.parametrize("keep", [1, 10, 200])
def test_truncated(tmp_path, keep):
    path = two_convolutions(tmp_path / "m.onnx", [1, 3, 20, 12])
    path.write_bytes(path.read_bytes()[:-keep])
    with pytest.raises(ModelError, match="truncated"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"<html>not a model</html>", b"\x08\x08"])
def test_not_a_model(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX model"):
        read(tmp_path / "m.onnx")


@pytest.mark.parametrize("newer", [{"ir": onnx.IR_VERSION + 1}, {"opset": onnx.defs.onnx_opset_version() + 1}])
def test_too_new(tmp_path, newer):
    with pytest.raises(ModelError, match="too new"):
        read(two_convolutions(tmp_path / "m.onnx", [1, 3, 20, 12], **newer))


def test_a_layout_does_not_apply(tmp_path):
    path = two_convolutions(tmp_path / "m.onnx", [1, 3, 20, 12])
    with pytest.raises(ModelError, match="fixes the layout"):
        read_model(path, ReadOptions(layout="HWIO"))
