"""Calls of NumPy code from JAX programs for a CPU, where the arrays are in the memory of the host already.

XLA takes seconds to compile a program with eigenvalues. On a CPU such a program calls LAPACK in the BLAS library of
SciPy, whose threads wait actively for each other at every small product. While other work kept two processors busy, a
training step that took 6 seconds did not return in two minutes. So a program for a CPU calls NumPy code instead, with
one BLAS thread. The primitive of such a call is lowered to a callback in programs for one device of a CPU. All other
programs contain XLA's own operations: for other platforms, for several devices, and for export. These operations are
traced only when they are needed.

The callback gets NumPy arrays and calls no function of JAX. `jax.pure_callback` would make JAX arrays of its arguments
first. It copies large ones on a thread of the pool that callbacks may be blocking.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convsv_core.backend import Array, ArraySpec
from convsv_core.plugins import get_backend

__all__ = ["VARIABLE", "call_host", "from_host", "on_host", "to_host"]

VARIABLE = "CONVSV_JAX_HOST"
"""Environment variable; "0" keeps all work in XLA's programs on a CPU too, as on an accelerator."""


def _uses_host() -> bool:
    """Tell whether work for a CPU is done by NumPy. The user's environment can forbid it."""
    return os.environ.get(VARIABLE, "1") != "0"


# ---- eager calls ------------------------------------------------------------------------------------


def on_host(arguments: Any) -> list[Array] | None:
    """Return the JAX arrays in a tree of arguments if NumPy can take their place, otherwise None.

    They must have values, lie on one device of a CPU, and be the only arrays: arrays of another library are an error,
    which the ordinary call raises.
    """
    import jax

    if not _uses_host():
        return None
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    for leaf in leaves:
        if isinstance(leaf, jax.core.Tracer | np.ndarray) or not isinstance(leaf, jax.Array | np.generic):
            return None
        if isinstance(leaf, jax.Array) and {device.platform for device in leaf.devices()} != {"cpu"}:
            return None
        if isinstance(leaf, jax.Array) and len(leaf.devices()) > 1:
            return None
    return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]


def to_host(tree: Any) -> Any:
    """Return a tree with NumPy arrays in place of JAX arrays, without a copy but for bfloat16, which NumPy lacks."""
    import jax
    import jax.numpy as jnp

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf)

    return jax.tree.map(convert, tree)


def from_host(tree: Any, like: Array) -> Any:
    """Return a tree with JAX arrays on the device of `like` in place of NumPy arrays and scalars."""
    import jax
    import jax.numpy as jnp

    device = like.sharding if like.committed else None

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        # XLA would use aligned memory without a copy, and NumPy code may keep and change that memory.
        return jnp.array(leaf, dtype=jax.dtypes.canonicalize_dtype(leaf.dtype), device=device)

    return jax.tree.map(convert, tree)


# ---- calls from programs ----------------------------------------------------------------------------


def call_host(
    function: Callable[..., tuple[Any, ...]],
    arrays: tuple[Array, ...],
    results: tuple[ArraySpec, ...],
    otherwise: Callable[..., tuple[Array, ...]],
    gradient: Callable[..., tuple[Any, ...]] | None,
) -> tuple[Array, ...]:
    """Return the results of `function` or of `otherwise`; see `Backend.call_host`."""
    import jax
    import jax.numpy as jnp

    _prepare()
    if gradient is None:
        return _bind(function, arrays, results, otherwise)

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def value(*arrays: Array) -> tuple[Array, ...]:
        return _bind(function, arrays, results, otherwise)

    def in_program(first: Array, *others: Array) -> tuple[Array, ...]:
        def number(first: Array) -> tuple[Array, tuple[Array, ...]]:
            number, *constants = otherwise(first, *others)
            return number, tuple(constants)

        (known, constants), slope = jax.value_and_grad(number, has_aux=True)(first)
        return known, *constants, slope

    @value.defjvp  # type: ignore[untyped-decorator]
    def derivative(primals: Any, tangents: Any) -> Any:
        first = primals[0]
        specs = (*results, ArraySpec(tuple(first.shape), first.dtype.name))
        *values, slope = _bind(gradient, tuple(primals), specs, in_program)
        change = jnp.sum(jnp.real(slope * tangents[0])).astype(values[0].dtype)
        return tuple(values), (change, *(jnp.zeros_like(one) for one in values[1:]))

    found: tuple[Array, ...] = value(*arrays)
    return found


@functools.cache
def _prepare() -> None:
    """Load the plugins and find the libraries of BLAS in the thread that traces.

    A search for libraries holds the lock of the dynamic loader, and so does an import. In a callback such a search and
    an import of another thread could wait for each other.
    """
    with get_backend("numpy").single_threaded():
        pass


