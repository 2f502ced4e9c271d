"""Tests of the ONNX reader where a model leaves axes of its inputs free."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from onnx_models import KERNEL, KERNEL_OF_3, conv, save, two_convolutions, value

from convsv_core.layers import ReadOptions
from convsv_core.reports import read_model


def hidden_from_inference(path, shape, *, multiple, channels=4):
    """Write a model that runs only for so many pixels or a multiple, and in which inference loses the shapes."""
    nodes = [
        helper.make_node("Reshape", ["x", "blocks"], ["b"]),
        helper.make_node("Reshape", ["b", "whole"], ["c"]),
        helper.make_node("NonZero", ["c"], ["n"]),
        helper.make_node("Shape", ["n"], ["s"]),
        helper.make_node("Gather", ["s", "last"], ["count"]),
        helper.make_node("Div", ["count", "channels"], ["extent"]),
        helper.make_node("Concat", ["front", "extent"], ["form"], axis=0),
        helper.make_node("Reshape", ["c", "form"], ["d"]),
        conv("d", "w", "y"),
    ]
    numbers = {"blocks": [-1, multiple], "whole": [-1], "last": [1], "channels": [channels], "front": [1, channels]}
    weights = {name: np.asarray(entries, np.int64) for name, entries in numbers.items()}
    return save(path, nodes, inputs=[value("x", shape)], weights=weights | {"w": KERNEL[..., 0]})


def read(path, **shapes):
    return read_model(path, ReadOptions(shapes))


def test_no_axis_is_called_free_where_none_is(tmp_path):
    path = hidden_from_inference(tmp_path / "m.onnx", ["batch", 4, 16], multiple=4)
    (layer,) = read(path)
    assert (layer.input_shape, layer.note, layer.assumed_extents) == ((16,), "", False)


def test_extents_for_free_axes_are_those_on_which_the_network_runs(tmp_path):
    path = hidden_from_inference(tmp_path / "m.onnx", [1, 4, "time"], multiple=1024)
    (layer,) = read(path)
    assert (layer.input_shape, layer.assumed_extents) == ((4096,), True)
    assert "free, x=1,4,?: its extents are those for the input x=1,4,4096;" in layer.note


def test_a_layer_without_extents_is_not_said_to_have_them(tmp_path):
    path = hidden_from_inference(tmp_path / "m.onnx", [1, 4, "time"], multiple=3000)
    (layer,) = read(path)
    assert layer.input_shape is None
    assert "running for the input x=1,4,128 fails" in layer.note
    assert layer.note.endswith("; --input-shape gives another input")
    assert "its extents are" not in layer.note
    (layer,) = read(path, x=(1, 4, 3000))
    assert (layer.input_shape, layer.note) == ((3000,), "")


@pytest.mark.parametrize(("symbol", "extent"), [("batch", 1), ("?", 128), (None, 128)])
def test_an_axis_has_the_extent_of_another_with_its_symbol(tmp_path, symbol, extent):
    nodes = [
        conv("x", "w1", "a"),
        helper.make_node("Transpose", ["state"], ["t"], perm=[2, 0, 1]),
        conv("t", "w2", "y"),
    ]
    inputs = [value("x", [symbol, 3, 16, 16]), value("state", [4, symbol, 1])]
    weights = {"w1": KERNEL_OF_3, "w2": KERNEL[:, :, 0, :1]}
    first, second = read(save(tmp_path / "m.onnx", nodes, inputs=inputs, weights=weights))
    assert (first.input_shape, second.input_shape) == ((16, 16), (extent,))
    assert second.assumed_extents is (extent != 1)


def test_axes_of_one_symbol_follow_the_given_shape_unless_it_gives_them_two_extents(tmp_path):
    nodes = [conv("x", "w1", "a"), conv("other", "w1", "y")]
    inputs = [value("x", [1, 3, "size", "size"]), value("other", [1, 3, "size", 16])]
    path = save(tmp_path / "m.onnx", nodes, inputs=inputs, weights={"w1": KERNEL_OF_3})
    assert [layer.input_shape for layer in read(path, x=(1, 3, 20, 20))] == [(20, 20), (20, 16)]
    assert [layer.input_shape for layer in read(path, x=(1, 3, 20, 24))] == [(20, 24), (128, 16)]


def test_free_axes_of_two_convolutions(tmp_path):
    layers = read(two_convolutions(tmp_path / "m.onnx", ["N", 3, "H", "W"]))
    assert [layer.input_shape for layer in layers] == [(128, 128), (64, 64)]
    assert all(layer.assumed_extents for layer in layers)
