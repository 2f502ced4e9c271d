"""The kernel of operator norm at most 1 with the largest inner product with a gradient, by a splitting method.

Let A(D) be the matrices of a kernel D on a grid, and cut(Z) the taps nearest to matrices Z, so that cut(A(D)) = D. The
convex problem and its dual are

    maximise  Re <G, D>  over kernels D with |A(D)| <= 1,
    minimise  mean |Z|_*  over matrices Z with cut(Z) = G.

The mean is over the frequencies, and |Z|_* is the nuclear norm. Every Z with cut(Z) = G bounds the optimum from above,
because <G, D> = mean <Z, A(D)>.

The Douglas-Rachford iteration holds matrices V. Their excess U over 1 makes ``rho U`` tend to the best Z, and V - U,
whose norm is at most 1, tends to the matrices of the best D:

    V <- S + relaxation A(G / rho),      D = cut(V - U),      S <- V + relaxation (A(cut(V - 2 U)) - (V - U)).

Each iteration gives the taps D nearest to matrices of norm at most 1, for the G of this iteration. In training, where
G changes before each iteration, this order led to larger inner products than the order that ends with V. S has no
unit, so the S of one gradient is a start for the next gradient, whatever its size.

The groups of a convolution have problems of their own, with a norm and a weight rho each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from convsv_core._norm.largest import norms_of_groups
from convsv_core._projection.excess import (
    BLOCK_COPIES,
    Samples,
    excess_by_eigenvectors,
    excess_by_products,
    nearest_taps,
    sharing,
)
from convsv_core._projection.orthogonal import polar_and_cut
from convsv_core._projection.polar import prefers_products
from convsv_core._symbol.joined import group_axis
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, TrigonometricPolynomial, symbol_polynomial
from convsv_core._symbol.small_matrices import divisors, safe_sqrt, squared_norm
from convsv_core.backend import Array

__all__ = [
    "Pull",
    "Split",
    "advance",
    "begin",
    "by_group",
    "choose_by_group",
    "dual_uppers",
    "inner_products",
    "pull_of",
    "resume",
    "with_equal_parts",
    "with_norm_one",
]

WEIGHT = 8.0
"""The weight rho, in units of the root mean square of the gradient's singular values.

Measured on gradients of ResNet-32 in training, 8 x 8 frequencies, iterations to a proved share of 0.99: with 1, 2, 4
and 8 layers of 16 channels took 120, 60, 40 and 40, and layers of 64 channels more than 150, more than 150, 110, 110.
In training, with one to three iterations for each gradient, 5 led to smaller inner products, and 12 and 16 to similar
ones.
"""

RELAXATION = 1.9
"""The step of the iteration, less than 2. Measured as for `WEIGHT`: 1.9 took fewer iterations than 1 and 1.6."""

VALUE_EPS = 8
"""Error of a small matrix's singular values, in eps times its side times its Frobenius norm.

LAPACK's users' guide promises a "modest" multiple. The value is a guess, far above what `dense_matrix` shows.
"""


class Pull(NamedTuple):
    """Hold a gradient without its size.

    Attributes
    ----------
    kernel : array
        The gradient of each group divided by the group's `weights`. Taps that act at one place share their mean.
    weights : array, shape (groups,)
        The weights rho, at the operand's scale; 1 for a group without a gradient.
    nonzero : array of bool, shape (groups,)
        Whether a group has a gradient.
    """

    kernel: Array
    weights: Array
    nonzero: Array


class Split(NamedTuple):
    """Hold the state of the iteration.

    Attributes
    ----------
    matrices : array, shape (visited, groups, rows, columns), complex
        The matrices S.
    kernel : array
        The taps nearest to S.
    direction : array
        The kernel D of the last iteration, whose norm tends to 1.
    """

    matrices: Array
    kernel: Array
    direction: Array


def pull_of(operand: Operand) -> Pull:
    """Return the operand's kernel, which is a gradient, without its size."""
    xp, plan = operand.xp, operand.plan
    kernel, shared = with_equal_parts(operand, operand.kernel), np.any(plan.sharing > 1)
    if shared:
        kernel = kernel / sharing(operand)
    taps = _taps(operand, kernel * xp.sqrt(sharing(operand)) if shared else kernel)
    weights = WEIGHT * safe_sqrt(xp, squared_norm(xp, taps, axis=(0, 2, 3)) / min(plan.block))
    nonzero = weights > 0
    weights = xp.where(nonzero, weights, xp.ones_like(weights))
    return Pull(by_group(operand, kernel, 1 / weights), weights, nonzero)


