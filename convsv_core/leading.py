"""The singular values above a limit of many matrices, where few of each matrix are, with their vectors.

These need no decomposition: a high power of the Gram matrix, applied to a few columns, leaves the space of the largest
ones, by products of matrices in single precision. What it leaves is then checked, residual and remainder, so
that the starting columns and the number of steps decide about time only.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from convsv_core._symbol.rows import MARGIN_EPS, are_below
from convsv_core.backend import Array, Backend
from convsv_core.decomposition import squared_norm
from convsv_core.gram import smaller_gram
from convsv_core.plan import HostArray

LEADING_SIDE = 12
"""Side from which this is cheaper than all eigenpairs."""

LEADING_ENTRIES = 1 << 13
"""Entries of all matrices together from which it is."""

PAIRS = 4
"""Columns: the most that may be above the limit, and the more, the fewer steps."""

SQUARINGS = 4
"""Of the matrix, before it is applied to the columns: together the cheapest way to a power of 64."""

POWER, POWER_SIDE = 64, 64
"""The power for matrices of at most this side. Beyond, the values of a random matrix lie closer to each other."""

WIDE_SIDE = 128
"""Side from which the rounding of single precision would hide the distance of the others from the limit."""

RESIDUAL_EPS = 16
"""Residual of a pair that is good enough, in eps of single precision times the largest square."""

_EPS = float(np.finfo(np.float32).eps)


def leading_pairs(backend: Backend, matrices: Array, limit: Array) -> tuple[Array, Array, HostArray]:
    """The largest singular values of matrices, vectors of the smaller side, and where no others are above the limit.

    Parameters
    ----------
    matrices : array, shape (count, groups, rows, columns)
        complex128.
    limit : 0-d array
        Positive.

    Returns
    -------
    squares : array, shape (count, groups, PAIRS)
        Of the values, ascending.
    vectors : array, shape (count, groups, side, PAIRS)
        Orthonormal in single precision; with residuals of at most `RESIDUAL_EPS` for those above the limit, where it is
        sure.
    sure : bool array on the host, shape (count,)
        False as well where a pair that is wanted has not been found to that precision.
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
    found = xp.sum(lengths, axis=-1) <= (RESIDUAL_EPS * _EPS * squares[..., -1]) ** 2
    if grams.shape[-1] >= WIDE_SIDE:
        grams = smaller_gram(backend, matrices)
        traces = xp.real(xp.linalg.trace(grams))
    removed = xp.matmul(xp.astype(vectors * kept, grams.dtype), xp.astype(backend.adjoint(vectors), grams.dtype))
    margin = MARGIN_EPS * grams.shape[-1] * float(xp.finfo(traces.dtype).eps) * xp.astype(traces, squares.dtype)
    sure = found & are_below(backend, grams - removed, limit**2 - margin)
    return squares, vectors, backend.to_numpy(xp.all(sure, axis=1))


def expected_share(backend: Backend, matrices: Array, limit: Array) -> float:
    """Of how many of the matrices `leading_pairs` finds all that it looks for, from all their singular values."""
    values: HostArray = backend.to_numpy(backend.eigvalsh(smaller_gram(backend, matrices)))
    least = np.where(values > float(limit) ** 2, values, np.inf).min(axis=-1)
    power = 2**SQUARINGS * _applications(values.shape[-1])
    # What is left of the others, and rounding between two orthonormal bases, which is relative to the largest.
    left = (values[..., -PAIRS - 1] / least) ** power
    rounding = np.where(least < np.inf, values[..., -1] / least, 0.0) ** (2 * 2**SQUARINGS) * _EPS
    return float(np.mean(np.all(left + rounding <= RESIDUAL_EPS * _EPS, axis=1)))


def _leading_space(backend: Backend, matrices: Array) -> Array:
    """Orthonormal columns near the leading eigenvectors of Gram matrices of trace 1."""
    xp = backend.namespace(matrices)
    for done in range(1, SQUARINGS + 1):
        matrices = xp.matmul(matrices, matrices)
        if 2 * done == SQUARINGS:  # so that the largest entries stay within single precision's exponents
            matrices = _divided(backend, matrices, xp.real(xp.linalg.trace(matrices)))
    columns = xp.astype(backend.constant(_start(matrices.shape[-1]), matrices), matrices.dtype)
    for done in range(1, _applications(matrices.shape[-1]) + 1):
        columns = xp.matmul(matrices, columns)
        if done % 2 == 0:
            columns, _ = xp.linalg.qr(columns)
    return columns


def _applications(side: int) -> int:
    """How often the squared matrices are applied: an even number, so that the columns end orthonormal.

    The distances at the upper end of a random matrix's spectrum shrink with the power 2/3 of its side.
    """
    return 2 * math.ceil(POWER * max(side / POWER_SIDE, 1.0) ** (2 / 3) / 2 ** (SQUARINGS + 1))


def _divided(backend: Backend, matrices: Array, numbers: Array) -> Array:
    """Matrices over a positive number each; those of the number 0 as they are."""
    xp = backend.namespace(matrices)
    inverse = 1 / xp.where(numbers > 0, numbers, xp.ones_like(numbers))
    return matrices * xp.astype(inverse, matrices.dtype)[..., None, None]


@functools.lru_cache(maxsize=64)
def _start(side: int) -> HostArray:
    """The same columns in every call: results are reproducible."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(side, PAIRS)))[0]
