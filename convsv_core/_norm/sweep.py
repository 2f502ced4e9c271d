"""One test of many Gram matrices of one kernel, against a level that rises on the way.

A few steps of Lanczos's method estimate the largest eigenvalue of a matrix that fails the test, in about the time of a
test. All later matrices are tested against this estimate. So nearly every matrix is tested once, and few eigenvalues
are computed in double precision afterwards.

An estimate need not be right. The result says which level each matrix was shown to be below. The caller repeats the
test of matrices whose level turns out to be too high.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.rows import GramRows
from convsv_core.backend import Array

__all__ = ["Swept", "estimate_largest", "is_sweepable", "sweep"]

SWEPT_SIDE = 96
"""Smallest side of the matrices that are swept. See `SWEPT_ROWS`."""

SWEPT_ROWS = 32
"""Smallest number of matrices that are swept.

Eigenvalues of small or few matrices cost less than the calls that estimate them. Gaussian kernels at 14 x 14 took these
shares of the time of all singular values, without and with a sweep: 0.18 and 0.19 to 0.21 at side 64, 0.22 and 0.18 at
side 96, 0.30 and 0.16 at side 256. The number of matrices is a guess.
"""

STEPS = 24
"""Number of steps of Lanczos's method for an estimate.

The largest estimates of Gaussian kernels of 256 channels then are right to 1e-5. A step takes about 10 microseconds.
"""

PATIENCE = 3
"""Number of estimates in a row that may leave the level as it is, before no more estimates are made. A guess.

Where many eigenvalues are equal to the largest one, tests fail by rounding errors alone, and estimates would be wasted.
"""

REDUCTION = 256
"""Reduction of an estimate, in units of eps times the estimate, before matrices are tested against it.

The level should not exceed the largest eigenvalue, or all tests have to be repeated. Rounding errors of a Ritz value
are much smaller. A guess.
"""


class Swept(NamedTuple):
    """Hold what a sweep has found: arrays of shape (rows,).

    Attributes
    ----------
    uppers : float array
        The smallest known upper bound of the eigenvalues, by the caller's knowledge or by the test.
    estimates : float array
        Estimates of the largest eigenvalues, and -inf where none was made.
    """

    uppers: HostArray
    estimates: HostArray


def is_sweepable(rows: GramRows, count: int) -> bool:
    """Tell whether a sweep of `count` matrices takes less time than a test of all against one level.

    A sweep reads values between blocks, which an accelerator or a compiled program would wait for.
    """
    operand = rows.operand
    large = min(operand.plan.block) >= SWEPT_SIDE and count >= SWEPT_ROWS
    return large and not operand.backend.compiles and operand.backend.has_fast_float64(operand.kernel)


def sweep(rows: GramRows, where: HostArray, uppers: HostArray, level: float) -> Swept:
    """Test matrices against the largest of a level and of the estimates of matrices that have failed before.

    Parameters
    ----------
    rows : GramRows
    where : array, shape (rows,) or (rows, ndim)
        The rows, by place or by angles. Those with the largest eigenvalues should come first.
    uppers : float array, shape (rows,)
        Upper bounds of the eigenvalues.
    level : float
        The least level. With 0 the first matrix is estimated before any is tested.
    """
    backend, kernel = rows.operand.backend, rows.operand.kernel
    known, estimates = uppers.copy(), np.full(len(where), -np.inf)
    goal = _Goal(level, rows.operand.eps)

    def estimate(number: int) -> None:
        block = backend.asarray_like(rows.table(where[[number]]), kernel)
        matrices = backend.to_numpy(rows.matrices(block))[0]
        estimates[number] = max(estimate_largest(matrix) for matrix in matrices)
        goal.rise(float(estimates[number]))

    def test(numbers: Array) -> Array:
        left = backend.to_numpy(numbers)
        while len(left := left[known[left] > goal.level]):
            if goal.level <= 0:
                estimate(left[0])
                if goal.level <= 0:  # The kernel is 0, or the estimate is NaN.
                    break
            level = goal.level
            below = ~rows.above(where[left], level)
            known[left[below]] = level
            left = left[~below & ~np.isfinite(estimates[left])]
            if not len(left) or goal.patience <= 0:
                break
            estimate(left[0])
            left = left[1:]
        return numbers

    backend.map_blocks(test, np.arange(len(where)), kernel, row_bytes=rows.row_bytes, budget=rows.budget)
    return Swept(known, estimates)


class _Goal:
    """Hold the level of a sweep, which several threads may raise."""

    def __init__(self, level: float, eps: float) -> None:
        self.level, self.patience = level, PATIENCE
        self._eps, self._lock = eps, threading.Lock()

    def rise(self, estimate: float) -> None:
        """Raise the level to an estimate, or lose patience."""
        reduced = estimate * (1 - REDUCTION * self._eps)
        with self._lock:
            if reduced > self.level:
                self.level, self.patience = reduced, PATIENCE
            else:
                self.patience -= 1


def estimate_largest(matrix: HostArray) -> float:
    """Return the largest Ritz value of a Hermitian matrix, which is at most its largest eigenvalue but for rounding.

    The Lanczos vectors are orthogonalised against all earlier ones.

    Parameters
    ----------
    matrix : array, shape (side, side), real or complex
    """
    count = min(STEPS, len(matrix))
    if not np.isfinite(matrix).all():
        return float("nan")
    basis = np.zeros((count, len(matrix)), matrix.dtype)
    products = np.zeros_like(basis)
    vector = np.random.default_rng(0).standard_normal(len(matrix)).astype(matrix.dtype)
    for step in range(count):
        for _ in range(2):  # The second pass removes what cancellation leaves after the first.
            vector = vector - (basis[:step].conj() @ vector) @ basis[:step]
        norm = np.linalg.norm(vector)
        if not norm > 0:
            break
        basis[step] = vector / norm
        vector = products[step] = matrix @ basis[step]
    return float(np.linalg.eigvalsh(basis.conj() @ products.T)[-1])
