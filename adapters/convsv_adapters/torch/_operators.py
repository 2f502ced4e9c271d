"""Operators of PyTorch for norms and penalties, which `torch.compile` keeps whole in its graph.

A search for a norm reads values, so a compiler cannot trace it. The operator computes its result eagerly, and the
derivatives along with it. Static arguments travel as the `repr` of a tuple: an operator takes tensors, numbers and
strings.

The product of the derivatives with a gradient is a second operator. It takes the weights too, although it does not read
them. A compiled backward pass thereby depends on the weights, and PyTorch refuses to differentiate it. A product alone
would hold the derivatives as constants, and a second derivative would lack a part without a word. PyTorch's C++
compiler may replace the weights of convolutions by copies, and then leaves out the second derivatives of all layers.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

from convsv_core import Conv
from convsv_core.dtypes import REAL_OF, answer_dtype

__all__ = ["Number", "compiled_number", "conv_arguments", "in_compiler", "register"]

CONV_FIELDS = tuple(field.name for field in fields(Conv))
"""The arguments of a `Conv`, in order."""


class Number(NamedTuple):
    """Hold a number that is computed from tensors, and its derivatives.

    Attributes
    ----------
    value : tensor
        Real and 0-d.
    slopes : list of tensors
        The derivatives by those tensors that are differentiated, each of its tensor's shape. PyTorch multiplies them
        with the gradient of `value`.
    """

    value: torch.Tensor
    slopes: list[torch.Tensor]


class _Function(NamedTuple):
    """Hold a function that `compiled_number` calls, and one that may find its result and derivatives faster."""

    call: Callable[..., torch.Tensor]
    known: Callable[..., Number | None] | None


_functions: dict[str, _Function] = {}


def register(
    *, known: Callable[..., Number | None] | None = None
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Return a decorator that lets `compiled_number` call a function, by its name.

    The function takes a list of tensors and further arguments that are Python literals. It returns a differentiable
    real 0-d tensor.

    Parameters
    ----------
    known : callable, optional
        It takes the tensors, a list that tells which of them are differentiated, and the further arguments. It returns
        what the function returns with its derivatives, in new memory, or None where the function has to be called.
    """

    def decorate(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        _functions[function.__name__] = _Function(function, known)
        return function

    return decorate


def in_compiler() -> bool:
    """Tell whether `torch.compile` traces now. `torch.export` traces PyTorch's own operators alone."""
    return bool(torch.compiler.is_compiling() and not torch.compiler.is_exporting())


def conv_arguments(conv: Conv) -> tuple[Any, ...]:
    """Return the arguments of a `Conv`, all of which are Python literals."""
    return tuple([getattr(conv, name) for name in CONV_FIELDS])


def compiled_number(tensors: Sequence[torch.Tensor], name: str, *static: Any) -> torch.Tensor:
    """Return what a registered function returns, in a graph of `torch.compile`: a differentiable 0-d tensor.

    The numbers among the static arguments are constants of the graph. The derivative is of first order. PyTorch refuses
    a second derivative of a compiled graph.

    Raises
    ------
    TypeError, ValueError
        A static argument is a tensor or another object, or a number that is not finite.
    """
    differentiated = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    number: torch.Tensor = _number(list(tensors), repr((name, *_constants(static))), differentiated)[0]
    return number


def _constants(value: Any) -> Any:
    """Return nested containers with constants in place of the numbers that a compiler has made variable."""
    if isinstance(value, tuple | list):
        return tuple([_constants(one) for one in value])
    if isinstance(value, dict):
        return {key: _constants(one) for key, one in value.items()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = guard_scalar(value)
        if isinstance(number, int) or math.isfinite(number):
            return number
        raise ValueError(f"an argument is {number} in torch.compile: wanted a finite number")
    if value is None or isinstance(value, bool | str):
        return value
    raise TypeError(f"an argument is a {type(value).__name__} in torch.compile: wanted a number of Python")


@torch.library.custom_op("convsv::number", mutates_args=())  # type: ignore[untyped-decorator]
def _number(
    tensors: list[torch.Tensor], call: str, differentiated: list[bool]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a registered function of some tensors, and its derivative by each one that is differentiated."""
    name, *static = _arguments(call)
    function = _functions[name]
    found = function.known(tensors, differentiated, *static) if function.known is not None else None
    if found is None:
        found = _differentiated(function.call, tensors, differentiated, static)
    return found.value.to(_answer(tensors)), found.slopes


def _differentiated(
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    wanted: Sequence[bool],
    static: Sequence[Any],
) -> Number:
    """Return a function of some tensors with its derivatives, by PyTorch's differentiation."""
    leaves = [tensor.detach().requires_grad_(one) for tensor, one in zip(tensors, wanted, strict=True)]
    by = [leaf for leaf in leaves if leaf.requires_grad]
    # PyTorch calls an operator with autograd excluded from the dispatch, and has no public way to include it again.
    included = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with included, torch.set_grad_enabled(bool(by)):
        value = function(leaves, *static)
        slopes = torch.autograd.grad(value, by, allow_unused=True, materialize_grads=True) if by else ()
    return Number(value.detach(), [slope.contiguous() for slope in slopes])


@functools.lru_cache(maxsize=256)
def _arguments(call: str) -> tuple[Any, ...]:
    """Return the static arguments that a string holds."""
    arguments: tuple[Any, ...] = ast.literal_eval(call)
    return arguments


def _answer(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the dtype of a number that is computed from tensors."""
    names = [answer_dtype(tensor) for tensor in tensors]
    dtypes: list[torch.dtype] = [getattr(torch, REAL_OF.get(name, name)) for name in names]
    return functools.reduce(torch.promote_types, dtypes)


@_number.register_fake  # type: ignore[untyped-decorator]
def _(tensors: list[torch.Tensor], call: str, differentiated: list[bool]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    by = [tensor for tensor, wanted in zip(tensors, differentiated, strict=True) if wanted]
    slopes = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in by]
    return tensors[0].new_empty((), dtype=_answer(tensors)), slopes


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    tensors, _, ctx.differentiated = inputs
    by = [tensor for tensor, wanted in zip(tensors, ctx.differentiated, strict=True) if wanted]
    ctx.save_for_backward(*output[1], *by)


def _gradients(ctx: Any, gradient: torch.Tensor, _: object) -> tuple[list[torch.Tensor | None], None, None]:
    count = sum(ctx.differentiated)
    if any(need and not known for need, known in zip(ctx.needs_input_grad[0], ctx.differentiated, strict=True)):
        raise RuntimeError("the norm or penalty was compiled for a tensor that needs no gradient: compile it anew")
    found = iter(_times_slopes(gradient, list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])))
    return [next(found) if known else None for known in ctx.differentiated], None, None


_number.register_autograd(_gradients, setup_context=_keep_slopes)


@torch.library.custom_op("convsv::times_slopes", mutates_args=())  # type: ignore[untyped-decorator]
def _times_slopes(
    gradient: torch.Tensor, slopes: list[torch.Tensor], tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the derivatives by some tensors times the gradient of the number."""
    return [gradient * slope for slope in slopes]


@_times_slopes.register_fake  # type: ignore[untyped-decorator]
def _(gradient: torch.Tensor, slopes: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.empty_like(slope) for slope in slopes]


def _refuse(ctx: Any, *gradients: Any) -> NoReturn:
    raise NotImplementedError(
        "a norm or penalty in a graph of torch.compile has a first derivative alone: wanted a call without the "
        "compiler for the second one"
    )


_times_slopes.register_autograd(_refuse)
