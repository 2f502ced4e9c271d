"""Penalties that take logarithms of singular values."""

from __future__ import annotations

import math

from convsv_core._geometry.plan import check_square
from convsv_core._norm.fixed_grid import norm_upper_bound
from convsv_core._spectrum.numbers import operator_norm
from convsv_core._spectrum.values import make_spectral_operand, mean_over_frequencies, visited_values
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_float
from convsv_core.plugins import on_host

__all__ = ["log_condition_number", "log_lipschitz", "negative_log_abs_det"]

FLOOR = 32
"""Default floor of a logarithm, in units of eps times the largest singular value.

A guess. The conformance suite allows singular values an error of 20 such units, so values below the floor may
be rounding alone.
"""


@on_host
def log_condition_number(
    kernel: Array, input_shape: tuple[int, ...], conv: Conv, *, floor: float | None = None
) -> Array:
    """Penalise an uneven spectrum by ``log(sigma_max / sigma_min)`` over all singular values of the operator.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also says what is raised.
    floor : float, optional
        The quotient ``sigma_min / sigma_max`` counts as at least this number. Default: 32 times the eps of the
        result's dtype.

    Returns
    -------
    0-d array, real
        Between 0 and ``-log(floor)``. Singular operators get ``-log(floor)``, but the zero operator gets 0.
        float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        `floor` is not a number.
    ValueError
        `floor` is not strictly between 0 and 1.

    Notes
    -----
    Differentiable and traceable with `floor` static. Where the quotient is at most the floor, the gradient is 0.
    Where the largest or the smallest singular value is repeated, the gradient is a subgradient.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(log_condition_number(np.asarray([[[2.0, 1.0]]]), (4,), Conv("OIW"))) / math.log(3), 9)
    1.0
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    return operand.run(_log_condition_number, _check_floor(operand, floor))


def log_lipschitz(kernel: Array, input_shape: tuple[int, ...] | None, conv: Conv, *, rtol: float = 0.1) -> Array:
    """Penalise the logarithm of the operator norm, which is the Lipschitz constant of the layer.

    The sum over the layers of a network without branches is the logarithm of a bound of its Lipschitz constant.

    Parameters
    ----------
    kernel, conv
        As for `convsv_core.operator_norm`, which also says what is raised. Any padding is allowed.
    input_shape : tuple of int or None
        Spatial extents of the layer's input. None: the certified upper bound of `convsv_core.norm_upper_bound` for
        every input size takes the place of the norm.
    rtol : float, default 0.1
        Without an `input_shape`, as for `convsv_core.norm_upper_bound`.

    Returns
    -------
    0-d array, real
        Norms below the smallest normal number of the result's dtype count as this number. float32 for kernels of 32
        bits or fewer, else float64.

    Notes
    -----
    Differentiable and traceable with `rtol` static. Where several singular values are the largest, the gradient is a
    subgradient. At the zero kernel it is 0.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(log_lipschitz(np.ones((1, 1, 3)), (8,), Conv("OIW"))) / math.log(3), 9)
    1.0
    >>> bool(log_lipschitz(np.ones((1, 1, 3)), None, Conv("OIW")) >= math.log(3))
    True
    """
    if input_shape is None:
        norm = norm_upper_bound(kernel, conv, rtol=rtol)
    else:
        norm = operator_norm(kernel, input_shape, conv)
    return make_operand(kernel, None, conv, lattice=True).run(_floored_log, arrays=(norm,))


@on_host
def negative_log_abs_det(
    kernel: Array, input_shape: tuple[int, ...], conv: Conv, *, floor: float | None = None
) -> Array:
    """Penalise a vanishing determinant by minus the mean over frequencies of ``sum log(sigma)``.

    It is the negative of `convsv_core.log_abs_det`, divided by the number of frequencies.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.log_abs_det`, which also says what is raised.
    floor : float, optional
        Singular values below ``floor * sigma_max`` count as ``floor * sigma_max``. Default and errors as for
        `log_condition_number`. The zero operator's values count as the smallest normal number of the result's dtype.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Notes
    -----
    Differentiable and traceable with `floor` static. Singular values at the floor have a gradient of 0, because
    differentiation takes the floor for a constant. Use: the likelihood term of an invertible convolution in a
    normalising flow, as in Hoogeboom, van den Berg and Welling, *Emerging Convolutions for Generative Normalizing
    Flows*, ICML 2019.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = 0.5 * np.eye(3)[:, :, None, None]
    >>> round(float(negative_log_abs_det(kernel, (4, 4), Conv("OIHW"))) / math.log(2), 9)
    3.0
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    check_square(operand.plan, tuple(kernel.shape))
    return operand.run(_negative_log_abs_det, _check_floor(operand, floor))


def _log_condition_number(operand: Operand, floor: float) -> Array:
    xp = operand.xp
    values = visited_values(operand)
    largest, smallest = xp.max(values), xp.min(values)
    if operand.plan.unread_values:
        smallest = smallest * 0
    is_above = smallest > floor * largest
    one = xp.ones_like(largest)
    log_quotient = xp.log(xp.where(is_above, largest, one)) - xp.log(xp.where(is_above, smallest, one))
    floored = xp.where(largest > 0, xp.full_like(largest, -math.log(floor)), xp.zeros_like(largest))
    return operand.answer(xp.where(is_above, log_quotient, floored), scaled=False)


def _negative_log_abs_det(operand: Operand, floor: float) -> Array:
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand)
    limits = xp.finfo(getattr(xp, operand.answered_in))
    least = floor * xp.max(operand.backend.stop_gradient(values))
    least = xp.clip(least, float(limits.smallest_normal), None)
    is_above = values > least
    logs = xp.where(is_above, xp.log(xp.where(is_above, values, xp.ones_like(values))), xp.log(least))
    # Values and floor are at the operand's scale, whose logarithm is added for every singular value.
    scale = plan.groups * plan.values_per_block * xp.log(operand.scale)
    total = mean_over_frequencies(operand, logs) + plan.unread_values * xp.log(least) + scale
    return operand.answer(-total, scaled=False)


def _floored_log(operand: Operand, norm: Array) -> Array:
    """Return the logarithm of a norm, or of the smallest normal number if the norm is below it; NaN stays NaN."""
    xp = operand.xp
    least = xp.full_like(norm, float(xp.finfo(norm.dtype).smallest_normal))
    return xp.log(xp.where(norm <= least, least, norm))


def _check_floor(operand: Operand, floor: float | None) -> float:
    """Return `floor`, or its default; raise an error if it is not a number between 0 and 1."""
    if floor is None:
        return FLOOR * operand.answer_eps
    number = as_float("floor", floor)
    if not 0 < number < 1:
        raise ValueError(f"floor={floor}: wanted a number between 0 and 1, relative to the largest singular value")
    return number