def with_equal_parts(operand: Operand, kernel: Array) -> Array:
    """Return a kernel in which taps that act at one place are replaced by their mean."""
    if not np.any(operand.plan.sharing > 1):
        return kernel
    symbol = symbol_polynomial(operand.of(kernel))
    (kernel,) = nearest_taps(symbol, Samples.at(operand), lambda phases, _: (symbol.matrices(phases),))
    return kernel


def begin(operand: Operand) -> Split:
    """Return a first state for the operand's kernel, which is the kernel of a `Pull`.

    The start is the taps nearest to the polar factors, scaled to norm 1.
    """
    polar = with_norm_one(operand, polar_and_cut(operand, operand.kernel))
    kernel = polar + (1 - RELAXATION) * operand.kernel
    symbol = symbol_polynomial(operand.of(kernel))
    matrices = _map(symbol, Samples.at(operand), lambda phases, _: symbol.matrices(phases))
    return Split(matrices, kernel, polar)


def resume(operand: Operand, matrices: Array) -> Split:
    """Return the state of an earlier problem of the same geometry, from its matrices."""
    xp = operand.xp
    (kernel,) = nearest_taps(
        symbol_polynomial(operand), Samples.at(operand), lambda _, chosen: (xp.take(matrices, chosen, axis=0),)
    )
    return Split(matrices, kernel, kernel)


def advance(operand: Operand, *arrays: Array) -> Split:
    """Return the state after one iteration; the operand's kernel is the kernel of a `Pull`."""
    xp, split, samples = operand.xp, Split(*arrays), Samples.at(operand)
    found = _excess(operand, split.matrices)
    kernel = split.kernel + RELAXATION * operand.kernel
    direction = kernel - found.kernel
    symbol = symbol_polynomial(operand.of(RELAXATION * (direction - found.kernel)))

    def moved(phases: Array, chosen: Array) -> Array:
        matrices, excess = (xp.take(one, chosen, axis=0) for one in (found.matrices, found.excess))
        return symbol.matrices(phases) + (1 - RELAXATION) * matrices + RELAXATION * excess

    return Split(_map(symbol, samples, moved), kernel - RELAXATION * found.kernel, direction)


def dual_uppers(operand: Operand, matrices: Array | None) -> Array:
    """Return an upper bound of each group's largest inner product with the operand's kernel: shape (groups,).

    Parameters
    ----------
    operand : Operand
        Its kernel is the kernel of a `Pull`.
    matrices : array or None
        The matrices S of a `Split`. Without them, the bound is the mean nuclear norm of the kernel's own matrices.

    Notes
    -----
    Rounding is included. The entries of a dual matrix are sums of n terms, with n offsets or frequencies, whose error
    is at most ``8 sqrt(n) eps`` times the sum of the moduli (Higham and Mary, 2019). The sum of the moduli is at most
    ``sqrt(offsets)`` times the Frobenius norm. An error matrix E changes the nuclear norm of a matrix of side m by at
    most ``sqrt(m)`` times the Frobenius norm of E.
    """
    xp, plan, samples = operand.xp, operand.plan, Samples.at(operand)
    kernel, excess = operand.kernel, None
    if matrices is not None:
        found = _excess(operand, matrices)
        kernel, excess = kernel - found.kernel, found.excess
    symbol = symbol_polynomial(operand.of(kernel))

    def nuclear(phases: Array, chosen: Array) -> Array:
        dual = symbol.matrices(phases)
        dual = dual if excess is None else dual + xp.take(excess, chosen, axis=0)
        if min(plan.block) == 1:
            return safe_sqrt(xp, squared_norm(xp, dual, axis=(-2, -1)))
        return xp.sum(operand.backend.svdvals(dual), axis=-1)

    sums = xp.sum(_map(symbol, samples, nuclear) * xp.real(samples.weights)[:, None], axis=0)
    side, offsets, count = min(plan.block), plan.offset_count, len(plan.frequencies)
    units = math.sqrt(side) * (VALUE_EPS * side + 8 * math.sqrt(offsets * (offsets + count)))
    return sums / math.prod(plan.periods) * (1 + units * operand.eps)


