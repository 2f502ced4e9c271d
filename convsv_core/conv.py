"""The static description of a convolution: everything about it but the numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

PerAxis: TypeAlias = int | tuple[int, ...]
Pads: TypeAlias = tuple[tuple[int, int], ...]
Padding: TypeAlias = Literal["same", "valid"] | int | tuple[int, ...] | Pads

SPATIAL_LETTERS = {1: "W", 2: "HW", 3: "DHW"}
PADDING_MODES = ("circular", "zeros", "reflect", "replicate")


@dataclass(frozen=True)
class Conv:
    """A convolutional layer without its weights: static, hashable and comparable.

    An instance describes how a kernel array acts. It holds no array, so it is safe as a
    ``static_argnames`` argument of `jax.jit` and as a dictionary key.

    Parameters
    ----------
    layout : str
        One letter for each axis of the kernel array, in the array's order: ``O`` (output channels),
        ``I`` (input channels) and the spatial letters ``W``, ``HW`` or ``DHW``. PyTorch's `Conv2d`
        is ``"OIHW"``, its `ConvTranspose2d` ``"IOHW"``; Keras and Flax are ``"HWIO"``. There is no
        default: frameworks disagree, and a wrong guess gives a plausible wrong number.
    stride, dilation : int or tuple of int, default 1
        One value for every spatial axis, or one for each in the order of `layout`. For a transposed
        convolution these are the framework's own values (a stride of 2 doubles the extents).
    groups : int, default 1
        The channels fall into this many groups that do not mix. The axis ``I`` of the kernel (``O``
        when `transposed`) holds the channels of one group, as in every framework.
    padding : "same", "valid", int, tuple of int, or tuple of pairs, default "same"
        Elements added before and after each spatial axis. "same" gives ``extent // stride`` outputs;
        when the total is odd the extra element goes to the end. For a transposed convolution it is
        the padding of the convolution whose adjoint this is, as in PyTorch.
    padding_mode : "circular", "zeros", "reflect" or "replicate", default "circular"
        What is added. "circular" with "same" is the operator of the paper.
    transposed : bool, default False
        Whether the layer is the transpose of the convolution described.

    Raises
    ------
    TypeError
        An argument is of the wrong kind, such as a float for `stride`.
    ValueError
        A value is impossible: letters repeated or unknown, a zero stride, as many values as there
        are no axes. The message names the argument, what was passed and what is wanted.

    Examples
    --------
    >>> Conv("OIHW", stride=2, padding=1)
    Conv(layout='OIHW', stride=(2, 2), dilation=(1, 1), groups=1, padding=((1, 1), (1, 1)),
         padding_mode='circular', transposed=False)
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

    def __post_init__(self) -> None:
        _check_layout(self.layout)
        ndim = self.ndim
        set_field = object.__setattr__  # the dataclass is frozen; fields are normalised once, here
        set_field(self, "stride", per_axis("stride", self.stride, ndim, least=1))
        set_field(self, "dilation", per_axis("dilation", self.dilation, ndim, least=1))
        set_field(self, "groups", as_int("groups", self.groups, least=1))
        set_field(self, "padding", _normalise_padding(self.padding, ndim))
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={self.padding_mode!r}: wanted one of {', '.join(PADDING_MODES)}")
        if not isinstance(self.transposed, bool):
            raise TypeError(f"transposed={self.transposed!r}: wanted True or False")

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.layout) - 2

    @property
    def spatial(self) -> str:
        """The spatial letters, in the order that `stride`, `padding` and input shapes follow."""
        return "".join(letter for letter in self.layout if letter not in "OI")

    @property
    def strides(self) -> tuple[int, ...]:
        """`stride`, one value an axis."""
        assert isinstance(self.stride, tuple)
        return self.stride

    @property
    def dilations(self) -> tuple[int, ...]:
        """`dilation`, one value an axis."""
        assert isinstance(self.dilation, tuple)
        return self.dilation

    def pads(self, taps: tuple[int, ...]) -> Pads:
        """Elements added before and after each axis for a kernel of `taps` taps an axis.

        "same" is the rule of TensorFlow and JAX, which for a stride of 1 is PyTorch's too: the total is
        ``max(dilated extent - stride, 0)``, of which the first side gets the smaller half.
        """
        if self.padding == "valid":
            return ((0, 0),) * self.ndim
        if self.padding == "same":
            totals = [
                max(dilation * (k - 1) + 1 - stride, 0)
                for k, dilation, stride in zip(taps, self.dilations, self.strides, strict=True)
            ]
            return tuple((total // 2, total - total // 2) for total in totals)
        return self.padding  # type: ignore[return-value]  # normalised to pairs at construction


def as_int(name: str, value: object, *, least: int) -> int:
    """`value` as an int no smaller than `least`; booleans and floats are refused."""
    if isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: wanted an integer, not a boolean")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r}: wanted an integer, not {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name}={number}: wanted an integer of at least {least}")
    return number


def check_positive(name: str, value: object) -> float:
    """Return `value` as a float; raise ValueError unless it is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name}={value!r}: wanted a positive, finite number")
    return float(value)


def per_axis(name: str, value: object, ndim: int, *, least: int) -> tuple[int, ...]:
    """`value` as one int an axis, from an int or an iterable of `ndim` ints."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return (as_int(name, value, least=least),) * ndim
    values = tuple(value)
    if len(values) != ndim:
        raise ValueError(f"{name}={values}: {len(values)} values for {ndim} spatial axes")
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


def _normalise_padding(padding: object, ndim: int) -> Padding:
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
            return tuple((as_int("padding", a, least=0), as_int("padding", b, least=0)) for a, b in pairs)
        padding = sides
    return tuple((side, side) for side in per_axis("padding", padding, ndim, least=0))
