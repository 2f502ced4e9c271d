"""Convolutions and their place in a parameter tree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from convsv_adapters._operators import Extents
from convsv_core import Conv
from convsv_core.layers import Layer

__all__ = ["ConvLayer", "Layers", "Tree", "check_layers", "joined", "model_layer", "named_leaves"]

WRAPPERS = ("value", "raw_value")
"""What the path of an array may end with that is held in a box, as flax's variables are."""

COLLECTION = "params"
"""Collection of flax's parameters, with which a path may begin."""


@dataclass(frozen=True)
class ConvLayer:
    """One convolution of a model, without its numbers: static, hashable and comparable.

    Attributes
    ----------
    name : str
        Path of the layer in the model, its parts separated by slashes.
    path : str
        Path of its kernel in the model's parameters.
    kernel_shape : tuple of int
    conv : Conv or None
        Geometry, the layer's own padding included; None where a `Conv` cannot express it, and the note says why.
    input_shapes : tuple of tuple of int
        Each spatial extents of its input that tracing showed, in order of appearance.
    note : str
        What a reader must know, or "".
    """

    name: str
    path: str
    kernel_shape: tuple[int, ...]
    conv: Conv | None
    input_shapes: tuple[Extents, ...] = ()
    note: str = ""

    @property
    def input_shape(self) -> Extents | None:
        """The first of `input_shapes`, or None."""
        return self.input_shapes[0] if self.input_shapes else None


Tree: TypeAlias = Any
Layers: TypeAlias = Iterable[ConvLayer] | Mapping[str, Any]


def joined(*notes: str) -> str:
    """Notes that are not empty, as one."""
    return "; ".join(note for note in notes if note)


def model_layer(layer: ConvLayer, kernel: Any) -> Layer:
    """The layer as a report of the core takes it: at the largest of its extents, where there are several."""
    note, extents = layer.note, layer.input_shape
    if len(layer.input_shapes) > 1:
        extents = max(layer.input_shapes, key=math.prod)
        note = joined(note, f"takes {len(layer.input_shapes)} different extents, of which the largest is used")
    if extents is None and not note:
        note = "extents unknown: wanted an example_input"
    return Layer(layer.name, kernel, layer.conv, extents, note)


def named_leaves(tree: object) -> dict[str, tuple[int, Any]]:
    """Place, among the leaves, and value of each array, by its path without boxes and without flax's collection."""
    found: dict[str, tuple[int, Any]] = {}
    for place, (keys, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        head, _, last = path.rpartition("/")
        found[head if last in WRAPPERS else path] = place, leaf
    prefix = f"{COLLECTION}/"
    collected = {path.removeprefix(prefix): leaf for path, leaf in found.items() if path.startswith(prefix)}
    return {**collected, **found}


def check_layers(layers: Layers | None, tree: object) -> tuple[ConvLayer, ...]:
    """What `layers` says about the kernels of a tree.

    Raises
    ------
    TypeError
        `layers` is None or of another kind: parameter trees carry no geometry.
    ValueError
        A kernel is not in the tree, has another shape, or has no geometry that a `Conv` expresses.
    """
    leaves = named_leaves(tree)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(
            f"layers={layers!r}: a tree of parameters carries no geometry; wanted what conv_layers of "
            f"convsv_adapters.flax or convsv_adapters.equinox finds in the model, or a mapping from the path of a "
            f"kernel to a Conv, or to (Conv, input_shape); of {_candidates(leaves)}"
        )
    items = layers.items() if isinstance(layers, Mapping) else [(None, layer) for layer in layers]
    chosen = [_as_layer(path, one, leaves) for path, one in items]
    if not chosen:
        raise ValueError("layers is empty: wanted a convolution")
    for layer in chosen:
        if layer.path not in leaves:
            raise ValueError(
                f"the layer {layer.name!r} has no kernel at {layer.path!r} in the tree: wanted a path of "
                f"{_candidates(leaves)}"
            )
        shape = tuple(leaves[layer.path][1].shape)
        if shape != layer.kernel_shape:
            raise ValueError(
                f"the kernel at {layer.path!r} has shape {shape}: wanted {layer.kernel_shape}, its layer's"
            )
        if layer.conv is None:
            raise ValueError(f"the layer {layer.name!r} has no geometry: {layer.note}; wanted layers without it")
    return tuple(chosen)


def _as_layer(path: str | None, one: object, leaves: Mapping[str, tuple[int, Any]]) -> ConvLayer:
    if isinstance(one, ConvLayer):
        return one
    conv, extents = one if isinstance(one, tuple) and len(one) == 2 else (one, None)
    if path is None or not isinstance(conv, Conv):
        raise TypeError(
            f"layers holds {one!r}: wanted ConvLayer objects, or a mapping from paths to a Conv or (Conv, input_shape)"
        )
    shape = tuple(leaves[path][1].shape) if path in leaves else ()
    return ConvLayer(path.rpartition("/")[0] or path, path, shape, conv, () if extents is None else (tuple(extents),))


def _candidates(leaves: Mapping[str, tuple[int, Any]]) -> str:
    rows = {
        place: f"{path!r} {tuple(leaf.shape)}"
        for path, (place, leaf) in leaves.items()
        if len(getattr(leaf, "shape", ())) >= 3
    }
    return f"the tree's leaves of three axes or more: {', '.join(rows.values()) or 'it has none'}"
