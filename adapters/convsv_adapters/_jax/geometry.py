"""The geometry of convolutions of JAX's frameworks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from convsv_adapters._layers import ConvLayer, make_layer, model_layer, one_tap_conv
from convsv_core import Conv
from convsv_core.conv import transposed_conv
from convsv_core.layers import Extents, Layer, join_notes

__all__ = [
    "COMPUTED_BY",
    "FoundConv",
    "Sides",
    "computed_layer",
    "linear_conv",
    "make_conv",
    "make_traced_layer",
    "make_transposed_conv",
    "per_axis",
]

COMPUTED_BY = "its weight is computed in the forward pass by {}"
"""The words for a weight that a wrapper computes, with a place for the wrapper's class."""

Sides: TypeAlias = tuple[tuple[int, int], ...]
"""The numbers of elements added before and after each spatial axis."""


class FoundConv(NamedTuple):
    """A layer's geometry, or None where a `Conv` cannot express it, with a note for people."""

    conv: Conv | None
    note: str = ""


def make_traced_layer(
    module: object,
    framework: str,
    found: FoundConv,
    *,
    name: str,
    path: str,
    kernel_shape: tuple[int, ...],
    input_shapes: tuple[Extents, ...],
    traced: bool,
    computed: bool = False,
    linear: bool = False,
) -> ConvLayer:
    """Return the layer of a module of a framework, whose own classes alone have a forward pass that is known.

    Parameters
    ----------
    module : object
    framework : str
        Top-level package of the framework.
    found : FoundConv
    name, path, kernel_shape, input_shapes
        As in `ConvLayer`.
    traced : bool
        Whether a call of the model was traced.
    computed : bool, default False
        Whether the forward pass computes the kernel.
    linear : bool, default False
        Whether the layer is linear. Its extents are then one pixel.
    """
    return make_layer(
        found.note,
        reached=not traced or bool(input_shapes),
        unknown_forward=_has_own_forward(type(module), framework),
        name=name,
        path=path,
        kernel_shape=kernel_shape,
        conv=found.conv,
        input_shapes=((1,),) if linear else input_shapes,
        computed_in_forward=computed,
        linear=linear,
    )


def _has_own_forward(kind: type, framework: str) -> bool:
    """Return whether a class replaces a method of the framework's class that it is a subclass of."""
    theirs = next((one for one in kind.__mro__ if one.__module__.startswith(f"{framework}.")), object)
    own = kind.__mro__[: kind.__mro__.index(theirs)]
    replaced = {name for one in own for name, value in vars(one).items() if callable(value) and hasattr(theirs, name)}
    return any(name == "__call__" or not name.startswith("__") for name in replaced)


def linear_conv(layout: str) -> FoundConv:
    """Return the geometry of a linear layer, whose kernel has one more axis, W, with the layer's weight as its tap."""
    return FoundConv(one_tap_conv(layout))


def computed_layer(layer: ConvLayer, found: FoundConv, kernels: Sequence[jax.Array], wrapper: str) -> Layer:
    """Return a layer whose kernel a wrapper computes, with the kernel that it used in a call.

    Parameters
    ----------
    layer : ConvLayer
        Without geometry.
    found : FoundConv
        The geometry of the layer inside of the wrapper.
    kernels : sequence of array
        The kernels that the layer used, one for each of its calls.
    wrapper : str
        The class of the wrapper.

    Returns
    -------
    Layer
        Without figures, and with the reason, unless there was just one call.
    """
    if found.conv is None or layer.unknown_forward:
        return dataclasses.replace(model_layer(layer, None), conv=None)
    if len(kernels) != 1:
        calls = "wanted an example_input that reaches it" if not kernels else f"it is called {len(kernels)} times"
        return Layer(layer.name, None, None, None, f"{COMPUTED_BY.format(wrapper)}: {calls}")
    note = f"its kernel is the one that {wrapper} computes for the example_input"
    return Layer(layer.name, kernels[0], found.conv, layer.largest_input_shape, join_notes(note, found.note))


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
) -> FoundConv:
    """Return the geometry of a convolution whose padding JAX resolves.

    "SAME" and "SAME_LOWER" depend on the extents. Without any, extents that the stride divides are assumed. With
    several that differ in their padding, the padding of the first is taken, and a note says so.
    """
    plain = Conv(layout, stride=stride, dilation=dilation, groups=groups, padding_mode=padding_mode)
    resolved: dict[Sides, None] = {}
    spans = tuple(d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True))
    for extents in list(input_shapes) or [stride]:
        resolved[_sides(padding, extents, spans, stride)] = None
    first, *others = resolved
    note = f"its padding depends on the extents; the padding for the first is used, {first}" if others else ""
    if isinstance(padding, str) and first == plain.pads(taps):
        return FoundConv(plain, note)
    return FoundConv(dataclasses.replace(plain, padding=first), note)


def _sides(padding: str | Sides, extents: Extents, spans: Extents, stride: Extents) -> Sides:
    """Return the elements added before and after each axis."""
    if not isinstance(padding, str):
        return padding
    return tuple((int(a), int(b)) for a, b in jax.lax.padtype_to_pads(extents, spans, stride, padding))


def make_transposed_conv(
    layout: str, taps: Extents, *, stride: Extents, dilation: Extents, groups: int, sides: Sides, adjoint: bool = False
) -> FoundConv:
    """Return the geometry of a convolution over an input with zeros between its elements.

    Parameters
    ----------
    layout : str
        I is the axis of the layer's input channels.
    taps, stride, dilation, groups
        `stride` is the dilation of the input.
    sides : tuple of pairs
        Elements added before and after each axis of the dilated input.
    adjoint : bool, default False
        Whether the taps are flipped first, so that the layer is the transpose of the convolution with the kernel. If
        not, it is the transpose of the convolution with the reversed taps. That has the singular values of the
        reflected convolution, which has the kernel, and the sides exchanged.
    """
    pairs = []
    for k, d, (before, after) in zip(taps, dilation, sides, strict=True):
        reach = d * (k - 1)
        pairs.append((reach - before, reach - after) if adjoint else (reach - after, reach - before))
    return FoundConv(transposed_conv(layout, taps, pairs, stride=stride, dilation=dilation, groups=groups))


def per_axis(value: Any, ndim: int) -> Extents:
    """Return one int for each axis, from None (for 1), from an int for all axes, or from ints."""
    if value is None:
        return (1,) * ndim
    if isinstance(value, int | np.integer):
        return (int(value),) * ndim
    return tuple(int(one) for one in value)
