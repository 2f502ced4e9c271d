"""Rescaling of several kernels at once, each to a bound of its operator norm: for use in every step of a training.

Kernels of one shape and geometry are the groups of one grouped convolution: the coefficients of their Gram matrices and
the moments of these are computed together. Moments leave out most frequencies, a test most of the others, and
eigenvalues are computed of the rest alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.decomposition import squared_norm
from convsv_core.evaluation import TrigonometricPolynomial, symbol_polynomial
from convsv_core.fixed_grid import every_size_grid
from convsv_core.gram import GramOf, GramPolynomial, useful_polynomial
from convsv_core.moments import frequency_factors, moment_bounds
from convsv_core.operand import make_operand
from convsv_core.plan import HostArray
from convsv_core.plugins import backend_of
from convsv_core.threshold import grams_below, product_rounding

TESTED_BYTES = 1 << 25
"""Budget for matrices that are held at one time: memory that is given back to the system is slow to be had again."""

FIRST_PROBES = 1
"""Frequencies whose eigenvalues are computed before the others are tested against the largest of them."""


def rescale_together(
    kernels: Sequence[Array],
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    bound: float,
    *,
    rtol: float = 0.01,
    headroom: float = 0.0,
) -> list[tuple[Array, float]]:
    """Multiply each kernel whose operator norm may be above a bound by what brings it within.

    Parameters
    ----------
    kernels : sequence of arrays
        Of one shape, dtype (float32, float64 or complex) and device, with the axes that ``conv.layout`` names.
    input_shape : tuple of int or None
        Spatial extents of the input of the circular convolutions. None: the bound holds for every input size, and for
        circular, zero and "valid" padding that repeats no pixel.
    conv : Conv
        The geometry of each.
    bound : float
        Positive.
    rtol : float, default 0.01
        Without an `input_shape`, how far above the norm its upper bound may be taken to be.
    headroom : float, default 0
        Share of the bound that a kernel which is multiplied is left below it.

    Returns
    -------
    list of (array, float)
        For each kernel the rescaled one, of its dtype, and a certified upper bound of its norm, which is at most
        `bound`. A kernel that is shown to be within the bound is returned itself.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `convsv_core.project`.

    Notes
    -----
    Neither traceable nor differentiable: the tests are looked at on the host. Computed in the kernels' own dtype, whose
    rounding, that of the product included, is part of the certificate: less than 1e-3 of the bound with float32.
    Source: as for `convsv_core.norm_upper_bound`.

    Examples
    --------
    >>> import numpy as np
    >>> kernels = [np.full((1, 1, 3, 3), 0.5), np.full((1, 1, 3, 3), 0.01)]
    >>> (first, norm), (second, _) = rescale_together(kernels, (8, 8), Conv("OIHW"), 1.0)
    >>> bool(0.999 < norm <= 1.0), second is kernels[1]
    (True, True)
    """
    backend = backend_of(kernels[0])
    xp = backend.namespace(kernels[0])
    axis = conv.layout.index("I" if conv.transposed else "O")
    together = dataclasses.replace(conv, groups=conv.groups * len(kernels))
    factor = 1.0
    if input_shape is None:
        shape = tuple(int(extent) for extent in kernels[0].shape)
        input_shape, _, factor = every_size_grid(shape, conv, rtol)
        together = dataclasses.replace(together, padding="same", padding_mode="circular")
    with backend.computing(kernels[0]):
        operand = make_operand(xp.concat(list(kernels), axis=axis), input_shape, together)
        limit = bound / factor / float(operand.scale)
        symbol = symbol_polynomial(operand)
        uppers = _upper_bounds(symbol, (1 - headroom) * limit, len(kernels))
        sizes = _sums_of_norms(symbol, len(kernels))
    eps = operand.answer_eps
    results = []
    for kernel, share, size in zip(kernels, (uppers / limit).tolist(), (sizes / limit).tolist(), strict=True):
        if share > 1:
            # Rounding of the product moves no tap by more than eps of its size.
            factor = (1 - headroom) * (1 - 4 * eps) / (share + 2 * eps * size)
            results.append((kernel * factor, bound * (1 - headroom)))
        else:
            results.append((kernel, min(share, 1.0) * bound))
    return results


def _upper_bounds(symbol: TrigonometricPolynomial, limit: float, count: int) -> HostArray:
    """Upper bounds of the norms of `count` kernels side by side, at the operand's scale; none below `limit`."""
    operand, groups = symbol.operand, symbol.operand.plan.groups // count
    if operand.finite is not None:
        raise ValueError("under tracing no norm can be looked at: wanted arrays with values")
    uppers, estimates = np.full((len(operand.plan.frequencies), count), np.inf), np.zeros(count)
    roundings = np.zeros(count)
    polynomial = useful_polynomial(operand)
    if polynomial is not None:
        roundings = polynomial.roundings().reshape(count, groups).max(axis=1)
        if (bounds := moment_bounds(polynomial)) is not None:
            uppers, likely = (bound.reshape(-1, count, groups).max(axis=2) for bound in bounds)
            uppers, estimates = uppers + roundings, likely.max(axis=0)
    squares = []
    for index in range(count):
        matrices = Matrices(symbol, polynomial, float(roundings[index]), slice(index * groups, (index + 1) * groups))
        squares.append(_largest(matrices, uppers[:, index], float(estimates[index]), limit * limit))
    return np.sqrt(squares)


