"""Integer planning: which frequencies to visit, which taps meet which phases, how often each value counts.

Everything here consists of integers on the host. They depend on shapes alone, are computed once and are
cached. So the array code has no branches on layout, stride, dilation or grouping.

A convolution of stride s splits an input of n elements into s classes: element m belongs to the class
``m mod s`` (space to depth). On these classes, as channels of n / s elements each, it is a convolution of
stride 1. The tap at position ``t`` relative to the output reads the class ``r = t mod s`` at the offset
``q = t // s``. At ``theta = 2 pi j / (n / s)`` the symbol is ``A(theta)[:, (r, :)] = sum K_t exp(i q theta)``,
a sum over the taps that read the class r.

Two properties save most of the work:

- For a real kernel ``A(-theta) = conj A(theta)``, so one frequency of each such pair is enough.
- Within a class, the singular values depend on differences between offsets alone. If the differences and
  the grid share a divisor ``g``, the singular values repeat g times along that axis. With one tap along an
  axis they are constant along it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from convsv_core._geometry.shapes import forward_extents, resolve_channels
from convsv_core.conv import Conv, Pads

__all__ = [
    "Axis",
    "HostArray",
    "IntArray",
    "Plan",
    "check_circulant",
    "check_square",
    "is_circulant",
    "make_plan",
]

IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
"""A NumPy array of integers on the host."""

BoolArray: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
"""A NumPy array of booleans on the host."""

HostArray: TypeAlias = np.ndarray[Any, Any]
"""A NumPy array on the host."""


@dataclass(frozen=True)
class Axis:
    """Hold the plan of one spatial axis of the forward convolution.

    A transposed layer is the adjoint of its forward convolution.

    Attributes
    ----------
    taps, stride, extent : int
        Number of taps of the kernel, stride, and number of elements of the input.
    grid : int
        Number of frequencies, ``extent // stride``; 0 on the infinite lattice.
    period : int
        Number of frequencies after which the singular values repeat: ``grid // step``.
    step : int
        The divisor that the grid and the offsets share.
    residues : tuple of int
        The classes modulo `stride` that some tap reads. If the plan keeps all residues: every class.
    bases : tuple of int
        For each class, the smallest offset of its taps. `offsets` are relative to it.
    offsets : tuple of int
        Distinct offsets, in units of `step`: the phase of offset q at frequency j is
        ``exp(2 pi i j q / period)``.
    slots : tuple of tuple of int
        ``slots[q][r]`` is the tap at offset number q and class number r, or `taps` where there is none.
    """

    taps: int
    stride: int
    extent: int
    grid: int
    period: int
    step: int
    residues: tuple[int, ...]
    bases: tuple[int, ...]
    offsets: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]

    def sharing(self) -> IntArray:
        """Return, for each tap, the number of taps at its place: more than 1 if the kernel wraps round."""
        places = self.places()
        counts = Counter(places)
        return np.asarray([counts[place] for place in places])

    def places(self) -> list[tuple[int, int]]:
        """Return the place of each tap: its class, and its offset modulo the period."""
        return [(r, self.offsets[q] % self.period) for q, r in self.tap_slots()]

    @functools.cached_property
    def tap_of_slot(self) -> IntArray | None:
        """Return `slots` in row-major order, or None if these are all taps in ascending order."""
        return _unless_in_order(np.asarray(self.slots).reshape(-1), self.taps)

    @functools.cached_property
    def slot_of_tap(self) -> IntArray | None:
        """Return each tap's place in the row-major `slots`, or None if these are all places in ascending order."""
        slots = [q * len(self.residues) + r for q, r in self.tap_slots()]
        return _unless_in_order(np.asarray(slots), len(self.offsets) * len(self.residues))

    def tap_slots(self) -> list[tuple[int, int]]:
        """Return each tap's indices ``(q, r)`` into `slots`."""
        found = {tap: (q, r) for q, row in enumerate(self.slots) for r, tap in enumerate(row)}
        return [found[tap] for tap in range(self.taps)]


