"""Trees of parameters: their leaves by path, and the layers whose kernels are among the leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from convsv_adapters._layers import ConvLayer, geometry_of, make_layer
from convsv_core import Conv

__all__ = ["Layers", "Leaf", "Tree", "as_kernel", "as_leaf", "check_layers", "is_alone", "kept", "named_leaves"]

WRAPPERS = ("value", "raw_value")
"""The names that an array's path ends with if a box holds the array, as flax's variables do."""

COLLECTION = "params"
"""The collection of flax's parameters, with which a path may begin."""

Tree: TypeAlias = Any
"""A pytree of arrays."""

Layers: TypeAlias = Iterable[ConvLayer] | Mapping[str, Any]
"""The layers that an adapter finds, or a mapping from the path of a kernel to a `Conv` or to (Conv, input_shape)."""


class Leaf(NamedTuple):
    """The place of an array among the leaves of a tree, and the array."""

    place: int
    value: Any


def named_leaves(tree: object) -> dict[str, Leaf]:
    """Return each leaf of a tree by its path, without boxes, and with and without flax's collection."""
    found: dict[str, Leaf] = {}
    for place, (keys, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        head, _, last = path.rpartition("/")
        found[head if last in WRAPPERS else path] = Leaf(place, leaf)
    prefix = f"{COLLECTION}/"
    collected = {path.removeprefix(prefix): leaf for path, leaf in found.items() if path.startswith(prefix)}
    return {**collected, **found}


def as_kernel(layer: ConvLayer, leaf: Any) -> jax.Array:
    """Return a leaf with the axes of its layer's kernel."""
    leaf = jnp.asarray(leaf)
    return jnp.expand_dims(leaf, geometry_of(layer).layout.index("W")) if layer.linear else leaf


def as_leaf(layer: ConvLayer, kernel: jax.Array) -> jax.Array:
    """Return a kernel with the axes of its leaf."""
    return jnp.squeeze(kernel, geometry_of(layer).layout.index("W")) if layer.linear else kernel


def is_alone(layer: ConvLayer) -> bool:
    """Return whether a layer is a normalisation that follows no layer."""
    return layer.normalisation is not None and layer.normalisation.scale == layer.path


def kept(layers: Layers) -> Layers:
    """Return `layers` for more than one use: an iterator's items, and anything else as it is."""
    return tuple(layers) if isinstance(layers, Iterator) else layers


def check_layers(layers: Layers | None, tree: object, *, normalised: bool = False) -> tuple[ConvLayer, ...]:
    """Return the layers that `layers` describes, whose kernels are in a tree.

    Parameters
    ----------
    layers, tree
        As the public functions have them.
    normalised : bool, default False
        Whether layers with normalisations may be among them.

    Raises
    ------
    TypeError
        `layers` is None or of another kind: a tree of parameters carries no geometry.
    ValueError
        A kernel is not in the tree, has another shape, or has no geometry that a `Conv` can express.
    """
    leaves = named_leaves(tree)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(
            f"layers={layers!r}: a tree of parameters carries no geometry; wanted the result of conv_layers of "
            f"convsv_adapters.flax or convsv_adapters.equinox, or a mapping from the path of a kernel to a Conv or to "
            f"(Conv, input_shape); {_candidates(leaves)}"
        )
    items = layers.items() if isinstance(layers, Mapping) else [(None, layer) for layer in layers]
    chosen = [_as_layer(path, one, leaves) for path, one in items]
    if not chosen:
        raise ValueError("layers is empty: wanted a convolution")
    for layer in chosen:
        if layer.path not in leaves:
            raise ValueError(
                f"the layer {layer.name!r} has no kernel at {layer.path!r} in the tree: wanted the path of "
                f"a kernel; {_candidates(leaves)}"
            )
        geometry_of(layer)
        if layer.normalisation is not None and not normalised:
            raise ValueError(
                f"the layer {layer.name!r} comes with its normalisation, which cannot be bounded here: wanted the "
                f"result of conv_layers without batch_norm"
            )
        shape = tuple(leaves[layer.path].value.shape)
        wanted = layer.normalisation.shape if is_alone(layer) else layer.weight_shape
        if shape != wanted:
            raise ValueError(f"the kernel at {layer.path!r} has shape {shape}: wanted {wanted}, its layer's")
    return tuple(chosen)


def _as_layer(path: str | None, one: object, leaves: Mapping[str, Leaf]) -> ConvLayer:
    """Return the layer that one entry of `layers` describes."""
    if isinstance(one, ConvLayer):
        return one
    conv, extents = one if isinstance(one, tuple) and len(one) == 2 else (one, None)
    if path is None or not isinstance(conv, Conv):
        raise TypeError(
            f"layers holds {one!r}: wanted ConvLayer objects, or a mapping from paths to a Conv or (Conv, input_shape)"
        )
    shape = tuple(leaves[path].value.shape) if path in leaves else ()
    linear = conv.ndim == 1 and len(shape) == 2
    if linear:
        axis = conv.layout.index("W")
        shape = (*shape[:axis], 1, *shape[axis:])
    return make_layer(
        name=path.rpartition("/")[0] or path,
        kernel_shape=shape,
        conv=conv,
        linear=linear,
        input_shapes=() if extents is None else (tuple(extents),),
        path=path,
    )


def _candidates(leaves: Mapping[str, Leaf]) -> str:
    """Return, for a message, the paths and shapes of the leaves that may be kernels."""
    rows = {
        place: f"{path!r} {tuple(leaf.shape)}"
        for path, (place, leaf) in leaves.items()
        if len(getattr(leaf, "shape", ())) >= 3
    }
    return f"the tree's leaves of three axes or more: {', '.join(rows.values()) or 'it has none'}"
