"""Arithmetic and functions of one number of JAX functions as kinds of maps."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np

from convsv_adapters._jax.calls import Call, Result, Rule
from convsv_adapters._jax.equations import Equation, Operand, Value
from convsv_adapters._jax.graph_layers import average_of
from convsv_adapters._jax.normalization import find_normalization
from convsv_adapters._networks import Traced, Undescribed, as_number
from convsv_core.networks import (
    Elementwise,
    Extremum,
    Identity,
    LogSoftmax,
    Product,
    Quotient,
    Scale,
    Softmax,
    Sum,
)

__all__ = ["FUNCTION_RULES"]


# ---- arithmetic --------------------------------------------------------------------------------------------


def _add(call: Call) -> Result:
    return _weighted_sum(call, 1.0)


def _sub(call: Call) -> Result:
    if (found := _log_softmax(call)) is not None:
        return found
    return _weighted_sum(call, -1.0)


def _weighted_sum(call: Call, weight: float) -> Result:
    """Describe ``x + weight * y``, of which one may be a constant."""
    x, y = call.operands
    if isinstance(x, Traced) and isinstance(y, Traced):
        return call.result(Sum((1.0, weight)), x, y)
    if isinstance(x, Traced):
        return call.result(Scale(shift=np.asarray(y, np.float64) * weight), x)
    assert isinstance(y, Traced)
    return call.result(Scale(np.asarray(weight), np.asarray(x)), y)


def _mul(call: Call) -> Result:
    x, y = call.operands
    if isinstance(x, Traced) and isinstance(y, Traced):
        if (found := find_normalization(call.equation)) is None:
            return call.result(Product(), x, y)
        normal = call.step(found.kind, call.known[found.operand], shape=found.operand.shape)
        return call.result(Scale(np.asarray(found.scale)), normal)
    if isinstance(x, Traced):
        return call.result(Scale(np.asarray(y)), x)
    assert isinstance(y, Traced)
    return call.result(Scale(np.asarray(x)), y)


def _div(call: Call) -> Result:
    x, y = call.operands
    if isinstance(y, Traced):
        found = _softmax(call)
        return call.result(Quotient(), call.as_traced(x), y) if found is None else found
    if (average := average_of(call, call.value(0), y)) is not None:
        return average
    return call.result(Scale(1 / np.asarray(y, np.float64)), call.x)


def _extremum(function: Literal["max", "min"]) -> Rule:
    def rule(call: Call) -> Result:
        x, y = call.operands
        if isinstance(x, Traced) and isinstance(y, Traced):
            return call.result(Extremum(function), x, y)
        if isinstance(y, Traced):
            x, y = y, x
        assert isinstance(x, Traced)
        if function == "max" and not np.any(y):
            return call.result(Elementwise("relu"), x)
        return call.result(Elementwise("clip", {"low" if function == "max" else "high": as_number(np.asarray(y))}), x)

    return rule


def _clamp(call: Call) -> Result:
    limits = {"low": as_number(call.constant(0)), "high": as_number(call.constant(2))}
    return call.result(Elementwise("clip", limits), call.known[call.value(1)])


def _select(call: Call) -> Result:
    """Describe a choice between two arrays that does not depend on the input: a sum with masks."""
    if isinstance(call.equation.operands[0], Value):
        raise Undescribed("a choice that depends on the input of the network, of no known function")
    if len(call.operands) != 3:
        raise Undescribed("a choice between more than two arrays")
    which, *cases = call.operands
    chosen = np.broadcast_to(np.asarray(which, np.float64), call.shape)
    masks = (1 - chosen, chosen)
    shift, parts = np.zeros(call.shape), []
    for mask, case in zip(masks, cases, strict=True):
        if isinstance(case, Traced):
            parts.append((mask, case))
        else:
            shift = shift + np.where(mask != 0, np.asarray(case, np.float64), 0.0)
    if len(parts) == 1:
        return call.result(Scale(parts[0][0], shift), parts[0][1])
    return call.result(Sum(), *(call.step(Scale(mask), case, shape=call.shape) for mask, case in parts))


# ---- functions of one number -----------------------------------------------------------------------------------


def _fixed(function: str, **parameters: float) -> Rule:
    return lambda call: call.result(Elementwise(function, parameters), call.x)


def _then(function: str, scale: float, shift: float) -> Rule:
    """Return the rule of a function of one number times `scale` plus `shift`."""

    def rule(call: Call) -> Result:
        inner = call.step(Elementwise(function), call.x, shape=call.shape)
        return call.result(Scale(np.asarray(scale), np.asarray(shift)), inner)

    return rule


def _log1p(call: Call) -> Result:
    moved = call.step(Scale(shift=np.asarray(1.0)), call.x, shape=call.shape)
    return call.result(Elementwise("log"), moved)


def _integer_power(call: Call) -> Result:
    return _powered(call, call.params["y"])


def _power(call: Call) -> Result:
    exponent = as_number(call.constant(1))
    if not isinstance(exponent, float):
        raise Undescribed("a power whose exponent is not one number")
    return _powered(call, exponent)


def _powered(call: Call, exponent: float) -> Result:
    named = {1: Identity(), 2: Elementwise("square"), 0.5: Elementwise("sqrt"), -1: Elementwise("reciprocal")}
    return call.result(named.get(exponent, Elementwise("power", {"exponent": float(exponent)})), call.x)


def _identity(call: Call) -> Result:
    if not jnp.issubdtype(call.equation.results[0].dtype, jnp.floating):
        raise Undescribed("a cast to a dtype that does not hold real numbers")
    return call.result(Identity(), call.x)


def _jump(call: Call) -> Result:
    raise Undescribed("a function that is not continuous")


# ---- softmax ---------------------------------------------------------------------------------------------------


def _softmax(call: Call) -> Result | None:
    """Describe ``exp(x - m) / sum(exp(x - m))``, where m is constant along the axes of the sum."""
    above = call.equation.operands[0]
    total = _stretched(call.equation.operands[1])
    if not (_is(above, "exp") and total is not None and _is(total[0], "reduce_sum")):
        return None
    summed = total[0].equation
    if summed is None or summed.operands[0] is not above:
        return None
    axes = tuple(int(axis) for axis in summed.params["axes"])
    x = _centred(_equation(above).operands[0], axes)
    if x is None or total[1] != axes:
        return None
    return call.result(Softmax(axes), call.known[x], op="softmax")


def _log_softmax(call: Call) -> Result | None:
    """Describe ``x - m - log(sum(exp(x - m)))``, where m is constant along the axes of the sum."""
    moved, other = call.equation.operands
    stretched = other
    if _is(other, "log"):
        stretched = _equation(other).operands[0]
    total = _stretched(stretched)
    if total is None:
        return None
    inner: Operand = total[0]
    if _is(inner, "log"):
        inner = _equation(inner).operands[0]
    elif stretched is other:
        return None
    if not _is(inner, "reduce_sum"):
        return None
    summed = _equation(inner)
    above = summed.operands[0]
    axes = tuple(int(axis) for axis in summed.params["axes"])
    if not _is(above, "exp") or _equation(above).operands[0] is not moved or total[1] != axes:
        return None
    x = _centred(moved, axes)
    return None if x is None else call.result(LogSoftmax(axes), call.known[x], op="log_softmax")


def _centred(value: Operand, axes: tuple[int, ...]) -> Value | None:
    """Return x if a value is ``x - m`` with m constant along axes, and the value itself otherwise."""
    if _is(value, "sub"):
        x, offset = _equation(value).operands
        spread = _stretched(offset)
        if isinstance(x, Value) and spread is not None and spread[1] == axes:
            return x
    return value if isinstance(value, Value) else None


def _stretched(value: Operand) -> tuple[Value, tuple[int, ...]] | None:
    """Return the array that an array with extents of 1 is, and the axes of these extents, which broadcast it."""
    while _is(value, "stop_gradient") or _is(value, "copy"):
        value = _equation(value).operands[0]
    if not isinstance(value, Value) or value.equation is None:
        return None
    equation = value.equation
    if equation.primitive == "broadcast_in_dim":
        axes = tuple(axis for axis in range(len(value.shape)) if axis not in equation.params["broadcast_dimensions"])
        added = all(value.shape[axis] == 1 for axis in axes)
    elif equation.primitive == "expand_dims":
        axes, added = tuple(equation.params["dimensions"]), True
    else:
        return None
    inner = equation.operands[0]
    return (inner, axes) if added and isinstance(inner, Value) else None


def _is(value: Operand, primitive: str) -> bool:
    return isinstance(value, Value) and value.equation is not None and value.equation.primitive == primitive


def _equation(value: Operand) -> Equation:
    assert isinstance(value, Value)
    assert value.equation is not None
    return value.equation


FUNCTION_RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "add_any"), _add),
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": lambda call: call.result(Scale(np.asarray(-1.0)), call.x),
    "max": _extremum("max"),
    "min": _extremum("min"),
    "clamp": _clamp,
    "select_n": _select,
    "logistic": _fixed("sigmoid"),
    **{name: _fixed(name) for name in ("tanh", "abs", "erf", "sin", "cos", "atan", "asinh")},
    **{name: _fixed(name) for name in ("exp", "log", "sqrt", "square")},
    "rsqrt": _fixed("power", exponent=-0.5),
    "erfc": _then("erf", -1.0, 1.0),
    "expm1": _then("exp", 1.0, -1.0),
    "log1p": _log1p,
    "integer_pow": _integer_power,
    "pow": _power,
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision"), _identity),
    **dict.fromkeys(("sharding_constraint", "optimization_barrier"), _identity),
    **dict.fromkeys(("round", "floor", "ceil", "sign"), _jump),
}
"""The rules of arithmetic and of functions of one number, by the names of the primitives in JAX."""
