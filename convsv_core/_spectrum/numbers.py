"""Numbers of an operator: its norms, stable rank, condition number and determinant."""

from __future__ import annotations

import math

from convsv_core._geometry.padding import tap_reads
from convsv_core._geometry.plan import check_square, is_circulant
from convsv_core._geometry.shapes import check_input_shape, resolve_channels
from convsv_core._norm.largest import norm_on_grid
from convsv_core._norm.padded import padded_operator_norm
from convsv_core._spectrum.values import make_spectral_operand, mean_over_frequencies, visited_values
from convsv_core._symbol.folding import fold
from convsv_core._symbol.operand import Operand, check_conv, make_operand
from convsv_core._symbol.small_matrices import divisors, safe_sqrt, squared_norm
from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.plugins import backend_of, on_host

__all__ = [
    "condition_number",
    "frobenius_norm",
    "log_abs_det",
    "operator_norm",
    "squared_frobenius",
    "stable_rank",
]


@on_host
def operator_norm(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the operator norm of a layer, its largest singular value, with the padding that `conv` declares.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or complex128.
    input_shape : tuple of int
        Spatial extents of the layer's input, in the order of ``conv.spatial``. An int stands for every axis.
    conv : Conv
        The geometry, with any padding and padding mode. A circulant operator has a closed form. The norm of another
        operator is found by an iteration.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64. For circulant operators it is exact up to rounding. For
        other operators it has the tolerance that `convsv_core._norm.padded.padded_operator_norm` states, and exceeds
        the norm by rounding at most. `norm_bounds` returns a certified upper bound of either.

    Raises
    ------
    TypeError
        `kernel` is not an array of an installed library, or not of a floating dtype.
    ValueError
        The shapes do not fit each other, a stride does not divide the extents of a circular input, or the kernel
        holds NaN or infinity. Under tracing the result of such a kernel is NaN instead.

    Notes
    -----
    Differentiable and traceable. The gradient is finite for every kernel. It is a subgradient where the maximum is
    attained more than once, and 0 for the zero kernel. For JAX kernels on one device of a CPU the norm and its gradient
    are computed with NumPy, from compiled programs too. Source: Sedghi, Gupta and Long, ICLR 2019, for circulant
    operators.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = np.ones((1, 1, 3, 3))
    >>> float(operator_norm(kernel, (8, 8), Conv("OIHW")))
    9.0

    With zeros around the image, outputs at the border add fewer pixels, and the norm is smaller:

    >>> round(float(operator_norm(kernel, (8, 8), Conv("OIHW", padding_mode="zeros"))), 3)
    8.291
    """
    backend = backend_of(kernel)
    check_conv(conv)
    extents = check_input_shape(input_shape, conv)
    # A circular operator is circulant if the stride divides the extents. If not, `make_operand` raises the error.
    circular = conv.padding_mode == "circular" and conv.padding == "same"
    shape = tuple(int(extent) for extent in kernel.shape)
    if circular or is_circulant(shape, extents, conv):
        operand = make_operand(kernel, extents, conv)
        return operand.answer(norm_on_grid(operand).norm)
    # A lazy kernel is computed later, but errors are raised now.
    tap_reads(resolve_channels(shape, conv).taps, extents, conv)
    return backend.run_to_number(padded_operator_norm, kernel, extents, conv)


@on_host
def frobenius_norm(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the Frobenius norm of a circular convolution: the root of the sum of its squared singular values.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also says what is raised.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Notes
    -----
    Differentiable (0 at the zero kernel) and traceable. It needs no decomposition, because every tap occurs once for
    each output pixel. Taps that wrap onto each other are added first.

    Examples
    --------
    >>> import numpy as np
    >>> float(frobenius_norm(np.ones((1, 1, 3, 3)), (8, 8), Conv("OIHW")))
    24.0
    """
    return make_operand(kernel, input_shape, conv).run(_frobenius_norm)


@on_host
def stable_rank(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the stable rank ``|A|_F^2 / |A|_2^2`` of a circular convolution; 0 for the zero kernel.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also says what is raised.

    Returns
    -------
    0-d array, real
        Between 1 and the operator's rank.

    Notes
    -----
    Differentiable and traceable.

    Examples
    --------
    The identity on an image of 8 x 8 pixels:

    >>> import numpy as np
    >>> float(stable_rank(np.ones((1, 1, 1, 1)), (8, 8), Conv("OIHW")))
    64.0
    """
    operand = make_operand(kernel, input_shape, conv)
    return operand.run(_stable_rank, arrays=(norm_on_grid(operand).norm,))


@on_host
def condition_number(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the condition number of a circular convolution: its largest over its smallest singular value.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also says what is raised.

    Returns
    -------
    0-d array, real
        At least 1; infinite where the smallest of the ``min(inputs, outputs)`` values is 0. A singular operator
        whose smallest value rounds to about ``eps * sigma_max`` rather than 0 gives about ``1 / eps``.

    Notes
    -----
    Differentiable where it is finite, and traceable.

    Examples
    --------
    >>> import numpy as np
    >>> float(condition_number(np.asarray([[[2.0, 1.0]]]), (4,), Conv("OIW")))
    3.0
    """
    return make_spectral_operand(kernel, input_shape, conv, "auto").run(_condition_number)


@on_host
def log_abs_det(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the logarithm of the absolute determinant of a circular convolution.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also says what is raised.

    Returns
    -------
    0-d array, real
        The sum of the logarithms of the singular values; minus infinity for a singular operator.

    Raises
    ------
    ValueError
        Also if the operator is not square. It is square if the number of output channels is the number of input
        channels times the product of the strides. For a transposed layer the two numbers change places.

    Notes
    -----
    Differentiable where it is finite, and traceable. The likelihood of a normalising flow has this term for an
    invertible convolution.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = 2.0 * np.eye(3)[:, :, None, None]
    >>> round(float(log_abs_det(kernel, (4, 4), Conv("OIHW"))) / math.log(2))
    48
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    check_square(operand.plan, tuple(kernel.shape))
    return operand.run(_log_abs_det)


def _frobenius_norm(operand: Operand) -> Array:
    """Return the Frobenius norm of an operand."""
    return operand.answer(safe_sqrt(operand.xp, squared_frobenius(operand)))


def _stable_rank(operand: Operand, norm: Array) -> Array:
    """Return the stable rank from the operator norm, given at the operand's scale."""
    xp = operand.xp
    rank = xp.where(norm > 0, squared_frobenius(operand) / divisors(xp, norm) ** 2, xp.zeros_like(norm))
    return operand.answer(rank, scaled=False)


def _condition_number(operand: Operand) -> Array:
    """Return the condition number of an operand."""
    xp = operand.xp
    # The quotient does not depend on the scale, with which the values may overflow or vanish.
    values = operand.answer(visited_values(operand), scaled=False)
    largest, smallest = xp.max(values), xp.min(values)
    if operand.plan.unread_values:
        smallest = smallest * 0
    invertible = smallest > 0
    ratio = largest / xp.where(invertible, smallest, xp.ones_like(smallest))
    otherwise = xp.where(xp.isnan(smallest), smallest, xp.full_like(smallest, math.inf))
    return xp.where(invertible, ratio, otherwise)


def _log_abs_det(operand: Operand) -> Array:
    """Return the logarithm of the absolute determinant of an operand."""
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand)
    positive = values > 0
    logs = xp.log(xp.where(positive, values, xp.ones_like(values)))
    logs = xp.where(positive, logs, xp.where(xp.isnan(values), values, xp.full_like(values, -math.inf)))
    if plan.unread_values:
        return operand.answer(xp.full_like(operand.scale, -math.inf), scaled=False)
    # The values are divided by the operand's scale. The logarithm of the scale is added for every singular value.
    scale = plan.groups * plan.values_per_block * xp.log(operand.scale)
    return operand.answer(math.prod(plan.grid) * (mean_over_frequencies(operand, logs) + scale), scaled=False)


def squared_frobenius(operand: Operand) -> Array:
    """Return the sum of all squared singular values, at the operand's own scale."""
    xp, plan = operand.xp, operand.plan
    taps = xp.reshape(operand.taps(), (*map(len, plan.offsets), -1))
    folded = fold(operand.backend, taps, plan.offsets, plan.periods)
    return squared_norm(xp, folded.coefficients) * math.prod(plan.grid)
