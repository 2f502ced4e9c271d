"""Tests of the ONNX reader: geometry and extents of convolutions, and padding by Pad nodes."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime
import pytest
from convsv_adapters.formats.onnx import layers as onnx_layers
from onnx import TensorProto, helper, numpy_helper
from onnx_models import KERNEL, KERNEL_OF_3, conv, save, two_convolutions, unknown_to_inference, value

from convsv_core import lipschitz
from convsv_core.layers import ModelError, ReadOptions
from convsv_core.reports import read_model

rng = np.random.default_rng(0)


def read(path, *shapes, **named):
    options = ReadOptions(dict.fromkeys([""], *shapes) if shapes else named)
    return read_model(path, options)


def output_extents(path, **feeds):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [result.shape[2:] for result in session.run(None, feeds)]


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
    half = KERNEL_OF_3.astype(np.float16)
    bf16 = helper.make_tensor("b", TensorProto.BFLOAT16, (4, 4, 3, 3), KERNEL.ravel().tolist())
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
    np.testing.assert_allclose(second.kernel, KERNEL, rtol=2**-8)
    assert (first.name, second.name) == ("a", "y")
    assert second.input_shape == (7, 7)


def test_every_convolution_is_listed_also_those_not_supported(tmp_path):
    nodes = [
        helper.make_node("DeformConv", ["x", "w", "offset"], ["a"], name="deform"),
        conv("a", "dynamic", "b"),
        conv("b", "nowhere", "y"),
    ]
    inputs = [value("x", [1, 4, 8, 8]), value("offset", [1, 18, 6, 6]), value("dynamic", [4, 4, 1, 1])]
    deform, dynamic, nowhere = read(save(tmp_path / "m.onnx", nodes, inputs=inputs, weights={"w": KERNEL}, opset=19))
    assert "DeformConv is not supported" in deform.note
    assert "computed at run time" in dynamic.note
    assert "defined nowhere" in nowhere.note
    assert deform.kernel is dynamic.kernel is nowhere.kernel is None


def test_names_tell_layers_apart(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="same"),
        helper.make_node("Conv", ["a", "w"], ["y"], name="same"),
    ]
    path = save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 4, 9, 9])], weights={"w": KERNEL})
    assert [layer.name for layer in read(path)] == ["same", "same#2"]


# ---- extents --------------------------------------------------------------------------------------------


def test_a_free_batch_is_one_and_stale_shapes_are_dropped(tmp_path):
    stale = [value("a", ["N", 4, 999, 999])]
    path = two_convolutions(tmp_path / "m.onnx", ["N", 3, 20, 12], value_info=stale)
    assert [layer.input_shape for layer in read(path)] == [(20, 12), (10, 6)]


@pytest.mark.parametrize("given", [(3, 20, 12), (1, 3, 20, 12), (20, 12, 3), (1, 20, 12, 3), (7, 3, 20, 12)])
def test_input_shape_with_or_without_batch_and_channels_last(tmp_path, given):
    path = two_convolutions(tmp_path / "m.onnx", ["N", 3, "H", "W"])
    assert [layer.input_shape for layer in read(path, given)] == [(20, 12), (10, 6)]


def test_free_extents_are_stated_with_how_to_give_others(tmp_path):
    path = two_convolutions(tmp_path / "m.onnx", ["N", 3, -1, "W"])
    layers = read(path)
    assert [layer.input_shape for layer in layers] == [(128, 128), (64, 64)]
    for layer in layers:
        assert "x=1,3,?,?" in layer.note
        assert "for the input x=1,3,128,128; --input-shape gives others" in layer.note
        assert layer.assumed_extents
        assert layer.kernel is not None
    assert not any(layer.assumed_extents or layer.note for layer in read(path, (3, 20, 12)))


def test_a_free_axis_of_time_is_long_enough_for_every_layer(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(2, 1, 10)), "w2": rng.normal(size=(2, 2, 8))}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first", strides=[64]),
        helper.make_node("Conv", ["a", "w2"], ["y"], name="second", strides=[2]),
    ]
    inputs = [value("x", ["N", 1, "time"])]
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    path = save(tmp_path / "m.onnx", nodes, inputs=inputs, weights=weights)
    assert [layer.input_shape for layer in read(path)] == [(4096,), (64,)]


def test_an_input_of_unknown_rank_keeps_its_extents_open(tmp_path):
    path = two_convolutions(tmp_path / "m.onnx", None)
    for layer in read(path):
        assert layer.input_shape is None
        assert "give the shape of the input, x=?" in layer.note


def test_input_shapes_by_name(tmp_path):
    nodes = [conv("x", "w1", "a"), conv("z", "w1", "b"), helper.make_node("Add", ["a", "b"], ["y"])]
    inputs = [value("x", ["N", 3, "H", "W"]), value("z", ["N", 3, "H", "W"])]
    path = save(tmp_path / "m.onnx", nodes, inputs=inputs, weights={"w1": KERNEL_OF_3})
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
    path = save(tmp_path / "m.onnx", nodes, inputs=[value("x", ["N", "H", "W", 3])], weights={"w": KERNEL_OF_3})
    (layer,) = read(path, (20, 12, 3))
    assert layer.input_shape == (20, 12)


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
        nodes, "net", [value("x", [1, 4, 8, 8])], [value("y")], [numpy_helper.from_array(KERNEL, "w")]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("org.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    (layer,) = read(tmp_path / "m.onnx")
    assert layer.input_shape is None
    assert "running fails" in layer.note
    assert "\n" not in layer.note


# ---- padding by Pad nodes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "padding_mode"), [("constant", "zeros"), ("reflect", "reflect"), ("edge", "replicate")]
)
def test_a_pad_node_is_part_of_the_padding(tmp_path, mode, padding_mode):
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["p"], mode=mode),
        helper.make_node("Identity", ["p"], ["i"]),
        conv("i", "w", "y", strides=[2, 2]),
    ]
    weights = {"w": KERNEL_OF_3, "pads": np.asarray([0, 0, 1, 0, 0, 0, 2, 1])}
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
    weights = {"w": KERNEL_OF_3, "half": np.asarray([0, 0, 1, 2])}
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
    weights["w"] = KERNEL if pads[1] else KERNEL_OF_3
    (layer,) = read(save(tmp_path / "m.onnx", nodes, inputs=[value("x", [1, 3, 8, 8])], weights=weights))
    assert layer.input_shape == tuple(8 + pads[a] + pads[4 + a] for a in (2, 3))
    assert layer.conv.padding == ((own, own),) * 2
    assert "Pad node" in layer.note


@pytest.mark.parametrize(
    ("shape", "attributes", "words"),
    [
        ((4, 2, 3, 3), {}, "3 channels"),
        ((4, 3, 3, 3), {"kernel_shape": [5, 5]}, r"kernel_shape=\[5, 5\]"),
        ((4, 3, 3, 3), {"pads": [1, 1, 1]}, "3 entries, wanted 4"),
        ((4, 1, 3, 3), {"group": 3}, "group=3 does not divide the 4"),
    ],
)
def test_attributes_that_contradict_the_kernel_are_named(tmp_path, shape, attributes, words):
    path = tmp_path / "m.onnx"
    weights = [numpy_helper.from_array(np.ones(shape, np.float32), "w")]
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [image], [result], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    (layer,) = read_model(path)
    assert layer.conv is None
    assert re.search(words, layer.note)
    (missing,) = lipschitz(path).missing
    assert re.search(words, missing.reason)
