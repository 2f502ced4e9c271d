"""Singular values above a limit, with their vectors, for many matrices that have few such values each.

No full decomposition is needed. A high power of the Gram matrix is applied to a few columns, by products of
matrices in single precision. The columns then span the space of the largest singular vectors, or nearly so.

Two tests check the result: the residuals of the pairs found, and the norm of the rest of the matrix. So the
starting columns and the number of steps change the time, but not whether a result can be trusted.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.gram import smaller_gram
from convsv_core._symbol.rows import MARGIN_EPS
from convsv_core._symbol.small_matrices import are_below, divisors, squared_norm
from convsv_core.backend import Array, Backend

__all__ = ["LEADING_ENTRIES", "LEADING_SIDE", "WIDE_SIDE", "LeadingPairs", "expected_share", "leading_pairs"]

LEADING_SIDE = 12
"""Smallest side of a matrix for which this method is cheaper than all eigenpairs.

A guess from measurements: a matrix of side 16 takes 13 us instead of 31 us, one of side 64 takes 168 us instead
of 420 us.
"""

LEADING_ENTRIES = 1 << 13
"""Smallest number of entries, of all matrices together, for which this method is tried. A guess."""

PAIRS = 4
"""Number of columns, the largest number of singular values above the limit that can be found.

A guess: more columns cost more but need fewer steps.
"""

SQUARINGS = 4
"""Number of times that the Gram matrix is squared before it is applied to the columns.

Found to be the cheapest way to the power 64, with four applications; the measurement was not recorded.
"""

POWER, POWER_SIDE = 64, 64
"""The power of the Gram matrix for matrices of at most this side. A guess.

Larger sides take a larger power, because the singular values of larger random matrices lie closer together.
"""

WIDE_SIDE = 128
"""Smallest side for which the rest of a matrix is tested in double precision.

The margin that rounding takes from the test grows with the square of the side. Measured: at 512 channels it is
1.6 % of the largest square in single precision, and every frequency of a Gaussian layer failed the test.
"""

RESIDUAL_EPS = 16
"""Largest residual of a pair that is accepted, in units of float32's eps times the largest square. A guess."""

EPS = float(np.finfo(np.float32).eps)
"""The spacing of float32 numbers at 1."""


class LeadingPairs(NamedTuple):
    """Hold the largest singular values of matrices, and where no other value is above the limit.

    Attributes
    ----------
    squares : array, shape (count, groups, PAIRS)
        Squared singular values, ascending.
    vectors : array, shape (count, groups, side, PAIRS)
        Singular vectors of the smaller side, orthonormal to single precision. Where `sure`, the vectors of values
        above the limit have residuals of at most `RESIDUAL_EPS`.
    sure : bool array on the host, shape (count,)
        Whether no other singular value of any group is above the limit, and all values above it were found to
        that precision.
    """

    squares: Array
    vectors: Array
    sure: HostArray


def leading_pairs(backend: Backend, matrices: Array, limit: Array) -> LeadingPairs:
    """Return the largest singular values of matrices with their vectors, and where no other is above the limit.

    Parameters
    ----------
    backend : Backend
        The library of `matrices`.
    matrices : array, shape (count, groups, rows, columns)
        complex128.
    limit : 0-d array
        Positive.
    """
    xp = backend.namespace(matrices)
    narrow = xp.astype(matrices, xp.complex64)
    grams = smaller_gram(backend, narrow)
    traces = xp.real(xp.linalg.trace(grams))
    basis = xp.astype(_leading_space(backend, _divided(backend, grams, traces)), matrices.dtype)
    adjoint = backend.adjoint(matrices)
    first, second = (adjoint, matrices) if matrices.shape[-2] <= matrices.shape[-1] else (matrices, adjoint)
    halves = xp.matmul(first, basis)
    images = xp.matmul(second, halves)
    squares, rotations = backend.eigh(xp.matmul(backend.adjoint(halves), halves))
    vectors = xp.matmul(basis, rotations)
    wanted = squares > limit**2
    kept = xp.astype(xp.where(wanted, squares, xp.zeros_like(squares)), matrices.dtype)[..., None, :]
    residuals = xp.matmul(images, rotations) - vectors * xp.astype(squares, matrices.dtype)[..., None, :]
    lengths = xp.where(wanted, squared_norm(xp, residuals, axis=-2), xp.zeros_like(squares))
    found = xp.sum(lengths, axis=-1) <= (RESIDUAL_EPS * EPS * squares[..., -1]) ** 2
    if grams.shape[-1] >= WIDE_SIDE:
        grams = smaller_gram(backend, matrices)
        traces = xp.real(xp.linalg.trace(grams))
    removed = xp.matmul(xp.astype(vectors * kept, grams.dtype), xp.astype(backend.adjoint(vectors), grams.dtype))
    margin = MARGIN_EPS * grams.shape[-1] * float(xp.finfo(traces.dtype).eps) * xp.astype(traces, squares.dtype)
    sure = found & are_below(backend, grams - removed, limit**2 - margin)
    return LeadingPairs(squares, vectors, backend.to_numpy(xp.all(sure, axis=1)))


def expected_share(backend: Backend, matrices: Array, limit: Array) -> float:
    """Return the share of matrices for which `leading_pairs` is expected to be sure, from all singular values."""
    values: HostArray = backend.to_numpy(backend.eigvalsh(smaller_gram(backend, matrices)))
    least = np.where(values > float(limit) ** 2, values, np.inf).min(axis=-1)
    power = 2**SQUARINGS * _applications(values.shape[-1])
    # The power leaves a part of the other vectors in the columns. Between two QR steps, rounding errors are relative
    # to the largest value, and may hide the smallest value above the limit.
    left = (values[..., -PAIRS - 1] / least) ** power
    rounding = np.where(least < np.inf, values[..., -1] / least, 0.0) ** (2 * 2**SQUARINGS) * EPS
    return float(np.mean(np.all(left + rounding <= RESIDUAL_EPS * EPS, axis=1)))


def _leading_space(backend: Backend, matrices: Array) -> Array:
    """Return orthonormal columns near the leading eigenvectors of Gram matrices of trace 1."""
    xp = backend.namespace(matrices)
    for done in range(1, SQUARINGS + 1):
        matrices = xp.matmul(matrices, matrices)
        if 2 * done == SQUARINGS:  # The largest entries must stay within the exponents of float32.
            matrices = _divided(backend, matrices, xp.real(xp.linalg.trace(matrices)))
    columns = xp.astype(backend.asarray_like(_start(matrices.shape[-1]), matrices), matrices.dtype)
    for done in range(1, _applications(matrices.shape[-1]) + 1):
        columns = xp.matmul(matrices, columns)
        if done % 2 == 0:
            columns, _ = xp.linalg.qr(columns)
    return columns


def _applications(side: int) -> int:
    """Return how often the squared matrices are applied; an even number, because every second step makes a QR.

    The power grows with the side to the 2/3: the gaps at the upper end of a random matrix's spectrum shrink so.
    """
    return 2 * math.ceil(POWER * max(side / POWER_SIDE, 1.0) ** (2 / 3) / 2 ** (SQUARINGS + 1))


def _divided(backend: Backend, matrices: Array, numbers: Array) -> Array:
    """Return each matrix divided by its number, or unchanged where the number is 0."""
    xp = backend.namespace(matrices)
    inverse = 1 / divisors(xp, numbers)
    return matrices * xp.astype(inverse, matrices.dtype)[..., None, None]


@functools.lru_cache(maxsize=64)
def _start(side: int) -> HostArray:
    """Return the starting columns, which are equal in every call so that results are reproducible."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(side, PAIRS)))[0]
