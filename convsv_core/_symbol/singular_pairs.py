"""Singular vectors of the largest singular value, for block-diagonal matrices of NumPy."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.gram import smaller_gram
from convsv_core.backend import Backend
from convsv_core.plugins import backend_of

__all__ = ["SingularPairs", "largest_pairs"]

SOLVES = 2
"""Linear systems that are solved for an eigenvector whose eigenvalue is known.

Measured in training steps of ResNet-32: after one, 537 of 744 kernels have residuals above `RESIDUAL_EPS`; after two,
none has. For 9 complex matrices of side 64, two take 0.6 ms, and all eigenvectors take 3.4 ms. For one of side 256,
double precision, two take 2.6 ms, and all eigenvectors take 12 ms.
"""

RESIDUAL_EPS = 16
"""Largest residual of an eigenvector that is accepted, in units of eps times the eigenvalue.

LAPACK's eigenvectors have residuals of a few of these units, and no method does better. A guess.
"""


class SingularPairs(NamedTuple):
    """Hold singular vectors of the largest singular value of each of several block-diagonal matrices.

    Attributes
    ----------
    groups : int array, shape (count,)
        The block of each matrix that has the value.
    values : float array, shape (count,)
    left : array, shape (count, rows)
        Unit vectors.
    right : array, shape (count, columns)
        Unit vectors: the block times `right` is `values` times `left`.
    """

    groups: HostArray
    values: HostArray
    left: HostArray
    right: HostArray


def largest_pairs(matrices: HostArray, squares: HostArray | None = None) -> SingularPairs:
    """Return singular vectors of the largest singular value of each matrix.

    They follow from an eigenvector of the smaller Gram matrix, which is as accurate as the SVD for the largest value.
    All eigenvectors take half of the time of the SVD or less: 0.8 instead of 4.0 ms for 60 x 960 entries, 13 instead of
    20 ms for 256 x 256.

    Parameters
    ----------
    matrices : array, shape (count, groups, rows, columns)
        The blocks of each matrix.
    squares : array, shape (count,), optional
        The square of the largest singular value of each matrix, if it is known to rounding. It saves time.
    """
    backend, count = backend_of(matrices), len(matrices)
    grams = smaller_gram(backend, matrices)
    found = _decomposed(backend, grams) if squares is None else _iterated(backend, grams, squares)
    blocks = matrices[np.arange(count), found.groups]
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    others = np.matmul(backend.adjoint(blocks) if is_wide else blocks, found.vectors[:, :, None])[:, :, 0]
    values = np.linalg.norm(others, axis=1)
    zero = values == 0
    others = others / np.where(zero, 1.0, values).astype(values.dtype)[:, None]
    others[zero, 0] = 1.0  # All unit vectors are singular vectors of a zero matrix.
    left, right = (found.vectors, others) if is_wide else (others, found.vectors)
    return SingularPairs(found.groups, values, left, right)


class _Vectors(NamedTuple):
    """Hold an eigenvector of the largest eigenvalue of each block-diagonal matrix.

    Attributes
    ----------
    groups : int array, shape (count,)
        The block that has the eigenvalue.
    vectors : array, shape (count, side)
    """

    groups: HostArray
    vectors: HostArray


def _iterated(backend: Backend, grams: HostArray, squares: HostArray) -> _Vectors:
    """Return eigenvectors of the largest eigenvalues, which are `squares` to rounding.

    Inverse iteration finds an eigenvector for a known eigenvalue at a fraction of the cost of all eigenvectors. The
    matrices whose vectors are not as good as those of LAPACK get all eigenvectors.

    Parameters
    ----------
    backend : Backend
    grams : array, shape (count, groups, side, side)
    squares : array, shape (count,)
    """
    count, groups, side, _ = grams.shape
    eps = float(np.finfo(grams.dtype).eps)
    levels = np.where(squares > 0, squares * (1 + 4 * eps), 1.0)[:, None, None, None]
    shifted = (levels * np.eye(side) - grams).astype(grams.dtype)
    solved = np.broadcast_to(_beginning(side), (count, groups, side, 1)).astype(grams.dtype)
    try:
        for _ in range(SOLVES):
            solved = np.linalg.solve(shifted, solved)
            growths = np.linalg.norm(solved, axis=-2, keepdims=True)
            solved = solved / growths
    except np.linalg.LinAlgError:
        return _decomposed(backend, grams)
    # The system of the block with the largest eigenvalue is the closest to a singular one.
    chosen = np.argmax(growths[:, :, 0, 0], axis=1)
    places = np.arange(count), chosen
    vectors = solved[places]
    residuals = np.linalg.norm(np.matmul(grams[places], vectors)[:, :, 0] - squares[:, None] * vectors[:, :, 0], axis=1)
    failed = ~(residuals <= RESIDUAL_EPS * eps * squares)  # A residual may be NaN.
    vectors = vectors[:, :, 0]
    if failed.any():
        chosen[failed], vectors[failed] = _decomposed(backend, grams[failed])
    return _Vectors(chosen, vectors)


def _decomposed(backend: Backend, grams: HostArray) -> _Vectors:
    """Return eigenvectors of the largest eigenvalues from all eigenvectors."""
    squares, vectors = backend.eigh(grams)
    chosen = np.argmax(squares[:, :, -1], axis=1)
    return _Vectors(chosen, vectors[np.arange(len(grams)), chosen, :, -1])


@functools.lru_cache(maxsize=64)
def _beginning(side: int) -> HostArray:
    """Return a vector that no structured kernel is likely to be orthogonal to: shape (side, 1)."""
    return np.random.default_rng(0).standard_normal((side, 1))
