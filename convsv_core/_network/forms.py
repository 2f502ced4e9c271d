"""Linear maps of images as convolutions on the infinite lattice, which can be composed and added where that is sound.

A form is ``P A E``: E puts the input into the lattice with zeros around it, A is a convolution with a stride, and P
takes the output's box. Its norm is at most the supremum of the norm of A's symbol. The composition with a second form
is ``P' B E P A E``, and ``E P`` may be left out, so that the symbols are multiplied, in two cases, axis by axis:

- B reads no element outside the box between the two, as 1 x 1 and 'valid' convolutions do;
- A gives nothing outside this box, as 1 x 1 convolutions and 'full' padding do.

Elsewhere the product of the symbols is no bound (T(b) T(a) = T(ba) less a Hankel term), and there is no composition.
Circular convolutions of one period multiply too. A map that reads inside of the box may follow one of them if the total
stride divides the period: with period 3, outputs 0 and 2 are neighbours, which those of the lattice are not. Padding
that repeats pixels is a map of its own in front of A, with the norm that the padding rule gives.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from convsv_core._network.norms import EPS, euclidean_norm, supremum_norm
from convsv_core._network.rule_types import Float64Array
from convsv_core.conv import SPATIAL_LETTERS, Conv

__all__ = ["Form", "add", "compose", "pointwise", "regrouped"]

MOST_ENTRIES = 1 << 23
"""Largest number of entries of a composed kernel: 64 MiB. A guess."""

MOST_PRODUCTS = 1 << 34
"""Largest number of multiplications to compose two kernels: about one processor second. A guess."""

PERIODIC = ("circular", "part")
"""The modes in which the output of the map is periodic, or part of a periodic image."""


@dataclass(frozen=True, eq=False)
class Form:
    """A linear map of images as a convolution on the lattice.

    Attributes
    ----------
    kernel : array, shape (groups, rows, columns, *taps)
        Output and input channels of each group, and one axis of taps for every other axis of the images.
    start, stride, dilation : tuple of int
        The first tap's offset, the step of the outputs and the step of the taps, along each axis of taps.
    extents, outputs : tuple of int
        The extents of the input's and of the output's box.
    axes_in, axes_out : tuple of int
        Which axis of the input, and of the output, is the channels, and which are the axes of taps, in this order.
    mode : {"zeros", "circular", "cut", "part"}
        "circular" if the images are periods of the lattice. "cut" if the output is part of a larger image that is not
        zero outside: only maps that read inside the box may follow. "part" if this larger image is periodic, with the
        period `extents` of the input: then the total stride must divide the period too.
    adjoint : bool
        Whether the map is the adjoint of the one described: a transposed convolution.
    factor : float
        The norm of what stands in front of the convolution, such as padding.
    error : float
        Bound of the norm of the difference between the kernel and the exact one, as operators.
    """

    kernel: Float64Array
    start: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    extents: tuple[int, ...]
    outputs: tuple[int, ...]
    axes_in: tuple[int, ...]
    axes_out: tuple[int, ...]
    mode: str = "zeros"
    adjoint: bool = False
    factor: float = 1.0
    error: float = 0.0

    @property
    def taps(self) -> tuple[int, ...]:
        """Return the number of taps along each axis."""
        return self.kernel.shape[3:]

    @property
    def is_pointwise(self) -> bool:
        """Return whether the map multiplies the channels of each place by a matrix, and changes no extent."""
        return (
            math.prod(self.taps) == 1
            and not any(self.start)
            and math.prod(self.stride) == 1
            and self.extents == self.outputs
        )

    @cached_property
    def moduli(self) -> float:
        """Return the sum over the taps of their Frobenius norms, which bounds the map's norm."""
        norms = euclidean_norm(self.kernel, axis=(1, 2))
        return float(np.max(np.sum(norms.reshape(len(norms), -1), axis=1))) * (1 + 1e-10)

    def norm(self, rtol: float) -> float:
        """Return a certified upper bound of the map's norm, whose search ends within `rtol` of the supremum."""
        kernel = self.kernel
        strides: list[int] = []
        dilations: list[int] = []
        for axis in reversed(range(len(self.taps))):
            if self.taps[axis] == 1:
                kernel = np.squeeze(kernel, axis=axis + 3)
            else:
                strides.insert(0, self.stride[axis])
                dilations.insert(0, self.dilation[axis])
        groups, rows, columns, *taps = kernel.shape
        if len(taps) > len(SPATIAL_LETTERS):
            return math.inf
        if not taps:
            kernel, strides, dilations, taps = kernel[..., None], [1], [1], [1]
        conv = Conv(
            "OI" + SPATIAL_LETTERS[len(taps)],
            stride=tuple(strides),
            dilation=tuple(dilations),
            groups=groups,
        )
        supremum = supremum_norm(kernel.reshape(groups * rows, columns, *taps), conv, rtol)
        return (supremum + self.error) * self.factor * (1 + 4 * EPS) if self.error or self.factor != 1 else supremum


