"""The layers of a model object of any framework, with their kernels on the host."""

from __future__ import annotations

import dataclasses
import os

from convsv_core.layers import Layer, join_notes
from convsv_core.plugins import backend_of, one_line, plugin_names, plugins

__all__ = ["COMPUTING_FAILS", "asking_for_extents", "model_layers"]

COMPUTING_FAILS = (ArithmeticError, MemoryError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Errors that cost one layer its figures, and not the other layers theirs.

Among them are the LinAlgError of NumPy and of PyTorch, and the errors of libraries whose device is out of memory.
"""


def model_layers(model: object, example_input: object = None, *, linear: bool = False) -> list[Layer]:
    """Return the layers of a model object, with their kernels on the host.

    The arguments and the errors are as for `analyze`. A kernel that has no numbers for NumPy is left out, and the
    layer's note says why.
    """
    layers = plugins().manager.hook.convsv_model_layers(model=model, example_input=example_input, linear=linear)
    if layers is None:
        if isinstance(model, str | os.PathLike):
            raise TypeError(f"model={str(model)!r}: wanted a model in memory; convsv spectrum reports on a file")
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a model of a framework that a "
            f"plugin knows ({plugin_names('convsv.models') or 'none is installed'})"
        )
    return list(map(_on_host, layers))


def asking_for_extents(layer: Layer) -> Layer:
    """Return the layer with a note if nothing else than its extents is missing."""
    if layer.input_shape is not None or layer.note:
        return layer
    return dataclasses.replace(layer, note="extents unknown: wanted an example_input")


def _on_host(layer: Layer) -> Layer:
    """Return the layer with its kernel on the host, or without a kernel and with the reason in its note."""
    if layer.kernel is None:
        return layer
    try:
        return dataclasses.replace(layer, kernel=backend_of(layer.kernel).to_numpy(layer.kernel))
    except COMPUTING_FAILS as error:  # NumPy may lack the dtype, or the device the numbers
        reason = f"its weight cannot be read as numbers: {one_line(error)}"
        return dataclasses.replace(layer, kernel=None, note=join_notes(layer.note, reason))
