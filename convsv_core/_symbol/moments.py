"""Bounds of the largest eigenvalues of all Gram matrices, from two moments that need no matrix.

The trace of a Gram matrix and its squared Frobenius norm, the sums of its eigenvalues and of their squares, are
trigonometric polynomials of the frequency too. Their coefficients are inner products of the Gram matrix's own, so that
both are known at every frequency for less than the work of making a few of the matrices.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray, Plan
from convsv_core._symbol.gram import GramPolynomial, factor_rows, half_differences
from convsv_core._symbol.operand import Operand
from convsv_core.backend import Array

MOMENT_ENTRIES = 1 << 23
"""Most entries of a table on the host for which moments are computed. A guess: 64 MiB."""

KEPT_FACTORS = 1 << 17
"""Most entries of a table of factors that is kept for the next call: 1 MiB, and at most 64 such tables."""


class MomentBounds(NamedTuple):
    """Bounds of the largest eigenvalue of each Gram matrix, from two moments.

    Attributes
    ----------
    uppers : float array, shape (visited, groups)
        Upper bounds at the plan's frequencies and the operand's scale. The rounding of the moments is included, that of
        the matrices is not.
    estimates : float array, of the same shape
        Lower bounds, up to rounding.
    """

    uppers: HostArray
    estimates: HostArray


def moment_bounds(gram: GramPolynomial) -> MomentBounds | None:
    """Bound the largest eigenvalue of each Gram matrix by its trace and Frobenius norm; None if that is too much.

    Of n eigenvalues of the mean m and the variance v, the largest is at most ``m + sqrt((n - 1) v)``, which it is where
    the others are equal: close where one singular value rises above the rest. It is at least the sum of their squares
    over their sum, as none is negative.

    Parameters
    ----------
    gram : GramPolynomial

    Notes
    -----
    Looks at values on the host. Source: Wolkowicz and Styan, Linear Algebra and its Applications 29 (1980).
    """
    operand, plan = gram.operand, gram.operand.plan
    half, groups, side, _ = gram.coefficients.shape
    if groups * half * max(half, len(plan.frequencies)) > MOMENT_ENTRIES:
        return None
    factors = frequency_factors(plan)
    cosines, sines = (_inner_products(operand, rows, groups) for rows in (gram.cosines, gram.sines))
    parts = [(factors[:, : half + 1], cosines), (factors[:, half + 1 :], sines)]
    if not plan.real:
        parts = [(factors, cosines + sines)]
    # The first row of the cosines is the identity, whose inner product with a matrix is that one's trace.
    traces = -(parts[0][0] @ parts[0][1][:, 0, :].T)
    squares, moduli = np.zeros_like(traces), np.zeros_like(traces)
    for some, products in parts:
        squares += np.einsum("gfa,fa->fg", some @ products, some)
        moduli += np.abs(some) @ np.sqrt(np.einsum("gaa->ag", products))
    terms = side**2 + 2 * half
    eps = min(terms, 8 * math.sqrt(terms)) * operand.eps  # of an inner product, relative to that of the moduli
    means, lost = traces / side, eps * moduli / math.sqrt(side)
    variances = (squares + eps * moduli**2) / side - np.maximum(means - lost, 0.0) ** 2
    uppers = means + lost + np.sqrt((side - 1) * np.maximum(variances, 0.0))
    return MomentBounds(uppers, squares / np.maximum(traces, np.finfo(float).tiny))


def frequency_factors(plan: Plan, where: HostArray | None = None, dtype: str = "float64") -> HostArray:
    """Return rows of factors of ``-G`` at the visited frequencies, or at some of their places; not to be written to."""
    if len(plan.frequencies) * 2 * len(half_differences(plan)) <= KEPT_FACTORS:
        factors = _all_factors(plan, dtype)
        return factors if where is None else factors[where]
    return _make_factors(plan, plan.frequencies if where is None else plan.frequencies[where]).astype(dtype)


@functools.lru_cache(maxsize=64)
def _all_factors(plan: Plan, dtype: str) -> HostArray:
    return _make_factors(plan, plan.frequencies).astype(dtype)


def _make_factors(plan: Plan, frequencies: HostArray) -> HostArray:
    turns = (frequencies[:, None, :] * half_differences(plan) % plan.periods / plan.periods).sum(axis=2)
    return factor_rows(2 * np.pi * turns)


def _inner_products(operand: Operand, rows: Array, groups: int) -> HostArray:
    """Those of all pairs of rows of entries, group by group: shape (groups, rows, rows)."""
    xp = operand.xp
    apart = xp.permute_dims(xp.reshape(rows, (rows.shape[0], groups, rows.shape[1] // groups)), (1, 0, 2))
    return operand.backend.to_numpy(xp.matmul(apart, xp.matrix_transpose(apart))).astype(float)
