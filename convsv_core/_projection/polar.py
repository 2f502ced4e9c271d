"""Polar factors of batches of small matrices, by singular vectors or by matrix products alone."""

from __future__ import annotations

from convsv_core._symbol.small_matrices import divisors, safe_sqrt, squared_norm
from convsv_core.backend import Array, Backend

__all__ = ["polar_by_products", "polar_factors", "prefers_products"]

FAST_STEPS, LAST_STEPS = 10, 4
"""Steps of the polar iteration that raise small singular values, and then steps that converge to 1. Guesses."""

FAST, LAST = (3.4445, -4.775, 2.0315), (15 / 8, -10 / 8, 3 / 8)
"""Coefficients of the odd polynomials of degree 5 for the two kinds of steps of the polar iteration.

The first polynomial has slope 3.4 at 0. It maps [0, 1.2] into itself, and values that have been raised into [0.68,
1.14]. It is known from Muon, an optimiser. The second polynomial is Newton and Schulz's step, of third order at 1.
"""


def prefers_products(backend: Backend, like: Array) -> bool:
    """Tell whether matrix products are faster than decompositions of many small matrices.

    They are on accelerators, but a compiler makes no faster program of them.
    """
    return not backend.compiles and not backend.has_fast_float64(like)


def polar_factors(backend: Backend, matrices: Array) -> Array:
    """Return the polar factors U V* of matrices U S V*, from their singular vectors.

    A rank-deficient matrix has no unique polar factor. It gets the one that its computed vectors make.
    """
    wide = matrices.shape[-2] < matrices.shape[-1]
    # LAPACK decomposes a tall matrix in half the time that it takes for the wide one.
    u, _, vh = backend.svd(backend.adjoint(matrices) if wide else matrices)
    polar = backend.namespace(matrices).matmul(u, vh)
    return backend.adjoint(polar) if wide else polar


def polar_by_products(backend: Backend, matrices: Array) -> Array:
    """Return the polar factors of wide matrices by Newton and Schulz's iteration, which uses matrix products alone."""
    xp = backend.namespace(matrices)
    norms = safe_sqrt(xp, squared_norm(xp, matrices, axis=(-2, -1)))[..., None, None]
    x = matrices / xp.astype(divisors(xp, norms), matrices.dtype)
    for a, b, c in FAST_STEPS * [FAST] + LAST_STEPS * [LAST]:
        gram = xp.matmul(x, backend.adjoint(x))
        x = a * x + xp.matmul(b * gram + c * xp.matmul(gram, gram), x)
    return x
