"""The largest eigenvalue of a positive semidefinite operator that can only be applied to vectors.

The method is Lanczos's with full reorthogonalisation and thick restarts (Wu and Simon, *Thick-restart Lanczos method
for large symmetric eigenvalue problems*, SIAM J. Matrix Anal. Appl. 22, 2000). The largest eigenvalues of a
convolution's Gram operator usually lie close together: near its maximum the norm of the symbol is a parabola, which a
large image samples finely. A restart therefore keeps many Ritz vectors, and the iteration does not end by the
residual alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.small_matrices import divisors
from convsv_core.backend import Array

__all__ = ["largest_eigenvector", "table_like", "unit"]

BASIS = 32
"""Number of Lanczos vectors held at a time. A guess."""

LEAST_BASIS = 10
"""Number of Lanczos vectors held at a time where `BASIS` of them take more than `BASIS_BYTES`. A guess."""

BASIS_BYTES = 1 << 29
"""Memory, in bytes, for the Lanczos vectors of large operators. A guess."""

KEPT = 0.4
"""Share of the Lanczos vectors' span that a restart keeps, as Ritz vectors. A guess."""

MOST_CYCLES = 100
"""Number of cycles, one more than the restarts, after which the best value so far is returned. A guess."""

TRACED_CYCLES = 6
"""Number of cycles under tracing, where no value can end the iteration. A guess.

The relative error after it was measured: about 1e-6 for a Gaussian kernel of 64 channels on 56 x 56 pixels.
"""

ROUNDING = 8
"""Residue of orthogonalisation that counts as zero, in units of eps times the norm of the vector. A guess."""

RESIDUAL_EXPONENT = 0.75
"""The iteration may end once the residual, relative to the eigenvalue, is below ``2 * eps**RESIDUAL_EXPONENT``.

A guess, between 1/2, which the eigenvalue's own error needs, and 1, which rounding forbids.
"""

Gram: TypeAlias = Callable[[Array], Array]
"""A function that applies the operator to a row, shape (1, size)."""


class Lanczos(NamedTuple):
    """The state of the iteration; vectors are rows.

    Attributes
    ----------
    basis : array, shape (count, size)
        Orthonormal vectors, and zeros where there are none yet.
    projected : array, shape (count, count)
        Row i holds the inner products of ``gram(basis[i])`` with the vectors up to i. Those with later vectors follow
        by symmetry. After a restart the Ritz values stand on the diagonal.
    vector : array, shape (1, size)
        The next vector of the basis.
    residual : 0-d array, real
        Norm of `vector` before it was normalised.
    index : 0-d array, integer
        Place of `vector` in `basis`.
    """

    basis: Array
    projected: Array
    vector: Array
    residual: Array
    index: Array


