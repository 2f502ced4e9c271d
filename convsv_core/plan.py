"""Integer planning: which frequencies to visit, which taps meet which phases, how often each value counts.

Everything here is host integers that depend on shapes alone, computed once and cached. The array code
that follows has no branches on layout, stride, dilation or grouping.

A convolution of stride s on a circular input of n elements is a stride-1 convolution on the n / s
residue classes of the input's elements modulo s (space to depth). The tap at position ``t`` relative to
the output then reads the class ``r = t mod s`` at the offset ``q = t // s``, and the symbol is
``A(theta)[:, (r, :)] = sum over the taps of r of K_t exp(i q theta)`` at ``theta = 2 pi j / (n / s)``.

Two properties save most of the work. For a real kernel ``A(-theta) = conj A(theta)``. And per class only
the differences between offsets matter to the singular values, so where they and the grid share a divisor
``g`` the symbol repeats g times along that axis: an axis with one tap is the case where it is constant.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from convsv_core.conv import Conv, Pads, as_int, per_axis

QUARTER_TURN = 1e-15
"""Far above the rounding error of a phase's vanishing part, and below the parts of all other phases."""

IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
HostArray: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Axis:
    """One spatial axis, for the convolution that runs forward (of which a transposed one is the adjoint).

    Attributes
    ----------
    taps, stride, extent, grid : int
        Taps of the kernel, stride, elements of the input, and ``extent // stride`` frequencies (0 on the
        infinite lattice).
    period : int
        Frequencies after which the singular values repeat: ``grid // step``.
    step : int
        The divisor that the grid and the offsets share.
    residues : tuple of int
        The classes modulo `stride` that some tap reads, or all of them where vectors are wanted.
    bases : tuple of int
        The offset, per class, that was taken out of `offsets`.
    offsets : tuple of int
        Distinct offsets, in units of `step`: the phase of offset q at frequency j is
        ``exp(2 pi i j q / period)``.
    slots : tuple of tuple of int
        ``slots[q][r]``: the tap at that offset and class, or `taps` where there is none.
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
        """For each tap, how many taps act at the same place: more than one if the kernel wraps round."""
        places = [(r, self.offsets[q] % self.period) for q, r in self.tap_slots()]
        return np.asarray([places.count(place) for place in places])

    @functools.cached_property
    def tap_of_slot(self) -> IntArray | None:
        """`slots` in row-major order; None where these are the taps in their own order."""
        return _unless_in_order(np.asarray(self.slots).reshape(-1), self.taps)

    @functools.cached_property
    def slot_of_tap(self) -> IntArray | None:
        """For each tap its slot in row-major order; None where these are the slots in their own order."""
        slots = [q * len(self.residues) + r for q, r in self.tap_slots()]
        return _unless_in_order(np.asarray(slots), len(self.offsets) * len(self.residues))

    def tap_slots(self) -> list[tuple[int, int]]:
        """The indices ``(q, r)`` into `slots` of each tap."""
        found = {tap: (q, r) for q, row in enumerate(self.slots) for r, tap in enumerate(row)}
        return [found[tap] for tap in range(self.taps)]


@dataclass(frozen=True, eq=False)
class Plan:
    """The geometry of one operator, resolved to integers.

    Attributes
    ----------
    conv : Conv
    axes : tuple of Axis
    groups, rows, columns : int
        Groups, and the channels of a block of the forward convolution's symbol before its phases.
    real : bool
        Whether conjugate frequencies are visited once.
    frequencies : int array, shape (visited, ndim)
        The frequencies to visit, those that are their own conjugates first.
    self_conjugate : int
        How many of them are their own conjugates.
    visit : int array, shape (prod(periods),)
        For each frequency of one period, in row-major order, the visited one that stands for it.
    mirrored : bool array, shape (prod(periods),)
        Whether that one is its conjugate.
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
    mirrored: np.ndarray[Any, np.dtype[np.bool_]]

    @property
    def grid(self) -> tuple[int, ...]:
        """Frequencies along each axis."""
        return tuple(axis.grid for axis in self.axes)

    @property
    def periods(self) -> tuple[int, ...]:
        """Distinct frequencies along each axis."""
        return tuple(axis.period for axis in self.axes)

    @property
    def copies(self) -> int:
        """How often the grid repeats one period."""
        return math.prod(self.grid) // math.prod(self.periods)

    @property
    def block(self) -> tuple[int, int]:
        """Shape of a block: without the columns of classes that no tap reads."""
        return self.rows, self.columns * math.prod(len(axis.residues) for axis in self.axes)

    @property
    def values_per_block(self) -> int:
        """Singular values of a block of the operator, the zeros of unread classes included."""
        return min(self.rows, self.columns * math.prod(self.conv.strides))

    @property
    def is_square(self) -> bool:
        """Whether the operator has as many outputs as inputs."""
        return self.rows == self.columns * math.prod(self.conv.strides)

    @property
    def exponential_types(self) -> HostArray:
        """Of the symbol along each axis: half the span of the axis's offsets."""
        return np.asarray([(max(axis.offsets) - min(axis.offsets)) / 2 for axis in self.axes])

    def weights(self) -> HostArray:
        """How many frequencies of one period each visited one stands for; sums to ``prod(periods)``."""
        weights = np.full(len(self.frequencies), 2.0 if self.real else 1.0)
        weights[: self.self_conjugate] = 1.0
        return weights

    @functools.cached_property
    def sharing(self) -> HostArray:
        """For each tap, how many taps act at the same place, with the shape of the kernel's spatial axes."""
        return np.asarray(functools.reduce(np.multiply.outer, [axis.sharing() for axis in self.axes]))

    def full_grid(self) -> tuple[IntArray, np.ndarray[Any, np.dtype[np.bool_]]]:
        """`visit` and `mirrored` for every frequency of the grid, in row-major order."""
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
    """Resolve a convolution; raises ValueError for a geometry that is impossible.

    Without an `input_shape` the operator acts on the infinite lattice: its axes have a grid and a period of 0,
    and there are no frequencies to visit. `all_residues` keeps the columns of input elements that no tap
    reads, which singular vectors need.
    """
    axes, groups, rows, columns = resolve_channels(kernel_shape, conv)
    pads = conv.pads(tuple(axes))
    if input_shape is None:
        extents: tuple[int, ...] = (0,) * conv.ndim
    else:
        check_circulant(tuple(axes), input_shape, pads, conv)
        extents = forward_extents(input_shape, conv)
    resolved = tuple(
        _make_axis(taps, extent, stride, dilation, before, all_residues)
        for taps, extent, stride, dilation, (before, _) in zip(
            axes, extents, conv.strides, conv.dilations, pads, strict=True
        )
    )
    visited = _visit([axis.period for axis in resolved], real)
    return Plan(conv, resolved, groups, rows, columns, real, *visited)


