"""Certified norms of matrices and convolutions, as floats rounded upward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from convsv_core._geometry.padding import lattice
from convsv_core._network.rule_types import Float64Array
from convsv_core._norm.bounds import norm_bounds
from convsv_core._norm.fixed_grid import norm_upper_bound
from convsv_core.conv import Conv

__all__ = ["EPS", "kronecker_norm", "matrix_norm", "product_up", "root_up", "supremum_norm"]

EPS = float(np.finfo(np.float64).eps)
"""The rounding unit of float64, twice the largest relative error of one operation."""


def product_up(values: Iterable[float]) -> float:
    """Return the product of numbers that are not negative, rounded upward; exact where each factor but one is 1."""
    values = [value for value in values if value != 1.0]
    if len(values) < 2:
        return values[0] if values else 1.0
    return math.prod(values) * (1 + len(values) * EPS)


def root_up(square: float) -> float:
    """Return the square root, rounded upward; exact for squares of integers."""
    root = math.sqrt(square)
    return root if root * root == square and root == round(root) else math.nextafter(root, math.inf)


def supremum_norm(kernel: Float64Array, conv: Conv, rtol: float) -> float:
    """Return an upper bound of the norm of the symbol over all frequencies, within `rtol` of it.

    Symbols that do not depend on the frequency are matrices, whose norm is exact but for rounding.
    """
    if not np.any(kernel):
        return 0.0
    conv = lattice(conv)
    taps = math.prod(kernel.shape[axis] for axis, letter in enumerate(conv.layout) if letter not in "OI")
    if taps == 1:
        return float(norm_upper_bound(kernel, conv))
    return float(norm_bounds(kernel, conv, rtol=rtol).upper)


def matrix_norm(matrices: Float64Array) -> float:
    """Return an upper bound of the largest norm in a stack of matrices, exact but for rounding."""
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    if 0 in stack.shape:
        return 0.0
    kernel = stack.reshape(-1, stack.shape[-1], 1)
    return supremum_norm(kernel, Conv("OIW", groups=len(stack)), 1.0)


def kronecker_norm(matrices: Mapping[int, Float64Array]) -> float:
    """Return an upper bound of the norm of a Kronecker product: the product of the norms."""
    return product_up(matrix_norm(matrix) for matrix in matrices.values())
