"""Small ONNX models for tests of the reader and the writer."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["KERNEL", "KERNEL_OF_3", "conv", "save", "two_convolutions", "unknown_to_inference", "value"]

_rng = np.random.default_rng(0)
KERNEL = _rng.normal(size=(4, 4, 3, 3)).astype(np.float32)
KERNEL_OF_3 = _rng.normal(size=(4, 3, 3, 3)).astype(np.float32)


def value(name, shape=None, kind=TensorProto.FLOAT):
    """Return a tensor's name, shape and type; the shape may hold symbols."""
    return helper.make_tensor_value_info(name, kind, shape)


def conv(source, weight, target, **attributes):
    """Return a Conv node that is called as its output."""
    return helper.make_node("Conv", [source, weight], [target], name=target, **attributes)


def save(
    path,
    nodes,
    initializers=(),
    *,
    inputs=None,
    weights=(),
    opset=17,
    functions=(),
    kind=TensorProto.FLOAT,
    value_info=(),
    ir=8,
):
    """Write a model whose output is ``y``, and return its path.

    `weights` maps names to arrays, which become initialisers beside those in `initializers`. By default the input is
    ``x`` of 4 channels and 8 x 8 pixels.
    """
    inputs = [value("x", [1, 4, 8, 8], kind)] if inputs is None else inputs
    initializers = [*initializers, *(numpy_helper.from_array(array, name) for name, array in dict(weights).items())]
    graph = helper.make_graph(nodes, "net", inputs, [value("y", None, kind)], initializers, value_info=value_info)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=functions)
    model.metadata_props.add(key="author", value="nobody")
    onnx.save(model, path)
    return path


def two_convolutions(path, shape, **options):
    """Write a model of two convolutions, of which the first halves the extents, and return its path."""
    nodes = [conv("x", "w1", "a", strides=[2, 2], pads=[1, 1, 1, 1]), conv("a", "w2", "y")]
    return save(path, nodes, inputs=[value("x", shape)], weights={"w1": KERNEL_OF_3, "w2": KERNEL}, **options)


def unknown_to_inference(path):
    """Write a network whose inner extents depend on values: an input says how many times five rows are kept."""
    nodes = [
        conv("x", "w1", "a", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["rows", "five"], ["stop"]),
        helper.make_node("Slice", ["a", "zero", "stop", "axis"], ["cut"]),
        conv("cut", "w2", "y", pads=[1, 1, 1, 1]),
    ]
    weights = {
        "w1": KERNEL_OF_3,
        "w2": KERNEL,
        "five": np.asarray([5]),
        "zero": np.asarray([0]),
        "axis": np.asarray([2]),
    }
    inputs = [value("x", ["N", 3, 8, 6]), value("rows", [1], TensorProto.INT64)]
    return save(path, nodes, inputs=inputs, weights=weights)
