"""Bounds that survive rounding: square roots that are rounded upward, and the rounding errors of sums."""

from __future__ import annotations

import math
from fractions import Fraction

__all__ = ["root_up", "summation_units"]


def root_up(square: float | Fraction) -> float:
    """Return the square root as a float64 that is no smaller, which exact arithmetic decides.

    Parameters
    ----------
    square : int, float or Fraction
        Not negative. Infinity and NaN are returned.

    Returns
    -------
    float
        The exact root where it is a float64, as for squares of integers.

    Notes
    -----
    `math.sqrt` rounds to nearest, so its result may lie below the root, as for 3 and 6. Where `square` is no float64,
    its own rounding moves the root by less than half a unit in the last place. Both together are less than one unit,
    so the next float64 is not below the root.

    Examples
    --------
    >>> root_up(9), root_up(Fraction(1, 4)), math.sqrt(3) < root_up(3)
    (3.0, 0.5, True)
    """
    root = math.sqrt(square)
    if not math.isfinite(root) or Fraction(root) ** 2 >= square:
        return root
    return math.nextafter(root, math.inf)


def summation_units(terms: int) -> float:
    """Return a bound of the rounding error of a sum, in unit roundoffs (half of eps) of the sum of the moduli.

    The number of terms is a bound in any case. The root is one for independent rounding errors of mean 0: Higham and
    Mary, SIAM Journal on Scientific Computing, 2019.

    Examples
    --------
    >>> summation_units(9), summation_units(10_000)
    (9, 800.0)
    """
    return min(terms, 8 * math.sqrt(terms))
