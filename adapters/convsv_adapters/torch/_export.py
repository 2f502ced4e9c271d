"""One call of a PyTorch module as a list of operators, with all that does not depend on its input computed."""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.export.graph_signature import ConstantArgument, InputKind

from convsv_adapters._layers import call_arguments

__all__ = ["Exported", "Operator", "export", "module_path"]

TRAINING_OPERATORS = ("_native_batch_norm_legit", "_native_batch_norm_legit_functional")
"""The operators of ATen that normalise a batch by its own mean and variance, and by nothing stored."""

UNINITIALISED_OPERATORS = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
"""The operators of ATen whose results hold arbitrary numbers."""

LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
"""PyTorch's loggers that report what `torch.export` raises too."""

Operator: TypeAlias = torch.fx.Node
"""One operator of an exported program, or one of its arguments."""


class Exported(NamedTuple):
    """The operators of one call of a module.

    Attributes
    ----------
    inputs : dict from Operator to torch.Tensor
        The inputs of the module, with the caller's tensors.
    operators : list of Operator
        What depends on an input, in the order of evaluation.
    values : dict from Operator to object
        What does not depend on an input. Stored tensors have their dtype, and what is computed from them has float64.
    outputs : list of Operator
        The tensors that the module returns, as far as they depend on an input.
    """

    inputs: dict[Operator, torch.Tensor]
    operators: list[Operator]
    values: dict[Operator, Any]
    outputs: list[Operator]


