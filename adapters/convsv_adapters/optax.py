"""Operator norms in training with optax: a projection, a transformation of updates, and a penalty.

>>> from flax import nnx
>>> from convsv_adapters.flax import conv_layers
>>> model = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
>>> layers = conv_layers(model, jnp.zeros((1, 32, 32, 3)))
>>> bounded = optax.chain(optax.adam(1e-3), operator_norm_bound(1.0, layers))
>>> optimizer = nnx.Optimizer(model, bounded, wrt=nnx.Param)

A tree of parameters carries no geometry. `layers` says it: what `conv_layers` of `convsv_adapters.flax` or
`convsv_adapters.equinox` finds in a model, or a mapping from the path of a kernel in the tree to a `convsv_core.Conv`
or to ``(conv, input_shape)``.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convsv_adapters._jax_layers import ConvLayer, Layers, check_layers, named_leaves
from convsv_adapters._operators import Operator, check_penalty, layer_operators, layer_penalty
from convsv_core import ProjectionState, norm_upper_bound, project
from convsv_core._geometry.plan import resolve_channels
from convsv_core.conv import as_int

__all__ = ["ConvLayer", "OperatorNormBoundState", "operator_norm_bound", "penalty", "projection_operator_norm"]

Tree: TypeAlias = Any

ROUNDING_MARGIN = 1.05
"""For the rounding errors of the margin itself, and products of two rounding errors, of 16 bits among them."""


class OperatorNormBoundState(NamedTuple):
    """State of `operator_norm_bound`.

    Attributes
    ----------
    count : 0-d array, int32
        Updates so far.
    duals : tuple of array or None
        For each layer, the dual variables that the next projection begins from.
    """

    count: jax.Array
    duals: tuple[jax.Array | None, ...]


class Settings(NamedTuple):
    """How a kernel is projected."""

    bound: float
    method: Any
    steps: int


def projection_operator_norm(
    tree: Tree,
    bound: float = 1.0,
    *,
    layers: Layers,
    method: str = "dykstra",
    steps: int = 30,
    circular: bool = False,
) -> Tree:
    r"""Project convolution kernels onto the ball of the operator norm.

    Solves, for each kernel K that `layers` names and the operator A of its layer,

        minimise \|X - K\|_F over kernels X of K's shape, subject to \|A(X)\| <= bound,

    and leaves the other leaves as they are. With "dykstra" the solution is approached, from within the ball, by a
    number of steps; the other methods give other kernels within the ball.

    Parameters
    ----------
    tree : pytree of arrays
        Such as flax's ``variables["params"]``, ``nnx.state(model, nnx.Param)``, or an equinox model.
    bound : float, default 1.0
        Largest operator norm, not negative.
    layers : iterable of ConvLayer, or mapping from str
        The geometry of the kernels: see above.
    method : {"dykstra", "alternating", "rescale", "newton-schulz"}, default "dykstra"
    steps : int, default 30
        Iterations. These two are as for `convsv_core.project`.
    circular : bool, default False
        What is bounded. By default the layer with its own padding, for every input size. Otherwise the circular
        convolution at each of the layer's extents, as in the paper (where a stride does not divide them, at the next
        multiples), whose norm can be less than that with other padding.

    Returns
    -------
    pytree
        Of the structure, shapes and dtypes of `tree`.

    Raises
    ------
    TypeError
        `layers` says no geometry.
    ValueError
        `tree` has no leaf at a layer's path, or one of another shape; extents are missing, for `circular` or for
        padding that repeats pixels; or `bound` is negative.

    Notes
    -----
    Traceable by `jax.jit`, all but `tree` being static; a constant to differentiation. NaN or infinity in a kernel
    gives NaN. The kernels as they are stored satisfy the bound, to a relative 1e-6; those of 16 bits because the norm
    gives up what rounding can add, of the order of the dtype's eps times the root of the number of taps and channels.
    A kernel that is within the bound comes back bit for bit.

    Examples
    --------
    >>> from convsv_core import Conv
    >>> tree = {"kernel": 3 * jnp.ones((3, 3, 1, 1)), "bias": jnp.ones(1)}
    >>> bounded = projection_operator_norm(tree, 1.0, layers={"kernel": Conv("HWIO", padding_mode="zeros")})
    >>> bool(bounded["kernel"].sum() <= 1)
    True
    """
    settings = _settings(bound, method, steps)
    chosen = check_layers(layers, tree)
    leaves, structure = jax.tree.flatten(tree)
    named = named_leaves(tree)
    for layer in chosen:
        place, kernel = named[layer.path]
        leaves[place] = _bounded(jnp.asarray(kernel), _operators(layer, circular), settings)
    return jax.tree.unflatten(structure, leaves)


def operator_norm_bound(
    bound: float,
    layers: Layers,
    every: int = 1,
    *,
    method: str = "dykstra",
    steps: int = 10,
    circular: bool = False,
    warm_start: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Change updates so that the updated convolution kernels satisfy a bound on the operator norm.

    It has to be the last of a chain: what comes after it changes the updated parameters.

    Parameters
    ----------
    bound : float
        Largest operator norm, not negative.
    layers : iterable of ConvLayer, or mapping from str
        The geometry of the kernels: see above.
    every : int, default 1
        Bound the parameters after every so many updates, and let the others pass.
    method, steps, circular
        As for `projection_operator_norm`.
    warm_start : bool, default True
        Keep the dual variables of "dykstra" from one update to the next, so that a few steps an update do. They take
        one complex matrix of the channels at each frequency of a grid: for 3 x 3 taps, at 545 of them.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its `update` needs the parameters.

    Raises
    ------
    ValueError
        On `update` without parameters, and for the reasons of `projection_operator_norm`.

    Notes
    -----
    A step of "dykstra" decomposes the matrices at all frequencies of the grid, and the check of kernels that are within
    the bound at about a tenth of them. On a CPU, ten steps for a layer of 64 channels take seconds: there, let `every`
    be larger, or take "rescale", which takes a tenth of that or less.

    To be jitted. The parameters may be sharded: where the mesh is explicit, every device projects whole kernels. The
    parameters that `optax.apply_updates` stores satisfy the bound, to a relative 1e-6, the rounding of the subtraction
    and addition being taken off the norm beforehand: in float32, of the order of 1e-6 of it. Updates of kernels of 16
    bits are of 32. The update of a kernel that ends within the bound is unchanged.

    Examples
    --------
    >>> from convsv_core import Conv
    >>> params = {"kernel": jnp.ones((3, 3, 1, 1)) / 9}
    >>> layers = {"kernel": Conv("HWIO", padding_mode="zeros")}
    >>> optimizer = optax.chain(optax.sgd(1.0), operator_norm_bound(1.0, layers))
    >>> updates, _ = optimizer.update({"kernel": -jnp.ones((3, 3, 1, 1))}, optimizer.init(params), params)
    >>> bool(optax.apply_updates(params, updates)["kernel"].sum() <= 1)
    True
    """
    settings = _settings(bound, method, steps)
    period = as_int("every", every, least=1)

    def init(params: Tree) -> OperatorNormBoundState:
        chosen = check_layers(layers, params)
        named = named_leaves(params)
        keeps = warm_start and method == "dykstra"
        duals = (
            _empty_dual(named[layer.path][1], _operators(layer, circular)[0], settings) if keeps else None
            for layer in chosen
        )
        return OperatorNormBoundState(jnp.zeros((), jnp.int32), tuple(duals))

    def update(
        updates: Tree, state: OperatorNormBoundState, params: Tree = None, **extra: object
    ) -> tuple[Tree, OperatorNormBoundState]:
        del extra
        if params is None:
            raise ValueError(
                "params is None: operator_norm_bound bounds the updated parameters; wanted "
                "update(updates, state, params)"
            )
        chosen = check_layers(layers, params)
        check_layers(chosen, updates)
        named, places = named_leaves(params), named_leaves(updates)
        kernels = [jnp.asarray(named[layer.path][1]) for layer in chosen]
        leaves, structure = jax.tree.flatten(updates)
        # Updates of 16 bits could not say where a kernel is to go.
        changes = [
            jnp.asarray(change).astype(jnp.promote_types(jnp.promote_types(change.dtype, kernel.dtype), jnp.float32))
            for kernel, (_, change) in ((k, places[layer.path]) for k, layer in zip(kernels, chosen, strict=True))
        ]
        count = state.count + 1

        def bounded(changes: list[jax.Array], duals: tuple[jax.Array | None, ...]) -> Any:
            pairs = [
                _bounded_change(kernel, change, _operators(layer, circular), settings, dual)
                for kernel, change, layer, dual in zip(kernels, changes, chosen, duals, strict=True)
            ]
            return [change for change, _ in pairs], tuple(dual for _, dual in pairs)

        if period == 1:
            changes, duals = bounded(changes, state.duals)
        else:
            changes, duals = jax.lax.cond(
                count % period == 0, bounded, lambda changes, duals: (changes, duals), changes, state.duals
            )
        for layer, change in zip(chosen, changes, strict=True):
            leaves[places[layer.path][0]] = change
        return jax.tree.unflatten(structure, leaves), OperatorNormBoundState(count, duals)

    return optax.GradientTransformationExtraArgs(init, update)


