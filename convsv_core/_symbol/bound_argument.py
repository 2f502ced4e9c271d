"""The check of a bound of a norm that a user gives as a number or an array."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convsv_core._symbol.operand import Operand
from convsv_core.backend import Array
from convsv_core.dtypes import dtype_name

__all__ = ["check_bound"]


def check_bound(operand: Operand, bound: float | Array, name: str = "bound") -> Array:
    """Check a bound of a norm, and return it as a 0-d array of the operand's real dtype beside the kernel.

    A bound is an int, a float, a NumPy scalar, or a 0-d array of the kernel's library. It is at least 0 and may be
    infinite. The sign of an array that is traced or lazy cannot be checked.

    Parameters
    ----------
    operand : Operand
    bound : float or 0-d array
        The user's argument, at the user's scale.
    name : str, default "bound"
        The name of the argument in an error.

    Raises
    ------
    TypeError
        `bound` is not a real number (a bool is not one), or is an array of another library.
    ValueError
        `bound` is an array with axes, is negative, or is NaN.
    """
    xp, backend = operand.xp, operand.backend
    is_real = isinstance(bound, int | float) or hasattr(bound, "dtype")
    if isinstance(bound, bool | np.bool_ | np.complexfloating) or not is_real:
        raise TypeError(f"{name}={bound!r}: wanted a real number or a 0-d array of the kernel's library")
    if isinstance(bound, int | float | np.integer | np.floating):
        array = xp.full_like(operand.scale, _as_float(bound))
        known: bool | None = bool(bound >= 0)
    else:
        if not backend.owns_array(bound):
            raise TypeError(
                f"kernel is an array of {backend.name}, {name} one of {type(bound).__module__}: wanted one library"
            )
        if bound.ndim != 0:
            raise ValueError(f"{name} has shape {tuple(bound.shape)}: wanted a number or a 0-d array")
        if xp.isdtype(bound.dtype, ("bool", "complex floating")):
            raise TypeError(f"{name} has dtype {dtype_name(bound.dtype)}: wanted a real number")
        array = xp.astype(bound, operand.real_dtype)
        known = backend.truth(array >= 0)
    if known is False:
        raise ValueError(f"{name}={bound}: wanted a number of at least 0")
    return array


def _as_float(number: float | np.integer[Any] | np.floating[Any]) -> float:
    """Return a real number as a float, or an infinity of its sign where it is an int beyond the range."""
    try:
        return float(number)
    except OverflowError:
        return math.copysign(math.inf, number > 0 or -1)
