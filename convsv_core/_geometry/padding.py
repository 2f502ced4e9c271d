"""The padding rule: from a layer's padding to the operators whose norms bound the norm of the layer.

Padding copies pixels beyond the edges of an image. Zero padding copies none, and a layer with it has a norm of at
most the supremum of its symbol, for every input size. Other padding can repeat pixels. The norm of the layer then is
at most the supremum times the norm of the padding, which depends on the extents of the input.

Everything in this module is computed from shapes alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeAlias

import numpy as np

from convsv_core._geometry.plan import IntArray
from convsv_core._geometry.rounding import root_up
from convsv_core._geometry.shapes import check_input_shape, forward_extents, resolve_channels
from convsv_core.conv import Conv

__all__ = [
    "AxisReads",
    "Extents",
    "Operator",
    "UnknownExtents",
    "check_repeats_no_pixel",
    "circular_geometry",
    "lattice",
    "layer_operators",
    "padding_norm",
    "padding_sources",
    "repeats_pixels",
    "tap_reads",
]

Extents: TypeAlias = tuple[int, ...]
"""One int for each spatial axis, in the order of ``conv.spatial``."""


class UnknownExtents(ValueError):
    """A layer's extents are needed and not known; the message says what for, without the name of the layer."""


@dataclass(frozen=True)
class Operator:
    """An operator whose norm bounds the norm of a layer.

    Attributes
    ----------
    conv : Conv
        A circular convolution.
    input_shape : tuple of int or None
        The extents of its input. None stands for every input size, as in `convsv_core.project`.
    padding_norm : float
        The norm of the layer is at most `padding_norm` times the norm of this operator.
    """

    conv: Conv
    input_shape: Extents | None
    padding_norm: float = 1.0

    def layer_upper(self, upper: float) -> float:
        """Return an upper bound of the layer's norm, from an upper bound of the operator's norm.

        Parameters
        ----------
        upper : float
            Not negative.

        Returns
        -------
        float
            The least float64 that is no smaller than ``upper * padding_norm``. Rounding to nearest could give half a
            unit in the last place less, and the result would be no bound.

        Examples
        --------
        >>> Operator(Conv("OIW"), None, 3.0).layer_upper(0.1) >= Fraction(0.1) * 3
        True
        """
        if self.padding_norm == 1.0:
            return upper  # A training step asks this for most layers, and arithmetic with fractions takes longer.
        product = upper * self.padding_norm
        if math.isfinite(product) and Fraction(product) < Fraction(upper) * Fraction(self.padding_norm):
            return math.nextafter(product, math.inf)
        return product

    def limit(self, bound: float) -> float:
        """Return how large the operator's norm may be, so that the layer's norm is at most `bound`.

        Parameters
        ----------
        bound : float
            Not negative.

        Returns
        -------
        float
            The largest float64 x for which ``layer_upper(x) <= bound``.

        Examples
        --------
        >>> Operator(Conv("OIW"), None, 3.0).limit(0.1) * Fraction(3) <= 0.1
        True
        """
        if self.padding_norm == 1.0:
            return bound
        quotient = bound / self.padding_norm
        if math.isfinite(quotient) and Fraction(quotient) * Fraction(self.padding_norm) > Fraction(bound):
            return math.nextafter(quotient, 0.0)
        return quotient


def layer_operators(
    kernel_shape: Sequence[int], conv: Conv, input_shapes: Sequence[Extents] = (), *, circular: bool = False
) -> tuple[Operator, ...]:
    """Return the operators whose norms are bounded in place of the norm of a layer.

    Parameters
    ----------
    kernel_shape : sequence of int
        Shape of the kernel, with the axes that ``conv.layout`` names.
    conv : Conv
        Geometry of the layer, with its own padding.
    input_shapes : sequence of tuple of int, default ()
        All spatial extents that the layer's input is known to have.
    circular : bool, default False
        Whether to bound the circular operator at each of the extents, and not the layer with its own padding.

    Returns
    -------
    tuple of Operator
        With `circular`, one operator for each of the different extents, which are rounded up to multiples of the
        stride (`circular_geometry`). Otherwise one operator for every input size. Its `padding_norm` is 1 where
        `repeats_pixels` is false. Elsewhere `padding_norm` is the largest one among the extents.

    Raises
    ------
    UnknownExtents
        There are no `input_shapes`, and `circular` or padding that repeats pixels needs them.
    ValueError
        The padding is impossible for some of the extents; see `padding_norm`.

    Notes
    -----
    With circular padding, a stride above 1 and unknown extents, the bound holds for extents that the stride divides.

    Examples
    --------
    >>> zeros, reflect = (Conv("OIHW", padding_mode=mode) for mode in ("zeros", "reflect"))
    >>> [operator.padding_norm for operator in layer_operators((4, 4, 3, 3), zeros)]
    [1.0]
    >>> [operator.padding_norm for operator in layer_operators((4, 4, 3, 3), reflect, [(8, 8), (9, 9)])]
    [2.0]
    """
    shape = tuple(kernel_shape)
    if circular:
        if not input_shapes:
            raise UnknownExtents("circular=True needs the layer's extents")
        geometries = dict.fromkeys(circular_geometry(conv, extents) for extents in input_shapes)
        return tuple(Operator(one, extents) for extents, one in geometries)
    if conv.padding_mode == "zeros" or not any(_pad_sums(resolve_channels(shape, conv).taps, conv)):
        return (Operator(lattice(conv), None),)
    if input_shapes:
        largest = max(padding_norm(shape, extents, conv) for extents in input_shapes)
        return (Operator(lattice(conv), None, largest),)
    if repeats_pixels(shape, conv):
        raise UnknownExtents(
            f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} repeats pixels: a bound for the "
            f"layer's own padding needs the layer's extents"
        )
    return (Operator(lattice(conv), None),)


