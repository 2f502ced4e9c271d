"""What a model reader hands over: one `Layer` for every convolution of a trained network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convsv_core.conv import Conv


class ModelError(Exception):
    """A model file that cannot be read; the message is one line that names the file and the reason."""


@dataclass(frozen=True)
class Stored:
    """Where a file stores a kernel.

    Parameters
    ----------
    key : str
        What `convsv_write_model` knows it by. Layers that share their weights have the same.
    dtype : str
        "float16", "bfloat16", "float32", "float64", "complex64" or "complex128".
    """

    key: str
    dtype: str


@dataclass(frozen=True)
class Layer:
    """One convolution of a network.

    Parameters
    ----------
    name : str
        The layer's name in its model.
    kernel : array or None
        The weights, or None where they could not be had.
    conv : Conv or None
        Geometry as the model declares it, its own padding included.
    input_shape : tuple of int or None
        Spatial extents of the layer's input, or None where they are unknown.
    note : str
        What a reader of the report must know: an assumption made, or why a figure is missing.
    stored : Stored or None
        Where the file stores `kernel`, entry for entry; None where it is computed from what the file stores.
    """

    name: str
    kernel: Any | None
    conv: Conv | None
    input_shape: tuple[int, ...] | None
    note: str = ""
    stored: Stored | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What a user says about a model that its file may leave open.

    Parameters
    ----------
    input_shapes : mapping from input name to tuple of int
        The shape of each input of the network; the key ``""`` stands for the only, or first, input.
        Formats without geometry take the trailing entries as every layer's spatial extents.
    layout : str or None
        Layout of the kernels, for formats that do not fix it.
    """

    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layout: str | None = None
