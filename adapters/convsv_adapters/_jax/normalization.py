"""Layer and RMS normalisation in a list of equations, as flax and equinox write them.

``(x - mean(x)) * rsqrt(variance + epsilon)`` has a bound, though the product of two activations has none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from convsv_adapters._jax.equations import Constant, Equation, Operand, Value
from convsv_adapters._networks import as_number
from convsv_core.networks import Normalize

__all__ = ["Normalization", "find_normalization"]

SAME_ORDER = ("reshape", "broadcast_in_dim", "expand_dims", "squeeze", "copy")
"""The primitives that keep the elements of an array in their order if there are as many of them afterwards."""


class Normalization(NamedTuple):
    """A normalisation of an array along axes, and the constant that multiplies it; 1.0 if there is none."""

    kind: Normalize
    operand: Value
    scale: Any


class _Mean(NamedTuple):
    """The mean of an array along axes."""

    source: Value
    axes: tuple[int, ...]


def find_normalization(product: Equation) -> Normalization | None:
    """Return the normalisation that the result of a `mul` is, or None if it is none."""
    one, other = product.operands
    for top, bottom in ((one, other), (other, one)):
        found = _find(top, bottom)
        if found is not None:
            return found
    return None


def _find(top: Operand, bottom: Operand) -> Normalization | None:
    scale: Any = 1.0
    if (inner := _equation(bottom, "mul")) is not None:
        first, second = inner.operands
        if isinstance(first, Constant):
            first, second = second, first
        if not isinstance(second, Constant):
            return None
        scale, bottom = second.array, first
    root = _equation(bottom, "rsqrt")
    above = _equation(root.operands[0], "add") if root is not None else None
    if above is None or not isinstance(above.operands[1], Constant):
        return None
    epsilon = as_number(above.operands[1].array)
    if not isinstance(epsilon, float) or not epsilon > 0:
        return None
    spread = above.operands[0]
    mean, x = _centred(top)
    if x is None or not isinstance(spread, Value):
        return None
    axes = _variance(spread, x, mean)
    if axes is None:
        return None
    if spread.shape != _kept(x, axes) or (mean is not None and (mean.source is not x or mean.axes != axes)):
        return None
    return Normalization(Normalize(axes, epsilon, mean is not None), x, scale)


def _centred(value: Operand) -> tuple[_Mean | None, Value | None]:
    """Return m and x if a value is ``x - m`` with a mean m, and None and x if it is x or x less zero."""
    difference = _equation(value, "sub")
    if difference is not None and isinstance(x := difference.operands[0], Value):
        offset = difference.operands[1]
        if isinstance(offset, Constant):
            return (None, x) if not np.any(offset.array) else (None, _value(value))
        mean = _mean(offset)
        if mean is not None and mean.source is x and offset.shape == _kept(x, mean.axes):
            return mean, x
    return None, _value(value)


def _variance(value: Operand, x: Value, mean: _Mean | None) -> tuple[int, ...] | None:
    """Return the axes along which a value is the mean of ``(x - mean) ** 2``, or None."""
    value = _bare(value)
    if (floor := _equation(value, "max")) is not None:
        # A variance is not negative: the maximum with 0 is there for rounding.
        one, other = floor.operands
        value, limit = (other, one) if isinstance(one, Constant) else (one, other)
        if not isinstance(limit, Constant) or np.any(limit.array):
            return None
        value = _bare(value)
    if (choice := _equation(value, "select_n")) is not None:
        which = choice.operands[0]
        if not isinstance(which, Constant) or not np.all(which.array):
            return None
        value = _bare(choice.operands[2])
    if (difference := _equation(value, "sub")) is not None:
        of_square, squared = _mean(difference.operands[0]), _square(_bare(difference.operands[1]))
        if of_square is None or squared is None or mean is None or _square(of_square.source) is not x:
            return None
        return of_square.axes if _mean(squared) == of_square._replace(source=x) else None
    found = _mean(value)
    if found is None or (base := _square(found.source)) is None:
        return None
    inner, source = _centred(base)
    if source is not x or (inner is None) != (mean is None):
        return None
    return found.axes if inner is None or inner.axes == found.axes else None


def _mean(value: Operand) -> _Mean | None:
    """Return the array and the axes that a value is the mean of, in whatever shape; None if it is no mean."""
    divided, count = False, 0.0
    while isinstance(value, Value) and value.equation is not None:
        equation = value.equation
        following = equation.operands[0]
        if equation.primitive == "reduce_sum" and isinstance(following, Value):
            axes = tuple(int(axis) for axis in equation.params["axes"])
            return _Mean(following, axes) if divided and count == _elements(following, axes) else None
        if equation.primitive == "div" and isinstance(divisor := equation.operands[1], Constant) and not divided:
            divided, count = True, as_number(divisor.array)
            value = following
        elif (bare := _bare(value)) is not value:
            value = bare
        else:
            return None
    return None


def _elements(x: Value, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def _kept(x: Value, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a reduction that keeps its axes."""
    return tuple(1 if axis in axes else extent for axis, extent in enumerate(x.shape))


def _square(value: Operand) -> Value | None:
    """Return the array that a value is the square of."""
    if not isinstance(value, Value) or value.equation is None:
        return None
    equation = value.equation
    base = equation.operands[0]
    squares = equation.primitive == "square" or (equation.primitive == "integer_pow" and equation.params["y"] == 2)
    squares = squares or (equation.primitive == "mul" and base is equation.operands[1])
    return base if squares and isinstance(base, Value) else None


def _bare(value: Operand) -> Operand:
    """Return the array whose elements a value holds in the same order."""
    while isinstance(value, Value) and value.equation is not None and value.equation.primitive in SAME_ORDER:
        inner = value.equation.operands[0]
        # The broadcast dimensions of `broadcast_in_dim` ascend, so that it does not permute.
        if not isinstance(inner, Value) or math.prod(inner.shape) != math.prod(value.shape):
            break
        value = inner
    return value


def _value(value: Operand) -> Value | None:
    return value if isinstance(value, Value) else None


def _equation(value: Operand, primitive: str) -> Equation | None:
    """Return the equation of a value if it is of this primitive."""
    if isinstance(value, Value) and value.equation is not None and value.equation.primitive == primitive:
        return value.equation
    return None
