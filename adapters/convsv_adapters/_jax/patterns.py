"""Functions of `jax.nn` in a list of equations, found by comparing equations with the equations of the function itself.

JAX expands most of its functions of one number into arithmetic, comparisons and choices. A template is the list of
equations that the installed JAX makes of such a function, so that nothing is assumed about how it is written. Numbers
in it have to be equal, except the parameters of the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convsv_adapters._jax.equations import Constant, Equation, Operand, Value, trace_equations
from convsv_adapters._networks import as_number

__all__ = ["Found", "find_function"]

COMMUTATIVE = ("add", "add_any", "mul", "max", "min", "eq", "ne", "and", "or")
"""The primitives whose two operands may change places."""

PASSED = ("copy", "copy_p", "convert_element_type", "broadcast_in_dim")
"""The primitives through which a number passes unchanged."""

SHAPES = ("sharding", "out_sharding", "accuracy", "shape", "broadcast_dimensions")
"""The parameters of primitives that do not change what a function of one number computes."""


class Function(NamedTuple):
    """A function of one number and of parameters, and the names that a kind has for it and for them."""

    name: str
    parameters: tuple[str, ...]
    call: Callable[..., Any]


class Found(NamedTuple):
    """A function of one array in a list of equations: its name, its parameters, and the array."""

    name: str
    parameters: dict[str, Any]
    operand: Value


FUNCTIONS = (
    Function("hard_swish", (), jax.nn.hard_swish),
    Function("hard_sigmoid", (), jax.nn.hard_sigmoid),
    Function("gelu", (), functools.partial(jax.nn.gelu, approximate=False)),
    Function("gelu_tanh", (), functools.partial(jax.nn.gelu, approximate=True)),
    Function("mish", (), jax.nn.mish),
    Function("selu", (), jax.nn.selu),
    Function("celu", ("alpha",), jax.nn.celu),
    Function("elu", ("alpha",), jax.nn.elu),
    Function("leaky_relu", ("alpha",), jax.nn.leaky_relu),
    Function("leaky_relu", ("alpha",), lambda x, alpha: jnp.where(x > 0, x, alpha * x)),
    Function("leaky_relu", ("alpha",), lambda x, alpha: jnp.where(x < 0, alpha * x, x)),
    Function("log_sigmoid", (), jax.nn.log_sigmoid),
    Function("softplus", (), jax.nn.softplus),
    Function("softsign", (), jax.nn.soft_sign),
    Function("hard_tanh", (), jax.nn.hard_tanh),
)
"""The functions that are looked for. What contains another one comes before it."""

USUAL = {
    "hard_sigmoid": ("hard_sigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hard_swish": ("hard_swish", {"alpha": 1 / 6, "beta": 0.5}),
    "hard_tanh": ("clip", {"low": -1.0, "high": 1.0}),
}
"""The kind's name and parameters of functions that are a special case of a kind's."""


def find_function(value: Value) -> Found | None:
    """Return the function of one array that computes `value`, or None if it is none of `FUNCTIONS`."""
    equation = value.equation
    if equation is None or equation.primitive not in ENDS or not jnp.issubdtype(value.dtype, jnp.floating):
        return None
    for template in _templates(np.dtype(value.dtype).name):
        bound: dict[Value, Operand] = {}
        if _matches(template.result, value, template, bound):
            operand = bound[template.operand]
            assert isinstance(operand, Value)
            name, usual = USUAL.get(template.function.name, (template.function.name, {}))
            pairs = zip(template.function.parameters, template.parameters, strict=True)
            given = {label: as_number(bound[one].array) for label, one in pairs if one in bound}  # type: ignore[union-attr]
            return Found(name, {**usual, **given}, operand)
    return None


ENDS = ("mul", "select_n", "div", "neg", "add")
"""The last primitives of the functions."""


class Template(NamedTuple):
    """The equations of a function: its argument, its parameters and its result."""

    function: Function
    operand: Value
    parameters: tuple[Value, ...]
    result: Value


@functools.cache
def _templates(dtype: str) -> tuple[Template, ...]:
    return tuple(_template(one, dtype) for one in FUNCTIONS)


def _template(function: Function, dtype: str) -> Template:
    """Return the equations of a function for an array of a dtype."""
    shapes = (jax.ShapeDtypeStruct((2, 3), dtype), *(jax.ShapeDtypeStruct((), dtype) for _ in function.parameters))
    traced = trace_equations(function.call, shapes)
    operand, *parameters = traced.inputs
    return Template(function, operand, tuple(parameters), traced.outputs[0])


def _passed(value: Operand) -> Operand:
    """Return the array that reaches `value` unchanged but for its shape and dtype."""
    while isinstance(value, Value) and value.equation is not None and value.equation.primitive in ("copy", "copy_p"):
        value = value.equation.operands[0]
    return value


def _parameter(value: Operand, template: Template) -> Value | None:
    """Return the parameter of a template that reaches `value` unchanged, or None."""
    while isinstance(value, Value) and value.equation is not None and value.equation.primitive in PASSED:
        value = value.equation.operands[0]
    return value if isinstance(value, Value) and value in template.parameters else None


def _matches(wanted: Operand, given: Operand, template: Template, bound: dict[Value, Operand]) -> bool:
    """Return whether an array is computed as a template's array is, and add to `bound` what stands for its inputs."""
    wanted, given = _passed(wanted), _passed(given)
    if isinstance(wanted, Constant):
        return isinstance(given, Constant) and _same_numbers(wanted.array, given.array)
    if (parameter := _parameter(wanted, template)) is not None:
        if not isinstance(given, Constant):
            return False
        held = bound.setdefault(parameter, given)
        return isinstance(held, Constant) and _same_numbers(held.array, given.array)
    if not isinstance(given, Value):
        return False
    if wanted is template.operand:
        return bound.setdefault(wanted, given) is given
    one, other = wanted.equation, given.equation
    if one is None or other is None or one.primitive != other.primitive or not _same_params(one, other):
        return False
    for operands in _orders(other):
        trial = dict(bound)
        if len(operands) == len(one.operands) and all(
            _matches(inner, given_inner, template, trial)
            for inner, given_inner in zip(one.operands, operands, strict=True)
        ):
            bound.update(trial)
            return True
    return False


def _orders(equation: Equation) -> Iterator[tuple[Operand, ...]]:
    yield equation.operands
    if equation.primitive in COMMUTATIVE:
        yield equation.operands[::-1]


def _same_params(one: Equation, other: Equation) -> bool:
    def kept(params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in params.items() if name not in SHAPES}

    return kept(one.params) == kept(other.params)


def _same_numbers(wanted: Any, given: Any) -> bool:
    """Return whether two arrays hold the same number everywhere, or are equal."""
    return np.array_equal(as_number(wanted), as_number(given))
