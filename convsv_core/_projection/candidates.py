"""Kernels with a large inner product with a gradient, by several methods, and their scaling into the ball of norm 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from convsv_core._norm.largest import norms_of_groups
from convsv_core._projection.orthogonal import polar_and_cut
from convsv_core._projection.polar import polar_by_products, polar_factors, prefers_products
from convsv_core._projection.splitting import (
    Pull,
    Split,
    advance,
    begin,
    by_group,
    choose_by_group,
    inner_products,
    resume,
    with_equal_parts,
)
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.small_matrices import divisors, squared_norm
from convsv_core.backend import Array

__all__ = [
    "DIRECTION_METHODS",
    "DirectionMethod",
    "Unscaled",
    "candidate",
    "check_direction_method",
    "check_matrices",
    "furthest_in_the_ball",
    "take_iterations",
    "within_the_ball",
]

DirectionMethod: TypeAlias = Literal["exact", "polar", "flat"]
"""The type of a method's name."""

DIRECTION_METHODS = ("exact", "polar", "flat")
"""The methods of `steepest_direction`, which its docstring describes."""

FLAT_SIDE = 48
"""Smallest side of a frequency's matrix for which a few iterations of "exact" are compared with "flat".

Measured on seven layers of ResNet-32 in training, with one iteration for each gradient. For 64 channels the iteration
has 0.64 to 0.72 of the optimum, and the flattened polar factor 0.74 to 0.83. For 16 and 32 channels the iteration has
0.70 to 0.84, and the flattened polar factor 0.61 to 0.68. The comparison takes a tenth of
the time of the optimizer's step.
"""


class Unscaled(NamedTuple):
    """Hold directions before they are scaled into the ball, and the matrices that the iteration ended with."""

    kernels: tuple[Array, ...]
    matrices: Array | None


def check_direction_method(method: object) -> None:
    """Raise ValueError unless `method` is one of `DIRECTION_METHODS`.

    Examples
    --------
    >>> check_direction_method("polar")
    >>> check_direction_method("svd")
    Traceback (most recent call last):
    ValueError: method='svd': wanted one of exact, polar, flat
    """
    if method not in DIRECTION_METHODS:
        raise ValueError(f"method={method!r}: wanted one of {', '.join(DIRECTION_METHODS)}")


def check_matrices(operand: Operand, matrices: Array) -> None:
    """Raise ValueError unless matrices of an earlier search fit an operand's geometry."""
    plan, found = operand.plan, tuple(matrices.shape)
    wanted = (len(plan.frequencies), plan.groups, *plan.block)
    if found != wanted:
        raise ValueError(f"state has matrices of shape {found}: wanted {wanted}; is it of another layer?")


def take_iterations(
    operand: Operand, pull: Pull, method: DirectionMethod, count: int, matrices: Array | None
) -> Unscaled:
    """Return directions by a method, after `count` iterations of "exact" from the matrices of an earlier search.

    For wide layers, "exact" returns the flattened polar factor too, which may be the better one; see `FLAT_SIDE`.
    """
    pulled = operand.of(pull.kernel)
    if method != "exact" or operand.plan.is_full:
        return Unscaled((candidate(pulled, method),), None)
    split = begin(pulled) if matrices is None else resume(pulled, matrices)

    def step(*arrays: Array) -> tuple[Array, ...]:
        return advance(pulled, *arrays)

    split = Split(*operand.backend.repeat(step, split, count, operand.kernel))
    others = (candidate(pulled, "flat"),) if min(operand.plan.block) >= FLAT_SIDE else ()
    return Unscaled((split.direction, *others), split.matrices)


def furthest_in_the_ball(operand: Operand, pull: Pull, kernels: Sequence[Array], factor: float) -> Array:
    """Return for each group, of several directions scaled into the ball, the one that is furthest along a pull.

    Parameters
    ----------
    operand, factor
        As for `within_the_ball`.
    pull : Pull
        A group without a pull gets the direction zero.
    kernels : sequence of arrays
    """
    xp = operand.xp
    present = xp.astype(pull.nonzero, pull.weights.dtype)
    best, *others = (within_the_ball(operand, by_group(operand, kernel, present), factor) for kernel in kernels)
    for other in others:
        kept = inner_products(operand, pull.kernel, best) >= inner_products(operand, pull.kernel, other)
        best = choose_by_group(operand, kept, best, other)
    return best


def within_the_ball(operand: Operand, kernel: Array, factor: float) -> Array:
    """Return a kernel whose groups are each multiplied by a number that brings their norms near 1, and at most to 1.

    Parameters
    ----------
    operand : Operand
        Its geometry is used.
    kernel : array
    factor : float
        Upper bound of the norm for every size over the norm on the operand's grid.

    Notes
    -----
    Rounding, of the product and to the answer's dtype, adds an error to each tap. The norm grows by at most the sum of
    the Frobenius norms of these errors.
    """
    xp, eps = operand.xp, operand.answer_eps
    chosen = operand.of(kernel)
    norms = norms_of_groups(chosen) * factor
    sizes = xp.sum(xp.sqrt(squared_norm(xp, chosen.taps(), axis=(-2, -1))), axis=0)
    limits = norms * (1 + 2 * eps) + 2 * eps * sizes
    return by_group(operand, kernel, 1 / divisors(xp, limits))


def candidate(operand: Operand, method: DirectionMethod) -> Array:
    """Return the direction of a method without iterations, not scaled."""
    if method == "flat":
        return with_equal_parts(operand, _flattened(operand))
    return polar_and_cut(operand, operand.kernel)


def _flattened(operand: Operand) -> Array:
    """Return the polar factor of each group's kernel as a matrix, with one row for each of the group's rows."""
    xp, taps = operand.xp, operand.taps()
    offsets, groups, rows, columns = taps.shape
    flat = xp.reshape(xp.permute_dims(taps, (1, 2, 0, 3)), (groups, rows, offsets * columns))
    polar_of = polar_by_products if prefers_products(operand.backend, operand.kernel) else polar_factors
    polar = xp.reshape(polar_of(operand.backend, flat), (groups, rows, offsets, columns))
    return operand.from_taps(xp.permute_dims(polar, (2, 0, 1, 3)))
