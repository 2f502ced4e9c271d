"""A function of JAX arrays, or a model of flax or equinox at inference, as a graph of maps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from convsv_adapters._jax.calls import Call, Result, Rule
from convsv_adapters._jax.equations import Equation, Value, trace_equations
from convsv_adapters._jax.graph_functions import FUNCTION_RULES
from convsv_adapters._jax.graph_layers import LAYER_RULES
from convsv_adapters._jax.graph_shapes import SHAPE_RULES
from convsv_adapters._jax.patterns import find_function
from convsv_adapters._jax.trees import named_leaves
from convsv_adapters._networks import GraphWriter, Traced, Undescribed
from convsv_core.networks import Elementwise, Graph, Input

__all__ = ["function_graph", "model_graph"]

RULES: dict[str, Rule] = {**LAYER_RULES, **FUNCTION_RULES, **SHAPE_RULES}
"""The rules of all primitives, by their names in JAX."""


def model_graph(model: Any, example_input: object) -> Graph:
    """Return a model as a graph of maps, from the equations of one call.

    Parameters
    ----------
    model : flax.nnx.Module, flax.linen.Module, equinox.Module or callable
        In evaluation mode. A linen module is bound to its variables, as by ``model.bind(variables)``. A function is of
        JAX arrays.
    example_input : array, jax.ShapeDtypeStruct, tuple, list or mapping
        The argument of the model, its positional arguments or its keyword arguments.

    Returns
    -------
    Graph
        Primitives that no kind of map describes are `Unsupported` nodes.

    Raises
    ------
    ValueError
        There is no `example_input`, the call fails or cannot be traced, a linen module has no variables, or the model
        is no fixed map, as in training mode.
    """
    if example_input is None:
        raise ValueError("example_input=None: wanted the input of one call of the model, or a jax.ShapeDtypeStruct")
    function, parameters = _inference(model)
    return function_graph(function, example_input, parameters)


def function_graph(function: Callable[..., object], example_input: object, parameters: object = ()) -> Graph:
    """Return a function of JAX arrays as a graph of maps; the arguments are as for `model_graph`.

    `parameters` is a tree of arrays that the function uses. Nodes that take one of them have the name of its layer.
    """
    paths: dict[int, str] = {}
    for path, leaf in named_leaves(parameters).items():
        paths.setdefault(id(leaf.value), path)
    traced = trace_equations(function, example_input, paths)
    writer = GraphWriter()
    known: dict[Value, Traced] = {}
    for place, (value, example) in enumerate(zip(traced.inputs, traced.examples, strict=True)):
        name = "input" if len(traced.inputs) == 1 else f"input_{place}"
        known[value] = writer.add(name, Input(example), (), value.shape, "input")
    for equation in traced.equations:
        found = _described(equation, known, writer)
        known.update(zip(equation.results, found if _is_several(found) else (found,), strict=False))  # type: ignore[arg-type]
    return writer.graph([known[value] for value in traced.outputs])


def _is_several(found: Result) -> bool:
    return not isinstance(found, Traced)


def _described(equation: Equation, known: dict[Value, Traced], writer: GraphWriter) -> Result:
    """Return the tensors of an equation, and add the nodes that describe it."""
    call = Call(equation, known, writer)
    if (function := find_function(equation.results[0])) is not None:
        kind = Elementwise(function.name, function.parameters)
        return call.result(kind, known[function.operand], op=function.name)
    rule = RULES.get(equation.primitive)
    if rule is None:
        return call.unsupported(f"no rule for the primitive {equation.primitive}")
    try:
        if not jnp.issubdtype(equation.results[0].dtype, jnp.floating):
            raise Undescribed("its result does not hold real numbers")
        return rule(call)
    except Undescribed as error:
        return call.unsupported(str(error))


# ---- models ------------------------------------------------------------------------------------------------


class _Inference(NamedTuple):
    """The function that a model is in its present mode, and the tree of its parameters."""

    function: Callable[..., object]
    parameters: object


def _inference(model: Any) -> _Inference:
    """Return the function that a model is in its present mode; raise ValueError if it is in training mode."""
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if nnx is not None and isinstance(model, nnx.Module):
        return _nnx_function(nnx, model)
    if linen is not None and isinstance(model, linen.Module):
        if model.scope is None:
            raise ValueError(
                f"model is a {type(model).__qualname__} of flax.linen without its variables: wanted "
                f"model.bind(variables)"
            )
        module, variables = model.unbind()
        return _Inference(lambda *args, **kwargs: module.apply(variables, *args, **kwargs), variables)
    return _Inference(model, model)


TRAINING_FLAGS = ("deterministic", "use_running_average")
"""The attributes of nnx modules that are False in training mode."""


def _nnx_function(nnx: Any, model: Any) -> _Inference:
    for path, module in nnx.iter_graph(model):
        training = [flag for flag in TRAINING_FLAGS if getattr(module, flag, None) is False]
        if training and getattr(module, "rate", 1) != 0:
            name = "/".join(map(str, path))
            raise ValueError(
                f"the module {name!r} ({type(module).__name__}) has {training[0]}=False: the model is in training "
                f"mode, and no fixed map; wanted model.eval()"
            )
    definition, state = nnx.split(model)

    def call(*args: object, **kwargs: object) -> object:
        # The call may write to the model's state, which must not end in the caller's model.
        return nnx.merge(definition, state)(*args, **kwargs)

    return _Inference(call, state)
