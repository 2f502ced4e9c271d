"""`Conv`, the static description of a convolution, and the checks of integer and real arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeAlias

__all__ = [
    "PADDING_MODES",
    "SPATIAL_LETTERS",
    "Conv",
    "Padding",
    "Pads",
    "PerAxis",
    "as_float",
    "as_int",
    "check_positive",
    "per_axis",
    "transposed_conv",
]

PerAxis: TypeAlias = int | tuple[int, ...]
"""One integer for every spatial axis, or one integer for each of them."""

Pads: TypeAlias = tuple[tuple[int, int], ...]
"""The numbers of elements added before and after each spatial axis."""

Padding: TypeAlias = Literal["same", "valid"] | int | tuple[int, ...] | Pads
"""The values that `Conv` accepts as its `padding`."""

SPATIAL_LETTERS = {1: "W", 2: "HW", 3: "DHW"}
"""The letters of the spatial axes in a layout, by the number of these axes."""

PADDING_MODES = ("circular", "zeros", "reflect", "replicate")
"""The values that `Conv` accepts as its `padding_mode`; the names are PyTorch's."""


@dataclass(frozen=True)
class Conv:
    """Describe a convolutional layer without its weights: static, hashable and comparable.

    An instance says how a kernel array acts on images. It holds no array. So it can be a
    ``static_argnames`` argument of `jax.jit`, and a dictionary key.

    Parameters
    ----------
    layout : str
        One letter for each axis of the kernel array, in the array's order: ``O`` (output channels),
        ``I`` (input channels) and the spatial letters ``W``, ``HW`` or ``DHW``. PyTorch's `Conv2d`
        uses ``"OIHW"``, its `ConvTranspose2d` ``"IOHW"``; Keras and Flax use ``"HWIO"``. There is no
        default, because frameworks disagree and a wrong guess gives a plausible wrong number.
    stride, dilation : int or tuple of int, default 1
        One value for every spatial axis, or one for each axis in the order of `layout`. A transposed
        convolution has the values that its framework gives it: a stride of 2 doubles the extents.
    groups : int, default 1
        The channels fall into this many groups that do not mix. The axis ``I`` of the kernel (``O``
        when `transposed`) holds the channels of one group, as in every framework.
    padding : "same", "valid", int, tuple of int, or tuple of pairs, default "same"
        Elements added before and after each spatial axis. "same" gives ``extent // stride`` outputs.
        Where "same" adds an odd number of elements, the end gets one more than the start. A transposed
        convolution has the padding of the convolution whose adjoint it is, as in PyTorch. With an
        `output_padding` the numbers may be negative: they then add outputs that no tap reaches.
    padding_mode : "circular", "zeros", "reflect" or "replicate", default "circular"
        The values of the added elements. "circular" with "same" is the operator of the paper.
    transposed : bool, default False
        Whether the layer is the transpose of the convolution described.
    output_padding : int or tuple of int, optional
        Only for a transposed convolution with `padding_mode` "zeros". It says how many outputs there are, as in
        PyTorch and ONNX: ``(inputs - 1) * stride + dilation * (taps - 1) + 1 - pads + output_padding`` along an axis.
        None, the default, stands for ``inputs * stride`` outputs, and the padding must allow as many.

    Raises
    ------
    TypeError
        An argument is of the wrong kind, such as a float for `stride`.
    ValueError
        A value is impossible: a repeated or unknown letter, a stride of zero, or a number of values
        other than the number of axes. The message names the argument, what was passed and what is wanted.

    Examples
    --------
    >>> Conv("OIHW", stride=2, padding=1)
    Conv(layout='OIHW', stride=(2, 2), dilation=(1, 1), groups=1, padding=((1, 1), (1, 1)),
         padding_mode='circular', transposed=False, output_padding=None)
    >>> Conv("OIHW") == Conv("OIHW", stride=(1, 1))
    True
    """

    layout: str
    stride: PerAxis = 1
    dilation: PerAxis = 1
    groups: int = 1
    padding: Padding = "same"
    padding_mode: str = "circular"
    transposed: bool = False
    output_padding: PerAxis | None = None

    def __post_init__(self) -> None:
        _check_layout(self.layout)
        ndim = self.ndim
        set_field = object.__setattr__  # A frozen dataclass refuses plain assignment to its fields.
        set_field(self, "stride", per_axis("stride", self.stride, ndim, least=1))
        set_field(self, "dilation", per_axis("dilation", self.dilation, ndim, least=1))
        set_field(self, "groups", as_int("groups", self.groups, least=1))
        least = None if self.output_padding is not None else 0
        set_field(self, "padding", _normalise_padding(self.padding, ndim, least))
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={self.padding_mode!r}: wanted one of {', '.join(PADDING_MODES)}")
        if not isinstance(self.transposed, bool):
            raise TypeError(f"transposed={self.transposed!r}: wanted True or False")
        if self.output_padding is not None:
            set_field(self, "output_padding", per_axis("output_padding", self.output_padding, ndim, least=0))
            if not self.transposed or self.padding_mode != "zeros":
                raise ValueError(
                    f"output_padding={self.output_padding} with transposed={self.transposed} and "
                    f"padding_mode={self.padding_mode!r}: wanted None, or a transposed convolution with zeros"
                )

    @property
    def ndim(self) -> int:
        """Return the number of spatial axes."""
        return len(self.layout) - 2

    @property
    def spatial(self) -> str:
        """Return the spatial letters, in the order that `stride`, `padding` and input shapes follow."""
        return "".join(letter for letter in self.layout if letter not in "OI")

    @property
    def strides(self) -> tuple[int, ...]:
        """Return `stride` as one value for each spatial axis."""
        assert isinstance(self.stride, tuple)
        return self.stride

    @property
    def dilations(self) -> tuple[int, ...]:
        """Return `dilation` as one value for each spatial axis."""
        assert isinstance(self.dilation, tuple)
        return self.dilation

    def pads(self, taps: tuple[int, ...]) -> Pads:
        """Return the numbers of elements added before and after each axis, for a kernel of `taps` taps.

        "same" follows the rule of TensorFlow and JAX: it adds ``max(dilated extent - stride, 0)``
        elements to an axis, and the smaller half of them at the start. For a stride of 1 this is
        PyTorch's rule too.
        """
        if self.padding == "valid":
            return ((0, 0),) * self.ndim
        if self.padding == "same":
            totals = [
                max(dilation * (k - 1) + 1 - stride, 0)
                for k, dilation, stride in zip(taps, self.dilations, self.strides, strict=True)
            ]
            return tuple((total // 2, total - total // 2) for total in totals)
        return self.padding  # type: ignore[return-value]  # The constructor made pairs of it.


def transposed_conv(layout: str, taps: Iterable[int], pads: Iterable[tuple[int, int]], **geometry: Any) -> Conv:
    """Return the geometry of a zero-padded transposed layer from pads that count the layer's output padding.

    Parameters
    ----------
    layout : str
    taps : iterable of int
        Number of taps along each axis.
    pads : iterable of pairs of int
        The padding before and after each axis, less the outputs that are added there. It may be negative.
    **geometry : int or tuple of int
        The `stride`, `dilation` and `groups` of a `Conv`.

    Returns
    -------
    Conv
        Its `output_padding` is None where the layer has ``inputs * stride`` outputs, and 0 elsewhere.

    Examples
    --------
    >>> transposed_conv("IOW", [3], [(1, 0)], stride=2).output_padding is None
    True
    >>> transposed_conv("IOW", [3], [(1, 1)], stride=2).output_padding
    (0,)
    """
    pairs = tuple((before, after) for before, after in pads)
    conv = Conv(layout, padding=pairs, padding_mode="zeros", transposed=True, output_padding=0, **geometry)
    axes = zip(taps, conv.dilations, conv.strides, pairs, strict=True)
    fits = all(d * (k - 1) + 1 - sum(pair) == stride and min(pair) >= 0 for k, d, stride, pair in axes)
    return replace(conv, output_padding=None) if fits else conv


def as_int(name: str, value: object, *, least: int | None) -> int:
    """Return `value` as an int of at least `least`; raise TypeError for a boolean or a float, ValueError for less.

    Any int will do if `least` is None.

    Examples
    --------
    >>> as_int("stride", 2, least=1)
    2
    >>> as_int("stride", 0, least=1)
    Traceback (most recent call last):
    ValueError: stride=0: wanted an integer of at least 1
    """
    if isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: wanted an integer, not a boolean")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r}: wanted an integer, not {type(value).__name__}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}={number}: wanted an integer of at least {least}")
    return number


def check_positive(name: str, value: object) -> float:
    """Return `value` as a float; raise ValueError unless it is a positive, finite number.

    Examples
    --------
    >>> check_positive("rtol", 1)
    1.0
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}={value!r}: wanted a positive, finite number")
    return float(value)


def as_float(name: str, value: object) -> float:
    """Return a real number as a float; raise TypeError for a boolean and for what is no number.

    Examples
    --------
    >>> as_float("p", 2)
    2.0
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: wanted a number, not {type(value).__name__}")
    return float(value)


def per_axis(name: str, value: object, ndim: int, *, least: int | None) -> tuple[int, ...]:
    """Return one int for each axis, each of at least `least`, from an int or an iterable of `ndim` ints.

    Examples
    --------
    >>> per_axis("stride", 2, 3, least=1), per_axis("stride", [1, 2], 2, least=1)
    ((2, 2, 2), (1, 2))
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (as_int(name, value, least=least),) * ndim
    if isinstance(value, Set | Mapping):
        raise TypeError(f"{name}={value!r}: wanted an int or a tuple of ints; a {type(value).__name__} has no order")
    values = tuple(value)
    if len(values) != ndim:
        raise ValueError(f"{name}={values}: {len(values)} values, wanted one for each of the {ndim} spatial axes")
    return tuple(as_int(f"{name}[{axis}]", item, least=least) for axis, item in enumerate(values))


def _check_layout(layout: object) -> None:
    wanted = "wanted O, I and the spatial letters W, HW or DHW in the array's order, such as 'OIHW' or 'HWIO'"
    if not isinstance(layout, str):
        raise TypeError(f"layout={layout!r}: {wanted}")
    repeated = sorted({letter for letter in layout if layout.count(letter) > 1})
    if repeated:
        raise ValueError(f"layout={layout!r}: the letter {repeated[0]} is repeated; {wanted}")
    unknown = sorted(set(layout) - set("OIDHW"))
    if unknown:
        hint = " (N is an axis of images, not of kernels)" if "N" in unknown else ""
        hint = hint or (" (letters are upper case)" if layout.upper() != layout else "")
        raise ValueError(f"layout={layout!r}: unknown letter {unknown[0]!r}{hint}; {wanted}")
    spatial = "".join(letter for letter in layout if letter not in "OI")
    if not {"O", "I"} <= set(layout) or sorted(spatial) not in [sorted(s) for s in SPATIAL_LETTERS.values()]:
        raise ValueError(f"layout={layout!r}: {wanted}")


def _normalise_padding(padding: object, ndim: int, least: int | None) -> Padding:
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding={padding!r}: wanted 'same', 'valid', an int, one int an axis, or pairs")
        return padding  # type: ignore[return-value]
    if isinstance(padding, Iterable):
        sides = tuple(padding)
        if sides and all(isinstance(side, Iterable) for side in sides):
            pairs = tuple(tuple(side) for side in sides)
            if len(pairs) != ndim or any(len(pair) != 2 for pair in pairs):
                raise ValueError(f"padding={pairs}: wanted one (before, after) pair for each of {ndim} axes")
            return tuple((as_int("padding", a, least=least), as_int("padding", b, least=least)) for a, b in pairs)
        padding = sides
    return tuple((side, side) for side in per_axis("padding", padding, ndim, least=least))