def pointwise(kernel: Float64Array, extents: tuple[int, ...], axes: tuple[int, ...], error: float = 0.0) -> Form:
    """Return the form that multiplies the channels of each place by matrices, shape (groups, rows, columns)."""
    ones, zeros = (1,) * len(extents), (0,) * len(extents)
    return Form(kernel.reshape(*kernel.shape, *ones), zeros, ones, ones, extents, extents, axes, axes, error=error)


def compose(second: Form, first: Form) -> Form | None:
    """Return the form of `second` after `first`; None where their symbols may not be multiplied, or it is too large."""
    if second.axes_in != first.axes_out or second.extents != first.outputs or second.factor != 1.0:
        return _padded_after(second, first)
    if first.adjoint or second.adjoint:
        return _composed_adjoints(second, first)
    mode = _joint_mode(second, first)
    if mode is None:
        return None
    return _multiply(second, first, mode)


def _padded_after(second: Form, first: Form) -> Form | None:
    """Compose a layer whose padding repeats pixels with a pointwise map before it: the two may change places."""
    fits = second.axes_in == first.axes_out and second.extents == first.outputs
    if not fits or not first.is_pointwise or first.adjoint or second.adjoint or first.factor != 1.0:
        return None
    return _multiply(second, first, second.mode)


def _joint_mode(second: Form, first: Form) -> str | None:
    """Return the mode of the composition, or None where the symbols may not be multiplied."""
    if first.is_pointwise and first.mode == "zeros":
        return second.mode
    if second.is_pointwise and second.mode == "zeros":
        return first.mode
    axes = range(len(first.taps))
    if second.mode == "circular":
        return "circular" if first.mode == "circular" else None
    if second.mode != "zeros":
        return None
    inside = [_reads_inside(second, axis) for axis in axes]
    if first.mode in PERIODIC:
        steps = (early * late for early, late in zip(first.stride, second.stride, strict=True))
        whole = not any(extent % step for extent, step in zip(first.extents, steps, strict=True))
        return "part" if whole and all(inside) else None
    if first.mode != "zeros":
        return "cut" if all(inside) else None
    return "zeros" if all(inside[axis] or _vanishes_outside(first, axis) for axis in axes) else None


def _reads_inside(form: Form, axis: int) -> bool:
    """Return whether no output reads an element outside of the input's box."""
    last = (form.outputs[axis] - 1) * form.stride[axis] + form.start[axis] + form.dilation[axis] * (form.taps[axis] - 1)
    return form.start[axis] >= 0 and last < form.extents[axis]


