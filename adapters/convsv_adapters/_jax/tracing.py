"""Tracing of a model's shapes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from convsv_adapters._layers import call_arguments

__all__ = ["trace"]


def trace(function: Callable[..., object], tree: object, example_input: object) -> None:
    """Call a function with a tree and the arguments of a model, tracing shapes alone.

    `example_input` is as in `call_arguments`. Arrays and `jax.ShapeDtypeStruct` are
    traced; numbers, booleans and strings are passed as they are.
    """
    leaves, structure = jax.tree.flatten((tree, *call_arguments(example_input)))
    traced = [isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) for leaf in leaves]

    def call(arrays: list[object]) -> None:
        given = iter(arrays)
        merged = [next(given) if is_traced else leaf for leaf, is_traced in zip(leaves, traced, strict=True)]
        one, positional, named = jax.tree.unflatten(structure, merged)
        function(one, *positional, **named)

    jax.eval_shape(call, [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced])
