"""Which operators a layer of a network stands for, as the core's functions take them: for any framework."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from convsv_core import Conv, norm_upper_bound, penalties
from convsv_core._geometry.padding import padding_norm
from convsv_core.plan import resolve_channels

Extents: TypeAlias = tuple[int, ...]

PENALTIES = tuple(penalties.__all__)

NEEDS_EXTENTS = "the extents of the layer {name!r} are not known: wanted an example_input that reaches it"


@dataclass(frozen=True)
class Operator:
    """One operator that a kernel stands for.

    Attributes
    ----------
    conv, input_shape
        As `convsv_core.project` takes them: of a circular convolution, or of every input size where there is no
        `input_shape`.
    padding_norm : float
        By how much the layer's own padding can raise the norm of that operator, as a factor.
    """

    conv: Conv
    input_shape: Extents | None
    padding_norm: float


def lattice(conv: Conv) -> Conv:
    """The convolution whose norm, over every input size, is that of the symbol."""
    return dataclasses.replace(conv, padding="same", padding_mode="circular")


def circular_geometry(conv: Conv, extents: Extents) -> tuple[Extents, Conv]:
    """The circular convolution of a layer and its extents, which the stride divides: the next such multiples."""
    strides = (1,) * conv.ndim if conv.transposed else conv.strides
    return tuple(-(-n // s) * s for n, s in zip(extents, strides, strict=True)), lattice(conv)


def layer_operators(
    name: str, kernel_shape: tuple[int, ...], conv: Conv, input_shapes: tuple[Extents, ...], circular: bool
) -> tuple[Operator, ...]:
    """The operators of a layer whose norms are to be bounded: its own, or the circular one at each of its extents.

    Raises
    ------
    ValueError
        Extents are needed, for `circular` or for padding that repeats pixels, and there are none.
    """
    taps, *_ = resolve_channels(kernel_shape, conv)
    if circular:
        if not input_shapes:
            raise ValueError(f"circular=True: {NEEDS_EXTENTS.format(name=name)}")
        geometries = dict.fromkeys(circular_geometry(conv, extents) for extents in input_shapes)
        return tuple(Operator(one, extents, 1.0) for extents, one in geometries)
    pads = [sum(sides) for sides in conv.pads(tuple(taps))]
    if conv.padding_mode == "zeros" or not any(pads):
        return (Operator(lattice(conv), None, 1.0),)
    if input_shapes:
        return (Operator(lattice(conv), None, max(padding_norm(kernel_shape, n, conv) for n in input_shapes)),)
    spans = [dilation * (k - 1) for k, dilation in zip(taps, conv.dilations, strict=True)]
    if conv.padding_mode != "circular" or any(pad > span for pad, span in zip(pads, spans, strict=True)):
        raise ValueError(
            f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} repeats pixels: "
            f"{NEEDS_EXTENTS.format(name=name)}"
        )
    return (Operator(lattice(conv), None, 1.0),)


def check_penalty(kind: object) -> None:
    """Raise ValueError unless `kind` names a penalty."""
    if kind not in PENALTIES:
        raise ValueError(f"kind={kind!r}: wanted one of {', '.join(PENALTIES)}")


def layer_penalty(
    name: str, kernel: Any, conv: Conv, input_shapes: tuple[Extents, ...], kind: str, options: Mapping[str, Any]
) -> Any:
    """A penalty on one layer: of the circular operator at the largest of its extents, or of every input size."""
    if input_shapes:
        extents, circular = circular_geometry(conv, max(input_shapes, key=math.prod))
        return getattr(penalties, kind)(kernel, extents, circular, **options)
    if kind == "orthogonality":
        return penalties.orthogonality(kernel, None, lattice(conv), **options)
    if kind == "squared_norm":
        return norm_upper_bound(kernel, lattice(conv), **options) ** 2
    if kind == "norm_hinge":
        if set(options) != {"bound"}:
            raise TypeError(f"options={dict(options)}: norm_hinge takes a bound")
        excess = norm_upper_bound(kernel, lattice(conv)) - options["bound"]
        return (excess * (excess > 0)) ** 2
    raise ValueError(f"kind={kind!r}: {NEEDS_EXTENTS.format(name=name)}")
