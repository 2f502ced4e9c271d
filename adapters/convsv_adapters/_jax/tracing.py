"""Tracing of a model's shapes, and of the arrays that its layers use in a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from convsv_adapters._layers import call_arguments

__all__ = ["evaluate", "jaxpr_of", "trace"]

T = TypeVar("T")


def trace(function: Callable[..., object], tree: object, example_input: object) -> None:
    """Call a function with a tree and the arguments of a model, tracing shapes alone.

    `example_input` is as in `call_arguments`. Arrays and `jax.ShapeDtypeStruct` are
    traced; numbers, booleans and strings are passed as they are.
    """
    call, arrays = _traceable(function, tree, example_input)
    jax.eval_shape(lambda given: (call(given), None)[1], arrays)


def evaluate(function: Callable[..., T], tree: object, example_input: object) -> T:
    """Return what a function of a tree and the arguments of a model returns, a tree of arrays.

    The arguments are as for `trace`; a `jax.ShapeDtypeStruct` stands for zeros. The call is compiled, so what the
    result does not depend on is not computed.
    """
    call, arrays = _traceable(function, tree, example_input)
    given = [jnp.zeros(one.shape, one.dtype) if isinstance(one, jax.ShapeDtypeStruct) else one for one in arrays]
    return jax.jit(call)(given)


def jaxpr_of(function: Callable[..., object], tree: object, example_input: object) -> Any:
    """Return the equations of a call, a `jax.extend.core.Jaxpr`, whose results are the arrays that the call returns.

    The arguments are as for `trace`. All arrays of the tree and of the arguments are variables of the equations.
    """
    call, arrays = _traceable(function, tree, example_input)

    def outputs(given: list[Any]) -> list[Any]:
        return [leaf for leaf in jax.tree.leaves(call(given)) if isinstance(leaf, jax.Array)]

    return jax.make_jaxpr(outputs)(arrays).jaxpr


def _traceable(
    function: Callable[..., T], tree: object, example_input: object
) -> tuple[Callable[[list[Any]], T], list[Any]]:
    """Return the call as a function of the arrays among its arguments, and these arrays."""
    leaves, structure = jax.tree.flatten((tree, *call_arguments(example_input)))
    traced = [isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) for leaf in leaves]

    def call(arrays: list[Any]) -> T:
        given = iter(arrays)
        merged = [next(given) if is_traced else leaf for leaf, is_traced in zip(leaves, traced, strict=True)]
        one, positional, named = jax.tree.unflatten(structure, merged)
        return function(one, *positional, **named)

    return call, [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced]
