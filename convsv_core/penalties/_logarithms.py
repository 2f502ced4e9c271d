"""Penalties that take logarithms of singular values."""

from __future__ import annotations

import math

from convsv_core.backend import Array
from convsv_core.conv import Conv, as_float
from convsv_core.evaluation import BLOCK_BYTES
from convsv_core.operand import Operand
from convsv_core.penalties._means import mean
from convsv_core.spectrum import make_spectral_operand, visited_values

FLOOR = 32
"""Default floor of a logarithm, in units of eps * sigma_max: below it lies little but rounding."""


def log_condition_number(
    kernel: Array, input_shape: tuple[int, ...], conv: Conv, *, floor: float | None = None
) -> Array:
    """Penalise an uneven spectrum: ``log(sigma_max / sigma_min)`` over all singular values of the operator.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also tells what is raised.
    floor : float, optional
        Least quotient ``sigma_min / sigma_max`` that is told from 0: 32 times the answer's eps unless given.

    Returns
    -------
    0-d array, real
        At least 0 and at most ``-log(floor)``, which singular operators get; 0 for the zero operator. float32 for
        kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        Also where `floor` is no number.
    ValueError
        Also where `floor` is not between 0, itself excluded, and 1.

    Notes
    -----
    Differentiable and traceable with `floor` static. The gradient is that of the two values where the quotient is above
    the floor (a subgradient where either is repeated), else 0.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(log_condition_number(np.asarray([[[2.0, 1.0]]]), (4,), Conv("OIW"))) / math.log(3), 9)
    1.0
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    return operand.run(_log_condition_number, _check_floor(operand, floor))


def negative_log_abs_det(
    kernel: Array, input_shape: tuple[int, ...], conv: Conv, *, floor: float | None = None
) -> Array:
    """Penalise a vanishing determinant: minus the mean over frequencies of ``sum log(sigma)``.

    It is `convsv_core.log_abs_det`, negated, over the number of frequencies.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also tells what is raised.
    floor : float, optional
        Relative to sigma_max, the least value that a logarithm is taken of: 32 times the answer's eps unless given.
        Smaller singular values count as the floor; those of the zero operator as the smallest normal number of the
        answer's dtype.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        Also where `floor` is no number.
    ValueError
        Also where the operator is not square, or `floor` is not between 0, itself excluded, and 1.

    Notes
    -----
    Differentiable and traceable with `floor` static. Values at the floor have a gradient of 0: the floor itself is a
    constant to differentiation. The likelihood term of an invertible convolution in a normalising flow, as in
    Hoogeboom, van den Berg and Welling, *Emerging Convolutions for Generative Normalizing Flows*, ICML 2019.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = 0.5 * np.eye(3)[:, :, None, None]
    >>> round(float(negative_log_abs_det(kernel, (4, 4), Conv("OIHW"))) / math.log(2), 9)
    3.0
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    plan = operand.plan
    if not plan.is_square:
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}, with {conv} no square operator: each group maps "
            f"{plan.columns} channels and strides {conv.strides} to {plan.rows} channels; wanted one with a determinant"
        )
    return operand.run(_negative_log_abs_det, _check_floor(operand, floor))


def _log_condition_number(operand: Operand, floor: float) -> Array:
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand, "auto", BLOCK_BYTES)
    largest, smallest = xp.max(values), xp.min(values)
    if plan.values_per_block > min(plan.block):
        smallest = smallest * 0
    is_above = smallest > floor * largest
    one = xp.ones_like(largest)
    log_quotient = xp.log(xp.where(is_above, largest, one)) - xp.log(xp.where(is_above, smallest, one))
    floored = xp.where(largest > 0, xp.full_like(largest, -math.log(floor)), xp.zeros_like(largest))
    return operand.answer(xp.where(is_above, log_quotient, floored), scaled=False)


def _negative_log_abs_det(operand: Operand, floor: float) -> Array:
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand, "auto", BLOCK_BYTES)
    limits = xp.finfo(getattr(xp, operand.answered_in))
    least = floor * xp.max(operand.backend.stop_gradient(values))
    least = xp.clip(least, float(limits.smallest_normal), None)
    is_above = values > least
    logs = xp.where(is_above, xp.log(xp.where(is_above, values, xp.ones_like(values))), xp.log(least))
    unread = plan.groups * (plan.values_per_block - min(plan.block))
    total = mean(operand, logs) + unread * xp.log(least) + plan.groups * plan.values_per_block * xp.log(operand.scale)
    return operand.answer(-total, scaled=False)


def _check_floor(operand: Operand, floor: float | None) -> float:
    if floor is None:
        return FLOOR * operand.answer_eps
    number = as_float("floor", floor)
    if not 0 < number < 1:
        raise ValueError(f"floor={floor}: wanted a number between 0 and 1, relative to the largest singular value")
    return number