def penalty(tree: Tree, layers: Layers, kind: str = "norm_hinge", **options: Any) -> jax.Array:
    """Sum a penalty on the singular values over convolution kernels, to add to a loss.

    The operator is the circular one at each layer's extents, whatever padding the layer has, at the largest extents
    where there are several.

    Parameters
    ----------
    tree : pytree of arrays
        The parameters.
    layers : iterable of ConvLayer, or mapping from str
        The geometry of the kernels: see above.
    kind : str, default "norm_hinge"
        A function of `convsv_core.penalties`.
    **options
        Of that function, such as ``bound=1.0``.

    Returns
    -------
    0-d array
        Differentiable by `tree` and traceable. Of layers without extents, "norm_hinge" and "squared_norm" are those of
        the upper bound for every input size, and "orthogonality" that of the infinite lattice.

    Raises
    ------
    TypeError
        `layers` says no geometry.
    ValueError
        `kind` is another, `tree` has no leaf at a layer's path, or the penalty needs extents that are not known.

    Examples
    --------
    >>> from convsv_core import Conv
    >>> tree = {"kernel": jnp.ones((3, 3, 1, 1))}
    >>> layers = {"kernel": (Conv("HWIO"), (8, 8))}
    >>> float(penalty(tree, layers, "norm_hinge", bound=1.0))
    64.0
    """
    check_penalty(kind)
    chosen = check_layers(layers, tree)
    named = named_leaves(tree)
    parts = [
        layer_penalty(layer.name, named[layer.path][1], layer.conv, layer.input_shapes, kind, options)
        for layer in chosen
        if layer.conv is not None
    ]
    return functools.reduce(jnp.add, parts)


