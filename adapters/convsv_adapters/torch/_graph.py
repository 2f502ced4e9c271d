"""A PyTorch module at inference as a graph of maps."""

from __future__ import annotations

import collections
import operator
from typing import Any

import torch
from torch import nn

from convsv_adapters._networks import GraphWriter, Traced, Undescribed
from convsv_adapters.torch._calls import Call, Result, Rule
from convsv_adapters.torch._export import Operator, export, module_path
from convsv_adapters.torch._graph_functions import FUNCTION_RULES
from convsv_adapters.torch._graph_layers import LAYER_RULES
from convsv_adapters.torch._graph_pools import POOL_RULES
from convsv_adapters.torch._graph_shapes import SHAPE_RULES
from convsv_adapters.torch._layers import unwrapped
from convsv_core.networks import Graph, Input

__all__ = ["model_graph"]

RULES: dict[str, Rule] = {**LAYER_RULES, **FUNCTION_RULES, **POOL_RULES, **SHAPE_RULES}
"""The rules of all operators, by the operators' names in ATen."""


def model_graph(model: nn.Module, example_input: object) -> Graph:
    """Return a module as a graph of maps, by `torch.export.export` of one call.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode. It may be wrapped by `DistributedDataParallel`, `DataParallel` or `torch.compile`. Weights
        that a parametrization computes, and all else that does not depend on the input, are computed once.
    example_input : tensor, tuple, list or mapping
        The argument of the model, its positional arguments or its keyword arguments.

    Returns
    -------
    Graph
        Operators that no kind of map describes are `Unsupported` nodes.

    Raises
    ------
    ValueError
        There is no `example_input`, the call fails or cannot be traced, or the model is no fixed map, as in training
        mode.
    """
    if example_input is None:
        raise ValueError(
            "example_input=None: wanted the input of one call of the model, such as torch.zeros(1, 3, 64, 64)"
        )
    exported = export(unwrapped(model), example_input)
    writer = GraphWriter()
    known: dict[Operator, Any] = dict(exported.values)
    for node, tensor in exported.inputs.items():
        example = tensor.detach().cpu().double().numpy()
        known[node] = writer.add(node.name, Input(example), (), tuple(tensor.shape), "input")
    names = _names(exported.operators)
    for node in exported.operators:
        known[node] = _described(node, known, writer, names[node])
    return writer.graph([known[node] for node in exported.outputs])


def _names(operators: list[Operator]) -> dict[Operator, str]:
    """Return a name for each operator: the path of its module where that calls no other one, else PyTorch's name."""
    counts = collections.Counter(module_path(node) for node in operators if node.target is not operator.getitem)
    return {node: path if (path := module_path(node)) and counts[path] == 1 else node.name for node in operators}


def _described(node: Operator, known: dict[Operator, Any], writer: GraphWriter, name: str) -> Result:
    """Return the tensors of an operator, and add the nodes that describe it."""
    call = Call(node, known, writer, name)
    if node.target is operator.getitem:
        held, place = known[node.args[0]], node.args[1]
        if not isinstance(held, Traced):
            return held[place]
        return held if place == 0 else call.unsupported("what an operator returns beside its result, such as indices")
    if not isinstance(node.target, torch._ops.OpOverload):
        return call.unsupported("control flow, or an operator that torch.export does not look into")
    namespace, _, operation = node.target._schema.name.partition("::")
    if namespace != "aten":
        return call.unsupported("a custom operator")
    if (rule := RULES.get(operation)) is None:
        return call.unsupported(f"no rule for the operator {operation}")
    try:
        if not call.real:
            raise Undescribed("its result does not hold real numbers")
        return rule(call)
    except Undescribed as error:
        return call.unsupported(str(error))
