"""Elementwise functions and arithmetic of PyTorch programs as kinds of maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from convsv_adapters._networks import Traced, Undescribed
from convsv_adapters.torch._calls import Call, Result, Rule, host
from convsv_core.networks import (
    Elementwise,
    Extremum,
    Identity,
    LogSoftmax,
    Product,
    Quotient,
    Scale,
    Slice,
    Softmax,
    Sum,
)

__all__ = ["FUNCTION_RULES"]


# ---- arithmetic --------------------------------------------------------------------------------------------


def _add(call: Call) -> Result:
    return _weighted_sum(call, call["self"], 1.0, call["other"], float(call["alpha"]))


def _sub(call: Call) -> Result:
    return _weighted_sum(call, call["self"], 1.0, call["other"], -float(call["alpha"]))


def _rsub(call: Call) -> Result:
    return _weighted_sum(call, call["self"], -float(call["alpha"]), call["other"], 1.0)


def _weighted_sum(call: Call, x: Any, x_weight: float, y: Any, y_weight: float) -> Result:
    """Describe ``x_weight * x + y_weight * y``, of which one may be a constant."""
    if isinstance(x, Traced) and isinstance(y, Traced):
        return call.result(Sum((x_weight, y_weight)), x, y)
    if isinstance(y, Traced):
        x, x_weight, y, y_weight = y, y_weight, x, x_weight
    shift = host(y).astype(np.float64) * y_weight
    return call.result(Scale(np.asarray(x_weight), shift), x)


def _mul(call: Call) -> Result:
    x, y = call["self"], call["other"]
    if isinstance(x, Traced) and isinstance(y, Traced):
        return call.result(Product(), x, y)
    if isinstance(x, Traced):
        return call.result(Scale(host(y)), x)
    return call.result(Scale(host(x)), y)


def _div(call: Call) -> Result:
    if call.get("rounding_mode") is not None:
        raise Undescribed("it rounds, and is not continuous")
    x, y = call["self"], call["other"]
    if isinstance(y, Traced):
        return call.result(Quotient(), call.as_traced(x), y)
    return call.result(Scale(1 / host(y).astype(np.float64)), x)


def _neg(call: Call) -> Result:
    return call.result(Scale(np.asarray(-1.0)), call.traced("self"))


def _extremum(call: Call) -> Result:
    x, y = call["self"], call["other"]
    function: Literal["max", "min"] = "max" if "max" in call.op else "min"
    if isinstance(x, Traced) and isinstance(y, Traced):
        return call.result(Extremum(function), x, y)
    if isinstance(y, Traced):
        x, y = y, x
    return call.result(Elementwise("clip", {"low" if function == "max" else "high": host(y)}), x)


# ---- functions of one number -----------------------------------------------------------------------------------


def _function(function: str, **parameters: str) -> Rule:
    """Return the rule of a function whose parameters are arguments of the operator, by the names in the kind."""

    def rule(call: Call) -> Result:
        values = {name: float(call[argument]) for name, argument in parameters.items()}
        return call.result(Elementwise(function, values), call.tensors[0])

    return rule


def _fixed(function: str, **parameters: float) -> Rule:
    """Return the rule of a function without arguments."""
    return lambda call: call.result(Elementwise(function, parameters), call.tensors[0])


def _clamp(call: Call) -> Result:
    x = call.traced("self")
    limits = {"low": call.get("min"), "high": call.get("max")}
    if any(isinstance(one, Traced) for one in limits.values()):
        raise Undescribed("its limits depend on the input of the network")
    return call.result(Elementwise("clip", {k: host(v) for k, v in limits.items() if v is not None}), x)


def _elu(call: Call) -> Result:
    if call["scale"] != 1 or call["input_scale"] != 1:
        # PyTorch's ELU with a scale is the function of SELU, whose own scale is the one of the positive part.
        if call["input_scale"] != 1:
            raise Undescribed("an ELU whose input is scaled")
        parameters = {"alpha": float(call["alpha"]), "gamma": float(call["scale"])}
        return call.result(Elementwise("selu", parameters), call.traced("self"))
    return call.result(Elementwise("elu", {"alpha": float(call["alpha"])}), call.traced("self"))


def _gelu(call: Call) -> Result:
    return call.result(Elementwise("gelu_tanh" if call["approximate"] == "tanh" else "gelu"), call.traced("self"))


def _prelu(call: Call) -> Result:
    x = call.traced("self")
    slopes = call.constant("weight").reshape(-1)
    if slopes.size > 1 and len(x.shape) > 1:
        slopes = slopes.reshape(-1, *(1,) * (len(x.shape) - 2))
    return call.result(Elementwise("leaky_relu", {"alpha": slopes}), x)


def _softplus(call: Call) -> Result:
    if call["threshold"] < LEAST_THRESHOLD:
        raise Undescribed(f"a softplus that jumps to its asymptote at {call['threshold']}, and is not continuous there")
    return call.result(Elementwise("softplus", {"beta": float(call["beta"])}), call.traced("self"))


LEAST_THRESHOLD = 17.0
"""The least argument at which PyTorch may replace the softplus by its asymptote: exp(-17) is below float32's eps."""


