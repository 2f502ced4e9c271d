"""The table of elementwise functions: values, derivatives, steepest slopes, and ranges over intervals.

A slope is a bound of the modulus of the derivative over all real numbers, rounded upward. Functions without one, such
as the exponential function, have a bound over an interval instead. A test derives each slope by maximising the
derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convsv_core._network.kinds import Elementwise
from convsv_core._network.rule_types import Float64Array, NoRule, Range

__all__ = ["ELEMENTWISE", "Function", "derivative", "function_of", "function_range", "least_modulus", "slope", "value"]

Parameters = Mapping[str, Any]
"""The parameters of a function by their names, as numbers or arrays."""

SILU_SLOPE = 1.0998394
"""Largest derivative of ``x * sigmoid(beta x)``, attained at ``beta x = 2.3994``; rounded up in the eighth digit."""

SILU_TURN = -1.2784645427610738
"""Where ``x * sigmoid(x)`` is least."""

GELU_SLOPE = 1.1289043
"""Largest derivative of ``x * Phi(x)``: ``Phi(r) + r * phi(r)`` at ``r = sqrt(2)``; rounded up in the eighth digit."""

GELU_TANH_SLOPE = 1.1289931
"""Largest derivative of GELU's approximation by tanh, attained at 1.4185; rounded up in the eighth digit."""

MISH_SLOPE = 1.0884982
"""Largest derivative of ``x * tanh(softplus(x))``, attained at 1.4906; rounded up in the eighth digit."""

ERF_SLOPE = math.nextafter(2 / math.sqrt(math.pi), math.inf)
"""The derivative of erf at 0, ``2 / sqrt(pi)``, rounded up."""

RANGE_ROUNDING = 1e-12
"""Relative amount by which a range is widened. A guess: a few thousand times the rounding error of one function."""


@dataclass(frozen=True)
class Function:
    """One elementwise function; each member takes the parameters, with defaults filled in, as its last argument.

    Attributes
    ----------
    value, derivative : callable
        Functions of an array. Where there are two one-sided derivatives, either is returned.
    slope : callable
        Returns the bound of the derivative over all numbers, of a parameter's shape; infinity where there is none.
    defaults : mapping
        The parameters that may be left out.
    turns : callable
        Returns the points at which the function may change from rising to falling.
    slope_on : callable, optional
        Returns the bound of the derivative over intervals, given their ends as arrays.
    required : tuple of str
        The parameters that may not be left out.
    limits : tuple of float, optional
        The least and the largest value, for functions with so many turns that they stand for every range.
    pole : callable, optional
        Returns whether the function has a pole at 0.
    """

    value: Callable[[Float64Array, Parameters], Float64Array]
    derivative: Callable[[Float64Array, Parameters], Float64Array]
    slope: Callable[[Parameters], Any]
    defaults: Mapping[str, float] = field(default_factory=dict)
    turns: Callable[[Parameters], tuple[Any, ...]] = lambda p: ()
    slope_on: Callable[[Float64Array, Float64Array, Parameters], Float64Array] | None = None
    required: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None
    pole: Callable[[Parameters], bool] | None = None


# ---- what the core asks --------------------------------------------------------------------------------------


def value(kind: Elementwise, x: Float64Array) -> Float64Array:
    """Return the function at every element of `x`, in float64."""
    function, parameters = function_of(kind)
    with np.errstate(all="ignore"):  # An overflow or an invalid argument gives the infinity or NaN that it should.
        return np.asarray(function.value(np.asarray(x, np.float64), parameters))


def derivative(kind: Elementwise, x: Float64Array) -> Float64Array:
    """Return the derivative at every element of `x`; at a kink, the derivative of either side."""
    function, parameters = function_of(kind)
    with np.errstate(all="ignore"):
        return np.asarray(function.derivative(np.asarray(x, np.float64), parameters))


def slope(kind: Elementwise, box: Range | None = None) -> float:
    """Return a bound of the derivative's modulus: over all numbers, or else over the range of the elements.

    Raises `NoRule` where there is no bound, or the function is not in the table.
    """
    function, parameters = function_of(kind)
    found = float(np.max(np.abs(function.slope(parameters))))
    if math.isfinite(found):
        return found
    if box is not None and function.slope_on is not None:
        with np.errstate(all="ignore"):
            found = float(np.max(function.slope_on(box.low, box.high, parameters)))
        if math.isfinite(found):
            return found * (1 + RANGE_ROUNDING)
        raise NoRule(f"the slope of {kind.function} has no bound over the range of its input")
    raise NoRule(f"the slope of {kind.function} has no bound over all numbers; a range of the input may give one")


