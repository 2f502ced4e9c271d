"""Translate operators of ONNX to kinds of maps, by a table with one function for each operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from convsv_adapters._networks import Undescribed, stored_normalization
from convsv_adapters.formats.onnx import translation_arithmetic, translation_layers, translation_rearranging
from convsv_adapters.formats.onnx.graph import Node, attributes, operator_name
from convsv_adapters.formats.onnx.operators import FLOATING, OPERATORS, Reading, operator
from convsv_core.networks import Identity

__all__ = ["ENTERED", "translate"]

ENTERED = (translation_arithmetic, translation_layers, translation_rearranging)
"""The modules that enter further operators into the table when they are imported."""


def translate(reading: Reading, node: Node) -> None:
    """Append the nodes that an ONNX node is.

    Raises `Undescribed` for an operator that is no kind of map; LookupError or ValueError for one that is not valid.
    """
    name = operator_name(node)
    if name in DISCONTINUOUS:
        raise Undescribed("its values jump, so that no constant exists")
    if name not in OPERATORS:
        raise Undescribed(f"there is no rule for the operator {name}")
    for output in node.output:
        kind = reading.types.get(output)
        if output and kind is not None and kind.HasField("tensor_type"):
            floating = kind.tensor_type.elem_type in (*FLOATING, onnx.TensorProto.UNDEFINED)
            if not floating and output in _used(reading):
                raise Undescribed("its output is not of floating numbers")
    OPERATORS[name](reading, node, attributes(node))


def _used(reading: Reading) -> set[str]:
    """Return the tensors that a node or the network's outputs take."""
    graph = reading.scope.graph
    return {name for node in graph.node for name in node.input} | {value.name for value in graph.output}


DISCONTINUOUS = (
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "ThresholdedRelu",
    "ArgMax",
    "ArgMin",
    "Hardmax",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Equal",
    "Not",
    "And",
    "Or",
    "Xor",
    "IsNaN",
    "IsInf",
    "Mod",
)
"""Operators whose values jump."""


# ---- operators that return their input ----------------------------------------------------------------


@operator("Identity", "Dropout", "Cast", "CastLike")
def _identity(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    if node.op_type == "Dropout":
        training = reading.optional(node, 2)
        if training is not None and bool(np.all(training)):
            raise Undescribed("dropout in training mode")
    kind = reading.types.get(node.input[0])
    if kind is not None and kind.tensor_type.elem_type not in (*FLOATING, onnx.TensorProto.UNDEFINED):
        raise Undescribed("its input is not of floating numbers")
    reading.add(node, Identity(), node.input[:1])


@operator("BatchNormalization")
def _batch_normalization(reading: Reading, node: Node, values: dict[str, Any]) -> None:
    training = values.get("training_mode", 0) or values.get("is_test", 1) == 0 or len([n for n in node.output if n]) > 1
    if training:
        raise Undescribed("batch normalisation in training mode: its scale depends on the batch")
    weight, bias, mean, variance = (reading.constant(name) for name in node.input[1:5])
    rank, epsilon = len(reading.shape(node.input[0])), values.get("epsilon", 1e-5)
    reading.add(node, stored_normalization(rank, mean, variance, epsilon, weight, bias), node.input[:1])
