"""A call of a JAX function as one list of equations, with all that does not depend on its input computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from convsv_adapters._jax.folding import FOLDED, promoted
from convsv_adapters._layers import call_arguments
from convsv_core.networks import Shape

__all__ = ["BODIES", "CALLS", "Constant", "Equation", "Operand", "Traced", "Value", "trace_equations"]

CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    *("checkpoint", "remat", "remat2", "custom_lin"),
)
"""The primitives that call another function, whose equations are listed in their place."""

BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""The parameters of `CALLS` that hold the function."""

RANDOM = ("random_bits", "random_wrap", "random_unwrap", "random_seed", "random_fold_in", "threefry2x32")
"""The primitives that random numbers come from."""


@dataclass(eq=False)
class Value:
    """An array that depends on the input of the function.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    equation : Equation or None
        The equation that computes it; None for an input.
    """

    shape: Shape
    dtype: Any
    equation: Equation | None = field(default=None, repr=False)


@dataclass(eq=False)
class Constant:
    """An array that does not depend on the input of the function.

    Attributes
    ----------
    array : numpy.ndarray
        The array. What is computed from floating-point numbers has float64.
    compute : callable
        Returns the array as JAX computes it, in the dtypes of the function.
    path : str, default ""
        The path of the array in the model, if it is one of the model's parameters.
    """

    array: npt.NDArray[Any]
    compute: Callable[[], Any]
    path: str = ""

    @classmethod
    def of(cls, value: Any, path: str = "") -> Constant:
        """Return an array or a number of a function as a constant."""
        return cls(promoted(value), lambda: value, path)


Operand: TypeAlias = Value | Constant
"""An array that an equation takes."""


@dataclass(eq=False)
class Equation:
    """One primitive with its operands, of which at least one depends on the input.

    Attributes
    ----------
    primitive : str
    params : mapping
        As JAX has them.
    operands : tuple of Value or Constant
    results : tuple of Value
    scope : str
        The names of the scopes in which the function applies the primitive, joined by "/". flax names its modules so.
    """

    primitive: str
    params: Mapping[str, Any]
    operands: tuple[Operand, ...]
    results: tuple[Value, ...]
    scope: str

    @property
    def layer(self) -> str:
        """Return the path of the layer whose parameter an operand is; "" if no operand is one."""
        paths = [one.path for one in self.operands if isinstance(one, Constant) and one.path]
        return paths[0].rpartition("/")[0] if paths else ""


class Traced(NamedTuple):
    """The equations of one call of a function.

    Attributes
    ----------
    inputs : list of Value
    examples : list of array or None
        The caller's array for each input; None where the caller gave its shape alone.
    equations : list of Equation
        In the order of evaluation.
    outputs : list of Value
        The results of the function, as far as they depend on an input.
    """

    inputs: list[Value]
    examples: list[npt.NDArray[np.float64] | None]
    equations: list[Equation]
    outputs: list[Value]


