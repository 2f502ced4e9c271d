"""Running an ONNX network once, to find the extents that shape inference leaves unknown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.helper

from convsv_adapters.formats.onnx.graph import Scope
from convsv_adapters.formats.onnx.types import Types, dims_of
from convsv_adapters.parameters import HostArray
from convsv_core.plugins import one_line

__all__ = ["Wanted", "run_for_shapes"]


class Wanted(NamedTuple):
    """A tensor whose shape is wanted."""

    scope: Scope
    name: str
    rank: int


class Seen(NamedTuple):
    """The shapes that each wanted tensor took, and the place of the inputs on which the network ran."""

    choice: int
    shapes: list[list[tuple[int, ...]]]


def run_for_shapes(model: Any, folder: Path, choices: Sequence[Types], wanted: Sequence[Wanted]) -> Seen:
    """Run the network once on ones, and return for each wanted tensor the shapes that it takes.

    A tensor in the body of a loop may take several shapes. A tensor in a branch that is not taken has none.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place: a `Shape` node is put behind each tensor, and its result is made an output of the network.
    folder : Path
        Where files with external data lie.
    choices : sequence of Types
        The inputs of the network, with all their extents. The first of them on which the network runs counts.
    wanted : sequence of Wanted

    Raises
    ------
    ImportError
        onnxruntime is not installed.
    RuntimeError
        onnxruntime cannot run the network on any of the inputs. The reason is that for the first.
    """
    import onnxruntime

    labels = [_lead_out(*tensor, f"convsv.shape.{index}") for index, tensor in enumerate(wanted)]
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    errors: list[Exception] = []
    for index, inputs in enumerate(choices):
        for value in model.graph.input:
            if value.name in inputs:
                value.type.CopyFrom(inputs[value.name])
        try:
            content = model.SerializeToString()
            session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
            results = session.run(labels, {name: _ones(kind) for name, kind in inputs.items()})
        except Exception as error:  # onnxruntime's exceptions share no base class, and protobuf has a limit of size
            errors.append(error)
            continue
        shapes = []
        for result, tensor in zip(results, wanted, strict=True):
            rows = {tuple(int(extent) for extent in row) for row in np.reshape(result, (-1, tensor.rank))}
            shapes.append(sorted(row for row in rows if min(row) > 0))
        return Seen(index, shapes)
    raise RuntimeError(one_line(errors[0])) from errors[0]


def _lead_out(scope: Scope, name: str, rank: int, label: str) -> str:
    """Make the shape of a tensor an output of the whole network, and return the name of that output.

    A loop collects the shapes as a scan output, with one row for each iteration. The other branch of an `If` gives
    negative extents instead.
    """
    scope.graph.node.append(onnx.helper.make_node("Shape", [name], [label]))
    while True:
        scope.graph.output.append(onnx.helper.make_tensor_value_info(label, onnx.TensorProto.INT64, None))
        if scope.parent is None:
            return label
        owner = scope.owner
        assert owner is not None
        for sibling in scope.siblings():
            absent = onnx.helper.make_node("Constant", [], [label], value_ints=[-1] * rank)
            sibling.graph.node.append(absent)
            sibling.graph.output.append(onnx.helper.make_tensor_value_info(label, onnx.TensorProto.INT64, None))
        for attribute in owner.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        label += "'"
        owner.output.append(label)
        scope = scope.parent


def _ones(kind: Any) -> HostArray:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
    return np.ones(dims_of(kind) or (), dtype)