def function_range(kind: Elementwise, box: Range) -> Range:
    """Return bounds of the function's values over the box, widened by rounding."""
    function, parameters = function_of(kind)
    with np.errstate(all="ignore"):
        ends = [np.asarray(function.value(end, parameters)) for end in box]
        low, high = np.minimum(*ends), np.maximum(*ends)
        for turn in function.turns(parameters):
            at_turn = function.value(np.asarray(turn, np.float64), parameters)
            inside = (box.low <= turn) & (turn <= box.high)
            low = np.where(inside, np.minimum(low, at_turn), low)
            high = np.where(inside, np.maximum(high, at_turn), high)
    if function.limits is not None:
        low, high = (np.full_like(low, limit) for limit in function.limits)
    if function.pole is not None and function.pole(parameters):
        inside = (box.low <= 0) & (box.high >= 0)
        low, high = np.where(inside, -np.inf, low), np.where(inside, np.inf, high)
    low, high = (np.where(np.isnan(end), fill, end) for end, fill in ((low, -np.inf), (high, np.inf)))
    return Range(
        low - RANGE_ROUNDING * np.where(np.isfinite(low), np.abs(low), 0.0),
        high + RANGE_ROUNDING * np.where(np.isfinite(high), np.abs(high), 0.0),
    )


def function_of(kind: Elementwise) -> tuple[Function, Parameters]:
    """Return the function of a kind, and its parameters with defaults filled in; raise `NoRule` where there is none."""
    if kind.function not in ELEMENTWISE:
        raise NoRule(f"the function {kind.function!r} is not in the table of elementwise functions")
    function = ELEMENTWISE[kind.function]
    missing = [name for name in function.required if name not in kind.parameters]
    if missing:
        raise NoRule(f"the function {kind.function!r} lacks its parameter {missing[0]!r}")
    given = {name: np.asarray(number, np.float64) for name, number in kind.parameters.items()}
    return function, {**function.defaults, **given}


# ---- formulas ------------------------------------------------------------------------------------------------


def _sigmoid(x: Float64Array) -> Float64Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _softplus(x: Float64Array) -> Float64Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


_erf_of_one = np.frompyfunc(math.erf, 1, 1)


def _erf(x: Float64Array) -> Float64Array:
    return np.asarray(_erf_of_one(x), np.float64)


def _normal(x: Float64Array) -> Float64Array:
    """Return the distribution function of the normal distribution."""
    return 0.5 * (1 + _erf(x / math.sqrt(2)))


def _silu_derivative(x: Float64Array, p: Parameters) -> Float64Array:
    at = p["beta"] * x
    gate = _sigmoid(at)
    return gate + at * gate * (1 - gate)


def _gelu_tanh_inner(x: Float64Array) -> Float64Array:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _gelu_tanh_derivative(x: Float64Array, p: Parameters) -> Float64Array:
    tanh = np.tanh(_gelu_tanh_inner(x))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    # Far out the product of 0 and infinity stands for 0.
    return 0.5 * (1 + tanh) + np.nan_to_num(0.5 * x * (1 - tanh**2) * inner)


def _mish_derivative(x: Float64Array, p: Parameters) -> Float64Array:
    tanh = np.tanh(_softplus(x))
    return tanh + x * (1 - tanh**2) * _sigmoid(x)


def _hard_gate(x: Float64Array, p: Parameters) -> Float64Array:
    return np.clip(p["alpha"] * x + p["beta"], 0, 1)


def _between(x: Float64Array, p: Parameters) -> Float64Array:
    """Return 1 where the hard sigmoid is not flat, else 0."""
    at = p["alpha"] * x + p["beta"]
    return ((at > 0) & (at < 1)).astype(np.float64)


def _hard_swish_turns(p: Parameters) -> tuple[Any, ...]:
    alpha, beta = p["alpha"], p["beta"]
    return (-beta / alpha, (1 - beta) / alpha, -beta / (2 * alpha))  # A turn that does not exist is infinite or NaN.