def _largest(matrices: Matrices, uppers: HostArray, estimate: float, level: float) -> float:
    """The largest eigenvalue at all frequencies, rounding counted in, or `level` where that is above it.

    Eigenvalues cost several times as much as a test whether they are below a level. So the first ones are those where
    the bounds from above are largest, and all others are tested against what these gave.

    Parameters
    ----------
    matrices : Matrices
    uppers : float array, shape (visited,)
        Bounds from above.
    estimate : float
        What the largest is likely to exceed.
    level : float
    """
    rows = np.argsort(-uppers, kind="stable")
    tested, probes = estimate <= level, FIRST_PROBES
    while len(rows := rows[uppers[rows] > level]):
        if tested:
            rows = rows[matrices.above(rows, level)]
        if len(rows):
            level = max(level, matrices.largest(rows[:probes]))
        rows, tested, probes = rows[probes:], True, 2 * probes
    return level


@dataclass(frozen=True)
class Matrices:
    """The Gram matrices of one of several kernels side by side, at the plan's frequencies.

    Attributes
    ----------
    symbol : TrigonometricPolynomial
        Of all kernels.
    gram : GramPolynomial or None
        Likewise. None: the matrices are products of the symbol's.
    rounding : float
        Rounding error of the eigenvalues, if they are those of a polynomial.
    groups : slice
        Those of the kernel.
    """

    symbol: TrigonometricPolynomial
    gram: GramPolynomial | None
    rounding: float
    groups: slice

    def above(self, rows: HostArray, level: float) -> HostArray:
        """Which of the rows have an eigenvalue, of some group, that is not shown to be at most `level`."""
        operand, part = self.symbol.operand, self.part
        level *= 1 - 4 * operand.eps  # more than its own rounding

        def are_below(block: Array) -> Array:
            if isinstance(part, GramPolynomial):
                return operand.backend.is_positive_definite(part.matrices(block))
            return grams_below(operand, part(block), math.sqrt(level))

        below = self._map(are_below, rows, level - self.rounding)
        return np.asarray(~below.all(axis=1))

    def largest(self, rows: HostArray) -> float:
        """The largest eigenvalue at some of the rows, with rounding counted in.

        Twice, so that a kernel that is divided by the root passes the test, which counts it too.
        """
        operand, part = self.symbol.operand, self.part
        xp, backend = operand.xp, operand.backend

        def least(block: Array) -> Array:
            negative = part.matrices(block) if isinstance(part, GramPolynomial) else -part(block)
            values = xp.real(negative[..., 0, 0]) if negative.shape[-1] == 1 else backend.eigvalsh(negative)[..., 0]
            if isinstance(part, GramPolynomial):
                return values - 2 * self.rounding
            return values + 2 * product_rounding(operand, xp.real(xp.linalg.trace(negative)))

        return -float(self._map(least, rows, 0.0).min())

    @functools.cached_property
    def part(self) -> GramPolynomial | GramOf:
        """The kernel's own matrices."""
        gram, groups = self.gram, self.groups
        if gram is None:
            taps = self.symbol.coefficients[:, groups, :, :]
            return GramOf(self.symbol.operand, dataclasses.replace(self.symbol, coefficients=taps))
        entries = gram.coefficients.shape[-1] ** 2
        columns = slice(groups.start * entries, groups.stop * entries)
        return dataclasses.replace(
            gram,
            coefficients=gram.coefficients[:, groups, :, :],
            cosines=gram.cosines[:, columns],
            sines=gram.sines[:, columns],
        )

    def _map(self, function: Callable[[Array], Array], rows: HostArray, level: float) -> HostArray:
        operand, backend = self.symbol.operand, self.symbol.operand.backend
        filled = rows[np.minimum(np.arange(backend.batch_size(len(rows))), len(rows) - 1)]
        table = operand.plan.frequencies[filled]
        if isinstance(self.part, GramPolynomial):
            table = frequency_factors(operand.plan, operand.computed_in)[filled]
            table[:, 0] = level
        found = backend.map_blocks(function, table, operand.kernel, row_bytes=self.part.row_bytes, budget=TESTED_BYTES)
        return backend.to_numpy(found)[: len(rows)]


def _sums_of_norms(symbol: TrigonometricPolynomial, count: int) -> HostArray:
    """For each of `count` kernels side by side, the sum of its taps' Frobenius norms, at the operand's scale."""
    squares = squared_norm(symbol.operand.xp, symbol.coefficients, axis=(-2, -1))
    host = symbol.operand.backend.to_numpy(squares).astype(float)
    return np.asarray(np.sqrt(host.reshape(len(host), count, -1).sum(axis=2)).sum(axis=0))
