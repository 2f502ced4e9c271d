"""Singular values of batches of small matrices: closed forms, an SVD, or Hermitian eigenvalues."""

from __future__ import annotations

from types import ModuleType

from convsv_core.backend import Array, Backend

CLOSED_FORM_SIDE = 2
"""Blocks whose smaller side is at most this have closed forms as accurate as the SVD.

Side 3 has one too, by the cubic formula, but where two values nearly agree it loses half of the digits.
"""


def block_singular_values(backend: Backend, blocks: Array) -> Array:
    """Singular values, descending, of the matrices in the last two axes of `blocks`.

    Blocks of side 1 and 2 have closed forms whose error is a few eps times the largest value. For others the
    SVD's error is about eps times the largest value.
    """
    xp = backend.namespace(blocks)
    side = min(blocks.shape[-2:])
    if side == 1:
        return _one(xp, blocks)
    if side == 2:
        return _two(backend, blocks)
    return backend.svdvals(blocks)


def gram_singular_values(backend: Backend, blocks: Array) -> Array:
    """Singular values, descending, where `blocks` holds Gram matrices: the roots of their eigenvalues.

    The error is about eps times the largest value for the largest ones and sqrt(eps) times it for
    the smallest.
    """
    xp = backend.namespace(blocks)
    return safe_sqrt(xp, xp.flip(backend.eigvalsh(blocks), axis=-1))


def safe_sqrt(xp: ModuleType, values: Array) -> Array:
    """Square root, 0 below 0; its derivative is taken as 0 at 0, where a singular value has none."""
    positive = values > 0
    root = xp.sqrt(xp.where(positive, values, xp.ones_like(values)))
    root = xp.where(positive, root, xp.zeros_like(values))
    return xp.where(xp.isnan(values), values, root)


def absolute_square(xp: ModuleType, array: Array) -> Array:
    """Squared absolute values."""
    if xp.isdtype(array.dtype, "real floating"):
        return array**2
    return xp.real(array) ** 2 + xp.imag(array) ** 2


def squared_norm(xp: ModuleType, array: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Sum of squared absolute values."""
    return xp.sum(absolute_square(xp, array), axis=axis)


def _one(xp: ModuleType, blocks: Array) -> Array:
    return safe_sqrt(xp, squared_norm(xp, blocks, axis=(-2, -1)))[..., None]


def _two(backend: Backend, blocks: Array) -> Array:
    """Largest from the 2 x 2 Gram matrix, smallest from the determinant that a QR step leaves.

    The larger vector goes first, so that the second's remainder is relative to it. The square root
    of the difference of the Gram matrix's eigenvalues enters a sum only, where its error is harmless.
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
    divisor = xp.where(nonzero, longer, xp.ones_like(longer))
    along = product / divisor
    remainder = second - along[..., None] * first
    determinant = safe_sqrt(xp, longer) * safe_sqrt(xp, squared_norm(xp, remainder, axis=-1))
    smallest = determinant / xp.where(nonzero, largest, xp.ones_like(largest))
    return xp.stack([largest, xp.where(smallest > largest, largest, smallest)], axis=-1)