def largest_eigenvector(operand: Operand, gram: Gram, size: int, like: Array) -> Array:
    """Return an eigenvector of the largest eigenvalue of an operator.

    Parameters
    ----------
    operand : Operand
        Gives the arrays' library, dtype and device.
    gram : callable
        Applies the operator to a row: shape (1, size), to the same shape.
    size : int
        Elements of a vector.
    like : array
        An array that `gram` uses, which tells whether the call is traced.

    Returns
    -------
    array, shape (1, size)
    """
    xp, backend = operand.xp, operand.backend
    count = min(size, BASIS, max(LEAST_BASIS, BASIS_BYTES // (size * operand.kernel_bytes)))
    kept = int(KEPT * count)
    diagonal = table_like(operand, np.eye(count))
    slots = backend.asarray_like(np.arange(count)[:, None], operand.kernel)
    vector = table_like(operand, _start(size, operand.plan.real))
    nothing = xp.zeros_like(vector) * diagonal[:, :1]
    state = Lanczos(nothing, xp.zeros_like(diagonal), vector, xp.zeros_like(operand.scale), slots[0, 0])
    for cycle in range(MOST_CYCLES):
        step = functools.partial(_step, operand, gram, slots)
        state = Lanczos(*backend.repeat(step, state, count - kept if cycle else count, like))
        projected = xp.tril(state.projected)
        values, vectors = backend.eigh(projected + backend.adjoint(xp.tril(projected, k=-1)))
        values, vectors = xp.flip(values, axis=0), xp.flip(vectors, axis=1)
        ritz = xp.matmul(backend.adjoint(vectors[:, :kept]), state.basis)
        done = backend.truth(_is_converged(operand, values, state.residual * xp.abs(vectors[-1, :])))
        if done or (done is None and cycle + 1 == TRACED_CYCLES):
            break
        basis = xp.concat([ritz, xp.zeros_like(state.basis[kept:, :])], axis=0)
        state = state._replace(basis=basis, projected=values[:, None] * diagonal, index=slots[kept, 0])
    return ritz[:1, :]


def table_like(operand: Operand, table: HostArray) -> Array:
    """Return a host table as an array of the computation's library, dtype and device."""
    return operand.xp.astype(operand.backend.asarray_like(table, operand.kernel), operand.kernel.dtype, copy=False)


def unit(operand: Operand, array: Array) -> Array:
    """Return `array` divided by its norm. Zeros stay zeros."""
    xp = operand.xp
    return array / divisors(xp, xp.linalg.vector_norm(array))


def _step(
    operand: Operand,
    gram: Gram,
    slots: Array,
    basis: Array,
    projected: Array,
    vector: Array,
    residual: Array,
    index: Array,
) -> Lanczos:
    """Return the state with `vector` in the basis, and a next vector orthogonal to the basis.

    If ``gram(vector)`` lies in the span of the basis but for rounding, the next vector and all later ones are 0.
    """
    xp, backend = operand.xp, operand.backend
    basis = xp.where(slots == index, vector, basis)
    rest = gram(vector)
    least = ROUNDING * operand.eps * xp.linalg.vector_norm(rest)
    row = xp.zeros_like(projected[:1, :])
    for _ in range(2):  # The second pass removes what cancellation leaves after the first.
        products = xp.matmul(rest, backend.adjoint(basis))
        rest = rest - xp.matmul(products, basis)
        row = row + products
    residual = xp.linalg.vector_norm(rest)
    is_new = residual > least
    residual = xp.where(is_new, residual, xp.zeros_like(residual))
    vector = unit(operand, xp.where(is_new, rest, xp.zeros_like(rest)))
    return Lanczos(basis, xp.where(slots == index, row, projected), vector, residual, index + 1)


def _is_converged(operand: Operand, values: Array, residuals: Array) -> Array:
    """Return whether the iteration may end: a 0-d boolean array.

    `values` are the Ritz values, descending, and `residuals` the norms of their residuals. Suppose that the first p
    Ritz values approximate one cluster of eigenvalues. Then the largest eigenvalue exceeds the first Ritz value by at
    most about ``sum of the p residuals^2 / (first value - Ritz value p + 1)``. The estimate is the least one among
    all p.
    """
    xp, eps = operand.xp, operand.answer_eps
    gaps = values[:1] - values[1:]
    separate = gaps > 0
    errors = xp.cumulative_sum(residuals**2)[:-1] / divisors(xp, gaps)
    error = xp.min(xp.where(separate, errors, xp.full_like(errors, math.inf)))
    # The relative error of a singular value is half of the relative error of its square.
    small_enough = residuals[0] <= 2 * eps**RESIDUAL_EXPONENT * values[0]
    return small_enough & ((error <= 2 * eps * values[0]) | (residuals[0] <= 2 * eps * values[0]))


def _start(size: int, real: bool) -> HostArray:
    """Return a fixed pseudo-random row of norm 1. A structured row could be orthogonal to the answer."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, size))
    if not real:
        row = row + 1j * rng.standard_normal((1, size))
    return np.asarray(row / np.linalg.norm(row))