def _vanishes_outside(form: Form, axis: int) -> bool:
    """Return whether the convolution on the lattice gives nothing outside of the output's box."""
    stride, low = form.stride[axis], form.start[axis]
    high = low + form.dilation[axis] * (form.taps[axis] - 1)
    first, last = -(high // stride), (form.extents[axis] - 1 - low) // stride
    return first >= 0 and last < form.outputs[axis]


def _composed_adjoints(second: Form, first: Form) -> Form | None:
    """Compose with a transposed convolution, where the other map is pointwise: ``B T = (T* B*)*``."""
    if first.adjoint and not second.adjoint and second.is_pointwise and second.mode == "zeros":
        found = compose(_bare(first), _pointwise_adjoint(second, first))
        return (
            None
            if found is None
            else replace(
                found,
                adjoint=True,
                extents=first.extents,
                outputs=first.outputs,
                axes_in=first.axes_in,
                axes_out=second.axes_out,
                factor=first.factor,
            )
        )
    return None


def _bare(form: Form) -> Form:
    """Return the forward convolution of a transposed one."""
    return replace(
        form,
        adjoint=False,
        extents=form.outputs,
        outputs=form.extents,
        axes_in=form.axes_out,
        axes_out=form.axes_in,
        factor=1.0,
    )


def _pointwise_adjoint(form: Form, like: Form) -> Form:
    return replace(form, kernel=np.swapaxes(form.kernel, 1, 2), axes_in=like.axes_out, axes_out=like.axes_out)


def _multiply(second: Form, first: Form, mode: str) -> Form | None:
    groups = math.gcd(len(second.kernel), len(first.kernel))
    rows = second.kernel.shape[0] * second.kernel.shape[1] // groups
    middle = first.kernel.shape[0] * first.kernel.shape[1] // groups
    columns = first.kernel.shape[0] * first.kernel.shape[2] // groups
    steps, taps = [], []
    for axis, (k, j) in enumerate(zip(first.taps, second.taps, strict=True)):
        own, other = first.dilation[axis], first.stride[axis] * second.dilation[axis]
        step = math.gcd(own if k > 1 else 0, other if j > 1 else 0) or 1
        steps.append(step)
        taps.append((own * (k - 1) + other * (j - 1)) // step + 1)
    entries = groups * rows * columns * math.prod(taps)
    products = groups * rows * middle * columns * math.prod(first.taps) * math.prod(second.taps)
    if entries > MOST_ENTRIES or products > MOST_PRODUCTS:
        return None
    left, right = regrouped(second.kernel, groups), regrouped(first.kernel, groups)
    kernel: Float64Array = np.zeros((groups, rows, columns, *taps))
    for late in itertools.product(*map(range, second.taps)):
        for early in itertools.product(*map(range, first.taps)):
            offsets = (
                (first.dilation[axis] * early[axis] + first.stride[axis] * second.dilation[axis] * late[axis])
                // steps[axis]
                for axis in range(len(taps))
            )
            place: Any = (Ellipsis, *offsets)
            after: Any = (Ellipsis, *late)
            before: Any = (Ellipsis, *early)
            kernel[place] += left[after] @ right[before]
    terms = middle * min(math.prod(first.taps), math.prod(second.taps)) + 2
    error = (
        second.error * first.moduli
        + second.moduli * first.error
        + second.error * first.error
        + terms * EPS * second.moduli * first.moduli
    )
    start = tuple(a + s * b for a, s, b in zip(first.start, first.stride, second.start, strict=True))
    stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    return Form(
        kernel,
        start,
        stride,
        tuple(steps),
        first.extents,
        second.outputs,
        first.axes_in,
        second.axes_out,
        mode,
        factor=first.factor * second.factor * (1.0 if 1.0 in (first.factor, second.factor) else 1 + EPS),
        error=error * (1 + 1e-10),
    )


def regrouped(kernel: Float64Array, groups: int) -> Float64Array:
    """Return the kernel with fewer groups, in which the channels of other groups have zeros."""
    own, rows, columns, *taps = kernel.shape
    if own == groups:
        return kernel
    part = own // groups
    result = np.zeros((groups, part, rows, part, columns, *taps))
    split = kernel.reshape(groups, part, rows, columns, *taps)
    for index in range(part):
        result[:, index, :, index] = split[:, index]
    return result.reshape(groups, part * rows, part * columns, *taps)


def add(first: Form, second: Form) -> Form | None:
    """Return the form of the sum of two maps of one input; None where they are no sum of symbols."""
    if (first.axes_in, first.axes_out, first.extents, first.outputs, first.stride) != (
        second.axes_in,
        second.axes_out,
        second.extents,
        second.outputs,
        second.stride,
    ):
        return None
    modes = {form.mode for form in (first, second) if not form.is_pointwise}
    if (
        first.adjoint
        or second.adjoint
        or first.factor != 1
        or second.factor != 1
        or len(modes) > 1
        or modes & {"cut", "part"}
    ):
        return None
    groups = math.gcd(len(first.kernel), len(second.kernel))
    start, steps, taps = [], [], []
    for axis in range(len(first.taps)):
        ends = [(f.start[axis], f.start[axis] + f.dilation[axis] * (f.taps[axis] - 1)) for f in (first, second)]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        gaps = [f.dilation[axis] for f in (first, second) if f.taps[axis] > 1]
        step = math.gcd(*gaps, first.start[axis] - second.start[axis]) or 1
        start.append(low)
        steps.append(step)
        taps.append((high - low) // step + 1)
    left, right = regrouped(first.kernel, groups), regrouped(second.kernel, groups)
    if left[0].size // math.prod(first.taps) * groups * math.prod(taps) > MOST_ENTRIES:
        return None
    kernel = np.zeros((*left.shape[:3], *taps))
    for form, part in ((first, left), (second, right)):
        window = tuple(
            slice((form.start[axis] - start[axis]) // steps[axis], None, form.dilation[axis] // steps[axis])
            if form.taps[axis] > 1
            else slice(
                (form.start[axis] - start[axis]) // steps[axis], (form.start[axis] - start[axis]) // steps[axis] + 1
            )
            for axis in range(len(taps))
        )
        view = kernel[(slice(None),) * 3 + window]
        view[(slice(None),) * 3 + tuple(slice(count) for count in form.taps)] += part
    error = first.error + second.error + 2 * EPS * (first.moduli + second.moduli)
    return replace(
        first, kernel=kernel, start=tuple(start), dilation=tuple(steps), mode=next(iter(modes), "zeros"), error=error
    )
