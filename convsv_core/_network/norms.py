"""Certified norms of matrices and convolutions, as floats rounded upward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from convsv_core._geometry.padding import lattice
from convsv_core._geometry.shapes import resolve_channels
from convsv_core._network.rule_types import Float64Array
from convsv_core._norm.bounds import norm_bounds
from convsv_core._norm.fixed_grid import norm_upper_bound
from convsv_core.conv import Conv

__all__ = ["EPS", "euclidean_norm", "kronecker_norm", "matrix_norm", "product_up", "supremum_norm"]

EPS = float(np.finfo(np.float64).eps)
"""The rounding unit of float64, twice the largest relative error of one operation."""

LARGE_SIDE = 256
"""Side of the symbol's matrices above which a norm is certified to `LARGE_RTOL` alone.

Measured on Gaussian kernels of 3 x 3 taps, in processor seconds: at side 256 a gap of 1e-3 takes 1.0, at side 512 it
takes 10.5.
"""

LARGE_RTOL = 0.03
"""Relative gap of the norm of large symbols. Measured at side 512: it takes 1.3 processor seconds."""

CLOSE_RTOL, CLOSE_EVALUATIONS = 1e-7, 4000
"""Relative gap of a second search, for norms that the first one leaves on both sides of 1, and its largest cost.

Guesses: projection ends at about this distance from its bound.
"""

DECOMPOSED_SIDE = 512
"""Side of a matrix above which its norm is found by a test and not by all eigenvalues.

