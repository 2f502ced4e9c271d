"""Arithmetic that several penalties share: means over frequencies, and squares above a limit."""

from __future__ import annotations

import math

from convsv_core.backend import Array
from convsv_core.operand import Operand

__all__ = ["mean", "squared_excess"]


def mean(operand: Operand, values: Array) -> Array:
    """Return the mean over all frequencies of the sum over the other axes; the first axis is the visited ones."""
    xp, plan = operand.xp, operand.plan
    weights = operand.backend.constant(plan.weights() / math.prod(plan.periods), values)
    weights = xp.reshape(xp.astype(weights, values.dtype, copy=False), (-1, *(1,) * (values.ndim - 1)))
    return xp.sum(weights * values)


def squared_excess(operand: Operand, values: Array, limit: Array) -> Array:
    """Return ``max(0, values - limit)**2``; NaN stays NaN."""
    xp = operand.xp
    return xp.where(values <= limit, xp.zeros_like(values), values - limit) ** 2