def export(model: nn.Module, example_input: object) -> Exported:
    """Return the operators of a call of a module, as `torch.export.export` finds them.

    Parameters
    ----------
    model : torch.nn.Module
        In the mode in which it is to be described. Its modes, buffers and parameters stay as they are.
    example_input : tensor, tuple, list or mapping
        The argument of the model, its positional arguments or its keyword arguments.

    Raises
    ------
    ValueError
        A tensor is on the meta device, the call fails, its control flow or its shapes depend on values, it is no fixed
        map (a normalisation or a dropout in training mode, random numbers, buffers that change), or an input is not of
        floating-point numbers.
    """
    args, kwargs = call_arguments(example_input)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        kinds = ", ".join(sorted({type(leaf).__qualname__ for leaf in leaves})) or "nothing"
        raise ValueError(f"example_input holds {kinds}: wanted tensors, such as torch.zeros(1, 3, 64, 64)")
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and not leaf.is_floating_point():
            raise ValueError(f"example_input holds a tensor of {leaf.dtype}: wanted floating-point numbers")
    held = (*model.named_parameters(), *model.named_buffers(), *(("example_input", one) for one in leaves))
    for name, tensor in held:
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device, where tensors have no numbers: wanted a loaded model")
    program = _exported(model, args, kwargs)
    _check_fixed(program, model)
    given = dict(zip(program.graph_signature.user_inputs, leaves, strict=True))
    inputs: dict[Operator, torch.Tensor] = {}
    values: dict[Operator, Any] = {}
    native: dict[Operator, Any] = {}
    operators: list[Operator] = []
    stored = _stored(program)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                if isinstance(tensor := given.get(node.name), torch.Tensor):
                    inputs[node] = tensor
                else:
                    values[node] = native[node] = stored.get(node.name, tensor)
            elif node.op == "get_attr":
                values[node] = native[node] = operator.attrgetter(node.target)(program.graph_module)
            elif node.op == "call_function":
                if not _returns(node):
                    continue  # An operator that returns nothing is an assertion.
                if all(source in values for source in node.all_input_nodes):
                    values[node], native[node] = _computed(node, values, native)
                else:
                    operators.append(node)
    returned = [node for node in program.graph.output_node().all_input_nodes if node not in values]
    if not returned:
        raise ValueError("model returns nothing that depends on its input: wanted a network")
    return Exported(inputs, operators, values, returned)


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """Return the exported program, in which no operator writes to its arguments."""
    try:
        # For its error messages `torch.export` prints programs.
        with warnings.catch_warnings(), _quiet(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, strict=False).run_decompositions({})
    except Exception as error:  # The forward pass is the user's, and can raise anything.
        reason = str(error).strip().split("\n\n")[0]
        raise ValueError(
            f"torch.export cannot trace {type(model).__name__} with the given example_input: "
            f"{type(error).__name__}: {reason}; wanted an input of the right shape, and a forward pass without control "
            f"flow or shapes that depend on values{_advice(model)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Return a context manager in which `torch.export` logs nothing: its exception says what went wrong."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_fixed(program: torch.export.ExportedProgram, model: nn.Module) -> None:
    """Raise ValueError unless the program is a fixed map."""
    advice = _advice(model)
    for node in program.graph.nodes:
        target = node.target
        if any(isinstance(extent, torch.SymInt) for extent in _extents(node.meta.get("val"))):
            raise ValueError(f"{_place(node)} returns a shape that depends on values: wanted fixed shapes")
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        name = target._schema.name.removeprefix("aten::")
        if name in TRAINING_OPERATORS and target is not torch.ops.aten._native_batch_norm_legit_no_training.default:
            raise ValueError(
                f"{_place(node)} normalises by the mean and the variance of its batch, which is no fixed map{advice}"
            )
        if torch.Tag.nondeterministic_seeded in target.tags and not _switched_off(node):
            raise ValueError(f"{_place(node)} draws random numbers, so that the model is no fixed map{advice}")
        if name in UNINITIALISED_OPERATORS:
            raise ValueError(f"{_place(node)} returns memory that is not initialised: wanted values")
    for output in program.graph_signature.output_specs:
        if output.kind.name.endswith("MUTATION"):  # The value of a buffer, an input or a parameter changes.
            raise ValueError(f"the forward pass changes {output.target!r}, so that the model is no fixed map{advice}")


def _extents(value: Any) -> Iterator[Any]:
    """Yield the extents of the tensors that an operator returns."""
    for one in value if isinstance(value, list | tuple) else (value,):
        if isinstance(one, torch.Tensor):
            yield from one.shape


def _switched_off(node: Operator) -> bool:
    """Return whether an operator that can draw random numbers, such as a dropout, is told not to."""
    given = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    given.update(zip(given, node.args, strict=False))
    given.update(node.kwargs)
    return given.get("train", given.get("training")) is False or given.get("dropout_p") == 0


def _advice(model: nn.Module) -> str:
    """Return the end of a message about a model in training mode; "" for another one."""
    training = any(module.training for module in model.modules())
    return "; the model is in training mode: wanted model.eval()" if training else ""


def module_path(node: Operator) -> str:
    """Return the path of the module that calls an operator; "" for the whole model."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def _place(node: Operator) -> str:
    """Return the operator with the path of its module, for a message."""
    path = module_path(node)
    return f"{node.target} in the module {path!r}" if path else str(node.target)


def _stored(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """Return the parameters, buffers and constants of a program by the names of their placeholders."""
    found: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        if isinstance(spec.arg, ConstantArgument):
            found[spec.arg.name] = spec.arg.value
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            held = program.state_dict if spec.target in program.state_dict else program.constants
            found[spec.arg.name] = held[spec.target]
        elif spec.kind is not InputKind.USER_INPUT:
            found[spec.arg.name] = program.constants[spec.target]
    return found


def _computed(node: Operator, values: dict[Operator, Any], native: dict[Operator, Any]) -> tuple[Any, Any]:
    """Return the value of an operator without an input, computed in float64, and as the model computes it.

    Integers and booleans are the model's own in both, since a rounding error can change them.
    """
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), native.__getitem__)
    own = node.target(*args, **kwargs)
    if not (isinstance(own, torch.Tensor) and own.is_floating_point()) or own.dtype is torch.float64:
        return own, own
    try:
        wide_args, wide_kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda one: _wide(values[one]))
        return _wide(node.target(*wide_args, **wide_kwargs)), own
    except (RuntimeError, NotImplementedError, TypeError):  # The device or the operator lacks float64.
        return own, own


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _returns(node: Operator) -> bool:
    """Return whether an operator returns anything; an assertion returns nothing."""
    return not isinstance(node.target, torch._ops.OpOverload) or bool(node.target._schema.returns)