Measured: eigenvalues take 0.15 s at side 512, 0.8 s at 1024, and a minute at 4096.
"""

MATRIX_RTOL = 1e-4
"""Relative gap of the squared norm of a large matrix, at the first test. A guess: tests that fail quadruple it."""

SUBSPACE = 16
"""Number of vectors of the subspace iteration. A guess."""

SUBSPACE_STEPS = 30
"""Number of subspace iterations. A guess: they take as long as one test of a matrix of side 4096."""


def product_up(values: Iterable[float]) -> float:
    """Return the product of numbers that are not negative, rounded upward; exact where each factor but one is 1."""
    values = [value for value in values if value != 1.0]
    if len(values) < 2:
        return values[0] if values else 1.0
    return math.prod(values) * (1 + len(values) * EPS)


def euclidean_norm(array: Float64Array, axis: int | tuple[int, ...] | None = None) -> Float64Array:
    """Return the root of the sum of squares, over all axes or those given; no square overflows or vanishes.

    The rounding of the sum is not included. An infinite entry gives an infinite norm.

    Examples
    --------
    >>> float(euclidean_norm(np.asarray([3e-200, 4e-200])))
    5e-200
    """
    scale = _power_of_two(array)
    return np.asarray(np.sqrt(np.sum((array / scale) ** 2, axis=axis)) * scale)


def _power_of_two(array: Float64Array) -> float:
    """Return a power of two near the largest entry; 1 where that is 0 or not finite."""
    largest = float(np.max(np.abs(array), initial=0.0))
    if not 0 < largest < math.inf:
        return 1.0
    return math.ldexp(1.0, min(max(math.frexp(largest)[1], -1021), 1021))  # The power and its reciprocal are normal.


def supremum_norm(kernel: Float64Array, conv: Conv, rtol: float) -> float:
    """Return an upper bound of the norm of the symbol over all frequencies, within `rtol` of it.

    Symbols that do not depend on the frequency are matrices: their norm is within `MATRIX_RTOL`. The gap of large
    symbols is `LARGE_RTOL`. Where that leaves open whether a norm is above 1, the search goes on.
    """
    if not np.any(kernel):
        return 0.0
    conv = lattice(conv)
    channels = resolve_channels(kernel.shape, conv)
    if math.prod(channels.taps) == 1:
        return _matrix_norm_of_one_tap(kernel, conv)
    if min(channels.rows, channels.columns) > LARGE_SIDE:
        upper = _narrow_upper_bound(kernel, conv, max(rtol, LARGE_RTOL))
        if not 1 < upper <= 1 + LARGE_RTOL:
            return upper
    found = norm_bounds(kernel, conv, rtol=rtol)
    if float(found.lower) <= 1 < float(found.upper):
        # Networks are kept at a norm of 1, so it matters whether this norm is above 1.
        found = norm_bounds(kernel, conv, rtol=CLOSE_RTOL, max_evaluations=CLOSE_EVALUATIONS)
    return float(found.upper)


def _narrow_upper_bound(kernel: Float64Array, conv: Conv, rtol: float) -> float:
    """Return an upper bound of the norm over all frequencies, computed in float32.

    Measured at side 512: 1.3 processor seconds, and 2.4 in float64; the rounding makes the bound 0.1 % larger. The
    rounding of the kernel adds at most the root of the number of taps times its Frobenius norm.
    """
    scale = _power_of_two(kernel)
    kernel = kernel / scale
    narrow = kernel.astype(np.float32)
    lost = float(euclidean_norm(kernel - narrow))
    taps = math.prod(resolve_channels(kernel.shape, conv).taps)
    upper = float(norm_upper_bound(narrow, conv, rtol=rtol)) + math.sqrt(taps) * lost * (1 + 1e-9)
    return upper * (1 + 4 * EPS) * scale


def _matrix_norm_of_one_tap(kernel: Float64Array, conv: Conv) -> float:
    channels = resolve_channels(kernel.shape, conv)
    if channels.groups == 1 and min(channels.rows, channels.columns) > DECOMPOSED_SIDE:
        return _tested_norm(kernel.reshape([extent for extent in kernel.shape if extent > 1]))
    return float(norm_upper_bound(kernel, conv))


def _tested_norm(matrix: Float64Array) -> float:
    """Return an upper bound of the norm of a large matrix by a test of its Gram matrix, within `MATRIX_RTOL`.

    Subspace iteration gives a level t just above the largest eigenvalue of ``G = A A^T``. Cholesky's factorisation of
    ``t I - G`` then proves that no eigenvalue is larger: where it succeeds, the least eigenvalue is at least
    ``-(n + 1) eps`` times the trace (Rump, *Verification of positive definiteness*, BIT 46, 2006). The rounding of G
    adds at most its number of terms times eps times the squared Frobenius norm.
    """
    scale = _power_of_two(matrix)
    rows = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T) / scale
    gram = rows @ rows.T
    side = len(gram)
    vectors = np.random.default_rng(0).standard_normal((side, SUBSPACE))
    for _ in range(SUBSPACE_STEPS):
        vectors, _ = np.linalg.qr(gram @ vectors)
    largest = float(np.linalg.eigvalsh(vectors.T @ gram @ vectors)[-1])
    squared = float(np.sum(rows**2))
    if not 0 < largest < math.inf:
        return math.sqrt(squared) * (1 + matrix.size * EPS) * scale
    level = largest * (1 + MATRIX_RTOL)
    rounding = (rows.shape[1] + 2) * EPS * squared * 2
    while True:
        shifted = np.diag(np.full(side, level)) - gram
        try:
            np.linalg.cholesky(shifted)
        except np.linalg.LinAlgError:
            level = largest * (1 + 4 * (level / largest - 1))
            continue
        level += rounding + 2 * (side + 2) * EPS * float(np.trace(np.abs(shifted)))
        return math.sqrt(level * (1 + 8 * EPS)) * scale


def matrix_norm(matrices: Float64Array) -> float:
    """Return an upper bound of the largest norm in a stack of matrices, within `MATRIX_RTOL`."""
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    if 0 in stack.shape:
        return 0.0
    kernel = stack.reshape(-1, stack.shape[-1], 1)
    return supremum_norm(kernel, Conv("OIW", groups=len(stack)), 1.0)


def kronecker_norm(matrices: Mapping[int, Float64Array]) -> float:
    """Return an upper bound of the norm of a Kronecker product: the product of the norms."""
    return product_up(matrix_norm(matrix) for matrix in matrices.values())