# ---- one kernel --------------------------------------------------------------------------------------------


def _settings(bound: float, method: str, steps: int) -> Settings:
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 <= bound < math.inf:
        raise ValueError(f"bound={bound!r}: wanted a finite number that is not negative")
    return Settings(float(bound), method, as_int("steps", steps, least=1))


def _operators(layer: ConvLayer, circular: bool) -> tuple[Operator, ...]:
    assert layer.conv is not None  # check_layers has refused it
    return layer_operators(layer.name, layer.kernel_shape, layer.conv, layer.input_shapes, circular)


def _empty_dual(kernel: Any, operator: Operator, settings: Settings) -> jax.Array:
    def dual(kernel: jax.Array) -> jax.Array:
        state = project(
            kernel, operator.input_shape, operator.conv, settings.bound, method=settings.method, steps=settings.steps
        ).state
        assert state is not None  # the method is Dykstra's
        return state.dual

    shape = jax.eval_shape(dual, jax.ShapeDtypeStruct(kernel.shape, kernel.dtype))
    return jnp.zeros(shape.shape, shape.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))  # so that layers of one shape and geometry are compiled once
def _nearest(
    kernel: jax.Array, operators: tuple[Operator, ...], settings: Settings, dual: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """A kernel near the given one and within the bound for each operator, which is itself if it is within; the dual.

    It is of the dtype that `convsv_core.project` answers in.
    """
    first, *others = operators
    upper = norm_upper_bound(kernel, first.conv) * max(operator.padding_norm for operator in operators)

    def inside(kernel: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), None if dual is None else dual * 0

    def outside(kernel: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        options: dict[str, Any] = {"method": settings.method, "steps": settings.steps}
        if dual is not None:
            frequencies = jnp.zeros((dual.shape[0], first.conv.ndim), jnp.int32)  # traced, `steps` mean all of the grid
            options["state"] = ProjectionState(frequencies, dual)
        found = project(kernel, first.input_shape, first.conv, settings.bound / first.padding_norm, **options)
        nearest = found.kernel
        for operator in others:
            limit = settings.bound / operator.padding_norm
            nearest = project(nearest, operator.input_shape, operator.conv, limit, method="rescale", steps=1).kernel
        return nearest, None if dual is None or found.state is None else found.state.dual

    return jax.lax.cond(upper <= settings.bound, inside, outside, kernel)


def _bounded(kernel: jax.Array, operators: tuple[Operator, ...], settings: Settings) -> jax.Array:
    """A kernel that is within the bound in the dtype of the one given."""
    sharding = _explicit_sharding(kernel)
    kernel = _whole(kernel, sharding)
    nearest, _ = _nearest(kernel, operators, settings, None)
    error = _eps(kernel.dtype) * _frobenius(nearest) if nearest.dtype != kernel.dtype else 0.0
    stored = _kept_or(kernel, nearest, _share(kernel, operators, settings, error)).astype(kernel.dtype)
    return stored if sharding is None else jax.sharding.reshard(stored, sharding)


def _bounded_change(
    kernel: jax.Array, change: jax.Array, operators: tuple[Operator, ...], settings: Settings, dual: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The change after which the kernel, as it is stored then, is within the bound; and the dual."""
    sharding = _explicit_sharding(kernel)
    kernel, change, dual = (_whole(array, sharding) for array in (kernel, change, dual))
    updated = (kernel + change).astype(kernel.dtype)
    nearest, dual = _nearest(updated, operators, settings, dual)
    # Stored is fl(kernel + fl(nearest - kernel)), off by an eps of either sum, and by that of the kernel's own dtype.
    size = _frobenius(nearest)
    error = _eps(change.dtype) * (_frobenius(kernel) + 2 * size) + _eps(kernel.dtype) * size
    target = _kept_or(updated, nearest, _share(kernel, operators, settings, error))
    same = jnp.all(nearest == updated)
    change = jnp.where(same, change, (target - kernel).astype(change.dtype))
    return change if sharding is None else jax.sharding.reshard(change, sharding), dual


def _explicit_sharding(kernel: jax.Array) -> NamedSharding | None:
    """How a kernel is sharded over a mesh whose shardings are part of types, which not every operation resolves."""
    sharding = jax.typeof(kernel).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _whole(array: jax.Array | None, sharding: NamedSharding | None) -> jax.Array | None:
    """An array on every device of a mesh."""
    if array is None or sharding is None:
        return array
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def _kept_or(kernel: jax.Array, nearest: jax.Array, share: jax.Array) -> jax.Array:
    """The nearest kernel, smaller by what rounding can add; or the kernel itself, if that is the nearest."""
    return jnp.where(jnp.all(nearest == kernel), nearest, nearest * share.astype(nearest.dtype))


def _share(kernel: Any, operators: tuple[Operator, ...], settings: Settings, error: jax.Array | float) -> jax.Array:
    """By how much to multiply a kernel within the bound, that it still is after an error of that Frobenius norm.

    The operator's norm is at most the sum of the norms of its taps, so at most the root of their number times the
    Frobenius norm.
    """
    if settings.bound == 0:
        return jnp.zeros(())
    taps, *_ = resolve_channels(tuple(kernel.shape), operators[0].conv)
    smallest = float(jnp.finfo(kernel.dtype).smallest_subnormal) * math.sqrt(kernel.size)
    largest = math.sqrt(math.prod(taps)) * max(operator.padding_norm for operator in operators)
    return jnp.clip(1 - ROUNDING_MARGIN * largest * (error + smallest) / settings.bound, 0, 1)


def _eps(dtype: Any) -> float:
    """Largest relative error of rounding to a dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def _frobenius(kernel: jax.Array) -> jax.Array:
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.abs(wide) ** 2))