def _exponential(x: Float64Array, p: Parameters) -> Float64Array:
    return np.exp(np.minimum(x, 0))  # The values of the other branch would overflow.


def _where_positive(low: Float64Array, bound: Float64Array) -> Float64Array:
    return np.where(low > 0, bound, np.inf)


def least_modulus(low: Float64Array, high: Float64Array) -> Float64Array:
    """Return the least modulus in each interval, 0 where it contains 0."""
    return np.where((low > 0) | (high < 0), np.minimum(np.abs(low), np.abs(high)), 0.0)


def _power_slope(p: Parameters) -> float:
    return 1.0 if np.all(p["exponent"] == 1) else (0.0 if np.all(p["exponent"] == 0) else math.inf)


def _power_slope_on(low: Float64Array, high: Float64Array, p: Parameters) -> Float64Array:
    exponent = p["exponent"]
    most, least = np.maximum(np.abs(low), np.abs(high)), least_modulus(low, high)
    bound = np.where(exponent == 0, 0.0, np.abs(exponent) * np.where(exponent >= 1, most, least) ** (exponent - 1))
    whole = exponent == np.round(exponent)
    return np.where(whole | (low >= 0), bound, np.inf)  # A negative number has no such root.


def _one(p: Parameters) -> float:
    return 1.0