def trace_equations(
    function: Callable[..., object], example_input: object, paths: Mapping[int, str] | None = None
) -> Traced:
    """Return the equations of a call of a function, in which calls of other functions are expanded.

    Parameters
    ----------
    function : callable
    example_input : array, jax.ShapeDtypeStruct, tuple, list or mapping
        The argument of the function, its positional arguments or its keyword arguments. Arrays and
        `jax.ShapeDtypeStruct` are inputs; numbers, booleans and strings are passed as they are.
    paths : mapping from int to str, optional
        The paths of the model's parameters, by the `id` of each array.

    Raises
    ------
    ValueError
        The call fails, draws random numbers, or has an input that is not of floating-point numbers.
    """
    leaves, structure = jax.tree.flatten(call_arguments(example_input))
    traced = [isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) for leaf in leaves]
    given = [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced]
    if not given:
        raise ValueError(f"example_input={example_input!r}: wanted an array, or a jax.ShapeDtypeStruct")
    for leaf in given:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"example_input holds an array of {leaf.dtype}: wanted floating-point numbers")

    def call(arrays: list[object]) -> object:
        source = iter(arrays)
        merged = [next(source) if is_traced else leaf for leaf, is_traced in zip(leaves, traced, strict=True)]
        positional, named = jax.tree.unflatten(structure, merged)
        return [leaf for leaf in jax.tree.leaves(function(*positional, **named)) if isinstance(leaf, jax.Array)]

    try:
        closed = jax.make_jaxpr(call)(given)
    except Exception as error:  # The function is the user's, and can raise anything.
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"JAX cannot trace the model with the given "
            f"example_input: {type(error).__name__}: {reason}; wanted an input of the right shape, a model in "
            f"evaluation mode, and no control flow that depends on values"
        ) from error
    inputs = [Value(tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in given]
    equations: list[Equation] = []
    constants = [Constant.of(one, (paths or {}).get(id(one), "")) for one in closed.consts]
    results = _expand(closed.jaxpr, [*constants, *inputs], "", equations)
    outputs = [one for one in results if isinstance(one, Value)]
    if not outputs:
        raise ValueError("model returns nothing that depends on its input: wanted a network")
    examples = [None if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf, np.float64) for leaf in given]
    return Traced(inputs, examples, equations, outputs)


def _expand(jaxpr: Any, operands: Sequence[Operand], scope: str, equations: list[Equation]) -> list[Operand]:
    """Append the equations of a function, and return its results."""
    held: dict[Any, Operand] = dict(zip([*jaxpr.constvars, *jaxpr.invars], operands, strict=True))

    def read(atom: Any) -> Operand:
        return Constant.of(atom.val) if isinstance(atom, jax.extend.core.Literal) else held[atom]

    for source in jaxpr.eqns:
        primitive = source.primitive.name
        if not source.outvars:
            continue  # An equation without results prints or checks something.
        given = tuple(read(atom) for atom in source.invars)
        if primitive in RANDOM:
            raise ValueError(f"the function draws random numbers ({primitive}): wanted a fixed map")
        inner = "/".join(filter(None, (scope, str(source.source_info.name_stack))))
        results: Sequence[Operand]
        if primitive in CALLS:
            body = next(source.params[name] for name in BODIES if name in source.params)
            constants = [Constant.of(one) for one in getattr(body, "consts", ())]
            results = _expand(getattr(body, "jaxpr", body), [*constants, *given], inner, equations)
        elif any(isinstance(one, Value) for one in given):
            found = tuple(Value(tuple(var.aval.shape), var.aval.dtype) for var in source.outvars)
            equation = Equation(primitive, source.params, given, found, inner)
            for one in found:
                one.equation = equation
            equations.append(equation)
            results = found
        else:
            results = _computed(source, given)
        held.update(zip(source.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _computed(source: Any, operands: tuple[Any, ...]) -> list[Constant]:
    """Return the results of an equation whose operands are all constants.

    NumPy computes floating-point numbers in float64. JAX computes integers and booleans that follow from
    floating-point numbers, since a rounding error can change them.
    """

    @functools.cache
    def native() -> Sequence[Any]:
        arrays = [
            jnp.asarray(one.compute(), atom.aval.dtype) for one, atom in zip(operands, source.invars, strict=True)
        ]
        results = source.primitive.bind(*arrays, **source.params)
        return results if source.primitive.multiple_results else [results]

    fold = FOLDED.get(source.primitive.name)
    floating = jnp.issubdtype(source.outvars[0].aval.dtype, jnp.floating)
    if fold is None or not (floating or all(one.array.dtype.kind != "f" for one in operands)):
        return [Constant.of(one) for one in native()]
    path = operands[0].path if source.primitive.name == "convert_element_type" else ""
    return [Constant(np.asarray(fold(source.params, *(one.array for one in operands))), lambda: native()[0], path)]