def _threshold(call: Call) -> Result:
    if call["threshold"] != call["value"]:
        raise Undescribed("a threshold at which the function jumps")
    return call.result(Elementwise("clip", {"low": float(call["value"])}), call.traced("self"))


def _power(call: Call) -> Result:
    exponent = call["exponent"]
    if not isinstance(exponent, int | float) or "self" not in call or not isinstance(call["self"], Traced):
        raise Undescribed("a power whose exponent is not one number")
    x = call.traced("self")
    named = {1: Identity(), 2: Elementwise("square"), 0.5: Elementwise("sqrt"), -1: Elementwise("reciprocal")}
    return call.result(named.get(exponent, Elementwise("power", {"exponent": float(exponent)})), x)


def _glu(call: Call) -> Result:
    x = call.traced("self")
    axis = int(call["dim"]) % len(x.shape)
    half = x.shape[axis] // 2
    halves = []
    for part in (slice(0, half), slice(half, None)):
        slices = tuple(part if place == axis else slice(None) for place in range(len(x.shape)))
        halves.append(call.step(Slice(slices), x, shape=call.shape))
    gate = call.step(Elementwise("sigmoid"), halves[1], shape=call.shape)
    return call.result(Product(), halves[0], gate)


def _along(kind: Callable[[tuple[int, ...]], Any]) -> Rule:
    """Return the rule of a function along one axis."""

    def rule(call: Call) -> Result:
        x = call.traced("self")
        return call.result(kind((int(call["dim"]) % max(len(x.shape), 1),)), x)

    return rule


# ---- identities ------------------------------------------------------------------------------------------------


def _identity(call: Call) -> Result:
    if not call.real:
        raise Undescribed("a cast to a dtype that does not hold real numbers")
    return call.result(Identity(), call.tensors[0])


def _dropout(call: Call) -> Result:
    # `export` has refused a dropout that is switched on.
    return call.result(Identity(), call.tensors[0])


def _jump(call: Call) -> Result:
    raise Undescribed("a function that is not continuous")


FUNCTION_RULES: dict[str, Rule] = {
    "add": _add,
    **dict.fromkeys(("sub", "subtract"), _sub),
    "rsub": _rsub,
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    **dict.fromkeys(("neg", "negative"), _neg),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), _extremum),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp),
    "hardtanh": _function("clip", low="min_val", high="max_val"),
    "relu": _fixed("relu"),
    "relu6": _fixed("clip", low=0.0, high=6.0),
    "leaky_relu": _function("leaky_relu", alpha="negative_slope"),
    "rrelu": lambda call: call.result(
        # In evaluation mode the slope is the mean of the limits.
        Elementwise("leaky_relu", {"alpha": (float(call["lower"]) + float(call["upper"])) / 2}),
        call.traced("self"),
    ),
    **dict.fromkeys(("prelu", "_prelu_kernel"), _prelu),
    "elu": _elu,
    "selu": _fixed("selu"),
    "celu": _function("celu", alpha="alpha"),
    "gelu": _gelu,
    "silu": _fixed("silu"),
    "mish": _fixed("mish"),
    "hardsigmoid": _fixed("hard_sigmoid", alpha=1 / 6, beta=0.5),
    "hardswish": _fixed("hard_swish", alpha=1 / 6, beta=0.5),
    "softplus": _softplus,
    "threshold": _threshold,
    "log_sigmoid": _fixed("log_sigmoid"),
    "log_sigmoid_forward": _fixed("log_sigmoid"),
    "softshrink": _function("soft_shrink", alpha="lambd"),
    "special_expit": _fixed("sigmoid"),
    "special_erf": _fixed("erf"),
    "absolute": _fixed("abs"),
    **{name: _fixed(name) for name in ("sigmoid", "tanh", "abs", "erf", "sin", "cos", "atan", "asinh")},
    **{name: _fixed(name) for name in ("exp", "log", "sqrt", "reciprocal", "square")},
    "rsqrt": _fixed("power", exponent=-0.5),
    "pow": _power,
    "glu": _glu,
    **dict.fromkeys(("softmax", "_softmax"), _along(Softmax)),
    **dict.fromkeys(("log_softmax", "_log_softmax"), _along(LogSoftmax)),
    **dict.fromkeys(("alias", "clone", "detach", "contiguous", "_to_copy", "to", "lift_fresh_copy"), _identity),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _dropout),
    "native_dropout": _dropout,
    **dict.fromkeys(("round", "floor", "ceil", "trunc", "sign", "hardshrink", "fmod", "remainder", "frac"), _jump),
}
"""The rules of elementwise functions and arithmetic, by the operators' names in ATen."""
