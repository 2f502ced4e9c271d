"""Rescaling of several kernels at once, each to a bound of its operator norm: for use in every step of a training.

Kernels of one shape and geometry are the groups of one grouped convolution. Their matrices are tested together, and the
eigenvalues are computed of those alone that are not shown to be within the bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.decomposition import squared_norm
from convsv_core.evaluation import BLOCK_BYTES, itemsize, symbol_polynomial
from convsv_core.fixed_grid import every_size_grid
from convsv_core.gram import smaller_gram
from convsv_core.operand import Operand, make_operand
from convsv_core.plan import HostArray
from convsv_core.plugins import backend_of
from convsv_core.threshold import Threshold, product_rounding


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
        uppers = _upper_bounds(operand, (1 - headroom) * limit, len(kernels))
        sizes = _sums_of_norms(operand, len(kernels))
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


def _upper_bounds(operand: Operand, limit: float, count: int) -> HostArray:
    """Upper bounds of the norms of `count` kernels side by side, at the operand's scale; none below `limit`."""
    plan, backend = operand.plan, operand.backend
    frequencies = backend.constant(plan.frequencies, operand.kernel)
    threshold = Threshold(operand, frequencies)
    above = threshold.above(limit * (1 - 4 * operand.eps), np.arange(len(plan.frequencies)))
    if above is None:
        raise ValueError("under tracing no norm can be looked at: wanted arrays with values")
    rows, groups = np.nonzero(above)
    uppers = np.full(plan.groups, limit)
    if len(rows):
        squares = _largest_eigenvalues(operand, backend.constant(plan.frequencies[rows], operand.kernel), groups)
        np.maximum.at(uppers, groups, np.sqrt(np.maximum(squares, 0.0) + threshold.polynomial_rounding))
    return uppers.reshape(count, -1).max(axis=1)


def _largest_eigenvalues(operand: Operand, frequencies: Array, groups: HostArray) -> HostArray:
    """Of the Gram matrices of single groups, each at a frequency of its own, with rounding counted in.

    Twice, so that a kernel that is divided by the root passes the test, which counts it too.
    """
    xp, backend = operand.xp, operand.backend
    symbol = symbol_polynomial(operand)
    offsets, _, rows, columns = symbol.coefficients.shape
    taps = xp.permute_dims(symbol.coefficients, (1, 0, 2, 3))

    def of_block(chosen: Array) -> Array:
        phases = symbol.phases(xp.take(frequencies, chosen, axis=0))
        own = xp.take(taps, xp.take(places, chosen, axis=0), axis=0)
        own = xp.astype(xp.reshape(own, (-1, offsets, rows * columns)), phases.dtype, copy=False)
        matrices = xp.reshape(xp.matmul(phases[:, None, :], own), (-1, rows, columns))
        grams = smaller_gram(backend, matrices)
        values = xp.real(grams[..., 0, 0]) if grams.shape[-1] == 1 else backend.eigvalsh(grams)[..., -1]
        return values + 2 * product_rounding(operand, xp.real(xp.linalg.trace(grams)))

    places = backend.constant(groups, operand.kernel)
    row_bytes = (offsets + 4) * rows * columns * itemsize(operand)
    count = backend.batch_size(len(groups))
    filled = np.minimum(np.arange(count), len(groups) - 1)
    found = backend.map_blocks(of_block, filled, operand.kernel, row_bytes=row_bytes, budget=BLOCK_BYTES)
    return np.asarray(backend.to_numpy(found)[: len(groups)], float)


def _sums_of_norms(operand: Operand, count: int) -> HostArray:
    """For each of `count` kernels side by side, the sum of its taps' Frobenius norms, at the operand's scale."""
    squares = squared_norm(operand.xp, operand.taps(), axis=(-2, -1))
    host = operand.backend.to_numpy(squares).astype(float)
    return np.asarray(np.sqrt(host.reshape(len(host), count, -1).sum(axis=2)).sum(axis=0))
