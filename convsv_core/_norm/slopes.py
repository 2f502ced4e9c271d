"""Derivatives of largest norms, each at one frequency of its own.

At the maximiser the symbol is ``A = sum_p exp(i p theta) K_p``. The derivative of its norm is ``Re u* dA v`` for a pair
of singular vectors u and v.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.gram import smaller_gram
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import phases_on_host
from convsv_core.backend import Backend

__all__ = ["slopes_at"]

SOLVES = 2
"""Linear systems that are solved for an eigenvector whose eigenvalue is known.

Measured in training steps of ResNet-32: after one, 537 of 744 kernels have residuals above `RESIDUAL_EPS`; after two,
none has. For 9 complex matrices of side 64, two take 0.6 ms, and all eigenvectors take 3.4 ms.
"""

RESIDUAL_EPS = 16
"""Largest residual of an eigenvector that is accepted, in units of eps times the eigenvalue.

LAPACK's eigenvectors have residuals of a few of these units, and no method does better. A guess.
"""


def slopes_at(operand: Operand, places: Sequence[int], squares: Sequence[float]) -> HostArray:
    """Return the derivative of each kernel's norm at one of the visited frequencies.

    Parameters
    ----------
    operand : Operand
        Of NumPy arrays. Its groups are those of one kernel after another.
    places : sequence of int
        A place among the visited frequencies for each kernel.
    squares : sequence of float
        The largest eigenvalue of each kernel's Gram matrices there, at the operand's scale, to rounding.

    Returns
    -------
    array, of the shape of the operand's kernel
        The derivative of each kernel's norm, at the places of this kernel. It is 0 at a zero kernel.
    """
    backend, plan = operand.backend, operand.plan
    taps = operand.taps()
    offsets, groups, rows, columns = taps.shape
    count, each = len(places), groups // len(places)
    phases = phases_on_host(plan, plan.frequencies[np.asarray(places)], operand.computed_in)
    with backend.computation_context(operand.kernel):
        apart = taps.reshape(offsets, count, each * rows * columns).transpose(1, 0, 2)
        if plan.real:  # Two real products are half of the work of a complex product.
            waves = np.stack([phases.real, phases.imag], axis=1)
            parts = np.matmul(waves, apart)
            matrices = backend.complex(parts[:, 0], parts[:, 1])
        else:
            matrices = np.matmul(phases[:, None, :], apart)[:, 0]
        matrices = matrices.reshape(count, each, rows, columns)
        chosen, vector = _largest_vectors(backend, smaller_gram(backend, matrices), np.asarray(squares))
        matrix = matrices[chosen]
        left, right = vector, vector
        if rows <= columns:
            right = np.matmul(backend.adjoint(matrix), vector[:, :, None])[:, :, 0]
        else:
            left = np.matmul(matrix, vector[:, :, None])[:, :, 0]
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        weights = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1.0), 0.0).astype(norms.dtype)
        pairs = np.conj(left * weights[:, None])[:, :, None] * right[:, None, :]
        if plan.real:  # The real part of the product of the phases with the pair.
            waves = np.stack([phases.real, -phases.imag], axis=2)
            parts = np.stack([pairs.real, pairs.imag], axis=1).reshape(count, 2, rows * columns)
            changes = np.matmul(waves, parts)
        else:
            changes = phases[:, :, None] * pairs.reshape(count, 1, rows * columns)
    changes = changes.reshape(count, offsets, rows, columns).transpose(1, 0, 2, 3)
    if each == 1:
        return operand.from_taps(changes.reshape(offsets, groups, rows, columns))
    slopes = np.zeros((offsets, count, each, rows, columns), operand.kernel.dtype)
    slopes[:, chosen[0], chosen[1]] = changes
    return operand.from_taps(slopes.reshape(offsets, groups, rows, columns))


class _Vectors(NamedTuple):
    """Hold an eigenvector of the largest eigenvalue of each kernel.

    Attributes
    ----------
    chosen : tuple of int arrays, shapes (kernels,)
        The kernels, and the group of each whose matrix has the eigenvalue.
    vectors : array, shape (kernels, side)
    """

    chosen: tuple[HostArray, HostArray]
    vectors: HostArray


def _largest_vectors(backend: Backend, grams: HostArray, squares: HostArray) -> _Vectors:
    """Return eigenvectors of the largest eigenvalues, which are `squares` to rounding.

    Inverse iteration finds an eigenvector for a known eigenvalue at a fraction of the cost of all eigenvectors. The
    kernels whose vectors are not as good as those of LAPACK get all eigenvectors.

    Parameters
    ----------
    backend : Backend
    grams : array, shape (kernels, groups, side, side)
    squares : array, shape (kernels,)
    """
    count, groups, side, _ = grams.shape
    kernels = np.arange(count)
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
    # The system of the group with the largest eigenvalue is the closest to a singular one.
    chosen = kernels, np.argmax(growths[:, :, 0, 0], axis=1)
    vectors = solved[chosen]
    residuals = np.linalg.norm(np.matmul(grams[chosen], vectors)[:, :, 0] - squares[:, None] * vectors[:, :, 0], axis=1)
    failed = ~(residuals <= RESIDUAL_EPS * eps * squares)  # A residual may be NaN.
    vectors = vectors[:, :, 0]
    if failed.any():
        again = _decomposed(backend, grams[failed])
        chosen[1][failed], vectors[failed] = again.chosen[1], again.vectors
    return _Vectors(chosen, vectors)


def _decomposed(backend: Backend, grams: HostArray) -> _Vectors:
    """Return eigenvectors of the largest eigenvalues from all eigenvectors."""
    squares, vectors = backend.eigh(grams)
    chosen = np.arange(len(grams)), np.argmax(squares[:, :, -1], axis=1)
    return _Vectors(chosen, vectors[(*chosen, slice(None), -1)])


@functools.lru_cache(maxsize=64)
def _beginning(side: int) -> HostArray:
    """Return a vector that no structured kernel is likely to be orthogonal to: shape (side, 1)."""
    return np.random.default_rng(0).standard_normal((side, 1))
