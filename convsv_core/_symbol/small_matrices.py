"""Singular values of batches of small matrices, by closed forms, an SVD or Hermitian eigenvalues."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from convsv_core._geometry.plan import IntArray, Plan
from convsv_core.backend import Array, Backend

__all__ = [
    "CLOSED_FORM_SIDE",
    "absolute_square",
    "are_below",
    "block_singular_values",
    "divisors",
    "gram_singular_values",
    "largest_eigenvalues",
    "real_and_complex",
    "remainders_of",
    "safe_sqrt",
    "squared_norm",
]

CLOSED_FORM_SIDE = 2
"""Largest smaller side of a matrix whose singular values come from a closed form, as accurate as the SVD.

It follows from the formulas. Side 3 has the cubic formula, which loses half of the digits where two values
nearly agree.
"""


def block_singular_values(backend: Backend, blocks: Array) -> Array:
    """Return the singular values, descending, of the matrices in the last two axes of `blocks`.

    The absolute error is about eps times the largest value for the SVD. For the closed forms of side 1 and 2 it
    is a few eps times the largest value.
    """
    xp = backend.namespace(blocks)
    side = min(blocks.shape[-2:])
    if side == 1:
        return _values_of_side_1(xp, blocks)
    if side == 2:
        return _values_of_side_2(backend, blocks)
    return backend.svdvals(blocks)


def gram_singular_values(backend: Backend, blocks: Array) -> Array:
    """Return the singular values, descending, of matrices whose Gram matrices are in the last two axes of `blocks`.

    They are the roots of the Gram matrices' eigenvalues. The absolute error of the largest value is about eps
    times that value. The error of the smallest is up to sqrt(eps) times the largest value.
    """
    xp = backend.namespace(blocks)
    return safe_sqrt(xp, xp.flip(backend.eigvalsh(blocks), axis=-1))


def safe_sqrt(xp: ModuleType, values: Array) -> Array:
    """Return the square root of positive values and 0 for others; NaN stays NaN.

    Its derivative is 0 at 0 and below. At 0 a singular value has no derivative.
    """
    positive = values > 0
    root = xp.sqrt(xp.where(positive, values, xp.ones_like(values)))
    root = xp.where(positive, root, xp.zeros_like(values))
    return xp.where(xp.isnan(values), values, root)


def divisors(xp: ModuleType, values: Array) -> Array:
    """Return positive values, and 1 in place of others: to divide by where the quotient is 0 or not used."""
    return xp.where(values > 0, values, xp.ones_like(values))


def absolute_square(xp: ModuleType, array: Array) -> Array:
    """Return the squared absolute value of every entry."""
    if xp.isdtype(array.dtype, "real floating"):
        return array**2
    return xp.real(array) ** 2 + xp.imag(array) ** 2


def squared_norm(xp: ModuleType, array: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Return the sum of squared absolute values, over all axes or those given."""
    return xp.sum(absolute_square(xp, array), axis=axis)


def largest_eigenvalues(backend: Backend, matrices: Array) -> Array:
    """Return the largest eigenvalue of each Hermitian matrix in the last two axes.

    Sides 1 and 2 have closed forms.
    """
    xp = backend.namespace(matrices)
    if matrices.shape[-1] == 1:
        return xp.real(matrices[..., 0, 0])
    if matrices.shape[-1] == 2:
        first, second = xp.real(matrices[..., 0, 0]), xp.real(matrices[..., 1, 1])
        half_gap = safe_sqrt(xp, ((first - second) / 2) ** 2 + absolute_square(xp, matrices[..., 0, 1]))
        return (first + second) / 2 + half_gap
    return backend.eigvalsh(matrices)[..., -1]


def are_below(backend: Backend, matrices: Array, levels: Array) -> Array:
    """Tell whether all eigenvalues of each Hermitian matrix are below its level, up to rounding.

    `levels` has the shape of `matrices` without the last two axes.
    """
    return backend.is_positive_definite(remainders_of(backend, matrices, levels))


def remainders_of(backend: Backend, matrices: Array, levels: Array) -> Array:
    """Return the level of each matrix times the identity, less the matrix."""
    xp = backend.namespace(matrices)
    identity = xp.astype(backend.asarray_like(np.eye(matrices.shape[-1]), matrices), matrices.dtype, copy=False)
    return xp.astype(levels, matrices.dtype)[..., None, None] * identity - matrices


def _values_of_side_1(xp: ModuleType, blocks: Array) -> Array:
    """Return the one singular value of row or column vectors: their length."""
    return safe_sqrt(xp, squared_norm(xp, blocks, axis=(-2, -1)))[..., None]


def _values_of_side_2(backend: Backend, blocks: Array) -> Array:
    """Return the two singular values of matrices with two rows or two columns, here called vectors.

    The largest value comes from the 2 x 2 Gram matrix of the vectors. Half the gap between its eigenvalues is a
    square root with a large relative error where it is small. It is added to a larger number, so no digit is lost.

    The smallest value is the determinant over the largest value. One step of QR gives the determinant: the length
    of the longer vector times the length of the other one's part that is orthogonal to it. With the longer
    vector first, the factor of the projection is at most 1.
    """
    xp = backend.namespace(blocks)
    vectors = blocks if blocks.shape[-2] == 2 else xp.matrix_transpose(blocks)
    first, second = vectors[..., 0, :], vectors[..., 1, :]
    a, d = squared_norm(xp, first, axis=-1), squared_norm(xp, second, axis=-1)
    swap = (d > a)[..., None]
    first, second = xp.where(swap, second, first), xp.where(swap, first, second)
    product = xp.sum(backend.conj(first) * second, axis=-1)
    half_gap = safe_sqrt(xp, ((a - d) / 2) ** 2 + absolute_square(xp, product))
    largest = safe_sqrt(xp, (a + d) / 2 + half_gap)
    longer = xp.where(swap[..., 0], d, a)
    nonzero = longer > 0
    along = product / xp.where(nonzero, longer, xp.ones_like(longer))
    remainder = second - along[..., None] * first
    determinant = safe_sqrt(xp, longer) * safe_sqrt(xp, squared_norm(xp, remainder, axis=-1))
    smallest = determinant / xp.where(nonzero, largest, xp.ones_like(largest))
    return xp.stack([largest, xp.where(smallest > largest, largest, smallest)], axis=-1)


def real_and_complex(plan: Plan) -> list[tuple[bool, IntArray]]:
    """Return the visited frequencies in two parts: first with real decompositions, then with complex ones.

    The symbol of a real kernel is real at a frequency that is its own conjugate. The symbol of a 1x1 kernel is real
    everywhere. A real decomposition takes a third of the time of a complex one. Closed forms gain nothing from it, so
    their frequencies stay in the second part.
    """
    alone = plan.self_conjugate if plan.real and min(plan.block) > CLOSED_FORM_SIDE else 0
    parts = [(True, plan.frequencies[:alone]), (False, plan.frequencies[alone:])]
    return [(real, frequencies) for real, frequencies in parts if len(frequencies)]
