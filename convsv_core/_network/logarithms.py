"""Arithmetic with decimal logarithms of bounds, rounded upward: real networks reach 1e26, and deep ones overflow.

A factor of exactly 1 has the logarithm 0 and changes no bound, so a network whose factors are at most 1 has a bound of
at most 1. The logarithm of 0 is minus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from convsv_core._network.norms import EPS

__all__ = ["log_of", "log_product", "log_root", "log_sum", "power_of_ten"]


def log_of(value: float) -> float:
    """Return the decimal logarithm of a bound, rounded upward."""
    if value == 0:
        return -math.inf
    log = math.log10(value)
    return log + 2 * EPS * abs(log)


def log_product(*logs: float) -> float:
    """Return the logarithm of a product, rounded upward. A factor of 0 makes it 0, even with an infinite factor."""
    if -math.inf in logs:
        return -math.inf
    total = math.fsum(logs) if math.inf not in logs else math.inf
    return total + EPS * abs(total)


def log_sum(logs: Sequence[float]) -> float:
    """Return the logarithm of a sum, rounded upward."""
    present = [log for log in logs if log != -math.inf]
    if len(present) < 2:
        return present[0] if present else -math.inf
    top = max(present)
    if top == math.inf:
        return math.inf
    rest = math.fsum(10 ** (log - top) for log in present)
    return top + math.log10(rest) + (8 * len(present) + 4 * abs(top)) * EPS


def log_root(logs: Sequence[float]) -> float:
    """Return the logarithm of the root of a sum of squares, rounded upward."""
    present = [log for log in logs if log != -math.inf]
    return log_sum([2 * log for log in present]) / 2 if len(present) > 1 else log_sum(present)


def power_of_ten(log: float) -> float:
    """Return the number that has this logarithm, rounded upward; infinity where it overflows."""
    if log == -math.inf:
        return 0.0
    try:
        value = 10.0**log
    except OverflowError:
        return math.inf
    # The error of the logarithm's own rounding is part of its bound. The error of the power is a few units.
    return min(value * (1 + (4 + 4 * abs(log)) * EPS), 1.0) if log <= 0 else value * (1 + (4 + 4 * log) * EPS)
