"""Rescaling of several kernels at once to a bound of their operator norms, for every step of a training.

Kernels of one shape and geometry are the groups of one grouped convolution. Their Gram matrices' coefficients and
moments are computed together. The moments exclude most frequencies, and a test excludes most of the rest. Eigenvalues
are computed at the few frequencies that are left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.padding import check_repeats_no_pixel, lattice
from convsv_core._geometry.plan import HostArray
from convsv_core._norm.cover import Cover, covered_grid, grid_cover
from convsv_core._norm.search import largest_of_each, moments_of, parts_of
from convsv_core._norm.tap_bounds import sums_of_norms
from convsv_core._symbol.gram import useful_polynomial
from convsv_core._symbol.joined import join_kernels
from convsv_core._symbol.kernel_values import check_values
from convsv_core._symbol.operand import make_operand, shape_of
from convsv_core._symbol.polynomial import TrigonometricPolynomial, symbol_polynomial
from convsv_core._symbol.rows import PolynomialRows, ProductRows
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_float, check_positive
from convsv_core.plugins import backend_of

__all__ = ["Rescaling", "rescale_together", "rescaling_factors"]


LEAST_LIMIT = 2.0**-20
"""Least bound, at the scale of the largest kernel, with which kernels are tested together.

Moments, and closed forms for matrices of side 2, square the entries of Gram matrices, which makes fourth powers of
norms. A square below the least normal number of float32, 2^-126, may be lost: up to 2^-63 of an eigenvalue, which is
less than an eps of eigenvalues above 2^-40.
"""


class Rescaling(NamedTuple):
    """A number by which a kernel is multiplied, and a certified upper bound of the norm afterwards.

    Attributes
    ----------
    factor : float
        At most 1. It is 1 if the kernel is shown to be within the bound.
    upper : float
    """

    factor: float
    upper: float


def rescale_together(
    kernels: Sequence[Array],
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    bound: float,
    *,
    rtol: float = 0.01,
    headroom: float = 0.0,
) -> list[tuple[Array, float]]:
    """Multiply each kernel whose operator norm may be above a bound by a number that brings it within the bound.

    Parameters
    ----------
    kernels : sequence of arrays
        Kernels of one shape, dtype (float32, float64 or complex) and device, with the axes that ``conv.layout`` names.
    input_shape : tuple of int or None
        Spatial extents of the input of the circular convolutions. None: the bound holds for every input size, and for
        circular, zero and "valid" padding that repeats no pixel.
    conv : Conv
        The geometry of each kernel.
    bound : float
        At least 0. Infinity leaves every kernel unchanged.
    rtol : float, default 0.01
        Without an `input_shape`, the largest relative excess of the upper bound over the norm.
    headroom : float, default 0
        Between 0 and 1. A kernel that is multiplied is brought to ``(1 - headroom) * bound``.

    Returns
    -------
    list of (array, float)
        For each kernel the rescaled one, of the same dtype, and a certified upper bound of its norm, which is at most
        `bound`. A kernel that is shown to be within the bound is returned itself.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `convsv_core.project`.

    Notes
    -----
    Neither traceable nor differentiable, because the tests read values on the host. The arithmetic is in the dtype of
    the kernels. The certificate includes its rounding errors, and those of the product: less than 1e-3 of the bound
    with float32. Source: as for `convsv_core.norm_upper_bound`.

    Examples
    --------
    >>> import numpy as np
    >>> kernels = [np.full((1, 1, 3, 3), 0.5), np.full((1, 1, 3, 3), 0.01)]
    >>> (first, norm), (second, _) = rescale_together(kernels, (8, 8), Conv("OIHW"), 1.0)
    >>> bool(0.999 < norm <= 1.0), second is kernels[1]
    (True, True)
    """
    found = rescaling_factors(kernels, input_shape, conv, bound, rtol=rtol, headroom=headroom)
    return [
        (kernel if one.factor == 1 else kernel * one.factor, one.upper)
        for kernel, one in zip(kernels, found, strict=True)
    ]


def rescaling_factors(
    kernels: Sequence[Array],
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    bound: float,
    *,
    rtol: float = 0.01,
    headroom: float = 0.0,
) -> list[Rescaling]:
    """Return the number by which `rescale_together` multiplies each kernel, and the norm that it certifies.

    The arguments and errors are as for `rescale_together`. The upper bound includes the rounding error of the product
    of kernel and factor in the kernel's dtype.

    Examples
    --------
    >>> import numpy as np
    >>> (found,) = rescaling_factors([np.full((1, 1, 3, 3), 0.5)], (8, 8), Conv("OIHW"), 1.0)
    >>> round(found.factor, 6)
    0.222222
    """
    backend = backend_of(kernels[0])
    options = (tuple(kernels), input_shape, conv, bound, rtol, headroom)
    if backend.prefers_host(options, search=True):
        found: list[Rescaling] = backend.run_on_host(_factors, *options)
        return found
    return _factors(*options)


def _factors(
    kernels: tuple[Array, ...],
    input_shape: tuple[int, ...] | None,
    conv: Conv,
    bound: float,
    rtol: float,
    headroom: float,
) -> list[Rescaling]:
    """Return what `rescaling_factors` does, computed by the library of the kernels."""
    if not as_float("bound", bound) >= 0:
        raise ValueError(f"bound={bound}: wanted a number of at least 0")
    if not 0 <= as_float("headroom", headroom) <= 1:
        raise ValueError(f"headroom={headroom}: wanted a share between 0 and 1")
    backend = backend_of(kernels[0])
    xp = backend.namespace(kernels[0])
    together = dataclasses.replace(conv, groups=conv.groups * len(kernels))
    factor, cover, every_size, shape = 1.0, None, input_shape is None, input_shape
    check_positive("rtol", rtol)
    if input_shape is None:
        check_repeats_no_pixel(shape_of(kernels[0], conv), conv)
        real = not xp.isdtype(kernels[0].dtype, "complex floating")
        grid, cover = covered_grid(shape_of(kernels[0], conv), conv, rtol, real)
        input_shape, factor, together = grid.input_shape, grid.factor, lattice(together)
    with backend.computation_context(kernels[0]):
        operand = make_operand(join_kernels(kernels, conv), input_shape, together)
        limit = bound / factor / float(operand.scale)
        if limit == math.inf:
            return [Rescaling(1.0, bound)] * len(kernels)
        if limit < LEAST_LIMIT and len(kernels) > 1:  # The square of a small kernel's norm could vanish.
            parts = [_factors((one,), shape, conv, bound, rtol, headroom) for one in kernels]
            return [part[0] for part in parts]
        symbol = symbol_polynomial(operand)
        if not every_size:
            cover = grid_cover(operand.plan)
        uppers = _upper_bounds(symbol, (1 - headroom) * limit, len(kernels), cover)
        sizes = sums_of_norms(symbol, len(kernels))
    eps = operand.answer_eps
    results = []
    for share, size in zip((uppers / limit).tolist(), (sizes / limit).tolist(), strict=True):
        if share > 1:
            # The rounding error of the product is at most eps times the size of each tap.
            factor = (1 - headroom) * (1 - 4 * eps) / (share + 2 * eps * size)
            results.append(Rescaling(factor, bound * (1 - headroom)))
        else:
            results.append(Rescaling(1.0, min(share, 1.0) * bound))
    return results


def _upper_bounds(symbol: TrigonometricPolynomial, limit: float, count: int, cover: Cover | None) -> HostArray:
    """Return upper bounds of the norms of `count` kernels, which are the groups of one operand, at its scale.

    A bound below `limit` is returned as `limit`.
    """
    operand = symbol.operand
    check_values(operand.backend, operand.kernel, "the rescaling reads norms")
    gram = useful_polynomial(operand)
    frequencies = operand.backend.asarray_like(operand.plan.frequencies, operand.kernel)
    rows = ProductRows(symbol, frequencies) if gram is None else PolynomialRows(gram)
    found = largest_of_each(parts_of(rows, count), moments_of(rows, count), [limit * limit] * count, cover=cover)
    return np.sqrt([one.upper for one in found])
