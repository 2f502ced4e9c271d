"""The largest norms of several kernels of one geometry, with their derivatives, for every step of a training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray, make_plan
from convsv_core._norm.fixed_grid import grid_for
from convsv_core._norm.largest import largest_of_kernels
from convsv_core._norm.slopes import slopes_at
from convsv_core._symbol.joined import group_axis, join_kernels
from convsv_core._symbol.operand import make_operand, shape_of
from convsv_core._symbol.transform import is_long
from convsv_core.conv import Conv, check_positive
from convsv_core.dtypes import REAL_OF, answer_dtype
from convsv_core.plugins import backend_of

__all__ = ["KernelNorm", "NormGroup", "Norms", "norms_of_groups", "norms_together"]

OPERATIONS_OF_ENTRY = 50.0
"""Operations for each entry of each matrix of the symbol that is visited, after times of ResNet-32 in training."""

OPERATIONS_OF_KERNEL = 5e6
"""Further operations for each kernel, after the same times: half a millisecond."""

SPREAD = 2.0**16
"""Ratio of the largest entries of two kernels up to which both may have one scale.

The square of a norm then is at least about 2^-32 at the scale of the operand, far above the least normal number of
float32.
"""


class KernelNorm(NamedTuple):
    """Hold the norm of one kernel and, where it is wanted, its derivative."""

    value: Any
    slope: HostArray | None


class Norms(NamedTuple):
    """Hold the norms of several kernels.

    Attributes
    ----------
    values : array, shape (kernels,)
        float32 for kernels of 32 bits or fewer, else float64.
    slopes : list of arrays, or None
        The derivative D of each norm, of its kernel's shape: a change of the kernel changes the norm by
        ``Re sum(D * change)``. It is a subgradient where several singular values are the largest, and 0 for a zero
        kernel.
    """

    values: HostArray
    slopes: list[HostArray] | None

    def of_each(self) -> list[KernelNorm]:
        """Return the norm of each kernel with its derivative."""
        slopes = self.slopes if self.slopes is not None else [None] * len(self.values)
        return [KernelNorm(value, slope) for value, slope in zip(self.values, slopes, strict=True)]


class NormGroup(NamedTuple):
    """Hold the arguments of one call of `norms_together`.

    Attributes
    ----------
    kernels : sequence of NumPy arrays
    input_shape : tuple of int or None
    conv : Conv
    rtol : float, default 0.1
    """

    kernels: Sequence[HostArray]
    input_shape: tuple[int, ...] | None
    conv: Conv
    rtol: float = 0.1


def norms_of_groups(groups: Sequence[NormGroup], *, derivatives: bool = True) -> list[Norms]:
    """Return what `norms_together` returns for each of several groups of kernels, shared out to threads.

    Parameters
    ----------
    groups : sequence of NormGroup
    derivatives : bool, default True
        As for `norms_together`.

    Returns
    -------
    list of Norms

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `norms_together`, for any of the groups.

    Notes
    -----
    Not traceable. The work of one call on small kernels gains nothing from threads, so each thread takes whole calls.

    Examples
    --------
    >>> small, large = np.full((1, 1, 3, 3), 0.5), np.full((2, 1, 5, 5), 0.01)
    >>> conv = Conv("OIHW")
    >>> found = norms_of_groups([NormGroup([small, 2 * small], (8, 8), conv), NormGroup([large], (8, 8), conv)])
    >>> [np.round(norms.values, 6).tolist() for norms in found]
    [[4.5, 9.0], [0.353553]]
    """

    def call(group: NormGroup, kernels: Sequence[HostArray]) -> Norms:
        return norms_together(kernels, group.input_shape, group.conv, rtol=group.rtol, derivatives=derivatives)

    def norms(members: Sequence[tuple[NormGroup, HostArray]]) -> list[KernelNorm]:
        return call(members[0][0], [kernel for _, kernel in members]).of_each()

    if len(groups) == 1:  # Its parts would take longer than the whole.
        return [call(group, group.kernels) for group in groups]
    like = groups[0].kernels[0]
    work = [[(group, kernel) for kernel in group.kernels] for group in groups]
    found = backend_of(like).map_groups(norms, work, [_operations(group) for group in groups], like)
    return [_together(members, derivatives) for members in found]


def norms_together(
    kernels: Sequence[HostArray],
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    *,
    rtol: float = 0.1,
    derivatives: bool = True,
) -> Norms:
    """Return what `operator_norm` or `norm_upper_bound` returns for each kernel, from few calls of NumPy.

    Parameters
    ----------
    kernels : sequence of NumPy arrays
        Kernels of one shape and dtype, with the axes that ``conv.layout`` names.
    input_shape : tuple of int or None
        Spatial extents of the input of circular convolutions, whose norms are returned. None: the upper bounds for
        every input size, as from `norm_upper_bound`.
    conv : Conv
        The geometry of each kernel. With an `input_shape` it must be circular.
    rtol : float, default 0.1
        Without an `input_shape`, as for `norm_upper_bound`.
    derivatives : bool, default True
        Whether the derivatives are wanted.

    Returns
    -------
    Norms

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `operator_norm` and `norm_upper_bound`.

    Notes
    -----
    Not traceable. A kernel is scaled by itself, so that a large one takes no digits from the others.

    Examples
    --------
    >>> kernels = [np.full((1, 1, 3, 3), 0.5), np.full((1, 1, 3, 3), 0.01)]
    >>> found = norms_together(kernels, (8, 8), Conv("OIHW"))
    >>> [round(norm, 6) for norm in found.values.tolist()]
    [4.5, 0.09]
    >>> [slope.shape for slope in found.slopes]
    [(1, 1, 3, 3), (1, 1, 3, 3)]
    """
    check_positive("rtol", rtol)
    one = kernels[0]  # The context depends on the size of one kernel, not on that of them all.
    with backend_of(one).computation_context(one):
        return _norms(kernels, input_shape, conv, rtol, derivatives)


def _norms(
    kernels: Sequence[HostArray], input_shape: tuple[int, ...] | None, conv: Conv, rtol: float, derivatives: bool
) -> Norms:
    exact, count = input_shape is not None, len(kernels)
    grid = grid_for(shape_of(kernels[0], conv), input_shape, conv, rtol)
    together = dataclasses.replace(grid.conv, groups=grid.conv.groups * count)
    dtype = answer_dtype(kernels[0])
    answered_in = np.dtype(REAL_OF.get(dtype, dtype))
    arrays = [np.asarray(kernel, dtype) for kernel in kernels]
    scales = _scales(arrays, answered_in)
    if not np.all(scales == 1):
        arrays = [array / answered_in.type(scale) for array, scale in zip(arrays, scales, strict=True)]
    operand = make_operand(join_kernels(arrays, conv), grid.input_shape, together)
    if is_long(operand) and count > 1:  # Transforms make such polynomials, one after another.
        parts = [_norms([one], input_shape, conv, rtol, derivatives) for one in kernels]
        slopes = [part.slopes[0] for part in parts if part.slopes]
        return Norms(np.concatenate([part.values for part in parts]), slopes if derivatives else None)
    found = largest_of_kernels(operand, count, exact=exact)
    norms = np.sqrt(np.maximum([one.value for one in found], 0.0))
    factors = np.ones(count)
    if not exact:
        widened = np.sqrt([one.upper for one in found]) / np.where(norms > 0, norms, 1.0)
        factors = np.where(norms > 0, widened, 1.0) * grid.factor * (1 + 4 * operand.answer_eps)
    values = (norms * float(operand.scale) * factors * scales).astype(answered_in)
    if not exact:  # As for `Operand.answer_upper`, a subnormal number is no upper bound.
        values = np.where(norms > 0, np.maximum(values, np.finfo(answered_in).smallest_normal), values)
    if not derivatives:
        return Norms(values, None)
    places = [one.place or 0 for one in found]
    side_by_side = slopes_at(operand.widen() if exact else operand, places, [one.value for one in found])
    apart = np.split(side_by_side, count, axis=group_axis(conv))
    if not exact:
        apart = [slope * factor for slope, factor in zip(apart, factors.tolist(), strict=True)]
    return Norms(values, [np.asarray(slope, dtype) for slope in apart])


def _together(members: Sequence[KernelNorm], derivatives: bool) -> Norms:
    """Return the norms of several kernels as one result."""
    slopes = [one.slope for one in members if one.slope is not None]
    return Norms(np.asarray([one.value for one in members]), slopes if derivatives else None)


def _operations(group: NormGroup) -> float:
    """Return the operations of a call of `norms_together`, to an order of magnitude."""
    kernel, conv = group.kernels[0], group.conv
    shape = shape_of(kernel, conv)
    grid = grid_for(shape, group.input_shape, conv, group.rtol)
    plan = make_plan(shape, not np.iscomplexobj(kernel), grid.input_shape, grid.conv)
    entries = len(plan.frequencies) * plan.groups * math.prod(plan.block)
    return len(group.kernels) * (OPERATIONS_OF_KERNEL + OPERATIONS_OF_ENTRY * entries)


def _scales(arrays: Sequence[HostArray], dtype: np.dtype[Any]) -> HostArray:
    """Return a power of two for each kernel, by which it is divided: shape (kernels,), float64.

    The numbers are 1 if the largest entries of the kernels differ by less than a factor of `SPREAD`. Otherwise each is
    near the largest entry of its kernel, or 1 where the kernel is 0 or holds NaN or infinity.
    """
    largest = np.asarray([max(abs(float(array.max())), abs(float(array.min()))) for array in map(_real, arrays)])
    nonzero = largest[largest > 0]
    if not len(nonzero) or nonzero.max() < SPREAD * nonzero.min():
        return np.ones(len(arrays))
    limits = np.finfo(dtype)
    usable = np.isfinite(largest) & (largest > 0)
    within = np.clip(largest, 4 * float(limits.smallest_normal), float(limits.max) / 4)
    return np.where(usable, 2.0 ** np.floor(np.log2(np.where(usable, within, 1.0))), 1.0)


def _real(array: HostArray) -> HostArray:
    """Return the array, or the absolute values of a complex one."""
    return np.abs(array) if np.iscomplexobj(array) else array
