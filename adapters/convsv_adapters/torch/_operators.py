"""An operator of PyTorch for norms and penalties, which `torch.compile` keeps whole in its graph.

A search for a norm reads values, so a compiler cannot trace it. The operator computes its result eagerly, and the
derivative by each weight along with it. Static arguments travel as the `repr` of a tuple: an operator takes tensors,
numbers and strings.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from convsv_core import Conv
from convsv_core.dtypes import REAL_OF, answer_dtype

__all__ = ["compiled_number", "conv_arguments", "in_compiler", "register"]

CONV_FIELDS = tuple(field.name for field in fields(Conv))
"""The arguments of a `Conv`, in order."""

_functions: dict[str, Callable[..., torch.Tensor]] = {}


def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator: let `compiled_number` call a function, by its name.

    The function takes a list of weights and further arguments that are Python literals. It returns a differentiable
    real 0-d tensor.
    """
    _functions[function.__name__] = function
    return function


def in_compiler() -> bool:
    """Tell whether `torch.compile` traces now. `torch.export` traces PyTorch's own operators alone."""
    return bool(torch.compiler.is_compiling() and not torch.compiler.is_exporting())


def conv_arguments(conv: Conv) -> tuple[Any, ...]:
    """Return the arguments of a `Conv`, all of which are Python literals."""
    return tuple([getattr(conv, name) for name in CONV_FIELDS])


def compiled_number(weights: Sequence[torch.Tensor], name: str, *static: Any) -> torch.Tensor:
    """Return what a registered function returns, in a graph of `torch.compile`: a differentiable 0-d tensor.

    The derivative is of first order. PyTorch refuses a second derivative of a compiled graph.
    """
    number: torch.Tensor = _number(list(weights), repr((name, *static)))[0]
    return number


@torch.library.custom_op("convsv::number", mutates_args=())  # type: ignore[untyped-decorator]
def _number(weights: list[torch.Tensor], call: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a registered function of some weights, and its derivative by each of them."""
    name, *static = _arguments(call)
    leaves = [weight.detach().requires_grad_() for weight in weights]
    # PyTorch calls an operator with autograd excluded from the dispatch, and has no public way to include it again.
    included = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with included, torch.enable_grad():
        value = _functions[name](leaves, *static)
        slopes = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), [slope.contiguous() for slope in slopes]


@functools.lru_cache(maxsize=256)
def _arguments(call: str) -> tuple[Any, ...]:
    """Return the static arguments that a string holds."""
    arguments: tuple[Any, ...] = ast.literal_eval(call)
    return arguments


@_number.register_fake  # type: ignore[untyped-decorator]
def _(weights: list[torch.Tensor], call: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    dtype = answer_dtype(weights[0])
    number = weights[0].new_empty((), dtype=getattr(torch, REAL_OF.get(dtype, dtype)))
    return number, [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]


def _keep_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    ctx.save_for_backward(*output[1])


def _times_slopes(ctx: Any, gradient: torch.Tensor, _: object) -> tuple[list[torch.Tensor], None]:
    return [gradient * slope for slope in ctx.saved_tensors], None


_number.register_autograd(_times_slopes, setup_context=_keep_slopes)
