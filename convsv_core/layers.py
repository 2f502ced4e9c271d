"""The layers of a network as readers hand them over, and the operators that bound their norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convsv_core._geometry.padding import (
    Extents,
    Operator,
    UnknownExtents,
    circular_geometry,
    lattice,
    layer_operators,
)
from convsv_core.conv import Conv

__all__ = [
    "Extents",
    "Geometry",
    "Layer",
    "LayerList",
    "LeftOut",
    "ModelError",
    "Normalisation",
    "Operator",
    "ReadOptions",
    "Stored",
    "UnknownExtents",
    "circular_geometry",
    "dense_layer",
    "join_notes",
    "lattice",
    "layer_operators",
    "some_names",
]

NAMES_SHOWN = 3
"""Number of names that a message lists. A guess: they fit one line."""


class ModelError(Exception):
    """A model file that cannot be read; the message is one line that names the file and the reason."""


@dataclass(frozen=True)
class Stored:
    """Where a file stores a kernel.

    Parameters
    ----------
    key : str
        Identifies the kernel for `convsv_write_model`. Layers that share their weights have one key.
    dtype : str
        "float16", "bfloat16", "float32", "float64", "complex64" or "complex128".
    """

    key: str
    dtype: str


@dataclass(frozen=True, eq=False)
class Normalisation:
    """The batch normalisation directly behind a layer, as it acts at inference: a factor for each channel, and a shift.

    Parameters
    ----------
    name : str
        The normalisation's name in its model.
    scale : array, shape (outputs,)
        The factor of each output channel of the layer, on the host, in float64. It is ``gamma / sqrt(variance +
        epsilon)``. Where a file does not store epsilon, it is 0, which makes no modulus smaller.
    """

    name: str
    scale: Any

    @classmethod
    def of_statistics(cls, name: str, gamma: Any, variance: Any, epsilon: float = 0.0) -> Normalisation | None:
        """Return the normalisation with these stored arrays; None if a factor is not finite.

        Parameters
        ----------
        name : str
        gamma, variance : array, shape (outputs,)
            On the host, of any floating dtype.
        epsilon : float, default 0.0

        Examples
        --------
        >>> Normalisation.of_statistics("bn", np.asarray([3.0]), np.asarray([4.0])).scale.tolist()
        [1.5]
        >>> Normalisation.of_statistics("bn", np.asarray([3.0]), np.asarray([0.0])) is None
        True
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.asarray(gamma, np.float64) / np.sqrt(np.asarray(variance, np.float64) + epsilon)
        return cls(name, scale) if np.isfinite(scale).all() else None


@dataclass(frozen=True)
class Layer:
    """One convolution of a network, or a dense layer, which is the convolution of one tap on one pixel.

    Parameters
    ----------
    name : str
        The layer's name in its model.
    kernel : array or None
        The weights, or None where the file does not give them.
    conv : Conv or None
        Geometry as the model declares it, with the layer's own padding. None where it is not known.
    input_shape : tuple of int or None
        Spatial extents of the layer's input, or None where they are unknown.
    note : str
        For people only: an assumption that was made, or why a figure is missing.
    stored : Stored or None
        Where the file stores `kernel`, entry for entry. None where the kernel is computed from other arrays.
    assumed_extents : bool
        Whether `input_shape` follows from extents that the reader chose, because the model leaves axes of its input
        free. No promise for the model may rest on them.
    linear : bool
        Whether the layer is a dense one. Its kernel is the matrix with a third axis W of extent 1. A file stores the
        matrix alone.
    normalisation : Normalisation or None
        The batch normalisation that acts on the layer's output and on nothing else. None where it is not surely known.
    assumed : tuple of str
        The fields of `conv` that the reader assumed, because the file does not store them.
    """

    name: str
    kernel: Any | None
    conv: Conv | None
    input_shape: tuple[int, ...] | None
    note: str = ""
    stored: Stored | None = None
    assumed_extents: bool = False
    linear: bool = False
    normalisation: Normalisation | None = None
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A part of a file that no layer was read from, though it holds arrays with the shape of a kernel.

    Parameters
    ----------
    path : str
        The place of the part in the file: its keys, joined by "/".
    reason : str
        For people.
    """

    path: str
    reason: str


class LayerList(list[Layer]):
    """The convolutions of a model file, and what else a reader says of the file.

    Parameters
    ----------
    layers : iterable of Layer
    networks : iterable of str, default ()
        The paths of the networks that were read, where the file is a tree that holds several.
    left_out : iterable of LeftOut, default ()
    """

    def __init__(
        self, layers: Iterable[Layer] = (), *, networks: Iterable[str] = (), left_out: Iterable[LeftOut] = ()
    ) -> None:
        super().__init__(layers)
        self.networks, self.left_out = tuple(networks), tuple(left_out)


@dataclass(frozen=True)
class Geometry:
    """The geometry of a layer, as far as a user states it. What is None stays as the reader assumes it.

    Parameters
    ----------
    groups : int or None
    stride, dilation, padding : int, tuple of int, or None
        As in `Conv`.
    transposed : bool or None
    """

    groups: int | None = None
    stride: int | tuple[int, ...] | None = None
    dilation: int | tuple[int, ...] | None = None
    padding: int | tuple[int, ...] | None = None
    transposed: bool | None = None


@dataclass(frozen=True)
class ReadOptions:
    """Facts about a model that its file may leave open, given by the user.

    Parameters
    ----------
    input_shapes : mapping from input name to tuple of int
        The shape of each input of the network. The key ``""`` stands for the only or first input. Formats without
        geometry take the trailing entries as the spatial extents of every layer.
    layout : str or None
        Layout of the kernels, for formats that do not fix it.
    network : str or None
        The path of the only network to read, for files that are trees with several networks.
    layers : mapping from str to Geometry
        The geometry of layers, for formats that do not store it. A key is a layer's name, or a pattern of `fnmatch`
        for names. A layer that is named here counts as a convolution. Later entries come before earlier ones.
    linear : bool
        Whether to list dense layers too.
    """

    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layout: str | None = None
    network: str | None = None
    layers: Mapping[str, Geometry] = field(default_factory=dict)
    linear: bool = False


def dense_layer(name: str, matrix: Any, layout: str, note: str = "", **facts: Any) -> Layer:
    """Return a dense layer as the convolution of one tap on one pixel, which has the norm of the matrix.

    Parameters
    ----------
    name : str
    matrix : array, two axes
    layout : {"OI", "IO"}
        Whether the rows are the outputs or the inputs.
    note : str, default ""
    **facts : Any
        Further fields of `Layer`.

    Examples
    --------
    >>> import numpy as np
    >>> layer = dense_layer("fc", np.ones((10, 64)), "OI")
    >>> layer.kernel.shape, layer.conv.layout, layer.input_shape
    ((10, 64, 1), 'OIW', (1,))
    """
    conv = Conv(f"{layout}W", padding="valid", padding_mode="zeros")
    return Layer(name, matrix[..., None], conv, (1,), note, linear=True, **facts)


def some_names(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are, for a message.

    Examples
    --------
    >>> some_names(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    found = list(names)
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return (", ".join(found[:NAMES_SHOWN]) or "none") + more


def join_notes(*notes: str) -> str:
    """Return one note that holds several, of which some may be empty.

    Examples
    --------
    >>> join_notes("padding assumed", "", "no extents")
    'padding assumed; no extents'
    """
    return "; ".join(filter(None, notes))