def _bind(
    function: Callable[..., Any], arrays: tuple[Array, ...], results: tuple[ArraySpec, ...], otherwise: Any
) -> tuple[Array, ...]:
    return tuple(_primitive().bind(*arrays, function=function, results=results, otherwise=otherwise))


@functools.cache
def _primitive() -> Any:
    """Return the primitive of a call, with its rules for evaluation, derivatives, batches and lowering."""
    import jax
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("convsv_host")
    primitive.multiple_results = True

    def abstract(*arrays: Any, results: tuple[ArraySpec, ...], **other: Any) -> list[Any]:
        return [jax.core.ShapedArray(spec.shape, np.dtype(spec.dtype)) for spec in results]

    def evaluate(*arrays: Any, **parameters: Any) -> Any:
        if (owned := on_host(arrays)) is not None:
            found = _checked(parameters["function"], parameters["results"])(*to_host(arrays))
            return list(from_host(found, owned[0]))
        return jax.jit(functools.partial(primitive.bind, **parameters))(*arrays)

    def differentiate(primals: Any, tangents: Any, *, otherwise: Any, **other: Any) -> Any:
        exact = [ad.instantiate_zeros(tangent) for tangent in tangents]
        return jax.jvp(lambda *arrays: list(otherwise(*arrays)), tuple(primals), tuple(exact))

    def batch(arrays: Any, axes: Any, *, function: Any, results: Any, otherwise: Any) -> Any:
        mapped = tuple(None if axis is None else 0 for axis in map(_axis, axes))
        moved = [
            array if axis is None else jax.numpy.moveaxis(array, axis, 0)
            for array, axis in zip(arrays, map(_axis, axes), strict=True)
        ]
        count = next(array.shape[0] for array, axis in zip(moved, mapped, strict=True) if axis == 0)
        many = functools.partial(_one_by_one, function, mapped, count, results)
        specs = tuple(ArraySpec((count, *spec.shape), spec.dtype) for spec in results)
        found = _bind(many, tuple(moved), specs, jax.vmap(otherwise, in_axes=mapped))
        return list(found), [0] * len(found)

    def in_program(*arrays: Any, otherwise: Any, **other: Any) -> list[Any]:
        return list(otherwise(*arrays))

    lower_in_program = mlir.lower_fun(in_program, multiple_results=True)

    def lower_for_cpu(context: Any, *operands: Any, function: Any, results: Any, otherwise: Any) -> Any:
        if not _on_one_device(context.module_context):
            return lower_in_program(context, *operands, function=function, results=results, otherwise=otherwise)
        found, *_ = mlir.emit_python_callback(
            context,
            _checked(function, results),
            None,
            list(operands),
            context.avals_in,
            context.avals_out,
            has_side_effect=False,
        )
        return found

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(evaluate)
    ad.primitive_jvps[primitive] = differentiate
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lower_in_program)
    if hasattr(mlir, "emit_python_callback"):
        mlir.register_lowering(primitive, lower_for_cpu, platform="cpu")
    return primitive


def _axis(axis: Any) -> int | None:
    """Return the batched axis of an array as an int, or None for an array that is not batched."""
    return axis if isinstance(axis, int) else None


def _on_one_device(module: Any) -> bool:
    """Tell whether a program is compiled for one device that can call back.

    The devices of a mesh would all wait for one host. An exported program outlives this process.
    """
    single = getattr(module.axis_context, "num_devices", 0) == 1
    exported = getattr(module.lowering_parameters, "for_export", False)
    return single and not exported and len(module.platforms) == 1 and _uses_host()


def _checked(function: Callable[..., Any], results: tuple[ArraySpec, ...]) -> Callable[..., tuple[Any, ...]]:
    """Return a function that gives arrays of exactly the shapes and dtypes that the program expects.

    One BLAS thread is used, as for a small kernel. BLAS's own threads would wait actively, and take processors from
    XLA's threads.
    """

    def call(*arrays: Any) -> tuple[Any, ...]:
        with get_backend("numpy").computation_context(np.empty(0)):
            found = function(*map(np.asarray, arrays))
        return tuple(
            np.asarray(one, spec.dtype, order="C").reshape(spec.shape) for one, spec in zip(found, results, strict=True)
        )

    return call


def _one_by_one(
    function: Callable[..., Any],
    mapped: Sequence[int | None],
    count: int,
    results: tuple[ArraySpec, ...],
    *arrays: np.ndarray[Any, Any],
) -> tuple[Any, ...]:
    """Return the stacked results of a function for each entry of a batch."""
    stacked = tuple(np.empty((count, *spec.shape), spec.dtype) for spec in results)
    for place in range(count):
        entry = (array if axis is None else array[place] for array, axis in zip(arrays, mapped, strict=True))
        for whole, one in zip(stacked, function(*entry), strict=True):
            whole[place] = one
    return stacked