def lattice(conv: Conv) -> Conv:
    """Return the circular convolution whose norm, over every input size, is the supremum of the symbol's norm.

    Examples
    --------
    >>> lattice(Conv("OIW", padding=3, padding_mode="zeros")) == Conv("OIW")
    True
    """
    return dataclasses.replace(conv, padding="same", padding_mode="circular", output_padding=None)


def circular_geometry(conv: Conv, input_shape: Extents) -> tuple[Extents, Conv]:
    """Return extents and geometry of a layer's circular operator, each extent rounded up to a multiple of the stride.

    Examples
    --------
    >>> circular_geometry(Conv("OIHW", stride=2, padding=1, padding_mode="zeros"), (7, 8))[0]
    (8, 8)
    """
    strides = (1,) * conv.ndim if conv.transposed else conv.strides
    extents = tuple(-(-extent // stride) * stride for extent, stride in zip(input_shape, strides, strict=True))
    return extents, lattice(conv)


def repeats_pixels(kernel_shape: Sequence[int], conv: Conv) -> bool:
    """Return whether padding can raise the norm above the supremum of the symbol, by how much depends on the extents.

    Reflect and replicate padding do so. Circular padding does so where it adds more than ``dilation * (taps - 1)``
    elements along an axis, as there are then more outputs than the circulant operator has.
    """
    if conv.padding_mode == "zeros":
        return False
    taps = resolve_channels(tuple(kernel_shape), conv).taps
    sums = _pad_sums(taps, conv)
    if conv.padding_mode == "circular":
        return any(pad > span for pad, span in zip(sums, _spans(taps, conv), strict=True))
    return any(sums)


def check_repeats_no_pixel(kernel_shape: Sequence[int], conv: Conv) -> None:
    """Raise NotImplementedError for padding with which no bound holds for every input size."""
    if repeats_pixels(kernel_shape, conv):
        cause = "gives more outputs than inputs, so it " if conv.padding_mode == "circular" else ""
        spans = tuple(_spans(resolve_channels(tuple(kernel_shape), conv).taps, conv))
        raise NotImplementedError(
            f"{conv.padding_mode} padding {cause}repeats pixels: the norm depends on the extents and can exceed any "
            f"bound for every input size (padding={conv.padding!r} with padding_mode={conv.padding_mode!r}); wanted "
            f"an input_shape, zero padding, or circular padding of at most dilation * (taps - 1) = {spans}"
        )


def padding_norm(kernel_shape: Sequence[int], input_shape: Extents, conv: Conv) -> float:
    r"""Return an upper bound of the norm of a layer's padding, as a linear map of images.

    The norm of the layer is at most this number times the supremum of the norm of the layer's symbol.

    Parameters
    ----------
    kernel_shape : sequence of int
        Shape of the kernel, with the axes that ``conv.layout`` names.
    input_shape : tuple of int
        Spatial extents of the layer's input, in the order of ``conv.spatial``.
    conv : Conv
        The geometry.

    Returns
    -------
    float
        The least float64 that is no smaller than the square root of an integer, hence exact for squares. At least 1.
        It is 1 for zero and 'valid' padding, and for circular padding that makes a circulant operator.

    Raises
    ------
    ValueError
        As for `operator_norm`.

    Notes
    -----
    A layer is ``A = C P``: P copies pixels to the places of the padded image that some tap reads, and C is the
    convolution from there. C is a compression of the convolution on the infinite lattice, so its norm is at most
    the supremum M of the norm of the symbol. Each row of P has one entry 1 or none, so ``P^T P`` is diagonal and
    counts the copies of each pixel. Padding goes axis by axis, so the largest count is the product of the axes'
    largest counts, and

        \|A\| <= M \|P\|,    \|P\| = prod_i sqrt(largest count along axis i).

    Circular padding of any amount has a second bound where the stride divides the extent n. The outputs of the layer
    are those of the circulant operator, whose norm is at most M, repeated at most ``r = ceil(outputs * stride / n)``
    times, so ``|A| <= sqrt(r) M``. The smaller bound is taken along each axis. This is right for the product, because
    one axis' copies of inputs and another axis' copies of outputs do not meet.

    Rounding: a certificate needs a number that is not below the root, so `root_up` takes it. The product with M rounds
    once more, which `Operator.layer_upper` accounts for. No caller has to widen anything.

    Examples
    --------
    Reflected, the second pixel from each edge appears twice, along both axes:

    >>> padding_norm((1, 1, 3, 3), (8, 8), Conv("OIHW", padding_mode="reflect"))
    2.0
    """
    extents = check_input_shape(input_shape, conv)
    squared = 1
    taps = resolve_channels(tuple(kernel_shape), conv).taps
    for axis in tap_reads(taps, extents, conv):
        source = padding_sources(axis.reached(), axis.extent, conv.padding_mode)
        copies = int(np.bincount(source[source >= 0], minlength=1).max())
        if conv.padding_mode == "circular" and axis.extent % axis.stride == 0:
            copies = min(copies, -(-axis.outputs * axis.stride // axis.extent))
        squared *= max(copies, 1)
    return root_up(squared)


class AxisReads(NamedTuple):
    """The places along one axis that the taps of a layer read, in the coordinates of the forward convolution's input.

    Output o reads with tap q at ``o * stride + q * dilation - before``. Places outside of ``range(extent)`` lie in the
    padding.

    Attributes
    ----------
    outputs, taps, stride, dilation, before, extent : int
    """

    outputs: int
    taps: int
    stride: int
    dilation: int
    before: int
    extent: int

    @property
    def span(self) -> IntArray:
        """All places from the first one that is read to the last one."""
        length = (self.outputs - 1) * self.stride + self.dilation * (self.taps - 1) + 1
        return np.arange(length) - self.before

    def places(self) -> IntArray:
        """Return the place that each output reads with each tap: shape (outputs, taps)."""
        return np.arange(self.outputs)[:, None] * self.stride + np.arange(self.taps) * self.dilation - self.before

    def reached(self) -> IntArray:
        """Return the places that some output reads, ascending.

        A table of outputs and taps is made only where stride and dilation both exceed 1.
        """
        if min(self.stride, self.dilation) > 1:
            return np.unique(self.places())
        # The places are runs of neighbours: of the taps at each stride, or of the outputs at each dilation.
        step, run = (self.stride, self.taps) if self.dilation == 1 else (self.dilation, self.outputs)
        return self.span if run >= step else self.span[(self.span + self.before) % step < run]


def tap_reads(taps: tuple[int, ...], input_shape: Extents, conv: Conv) -> list[AxisReads]:
    """Return where the taps read along each axis. Raises ValueError for padding that is impossible."""
    reads = []
    for axis, (k, extent, stride, dilation, (before, after)) in enumerate(
        zip(taps, forward_extents(taps, input_shape, conv), conv.strides, conv.dilations, conv.pads(taps), strict=True)
    ):
        if conv.output_padding is not None:  # The forward convolution gives the input, and may read less than it all.
            reads.append(AxisReads(input_shape[axis], k, stride, dilation, before, extent))
            continue
        where = f"on axis {conv.spatial[axis]} (input_shape={input_shape}, padding={conv.padding!r})"
        outputs = (extent + before + after - dilation * (k - 1) - 1) // stride + 1
        if outputs < 1:
            raise ValueError(
                f"{k} taps of dilation {dilation} span {dilation * (k - 1) + 1} elements {where}, of which there "
                f"are {extent + before + after} with the padding: wanted a larger input or more padding"
            )
        if conv.transposed and outputs != input_shape[axis]:
            raise ValueError(
                f"the convolution of which the layer is the transpose takes {extent} elements to {outputs} {where}: "
                f"wanted padding with which it gives back {input_shape[axis]}, or an output_padding"
            )
        widest = max(before, after)
        if conv.padding_mode == "reflect" and widest >= extent:
            raise ValueError(f"reflect padding of {widest} {where}: wanted less than the extent {extent}")
        if conv.padding_mode == "circular" and widest > extent and outputs * stride != extent:
            raise ValueError(f"circular padding of {widest} {where}: wanted at most the extent {extent}")
        reads.append(AxisReads(outputs, k, stride, dilation, before, extent))
    return reads


def padding_sources(places: IntArray, extent: int, padding_mode: str) -> IntArray:
    """Return the element of the input that padding puts at each of `places`; -1 for a zero."""
    if padding_mode == "circular":
        return places % extent
    if padding_mode == "replicate":
        return np.clip(places, 0, extent - 1)
    if padding_mode == "reflect":
        return extent - 1 - np.abs(extent - 1 - np.abs(places))
    return np.where((places >= 0) & (places < extent), places, -1)


def _pad_sums(taps: Extents, conv: Conv) -> list[int]:
    """Return how many elements padding adds along each axis, both sides together."""
    return [sum(sides) for sides in conv.pads(taps)]


def _spans(taps: Extents, conv: Conv) -> list[int]:
    """Return the distance from the first tap to the last one along each axis, in elements of the input."""
    return [dilation * (k - 1) for k, dilation in zip(taps, conv.dilations, strict=True)]