def check_input_shape(input_shape: object, conv: Conv) -> tuple[int, ...]:
    """`input_shape` as one positive int an axis; an int stands for every axis."""
    return per_axis("input_shape", input_shape, conv.ndim, least=1)


def forward_extents(input_shape: tuple[int, ...], conv: Conv) -> tuple[int, ...]:
    """Input extents of the forward convolution: those of the output where `conv` is transposed."""
    if conv.transposed:
        return tuple(extent * stride for extent, stride in zip(input_shape, conv.strides, strict=True))
    return input_shape


def resolve_channels(kernel_shape: tuple[int, ...], conv: Conv) -> tuple[list[int], int, int, int]:
    """Taps an axis, groups, and rows and columns of a group's block, for the forward convolution."""
    if len(kernel_shape) != len(conv.layout):
        raise ValueError(
            f"kernel has shape {kernel_shape} but layout={conv.layout!r} names {len(conv.layout)} axes: "
            f"wanted one letter for each axis of the kernel"
        )
    extents = dict(zip(conv.layout, kernel_shape, strict=True))
    for letter, extent in extents.items():
        as_int(f"kernel extent {letter} of shape {kernel_shape}", extent, least=1)
    whole, grouped = ("I", "O") if conv.transposed else ("O", "I")
    if extents[whole] % conv.groups:
        raise ValueError(
            f"groups={conv.groups} does not divide the {extents[whole]} channels of axis {whole} "
            f"(kernel shape {kernel_shape}, layout={conv.layout!r}); axis {grouped} holds the channels of one group"
        )
    taps = [extents[letter] for letter in conv.spatial]
    return taps, conv.groups, extents[whole] // conv.groups, extents[grouped]


