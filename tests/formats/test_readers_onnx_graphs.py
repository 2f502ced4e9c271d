"""Tests of the ONNX reader: weights wherever a graph keeps them, bodies of nodes, and files."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import KERNEL, KERNEL_OF_3, conv, save, two_convolutions, unknown_to_inference, value

from convsv_core.layers import ModelError, ReadOptions
from convsv_core.reports import read_model

rng = np.random.default_rng(0)


def read(path, *shapes, **named):
    options = ReadOptions(dict.fromkeys([""], *shapes) if shapes else named)
    return read_model(path, options)


# ---- where weights are ------------------------------------------------------------------------------------


def test_weights_in_constants_behind_identity_and_folded(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(KERNEL_OF_3)),
        helper.make_node("Identity", ["c"], ["i"]),
        helper.make_node("Identity", ["i"], ["ii"]),
        conv("x", "ii", "a"),
        helper.make_node("Transpose", ["t"], ["tt"], perm=[3, 2, 0, 1]),
        conv("a", "tt", "y"),
    ]
    weights = {"t": np.ascontiguousarray(KERNEL.transpose(2, 3, 1, 0))}
    first, second = read(save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 3, 9, 9])], weights=weights))
    np.testing.assert_array_equal(first.kernel, KERNEL_OF_3)
    np.testing.assert_array_equal(second.kernel, KERNEL)
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
    inner = numpy_helper.from_array(2 * KERNEL, "inner")
    then = helper.make_graph([conv("a", "w2", "t1"), conv("t1", "inner", "t2")], "then", [], [value("t2")], [inner])
    constant = helper.make_node("Constant", [], ["own"], value=numpy_helper.from_array(3 * KERNEL))
    other = helper.make_graph([constant, conv("a", "own", "e1", pads=[1] * 4)], "else", [], [value("e1")])
    return helper.make_node("If", ["flag"], ["y"], name="if", then_branch=then, else_branch=other)


def test_both_branches_of_an_if(tmp_path):
    nodes = [conv("x", "w1", "a"), branches()]
    inputs = [value("x", ["N", 3, "H", "W"]), value("flag", [], TensorProto.BOOL)]
    path = save(tmp_path / "m.onnx", nodes, inputs=inputs, weights={"w1": KERNEL_OF_3, "w2": KERNEL})
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
    np.testing.assert_array_equal(found["if/then/t2"].kernel, 2 * KERNEL)
    np.testing.assert_array_equal(found["if/else/e1"].kernel, 3 * KERNEL)


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
    weights = {"w1": KERNEL_OF_3, "w2": KERNEL, "trips": np.asarray(trips), "yes": np.asarray(True)}
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
    weights = {"w2": KERNEL, "trips": np.asarray(2), "yes": np.asarray(True)}
    (layer,) = read(save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 4, 10, 12])], weights=weights))
    assert layer.name == "loop/body/if/then/t"
    assert layer.input_shape == (10, 12)
    assert "2 different extents" in layer.note


def test_a_scan_over_frames(tmp_path):
    body = helper.make_graph([conv("frame", "w", "out")], "body", [value("frame")], [value("out")])
    nodes = [helper.make_node("Scan", ["x"], ["y"], name="scan", body=body, num_scan_inputs=1, scan_input_axes=[1])]
    path = save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 5, 4, 8, 6])], weights={"w": KERNEL})
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
        [numpy_helper.from_array(KERNEL, "w")],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    (layer,) = read(tmp_path / "m.onnx")
    assert layer.input_shape == (9, 9)
    np.testing.assert_array_equal(layer.kernel, KERNEL)


# ---- files -------------------------------------------------------------------------------------------------


def with_external_data(folder):
    path = two_convolutions(folder / "m.onnx", [1, 3, 20, 12])
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data(tmp_path):
    first, _ = read(with_external_data(tmp_path))
    np.testing.assert_array_equal(first.kernel, KERNEL_OF_3)


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
