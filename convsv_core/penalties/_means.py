"""Means over frequencies."""

from __future__ import annotations

import math

from convsv_core.backend import Array
from convsv_core.operand import Operand


def mean(operand: Operand, values: Array) -> Array:
    """The mean over frequencies of the sum over all other axes; the first axis is that of the visited ones."""
    xp, plan = operand.xp, operand.plan
    weights = operand.backend.constant(plan.weights() / math.prod(plan.periods), values)
    weights = xp.reshape(xp.astype(weights, values.dtype, copy=False), (-1, *(1,) * (values.ndim - 1)))
    return xp.sum(weights * values)


def squared_excess(operand: Operand, value: Array, limit: Array) -> Array:
    xp = operand.xp
    return xp.where(value <= limit, xp.zeros_like(value), value - limit) ** 2  # NaN stays
