"""Bounds of the largest eigenvalues of all Gram matrices, from two moments that need no matrix.

The trace of a Gram matrix is the sum of its eigenvalues. Its squared Frobenius norm is the sum of their squares. Both
are trigonometric polynomials of the frequency. Their coefficients are inner products of the coefficients of the Gram
matrix. So both moments at every frequency cost less than a few Gram matrices.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray, Plan
from convsv_core._geometry.rounding import summation_units
from convsv_core._symbol.gram import GramPolynomial, factor_rows, half_differences
from convsv_core._symbol.operand import Operand
from convsv_core.backend import Array

__all__ = ["MomentBounds", "frequency_factors", "moment_bounds"]

MOMENT_ENTRIES = 1 << 23
"""Largest number of entries of a host table with which moments are computed. A guess: 64 MiB."""

KEPT_FACTORS = 1 << 17
"""Largest number of entries of a table of factors that is kept for later calls.

A guess: 1 MiB for each of 64 tables.
"""


class MomentBounds(NamedTuple):
    """Hold bounds of the largest eigenvalue of each Gram matrix, from two moments.

    Attributes
    ----------
    uppers : float array, shape (visited, groups)
        Upper bounds at the plan's frequencies, at the operand's scale. They include the rounding errors of the
        moments, and exclude the rounding errors of the Gram matrices.
    estimates : float array, shape (visited, groups)
        Lower bounds, up to rounding.
    """

    uppers: HostArray
    estimates: HostArray


def moment_bounds(gram: GramPolynomial) -> MomentBounds | None:
    """Return bounds of the largest eigenvalue of each Gram matrix, or None if their tables would be too large.

    Let n eigenvalues have the mean m and the variance v. The largest one is at most ``m + sqrt((n - 1) v)``. It
    equals this bound if all other eigenvalues are equal, and is close to it if one singular value is much larger than
    the rest. The largest eigenvalue is at least the sum of the squares over the sum, because no eigenvalue is
    negative.

    Parameters
    ----------
    gram : GramPolynomial

    Notes
    -----
    It reads values on the host, so it is not traceable. Source: Wolkowicz and Styan, Linear Algebra and its
    Applications 29 (1980).
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
    # The first row of the cosines is the identity. The inner product of the identity with a matrix is its trace.
    traces = -(parts[0][0] @ parts[0][1][:, 0, :].T)
    squares, moduli = np.zeros_like(traces), np.zeros_like(traces)
    for some, products in parts:
        squares += np.einsum("gfa,fa->fg", some @ products, some)
        moduli += np.abs(some) @ np.sqrt(np.einsum("gaa->ag", products))
    # The rounding error of an inner product is at most `eps` times the inner product of the absolute values.
    eps = summation_units(side**2 + 2 * half) * operand.eps
    means, lost = traces / side, eps * moduli / math.sqrt(side)
    variances = (squares + eps * moduli**2) / side - np.maximum(means - lost, 0.0) ** 2
    uppers = means + lost + np.sqrt((side - 1) * np.maximum(variances, 0.0))
    known = means > lost  # The quotient of a smaller trace is one of rounding errors, and may overflow.
    return MomentBounds(uppers, np.where(known, squares / np.where(known, traces, 1.0), 0.0))


def frequency_factors(plan: Plan, where: HostArray | None = None, dtype: str = "float64") -> HostArray:
    """Return rows of factors of ``-G`` at the visited frequencies, or at the places `where` among them.

    The caller must not write to the result without `where`, because later calls may get the same array.
    """
    if len(plan.frequencies) * 2 * len(half_differences(plan)) <= KEPT_FACTORS:
        factors = _all_factors(plan, dtype)
        return factors if where is None else factors[where]
    return _make_factors(plan, plan.frequencies if where is None else plan.frequencies[where]).astype(dtype)


@functools.lru_cache(maxsize=64)
def _all_factors(plan: Plan, dtype: str) -> HostArray:
    """Return the factors at all visited frequencies, from a cache."""
    return _make_factors(plan, plan.frequencies).astype(dtype)


def _make_factors(plan: Plan, frequencies: HostArray) -> HostArray:
    """Return the factors at the frequencies of the given indices."""
    turns = (frequencies[:, None, :] * half_differences(plan) % plan.periods / plan.periods).sum(axis=2)
    return factor_rows(2 * np.pi * turns)


def _inner_products(operand: Operand, rows: Array, groups: int) -> HostArray:
    """Return the inner products of all pairs of rows, for each group: shape (groups, rows, rows)."""
    xp = operand.xp
    apart = xp.permute_dims(xp.reshape(rows, (rows.shape[0], groups, rows.shape[1] // groups)), (1, 0, 2))
    return operand.backend.to_numpy(xp.matmul(apart, xp.matrix_transpose(apart))).astype(float)
