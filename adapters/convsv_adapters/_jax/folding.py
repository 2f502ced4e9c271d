"""Constants of JAX functions, computed by NumPy in float64.

A network's constants, such as the scale of a batch normalisation, are computed in double precision here. JAX itself
computes in single precision unless a setting is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

__all__ = ["FOLDED", "promoted"]

Fold: TypeAlias = Callable[..., Any]
"""A function of the parameters and the operands of a primitive that returns its result."""


def promoted(value: Any) -> npt.NDArray[Any]:
    """Return a constant as a NumPy array, of float32 in place of shorter floating-point numbers."""
    array = np.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4:
        return array.astype(np.float32)
    return array


def _wide(value: Any) -> Any:
    """Return floating-point numbers in float64, and other numbers as they are."""
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _ufunc(function: Callable[..., Any]) -> Fold:
    """Return the fold of a function of numbers."""

    def fold(params: Mapping[str, Any], *operands: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*(_wide(one) for one in operands))

    return fold


def _div(x: Any, y: Any) -> Any:
    # The division of integers in JAX rounds towards zero.
    return np.trunc(x / y).astype(x.dtype) if x.dtype.kind in "iu" else x / y


def _integer_pow(params: Mapping[str, Any], x: Any) -> Any:
    return _wide(x) ** params["y"]


def _broadcast(params: Mapping[str, Any], x: Any, *dynamic: Any) -> Any:
    shape, places = params["shape"], params["broadcast_dimensions"]
    lined = np.reshape(x, [np.shape(x)[places.index(axis)] if axis in places else 1 for axis in range(len(shape))])
    return np.broadcast_to(lined, shape)


def _cast(params: Mapping[str, Any], x: Any, *rest: Any) -> Any:
    kind = np.dtype(params["new_dtype"])
    return np.asarray(x).astype(np.float64 if jnp.issubdtype(kind, jnp.floating) else kind)


def _iota(params: Mapping[str, Any], *rest: Any) -> Any:
    shape, axis = params["shape"], params["dimension"]
    kind = np.dtype(params["dtype"])
    row = np.arange(shape[axis], dtype=np.float64 if jnp.issubdtype(kind, jnp.floating) else kind)
    return np.broadcast_to(row.reshape([-1 if place == axis else 1 for place in range(len(shape))]), shape)


def _select(params: Mapping[str, Any], which: Any, *cases: Any) -> Any:
    return np.choose(np.asarray(which).astype(np.int64), [_wide(one) for one in cases])


def _reduced(function: Callable[..., Any]) -> Fold:
    return lambda params, x: function(_wide(x), axis=tuple(params["axes"]))


def _same(params: Mapping[str, Any], x: Any) -> Any:
    return x


FOLDED: dict[str, Fold] = {
    **{name: _ufunc(getattr(np, name)) for name in ("abs", "exp", "exp2", "expm1", "log", "log1p", "sqrt", "tanh")},
    **{name: _ufunc(getattr(np, name)) for name in ("sin", "cos", "floor", "ceil", "sign", "square")},
    **{name: _ufunc(function) for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply))},
    **{name: _ufunc(function) for name, function in (("max", np.maximum), ("min", np.minimum), ("neg", np.negative))},
    **{
        name: _ufunc(function)
        for name, function in (("ge", np.greater_equal), ("gt", np.greater), ("le", np.less_equal))
    },
    **{name: _ufunc(function) for name, function in (("lt", np.less), ("eq", np.equal), ("ne", np.not_equal))},
    **{name: _ufunc(function) for name, function in (("pow", np.power), ("add_any", np.add))},
    **{name: _ufunc(function) for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or))},
    "div": _ufunc(_div),
    "rsqrt": _ufunc(lambda x: 1 / np.sqrt(x)),
    "logistic": _ufunc(lambda x: 1 / (1 + np.exp(-x))),
    "erf": _ufunc(np.vectorize(math.erf, otypes=[np.float64])),
    "integer_pow": _integer_pow,
    "convert_element_type": _cast,
    "iota": _iota,
    "select_n": _select,
    "reduce_sum": _reduced(np.sum),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "broadcast_in_dim": _broadcast,
    "reshape": lambda params, x, *rest: np.reshape(x, params["new_sizes"]),
    "squeeze": lambda params, x: np.squeeze(x, tuple(params["dimensions"])),
    "expand_dims": lambda params, x: np.expand_dims(x, tuple(params["dimensions"])),
    "transpose": lambda params, x: np.transpose(x, params["permutation"]),
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "optimization_barrier"), _same),
}
"""The primitives whose results NumPy computes, by their names in JAX. JAX computes the results of other primitives."""
