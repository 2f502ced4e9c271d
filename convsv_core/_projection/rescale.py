"""Rescaling of several kernels at once, each to a bound of its operator norm: for use in every step of a training.

Kernels of one shape and geometry are the groups of one grouped convolution: the coefficients of their Gram matrices and
the moments of these are computed together. Moments leave out most frequencies, a test most of the others, and
eigenvalues are computed of the rest alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from convsv_core._geometry.padding import lattice
from convsv_core._geometry.plan import HostArray
from convsv_core._norm.fixed_grid import every_size_grid
from convsv_core._norm.largest import largest_among
from convsv_core._norm.tap_bounds import sums_of_norms
from convsv_core._symbol.gram import useful_polynomial
from convsv_core._symbol.moments import MomentBounds, moment_bounds
from convsv_core._symbol.operand import make_operand, shape_of
from convsv_core._symbol.polynomial import TrigonometricPolynomial, symbol_polynomial
from convsv_core._symbol.rows import GramRows, PolynomialRows, ProductRows
from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.plugins import backend_of

TESTED_BYTES = 1 << 25
"""Budget for matrices that are held at one time: memory that is given back to the system is slow to be had again."""


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
        grid = every_size_grid(shape_of(kernels[0], conv), conv, rtol)
        input_shape, factor, together = grid.input_shape, grid.factor, lattice(together)
    with backend.computation_context(kernels[0]):
        operand = make_operand(xp.concat(list(kernels), axis=axis), input_shape, together)
        limit = bound / factor / float(operand.scale)
        symbol = symbol_polynomial(operand)
        uppers = _upper_bounds(symbol, (1 - headroom) * limit, len(kernels))
        sizes = sums_of_norms(symbol, len(kernels))
    eps = operand.answer_eps
    results = []
    for kernel, share, size in zip(kernels, (uppers / limit).tolist(), (sizes / limit).tolist(), strict=True):
        if share > 1:
            # Rounding of the product moves no tap by more than eps times its size.
            factor = (1 - headroom) * (1 - 4 * eps) / (share + 2 * eps * size)
            results.append((kernel * factor, bound * (1 - headroom)))
        else:
            results.append((kernel, min(share, 1.0) * bound))
    return results


def _upper_bounds(symbol: TrigonometricPolynomial, limit: float, count: int) -> HostArray:
    """Return upper bounds of the norms of `count` kernels side by side, at the operand's scale; none below `limit`."""
    operand, groups = symbol.operand, symbol.operand.plan.groups // count
    if not operand.backend.has_values(operand.kernel):
        raise ValueError("under tracing no norm can be looked at: wanted arrays with values")
    gram = useful_polynomial(operand)
    bounds = None if gram is None else moment_bounds(gram)
    frequencies = operand.backend.asarray_like(operand.plan.frequencies, operand.kernel)
    squares = []
    for index in range(count):
        part = slice(index * groups, (index + 1) * groups)
        rows: GramRows
        if gram is None:
            rows = ProductRows(symbol.part(part), frequencies, budget=TESTED_BYTES)
        else:
            rows = PolynomialRows(gram.part(part), budget=TESTED_BYTES)
        own = None if bounds is None else MomentBounds(bounds.uppers[:, part], bounds.estimates[:, part])
        squares.append(largest_among(rows, own, level=limit * limit).upper)
    return np.sqrt(squares)
