"""Convolutions of JAX's frameworks: their geometry, their place in a parameter tree, and tracing of shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np

from convsv_adapters._operators import Extents
from convsv_core import Conv
from convsv_core.layers import Layer

Sides: TypeAlias = tuple[tuple[int, int], ...]

LAYOUTS = {1: "W", 2: "HW", 3: "DHW"}
"""Spatial letters, by how many there are."""

BEYOND_REACH = "its padding goes beyond the reach of the kernel"
USERS_CLASS = "of a class of the user's: what it does to kernel and padding is not known"

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


Layers: TypeAlias = Iterable[ConvLayer] | Mapping[str, Any]


def trace(function: Callable[..., object], tree: object, example_input: object) -> None:
    """Call a function with a tree and what the model is called with, tracing shapes alone.

    `example_input` is an argument, positional arguments or keyword arguments. Only arrays, or what has their shape and
    dtype, are traced; numbers, booleans and strings are passed as they are.
    """
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = {}
    if isinstance(example_input, Mapping):
        kwargs = dict(example_input)
    elif isinstance(example_input, tuple | list):
        args = tuple(example_input)
    else:
        args = (example_input,)
    leaves, structure = jax.tree.flatten((tree, args, kwargs))
    traced = [isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) for leaf in leaves]

    def call(arrays: list[object]) -> None:
        given = iter(arrays)
        merged = [next(given) if is_traced else leaf for leaf, is_traced in zip(leaves, traced, strict=True)]
        one, positional, named = jax.tree.unflatten(structure, merged)
        function(one, *positional, **named)

    jax.eval_shape(call, [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced])


# ---- geometry ----------------------------------------------------------------------------------------------


def make_conv(
    layout: str,
    taps: Extents,
    *,
    stride: Extents,
    dilation: Extents,
    groups: int,
    padding: str | Sides,
    padding_mode: str,
    input_shapes: Iterable[Extents],
) -> tuple[Conv, str]:
    """Geometry of a convolution whose padding JAX resolves, and a note.

    "SAME" and "SAME_LOWER" depend on the extents: without any, those are meant that the stride divides.
    """
    plain = Conv(layout, stride=stride, dilation=dilation, groups=groups, padding_mode=padding_mode)
    resolved: dict[Sides, None] = {}
    spans = tuple(d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True))
    for extents in list(input_shapes) or [stride]:
        resolved[_sides(padding, extents, spans, stride)] = None
    first, *others = resolved
    note = f"its padding depends on the extents; that of the first is used, {first}" if others else ""
    if isinstance(padding, str) and first == plain.pads(taps):
        return plain, note
    return Conv(layout, stride=stride, dilation=dilation, groups=groups, padding=first, padding_mode=padding_mode), note


def _sides(padding: str | Sides, extents: Extents, spans: Extents, stride: Extents) -> Sides:
    """Elements added before and after each axis."""
    if not isinstance(padding, str):
        return padding
    return tuple((int(a), int(b)) for a, b in jax.lax.padtype_to_pads(extents, spans, stride, padding))


def make_transposed_conv(
    layout: str, taps: Extents, *, stride: Extents, dilation: Extents, groups: int, sides: Sides, adjoint: bool = False
) -> tuple[Conv, str]:
    """Geometry of a convolution over an input with zeros between its elements, and a note.

    Parameters
    ----------
    layout : str
        O and I as the layer has them: I of its input.
    taps, stride, dilation, groups
        `stride` is the dilation of the input.
    sides : tuple of pairs
        Elements added before and after each axis of the dilated input.
    adjoint : bool, default False
        Whether the taps are flipped first, which makes the layer the transpose of a convolution. Otherwise it is that
        of one with the taps in reverse, which has the singular values of the reflected one with the sides exchanged.

    Returns
    -------
    Conv, str
    """
    pairs = []
    for k, d, (before, after) in zip(taps, dilation, sides, strict=True):
        reach = d * (k - 1)
        pairs.append((reach - before, reach - after) if adjoint else (reach - after, reach - before))
    note = BEYOND_REACH if min(min(pair) for pair in pairs) < 0 else ""
    padding = tuple((max(before, 0), max(after, 0)) for before, after in pairs)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "transposed": True}
    return Conv(layout, padding=padding, padding_mode="zeros", **options), note


def per_axis(value: Any, ndim: int) -> Extents:
    """An int, None (for 1) or ints, as one an axis."""
    if value is None:
        return (1,) * ndim
    if isinstance(value, int | np.integer):
        return (int(value),) * ndim
    return tuple(int(one) for one in value)


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


# ---- parameter trees ---------------------------------------------------------------------------------------


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
