"""A Keras model at inference as a graph of maps, through the front end of Keras's backend."""

from __future__ import annotations

from typing import Any

import keras

from convsv_adapters.keras._layers import declared_input
from convsv_core.networks import Graph

__all__ = ["model_graph"]


def model_graph(model: keras.layers.Layer, example_input: object) -> Graph:
    """Return a Keras model as a graph of maps, from one call with ``training=False``.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        Built, on the backend torch or jax.
    example_input : array, keras.KerasTensor, tuple of int, or a list or mapping of the first two, optional
        The argument of the model, or the shape of its one array. Where it gives shapes alone, the call is made with
        zeros. Without it `keras.Input` gives the shapes, which must not leave axes free but the first.

    Raises
    ------
    ValueError
        The backend is numpy, the shapes are not known, or the call fails or cannot be traced.
    """
    backend = keras.backend.backend()
    if backend not in ("torch", "jax"):
        raise ValueError(f"Keras runs on its backend {backend!r}, which has no graphs: wanted torch or jax")
    if example_input is None:
        example_input, note = declared_input(model)
        if example_input is None or note:
            raise ValueError("example_input=None: the model does not fix its input's shape, wanted an input or a shape")
    given = _arrays(example_input)
    if backend == "torch":
        return _torch_graph(model, given)
    from convsv_adapters._jax.graph import function_graph

    return function_graph(lambda x: model(x, training=False), (given,))


def _torch_graph(model: keras.layers.Layer, given: Any) -> Graph:
    import torch

    from convsv_adapters.torch import _graph

    class Inference(torch.nn.Module):  # type: ignore[misc]  # mypy does not see PyTorch.
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, given: Any) -> Any:
            return self.model(given, training=False)

    return _graph.model_graph(Inference().eval(), (given,))


def _arrays(example_input: Any) -> Any:
    """Return arrays of Keras's backend, with zeros where only a shape is given."""
    if isinstance(example_input, tuple) and all(isinstance(n, int) for n in example_input):
        return keras.ops.zeros(example_input)

    def array(one: Any) -> Any:
        if isinstance(one, keras.KerasTensor):
            return keras.ops.zeros(one.shape, one.dtype)
        return keras.ops.convert_to_tensor(one)

    return keras.tree.map_structure(array, example_input)