ELEMENTWISE: dict[str, Function] = {
    "relu": Function(lambda x, p: np.maximum(x, 0), lambda x, p: (x > 0).astype(np.float64), _one),
    "leaky_relu": Function(
        lambda x, p: np.where(x > 0, x, p["alpha"] * x),
        lambda x, p: np.where(x > 0, 1.0, p["alpha"]),
        lambda p: np.maximum(1.0, np.abs(p["alpha"])),
        {"alpha": 0.01},
        lambda p: (0.0,),
    ),
    "elu": Function(
        lambda x, p: np.where(x > 0, x, p["alpha"] * np.expm1(np.minimum(x, 0))),
        lambda x, p: np.where(x > 0, 1.0, p["alpha"] * _exponential(x, p)),
        lambda p: np.maximum(1.0, np.abs(p["alpha"])),
        {"alpha": 1.0},
        lambda p: (0.0,),
    ),
    "selu": Function(
        lambda x, p: p["gamma"] * np.where(x > 0, x, p["alpha"] * np.expm1(np.minimum(x, 0))),
        lambda x, p: p["gamma"] * np.where(x > 0, 1.0, p["alpha"] * _exponential(x, p)),
        lambda p: np.nextafter(np.abs(p["gamma"]) * np.maximum(1.0, np.abs(p["alpha"])), np.inf),
        {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805},
        lambda p: (0.0,),
    ),
    "celu": Function(
        lambda x, p: np.where(x > 0, x, p["alpha"] * np.expm1(np.minimum(x, 0) / p["alpha"])),
        lambda x, p: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0) / p["alpha"])),
        lambda p: np.where(np.asarray(p["alpha"]) > 0, 1.0, np.inf),
        {"alpha": 1.0},
    ),
    "gelu": Function(
        lambda x, p: x * _normal(x),
        lambda x, p: _normal(x) + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi),
        lambda p: GELU_SLOPE,
        turns=lambda p: (-0.7517915246935645,),
    ),
    "gelu_tanh": Function(
        lambda x, p: 0.5 * x * (1 + np.tanh(_gelu_tanh_inner(x))),
        _gelu_tanh_derivative,
        lambda p: GELU_TANH_SLOPE,
        turns=lambda p: (-0.752461422,),
    ),
    "silu": Function(
        lambda x, p: x * _sigmoid(p["beta"] * x),
        _silu_derivative,
        lambda p: SILU_SLOPE,
        {"beta": 1.0},
        lambda p: (SILU_TURN / p["beta"],),
    ),
    "mish": Function(
        lambda x, p: x * np.tanh(_softplus(x)), _mish_derivative, lambda p: MISH_SLOPE, turns=lambda p: (-1.192431215,)
    ),
    "hard_sigmoid": Function(
        _hard_gate,
        lambda x, p: p["alpha"] * _between(x, p),
        lambda p: np.abs(p["alpha"]),
        {"alpha": 1 / 6, "beta": 0.5},
    ),
    "hard_swish": Function(
        lambda x, p: x * _hard_gate(x, p),
        lambda x, p: _hard_gate(x, p) + x * p["alpha"] * _between(x, p),
        lambda p: np.maximum(1.0, np.maximum(np.abs(2 - p["beta"]), np.abs(p["beta"]))),
        {"alpha": 1 / 6, "beta": 0.5},
        _hard_swish_turns,
    ),
    "clip": Function(
        lambda x, p: np.minimum(np.maximum(x, p["low"]), p["high"]),
        lambda x, p: ((x > p["low"]) & (x < p["high"])).astype(np.float64),
        _one,
        {"low": -math.inf, "high": math.inf},
    ),
    "sigmoid": Function(lambda x, p: _sigmoid(x), lambda x, p: _sigmoid(x) * (1 - _sigmoid(x)), lambda p: 0.25),
    "log_sigmoid": Function(lambda x, p: -_softplus(-x), lambda x, p: _sigmoid(-x), _one),
    "softplus": Function(
        lambda x, p: _softplus(p["beta"] * x) / p["beta"], lambda x, p: _sigmoid(p["beta"] * x), _one, {"beta": 1.0}
    ),
    "softsign": Function(lambda x, p: x / (1 + np.abs(x)), lambda x, p: (1 + np.abs(x)) ** -2.0, _one),
    "tanh": Function(lambda x, p: np.tanh(x), lambda x, p: 1 - np.tanh(x) ** 2, _one),
    "abs": Function(lambda x, p: np.abs(x), lambda x, p: np.sign(x), _one, turns=lambda p: (0.0,)),
    "soft_shrink": Function(
        lambda x, p: x - np.clip(x, -p["alpha"], p["alpha"]),
        lambda x, p: (np.abs(x) > p["alpha"]).astype(np.float64),
        _one,
        {"alpha": 0.5},
    ),
    "erf": Function(lambda x, p: _erf(x), lambda x, p: 2 / math.sqrt(math.pi) * np.exp(-(x**2)), lambda p: ERF_SLOPE),
    "sin": Function(lambda x, p: np.sin(x), lambda x, p: np.cos(x), _one, limits=(-1.0, 1.0)),
    "cos": Function(lambda x, p: np.cos(x), lambda x, p: -np.sin(x), _one, limits=(-1.0, 1.0)),
    "atan": Function(lambda x, p: np.arctan(x), lambda x, p: 1 / (1 + x**2), _one),
    "asinh": Function(lambda x, p: np.arcsinh(x), lambda x, p: 1 / np.sqrt(1 + x**2), _one),
    "exp": Function(
        lambda x, p: np.exp(x), lambda x, p: np.exp(x), lambda p: math.inf, slope_on=lambda a, b, p: np.exp(b)
    ),
    "log": Function(
        lambda x, p: np.log(x),
        lambda x, p: 1 / x,
        lambda p: math.inf,
        slope_on=lambda a, b, p: _where_positive(a, 1 / a),
    ),
    "sqrt": Function(
        lambda x, p: np.sqrt(x),
        lambda x, p: 0.5 / np.sqrt(x),
        lambda p: math.inf,
        slope_on=lambda a, b, p: _where_positive(a, 0.5 / np.sqrt(a)),
    ),
    "reciprocal": Function(
        lambda x, p: 1 / x,
        lambda x, p: -1 / x**2,
        lambda p: math.inf,
        slope_on=lambda a, b, p: least_modulus(a, b) ** -2.0,
        pole=lambda p: True,
    ),
    "square": Function(
        lambda x, p: x**2,
        lambda x, p: 2 * x,
        lambda p: math.inf,
        turns=lambda p: (0.0,),
        slope_on=lambda a, b, p: 2 * np.maximum(np.abs(a), np.abs(b)),
    ),
    "power": Function(
        lambda x, p: x ** p["exponent"],
        lambda x, p: p["exponent"] * x ** (p["exponent"] - 1),
        _power_slope,
        turns=lambda p: (0.0,) if np.any(p["exponent"] > 0) else (),
        slope_on=_power_slope_on,
        pole=lambda p: bool(np.any(p["exponent"] < 0)),
        required=("exponent",),
    ),
}
"""Every elementwise function by its name in `Elementwise`."""