def check_circulant(taps: tuple[int, ...], input_shape: tuple[int, ...], pads: Pads, conv: Conv) -> None:
    """Raise unless the operator is circulant: periodic, with ``extent // stride`` outputs an axis."""
    for axis, (k, extent, stride, dilation, pad) in enumerate(
        zip(taps, forward_extents(input_shape, conv), conv.strides, conv.dilations, pads, strict=True)
    ):
        if extent % stride:
            raise ValueError(
                f"stride {stride} does not divide the extent {extent} of axis {conv.spatial[axis]} "
                f"(input_shape={input_shape}): a circular convolution needs a multiple; nearest are "
                f"{[m for m in (extent - extent % stride, extent - extent % stride + stride) if m]}"
            )
        if _fits(k, extent, stride, dilation, pad, conv.padding_mode):
            continue
        outputs = (extent + sum(pad) - dilation * (k - 1) - 1) // stride + 1
        raise NotImplementedError(
            f"padding={conv.padding!r} with padding_mode={conv.padding_mode!r} on axis {conv.spatial[axis]} "
            f"({k} taps, dilation {dilation}, stride {stride}) gives {outputs} outputs for {extent} inputs and is "
            f"not the circulant operator; supported: padding_mode='circular' with padding='same' or explicit "
            f"padding that gives extent / stride = {extent // stride} outputs (operator_norm takes any padding)"
        )


def is_circulant(kernel_shape: tuple[int, ...], input_shape: tuple[int, ...], conv: Conv) -> bool:
    """Whether the operator is circulant: periodic, with ``extent // stride`` outputs an axis."""
    taps, *_ = resolve_channels(kernel_shape, conv)
    pads = conv.pads(tuple(taps))
    extents = forward_extents(input_shape, conv)
    geometry = zip(taps, extents, conv.strides, conv.dilations, pads, strict=True)
    return all(_fits(*axis, conv.padding_mode) for axis in geometry)


def _fits(taps: int, extent: int, stride: int, dilation: int, pad: tuple[int, int], padding_mode: str) -> bool:
    outputs = (extent + sum(pad) - dilation * (taps - 1) - 1) // stride + 1
    padded_alike = padding_mode == "circular" or not any(pad)
    return padded_alike and extent % stride == 0 and outputs == extent // stride


def _unless_in_order(places: IntArray, count: int) -> IntArray | None:
    return None if np.array_equal(places, np.arange(count)) else places


def unit_phases(numerators: IntArray, denominator: int) -> HostArray:
    """``exp(2 pi i m / denominator)`` for integers m, reduced exactly before rounding; quarter turns are exact."""
    phases = np.asarray(np.exp(2j * np.pi * (numerators % denominator) / denominator))
    # What rounding leaves of a zero would make denormal numbers of real matrices' imaginary parts.
    phases.real[np.abs(phases.real) < QUARTER_TURN] = 0
    phases.imag[np.abs(phases.imag) < QUARTER_TURN] = 0
    return phases


def _make_axis(taps: int, extent: int, stride: int, dilation: int, before: int, all_residues: bool) -> Axis:
    grid = extent // stride
    places = [divmod(tap * dilation - before, stride) for tap in range(taps)]  # (offset q, class r)
    bases = {r: min(q for q, other in places if other == r) for _, r in places}
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


def _visit(periods: list[int], real: bool) -> tuple[IntArray, int, IntArray, np.ndarray[Any, np.dtype[np.bool_]]]:
    """The fields `frequencies`, `self_conjugate`, `visit` and `mirrored` of a plan."""
    indices = np.indices(periods).reshape(len(periods), -1)
    own = np.arange(indices.shape[1])
    conjugate = np.ravel_multi_index(tuple(-i % p for i, p in zip(indices, periods, strict=True)), periods)
    if not real:
        conjugate = own  # no frequency has another that stands for it
    alone = own[own == conjugate]
    visited = np.concatenate([alone, own[own < conjugate]])
    position = np.empty_like(own)
    position[visited] = np.arange(len(visited))
    mirrored = own > conjugate
    return indices.T[visited], len(alone), position[np.minimum(own, conjugate)], mirrored
