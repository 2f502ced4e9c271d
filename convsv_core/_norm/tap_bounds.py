"""Upper bounds of the operator norm from the taps alone, without a frequency: crude, and cheap."""

from __future__ import annotations

import functools
import math

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.kernel_values import normalise
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import TrigonometricPolynomial, symbol_polynomial
from convsv_core._symbol.small_matrices import squared_norm
from convsv_core._symbol.transform import fast_length
from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.dtypes import answer_dtype
from convsv_core.plugins import backend_of

__all__ = ["frobenius_bound", "sum_of_norms", "sums_of_norms"]

MOST_PAIRED = 512
"""Largest number of taps whose products are formed in pairs. With more of them, transforms take less time and memory.

Measured with NumPy: times are equal at about 128 taps for one channel, and at about 1000 taps for 64 x 64 channels.
"""


def sum_of_norms(operand: Operand) -> float:
    """Return the sum of the taps' Frobenius norms, the largest one among the groups, at the operand's scale."""
    return float(sums_of_norms(symbol_polynomial(operand), 1)[0])


def sums_of_norms(symbol: TrigonometricPolynomial, kernels: int) -> HostArray:
    """Return the `sum_of_norms` of each of several kernels that lie side by side in the groups of one symbol."""
    squares = squared_norm(symbol.operand.xp, symbol.coefficients, axis=(-2, -1))
    norms = np.sqrt(symbol.operand.backend.to_numpy(squares).astype(float))
    return np.asarray(norms.sum(axis=0).reshape(kernels, -1).max(axis=1))


def frobenius_bound(kernel: Array, conv: Conv) -> float:
    """Return an upper bound of the operator norm for every input size, from the products of the taps alone.

    The squared Frobenius norm of the symbol is a trigonometric polynomial. Its coefficient at an offset is the sum of
    the inner products of all taps at this distance. The polynomial is at most the sum of the coefficients' moduli. With
    a stride, two taps meet only if they belong to one class, which depends on the offset between them alone.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names.
    conv : Conv
        Only the layout is read. The bound holds for zero and "valid" padding, and for circular padding that repeats no
        pixel.

    Returns
    -------
    float
        The bound, without the rounding of the products. For up to a million taps it is below a millionth of the bound.

    Examples
    --------
    The sum of all taps is the norm of a kernel of ones, and the bound is the same number:

    >>> float(round(frobenius_bound(np.ones((1, 1, 3)), Conv("OIW")), 6))
    3.0
    """
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    # The products of the divided taps neither overflow nor vanish.
    kernel, scale = normalise(xp.astype(kernel, getattr(xp, answer_dtype(kernel)), copy=False), backend)
    order = [conv.layout.index(letter) for letter in ("O", "I", *conv.spatial)]
    taps = tuple(kernel.shape[axis] for axis in order[2:])
    flat = xp.reshape(xp.permute_dims(kernel, tuple(order)), (-1, math.prod(taps)))
    if math.prod(taps) > MOST_PAIRED:
        return float(np.sqrt(np.abs(_lag_sums(backend.to_numpy(flat).reshape(-1, *taps))).sum())) * float(scale)
    products = backend.to_numpy(xp.matmul(backend.adjoint(flat), flat)).reshape(-1)
    lags = _lags(taps)
    sums = np.bincount(lags, products.real) + 1j * np.bincount(lags, products.imag)
    return float(np.sqrt(np.abs(sums).sum())) * float(scale)


def _lag_sums(kernels: HostArray) -> HostArray:
    """Return the sums of the products of all taps at each distance, by one Fourier transform a kernel.

    Parameters
    ----------
    kernels : numpy.ndarray, shape (kernels, *taps)
    """
    lengths = [fast_length(2 * k - 1) for k in kernels.shape[1:]]
    axes = tuple(range(len(lengths)))
    spectrum = np.zeros(lengths)
    for kernel in kernels:
        transformed = np.fft.fftn(kernel, lengths, axes)
        spectrum += transformed.real**2 + transformed.imag**2
    return np.fft.ifftn(spectrum, axes=axes)


@functools.lru_cache(maxsize=64)
def _lags(taps: tuple[int, ...]) -> HostArray:
    """Return, for each pair of taps in row-major order, a number that stands for the offset between them."""
    places = np.indices(taps).reshape(len(taps), -1)
    apart = places[:, :, None] - places[:, None, :] + np.asarray(taps)[:, None, None] - 1
    numbers = np.ravel_multi_index(tuple(apart), tuple(2 * k - 1 for k in taps))
    return np.asarray(numbers).reshape(-1)