@dataclass(frozen=True, eq=False)
class Plan:
    """Hold the geometry of one operator, resolved to integers.

    A block is the symbol's matrix of one group at one frequency.

    Attributes
    ----------
    conv : Conv
    axes : tuple of Axis
    groups : int
    rows, columns : int
        Output channels and input channels of one group of the forward convolution.
    real : bool
        Whether the kernel is real. If it is, one frequency of each conjugate pair is visited.
    frequencies : int array, shape (visited, ndim)
        Indices of the visited frequencies. Frequencies that are their own conjugates come first.
    self_conjugate : int
        Number of visited frequencies that are their own conjugates.
    visit : int array, shape (prod(periods),)
        For each frequency of one period, in row-major order: the row of `frequencies` that stands for it.
    mirrored : bool array, shape (prod(periods),)
        For each frequency of one period: whether it is the conjugate of the frequency that stands for it.
    """

    conv: Conv
    axes: tuple[Axis, ...]
    groups: int
    rows: int
    columns: int
    real: bool
    frequencies: IntArray
    self_conjugate: int
    visit: IntArray
    mirrored: BoolArray

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the number of frequencies along each axis."""
        return tuple(axis.grid for axis in self.axes)

    @property
    def periods(self) -> tuple[int, ...]:
        """Return the number of frequencies along each axis after which the singular values repeat."""
        return tuple(axis.period for axis in self.axes)

    @property
    def copies(self) -> int:
        """Return how often the grid repeats one period."""
        return math.prod(self.grid) // math.prod(self.periods)

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Return the distinct offsets along each axis."""
        return tuple(axis.offsets for axis in self.axes)

    @functools.cached_property
    def offset_count(self) -> int:
        """Return the number of combinations of the axes' offsets, which is the number of the symbol's coefficients."""
        return math.prod(map(len, self.offsets))

    @property
    def block(self) -> tuple[int, int]:
        """Return the shape of a block, without the columns of classes that no tap reads."""
        return self.rows, self.columns * math.prod(len(axis.residues) for axis in self.axes)

    @property
    def values_per_block(self) -> int:
        """Return the number of singular values of a block, including the zeros of classes that no tap reads."""
        return min(self.rows, self.columns * math.prod(self.conv.strides))

    @property
    def unread_values(self) -> int:
        """Return how many singular values are 0 at each frequency because no tap reads their inputs."""
        return self.groups * (self.values_per_block - min(self.block))

    @property
    def is_square(self) -> bool:
        """Return whether the operator has as many outputs as inputs."""
        return self.rows == self.columns * math.prod(self.conv.strides)

    @property
    def exponential_types(self) -> HostArray:
        """Return the symbol's exponential type along each axis: half the span of the axis's offsets."""
        return np.asarray([(max(axis.offsets) - min(axis.offsets)) / 2 for axis in self.axes])

    def weights(self) -> HostArray:
        """Return how many frequencies of one period each visited one stands for; the sum is ``prod(periods)``."""
        weights = np.full(len(self.frequencies), 2.0 if self.real else 1.0)
        weights[: self.self_conjugate] = 1.0
        return weights

    @functools.cached_property
    def sharing(self) -> HostArray:
        """Return, for each tap, the number of taps at its place; the shape is that of the kernel's spatial axes."""
        return np.asarray(functools.reduce(np.multiply.outer, [axis.sharing() for axis in self.axes]))

    @property
    def is_full(self) -> bool:
        """Return whether a tap acts at every place of one period, so that the taps are free to be any operator."""
        return all(len(set(axis.places())) == len(axis.residues) * axis.period for axis in self.axes)

    def full_grid(self) -> tuple[IntArray, BoolArray]:
        """Return `visit` and `mirrored` for every frequency of the grid, in row-major order."""
        indices = np.indices(self.grid).reshape(len(self.grid), -1)
        places = np.ravel_multi_index(tuple(i % p for i, p in zip(indices, self.periods, strict=True)), self.periods)
        return self.visit[places], self.mirrored[places]


@functools.lru_cache(maxsize=64)
def make_plan(
    kernel_shape: tuple[int, ...],
    real: bool,
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    *,
    all_residues: bool = False,
) -> Plan:
    """Resolve a convolution to integers; raise ValueError for an impossible geometry.

    Without an `input_shape` the operator acts on the infinite lattice. Its axes then have a grid and a
    period of 0, and there are no frequencies to visit. With `all_residues` the plan keeps the columns of
    input elements that no tap reads: singular vectors need these columns.
    """
    channels = resolve_channels(kernel_shape, conv)
    pads = conv.pads(channels.taps)
    if input_shape is None:
        extents: tuple[int, ...] = (0,) * conv.ndim
    else:
        check_circulant(channels.taps, input_shape, pads, conv)
        extents = forward_extents(channels.taps, input_shape, conv)
    resolved = tuple(
        _make_axis(taps, extent, stride, dilation, before, all_residues)
        for taps, extent, stride, dilation, (before, _) in zip(
            channels.taps, extents, conv.strides, conv.dilations, pads, strict=True
        )
    )
    visits = _visits([axis.period for axis in resolved], real)
    return Plan(conv, resolved, channels.groups, channels.rows, channels.columns, real, *visits)


