"""The excess of matrices over a bound, from a few singular vectors that follow the matrices from step to step.

The matrices of an iteration change little from step to step, and few of their singular values exceed the bound. So one
step of subspace iteration, from the singular vectors of the step before, nearly gives the excess. Products with a few
columns cost much less than a decomposition.

A singular value that is missed makes the excess too small. The value of the dual is nevertheless the value of the
excess that was found, so it is a lower bound in any case.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray, Plan
from convsv_core._projection.excess import BLOCK_COPIES, Excess, Samples, nearest_taps
from convsv_core._symbol.gram import smaller_gram
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, symbol_polynomial
from convsv_core._symbol.small_matrices import divisors, safe_sqrt
from convsv_core.backend import Array

__all__ = [
    "Followed",
    "excess_of_followed",
    "first_columns",
    "first_vectors",
    "has_full_support",
    "leading_vectors",
    "more_columns",
]

FOLLOWED_SIDE = 16
"""Smallest side of a matrix whose singular vectors are followed.

Measured with NumPy: at side 32, 64 and 128, all eigenvectors take 80, 350 and 1730 us, and a QR decomposition and the
eigenvectors for 16 columns 40 to 60 us. With 16 in place of 32 the layers of side 16 took half of the time.
"""

FOLLOWED_SHARE = 4
"""The side of a matrix over the first number of singular vectors that are followed. A guess."""


class Followed(NamedTuple):
    """Hold the excesses of matrices, the singular vectors to start the next step from, and the singular values."""

    excess: Excess
    vectors: Array
    norms: Array


def first_columns(operand: Operand) -> int:
    """Return the number of singular vectors that are followed at first; 0 if decompositions are as cheap."""
    side = min(operand.plan.block)
    return 0 if side < FOLLOWED_SIDE or has_full_support(operand.plan) else side // FOLLOWED_SHARE


def has_full_support(plan: Plan) -> bool:
    """Tell whether a kernel has a tap for each frequency, so that clipping alone gives the nearest kernel."""
    return math.prod(plan.periods) == math.prod(axis.taps for axis in plan.axes)


def more_columns(operand: Operand, columns: int) -> int:
    """Return a larger number of singular vectors to follow; 0 if decompositions are as cheap."""
    return 2 * columns if 4 * columns <= min(operand.plan.block) else 0


def first_vectors(operand: Operand, count: int, columns: int) -> Array:
    """Return the vectors to start from, for `count` frequencies: shape (count, groups, plan columns, columns)."""
    xp, plan = operand.xp, operand.plan
    start = operand.backend.asarray_like(_start(plan.block[1], columns), operand.kernel)
    return xp.broadcast_to(xp.astype(start, operand.complex_dtype), (count, plan.groups, plan.block[1], columns))


def leading_vectors(operand: Operand, kernel: Array, frequencies: Array, columns: int) -> Array:
    """Return the leading right singular vectors of the symbol of a kernel, from decompositions."""
    xp, backend = operand.xp, operand.backend
    symbol = symbol_polynomial(operand.of(kernel))

    def of_block(chosen: Array) -> Array:
        matrices = symbol(xp.take(frequencies, chosen, axis=0))
        _, vectors = backend.eigh(smaller_gram(backend, matrices))
        vectors = vectors[..., vectors.shape[-1] - columns :]
        wide = matrices.shape[-2] <= matrices.shape[-1]
        return xp.linalg.qr(xp.matmul(backend.adjoint(matrices), vectors))[0] if wide else vectors

    rows, row_bytes = np.arange(frequencies.shape[0]), BLOCK_COPIES * symbol.row_bytes
    found: Array = backend.map_blocks(of_block, rows, operand.kernel, row_bytes=row_bytes, budget=BLOCK_BYTES)
    return found


def excess_of_followed(
    operand: Operand,
    kernel: Array,
    limit: Array,
    frequencies: Array,
    weights: Array,
    dual: Array | None,
    vectors: Array,
) -> Followed:
    """Return the excess over a limit of the symbol of a kernel plus the matrices of `dual`, if there are any.

    `vectors` are near the leading right singular vectors, shape (count, groups, columns of a matrix, followed).
    """
    xp, backend = operand.xp, operand.backend
    symbol = symbol_polynomial(operand.of(kernel))

    def of_block(phases: Array, chosen: Array) -> tuple[Array, ...]:
        matrices = symbol.matrices(phases)
        matrices = matrices if dual is None else matrices + xp.take(dual, chosen, axis=0)
        left, _ = xp.linalg.qr(xp.matmul(matrices, xp.take(vectors, chosen, axis=0)))
        right = xp.matmul(backend.adjoint(matrices), left)
        squares, rotations = backend.eigh(xp.matmul(backend.adjoint(right), right))
        left, right = xp.matmul(left, rotations), xp.matmul(right, rotations)
        norms = safe_sqrt(xp, squares)
        inverse = 1 / divisors(xp, norms)
        right = right * xp.astype(inverse, right.dtype)[..., None, :]
        excess = xp.maximum(norms - limit, xp.zeros_like(norms))
        found = xp.matmul(left * xp.astype(excess, left.dtype)[..., None, :], backend.adjoint(right))
        return found, found, xp.sum(excess, axis=(-2, -1)), right, norms

    change, matrices, trace, following, largest = nearest_taps(symbol, Samples(frequencies, weights), of_block)
    return Followed(Excess(change, matrices, trace), following, largest)


@functools.lru_cache(maxsize=64)
def _start(side: int, columns: int) -> HostArray:
    """Return the starting columns, which are equal in every call so that results are reproducible."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(side, columns)))[0]