def by_group(operand: Operand, kernel: Array, factors: Array) -> Array:
    """Return a kernel with the taps of each group multiplied by a real factor, shape (groups,)."""
    xp, conv = operand.xp, operand.plan.conv
    axis = group_axis(conv)
    shape = [1] * kernel.ndim
    shape[axis] = operand.plan.groups
    factors = xp.astype(xp.reshape(factors, tuple(shape)), kernel.dtype)
    return kernel * xp.repeat(factors, kernel.shape[axis] // operand.plan.groups, axis=axis)


def with_norm_one(operand: Operand, kernel: Array) -> Array:
    """Return a kernel of which each group is divided by an upper bound of its norm on the grid; zeros stay zeros."""
    return by_group(operand, kernel, 1 / divisors(operand.xp, norms_of_groups(operand.of(kernel))))


def choose_by_group(operand: Operand, chosen: Array, one: Array, other: Array) -> Array:
    """Return the taps of one kernel in the groups where `chosen`, shape (groups,), is True, and else of another."""
    share = operand.xp.astype(chosen, operand.real_dtype)
    return by_group(operand, one, share) + by_group(operand, other, 1 - share)


def inner_products(operand: Operand, one: Array, other: Array) -> Array:
    """Return the real inner product of two kernels' taps, for each group: shape (groups,)."""
    products = operand.backend.conj(_taps(operand, one)) * _taps(operand, other)
    return operand.xp.sum(operand.xp.real(products), axis=(0, 2, 3))


def _taps(operand: Operand, kernel: Array) -> Array:
    return operand.of(kernel).taps()


class _Excess(NamedTuple):
    """Hold the taps nearest to the excess U, the matrices V, and U."""

    kernel: Array
    matrices: Array
    excess: Array


def _excess(operand: Operand, matrices: Array) -> _Excess:
    """Return the excess over 1 of the matrices V that follow on the matrices S of a `Split`."""
    xp, backend = operand.xp, operand.backend
    one = xp.ones_like(operand.scale)
    excess_of = excess_by_products if prefers_products(backend, operand.kernel) else excess_by_eigenvectors
    symbol = symbol_polynomial(operand.of(RELAXATION * operand.kernel))

    def of_block(phases: Array, chosen: Array) -> tuple[Array, ...]:
        pulled = xp.take(matrices, chosen, axis=0) + symbol.matrices(phases)
        found, _ = excess_of(backend, pulled, one)
        return found, pulled, found

    return _Excess(*nearest_taps(symbol, Samples.at(operand), of_block))


def _map(symbol: TrigonometricPolynomial, samples: Samples, function: Callable[[Array, Array], Array]) -> Array:
    """Map a function of phases, and of the rows of a block, over all samples."""
    operand = symbol.operand

    def of_block(chosen: Array) -> Array:
        return function(symbol.phases(operand.xp.take(samples.frequencies, chosen, axis=0)), chosen)

    found: Array = operand.backend.map_blocks(
        of_block,
        np.arange(len(operand.plan.frequencies)),
        operand.kernel,
        row_bytes=BLOCK_COPIES * symbol.row_bytes,
        budget=BLOCK_BYTES,
    )
    return found