def check_square(plan: Plan, kernel_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the operator has as many outputs as inputs, and so a determinant."""
    if plan.is_square:
        return
    conv = plan.conv
    ours, other = ("input", "output") if conv.transposed else ("output", "input")
    raise ValueError(
        f"the operator is not square, so it has no determinant: a group has {plan.rows} {ours} channels, "
        f"wanted {plan.columns * math.prod(conv.strides)}: its {plan.columns} {other} channels times the "
        f"strides {conv.strides} (kernel shape {kernel_shape}, {conv})"
    )


def check_circulant(taps: tuple[int, ...], input_shape: tuple[int, ...], pads: Pads, conv: Conv) -> None:
    """Raise an error unless the operator is circulant: periodic, with ``extent // stride`` outputs along each axis.

    The error is a ValueError where a stride does not divide an extent, and NotImplementedError for other padding.
    """
    for axis, (k, extent, stride, dilation, pad) in enumerate(
        zip(taps, forward_extents(taps, input_shape, conv), conv.strides, conv.dilations, pads, strict=True)
    ):
        if extent % stride and not conv.transposed:
            raise ValueError(
                f"stride {stride} does not divide the extent {extent} of axis {conv.spatial[axis]} "
                f"(input_shape={input_shape}): a circular convolution needs a multiple of the stride; the nearest "
                f"are {[m for m in (extent - extent % stride, extent - extent % stride + stride) if m]}"
            )
        if _fits(k, extent, stride, dilation, pad, conv.padding_mode):
            continue
        outputs = (extent + sum(pad) - dilation * (k - 1) - 1) // stride + 1
        raise NotImplementedError(
            f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} on axis {conv.spatial[axis]} "
            f"({k} taps, dilation {dilation}, stride {stride}) gives {outputs} outputs for {extent} inputs, so the "
            f"operator is not circulant; supported: padding_mode='circular' with padding='same', or with explicit "
            f"padding that gives extent / stride = {extent // stride} outputs (operator_norm takes any padding)"
        )


def is_circulant(kernel_shape: tuple[int, ...], input_shape: tuple[int, ...], conv: Conv) -> bool:
    """Return whether the operator is circulant: periodic, with ``extent // stride`` outputs along each axis."""
    taps = resolve_channels(kernel_shape, conv).taps
    pads = conv.pads(taps)
    extents = forward_extents(taps, input_shape, conv)
    geometry = zip(taps, extents, conv.strides, conv.dilations, pads, strict=True)
    return all(_fits(*axis, conv.padding_mode) for axis in geometry)


def _fits(taps: int, extent: int, stride: int, dilation: int, pad: tuple[int, int], padding_mode: str) -> bool:
    """Return whether one axis of an operator is circulant."""
    outputs = (extent + sum(pad) - dilation * (taps - 1) - 1) // stride + 1
    padded_alike = padding_mode == "circular" or not any(pad)
    return padded_alike and extent % stride == 0 and outputs == extent // stride


def _unless_in_order(places: IntArray, count: int) -> IntArray | None:
    """Return `places`, or None if they are 0 to `count` - 1 in ascending order."""
    return None if np.array_equal(places, np.arange(count)) else places


def _make_axis(taps: int, extent: int, stride: int, dilation: int, before: int, all_residues: bool) -> Axis:
    """Return the plan of one axis, with `before` elements of padding at its start."""
    grid = extent // stride
    places = [divmod(tap * dilation - before, stride) for tap in range(taps)]  # (offset q, class r)
    bases = {r: q for q, r in sorted(places, reverse=True)}  # The smallest offset of a class is written last.
    residues = tuple(range(stride)) if all_residues else tuple(sorted(bases))
    relative = [(q - bases[r], r) for q, r in places]
    step = math.gcd(grid, *(q for q, _ in relative)) or 1
    offsets = tuple(sorted({q // step for q, _ in relative}))
    at = {(q // step, r): tap for tap, (q, r) in enumerate(relative)}
    slots = tuple(tuple(at.get((q, r), taps) for r in residues) for q in offsets)
    return Axis(
        taps=taps,
        stride=stride,
        extent=extent,
        grid=grid,
        period=grid // step,
        step=step,
        residues=residues,
        bases=tuple(bases.get(r, 0) for r in residues),
        offsets=offsets,
        slots=slots,
    )


class _Visits(NamedTuple):
    """Hold the fields of a `Plan` that say which frequencies to visit."""

    frequencies: IntArray
    self_conjugate: int
    visit: IntArray
    mirrored: BoolArray


def _visits(periods: list[int], real: bool) -> _Visits:
    """Choose the frequencies to visit: all of one period, or one of each conjugate pair for a real kernel."""
    indices = np.indices(periods).reshape(len(periods), -1)
    own = np.arange(indices.shape[1])
    conjugate = np.ravel_multi_index(tuple(-i % p for i, p in zip(indices, periods, strict=True)), periods)
    if not real:
        conjugate = own  # Every frequency stands for itself alone.
    alone = own[own == conjugate]
    visited = np.concatenate([alone, own[own < conjugate]])
    position = np.empty_like(own)
    position[visited] = np.arange(len(visited))
    return _Visits(indices.T[visited], len(alone), position[np.minimum(own, conjugate)], own > conjugate)
