"""Muon for convolutions: updates that are steepest in the operator norm of each convolution."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from convsv_adapters._jax.trees import Layers, Tree, as_kernel, as_leaf, check_layers, kept, named_leaves
from convsv_adapters._layers import COLD_ITERATIONS, ConvLayer, check_scaling, geometry_of, step_factor
from convsv_adapters.optax._kernels import explicit_sharding, on_every_device
from convsv_core import Conv
from convsv_core.conv import as_float, as_int
from convsv_core.layers import lattice
from convsv_core.training import DirectionMethod, check_direction_method, steepest_together

__all__ = ["SteepestDirectionState", "conv_muon", "scale_by_steepest_direction"]


class SteepestDirectionState(NamedTuple):
    """State of `scale_by_steepest_direction`.

    Attributes
    ----------
    count : 0-d array, int32
        Number of updates so far.
    momentum : tuple of array
        For each layer, the mean of its gradients.
    matrices : tuple of array or None
        For each layer, the matrices from which the next search begins, or zeros.
    """

    count: jax.Array
    momentum: tuple[jax.Array, ...]
    matrices: tuple[jax.Array | None, ...]


class _Settings(NamedTuple):
    """Hold the static arguments of the search for a direction."""

    conv: Conv
    method: DirectionMethod
    iterations: int


def scale_by_steepest_direction(
    layers: Layers,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    method: DirectionMethod = "exact",
    iterations: int = 1,
    scaling: str = "rms",
) -> optax.GradientTransformation:
    """Replace the gradients of kernels by directions of steepest descent in the operator norms of their layers.

    Updates of other leaves pass unchanged. `conv_muon` is the whole optimizer.

    Parameters
    ----------
    layers : iterable of ConvLayer, or mapping from str
        The geometry of the kernels, as for `projection_operator_norm`, linear layers among them.
    momentum : float, default 0.95
    nesterov : bool, default True
    method : {"exact", "polar", "flat"}, default "exact"
        As for `convsv_core.steepest_direction`.
    iterations : int, default 1
        Iterations of "exact" for each update. They start from the matrices of the update before.
    scaling : {"rms", "operator"}, default "rms"
        The certified norm of an update. "operator": 1. "rms": the root of the number of output elements of an image
        for each input element.

    Returns
    -------
    optax.GradientTransformation

    Raises
    ------
    TypeError, ValueError
        As for `projection_operator_norm`, or an option is impossible.

    Notes
    -----
    Use it within `jax.jit`. The parameters may be sharded; with an explicit mesh, every device computes whole kernels.
    The norm is certified on a grid for every input size, so the true norm is at least 0.84 of the certified one. It is
    the norm with zero or circular padding, and padding that repeats pixels can raise it. NaN or infinity in a gradient
    gives NaN. The first update of "exact" takes 20 iterations. The state then holds complex matrices at 34 frequencies
    for 3 x 3 taps. Updates have 32 bits or more. `optax.inject_hyperparams` needs
    ``static_args=("iterations",)``.

    The decompositions run one after the other on most accelerators.

    Examples
    --------
    >>> params = {"kernel": jnp.ones((3, 3, 1, 1))}
    >>> transform = scale_by_steepest_direction({"kernel": Conv("HWIO", padding_mode="zeros")})
    >>> updates, _ = transform.update(params, transform.init(params))
    >>> bool(0.84 <= updates["kernel"].sum() <= 1.0)
    True
    """
    check_direction_method(method)
    check_scaling(scaling)
    layers = kept(layers)
    if isinstance(iterations, jax.Array):
        raise TypeError(
            "iterations is an array: wanted an int; with optax.inject_hyperparams, static_args=('iterations',)"
        )
    count = as_int("iterations", iterations, least=1)
    # An array comes from `optax.inject_hyperparams`, and may have no value yet.
    if not isinstance(momentum, jax.Array) and not 0 <= as_float("momentum", momentum) < 1:
        raise ValueError(f"momentum={momentum!r}: wanted a number from 0 to less than 1")

    def settings_of(layer: ConvLayer) -> _Settings:
        return _Settings(lattice(geometry_of(layer)), method, count)

    def init(params: Tree) -> SteepestDirectionState:
        chosen, named = check_layers(layers, params), named_leaves(params)
        kernels = [jnp.asarray(named[layer.path].value) for layer in chosen]
        buffers = tuple(jnp.zeros_like(kernel, dtype=_wide(kernel)) for kernel in kernels)
        matrices = []
        for layer, buffer in zip(chosen, buffers, strict=True):
            cold = functools.partial(_cold, settings=settings_of(layer))
            shape = jax.eval_shape(cold, [as_kernel(layer, buffer)])[1]
            matrices.append(None if shape is None else jnp.zeros(shape[0].shape, shape[0].dtype))
        return SteepestDirectionState(jnp.zeros((), jnp.int32), buffers, tuple(matrices))

    def update(
        updates: Tree, state: SteepestDirectionState, params: Tree = None
    ) -> tuple[Tree, SteepestDirectionState]:
        del params
        chosen, places = check_layers(layers, updates), named_leaves(updates)
        leaves, structure = jax.tree.flatten(updates)
        gradients = [jnp.asarray(places[layer.path].value) for layer in chosen]
        gradients = [gradient.astype(_wide(gradient)) for gradient in gradients]
        buffers = [
            momentum * buffer + (1 - momentum) * gradient
            for buffer, gradient in zip(state.momentum, gradients, strict=True)
        ]
        pulls = buffers
        if nesterov:
            pulls = [momentum * b + (1 - momentum) * g for b, g in zip(buffers, gradients, strict=True)]
        pulls = [as_kernel(layer, pull) for layer, pull in zip(chosen, pulls, strict=True)]
        matrices = list(state.matrices)
        for members in _alike(pulls, [settings_of(layer) for layer in chosen]):
            settings = settings_of(chosen[members[0]])
            found = _directions([pulls[i] for i in members], [matrices[i] for i in members], settings)
            for index, direction, own in zip(members, *found, strict=True):
                layer = chosen[index]
                factor = step_factor(layer.kernel_shape, geometry_of(layer), scaling)
                leaves[places[layer.path].place] = as_leaf(layer, direction) * factor
                matrices[index] = own
        new = SteepestDirectionState(optax.safe_increment(state.count), tuple(buffers), tuple(matrices))
        return jax.tree.unflatten(structure, leaves), new

    return optax.GradientTransformation(init, update)


def conv_muon(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    method: DirectionMethod = "exact",
    iterations: int = 1,
    scaling: str = "rms",
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    adam_weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Return Muon with the operator norms of convolutions and linear layers, and AdamW for all other parameters.

    Parameters
    ----------
    learning_rate : float or schedule
        The certified operator norm of a step, in units of the factor that `scaling` says.
    layers, momentum, nesterov, method, iterations, scaling
        As for `scale_by_steepest_direction`.
    weight_decay : float, default 0.0
        Decoupled, for the kernels of `layers`: each step subtracts ``learning_rate * weight_decay`` times the kernel.
    adam_learning_rate : float or schedule, optional
        `learning_rate` if not given, as for `optax.contrib.muon`. Here it is a norm, so AdamW often needs less.
    adam_b1, adam_b2, adam_eps, adam_weight_decay : float, default 0.9, 0.95, 1e-8, 0.0
        The options of AdamW.

    Returns
    -------
    optax.GradientTransformation

    Raises
    ------
    TypeError, ValueError
        As for `scale_by_steepest_direction`.

    Examples
    --------
    >>> params = {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.ones(1)}
    >>> optimizer = conv_muon(0.1, {"kernel": Conv("HWIO", padding_mode="zeros")})
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> bool(-0.1 <= updates["kernel"].sum() <= -0.084)
    True
    """
    layers = kept(layers)
    steepest = optax.chain(
        scale_by_steepest_direction(
            layers, momentum=momentum, nesterov=nesterov, method=method, iterations=iterations, scaling=scaling
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    others = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        weight_decay=adam_weight_decay,
    )

    def labels(params: Tree) -> Tree:
        named = named_leaves(params)
        places = {named[layer.path].place for layer in check_layers(layers, params)}
        leaves, structure = jax.tree.flatten(params)
        return jax.tree.unflatten(structure, ["steepest" if i in places else "adamw" for i in range(len(leaves))])

    return optax.partition({"steepest": steepest, "adamw": others}, labels)


def _wide(array: Any) -> Any:
    """Return the dtype of the computation for an array's dtype."""
    return jnp.promote_types(array.dtype, jnp.float32)


def _alike(pulls: list[jax.Array], settings: list[_Settings]) -> list[list[int]]:
    """Return the indices of kernels in groups of one shape, dtype, sharding and geometry."""
    found: dict[Any, list[int]] = {}
    for index, (pull, own) in enumerate(zip(pulls, settings, strict=True)):
        found.setdefault((pull.shape, pull.dtype, explicit_sharding(pull), own), []).append(index)
    return list(found.values())


def _cold(pulls: list[jax.Array], settings: _Settings) -> Any:
    """Return the directions of a first update, and the matrices that the search ended with."""
    found = steepest_together(
        pulls,
        None,
        settings.conv,
        method=settings.method,
        iterations=max(settings.iterations, COLD_ITERATIONS) if settings.method == "exact" else 1,
    )
    directions = [one.direction for one in found]
    return directions, None if found[0].matrices is None else [one.matrices for one in found]


# This function stands alone, so that layers of one shape and geometry are compiled once.
@functools.partial(jax.jit, static_argnums=2)
def _directions(
    pulls: list[jax.Array], matrices: list[jax.Array | None], settings: _Settings
) -> tuple[list[jax.Array], list[jax.Array | None]]:
    """Return the directions of kernels of one shape and geometry, and the matrices for the next update.

    Matrices are zero until there is a gradient. If one kernel has its first gradient, all of them start anew.
    """
    sharding = explicit_sharding(pulls[0])
    pulls = [on_every_device(pull, sharding) for pull in pulls]
    if matrices[0] is None:
        directions, _ = _cold(pulls, settings)
        found: list[jax.Array | None] = [None] * len(pulls)
    else:
        known = [on_every_device(one, sharding) for one in matrices]

        def warm(pulls: list[jax.Array]) -> Any:
            steps = steepest_together(
                pulls, None, settings.conv, method="exact", iterations=settings.iterations, matrices=known
            )
            return [one.direction for one in steps], [one.matrices for one in steps]

        alive = [jnp.any(pull != 0) for pull in pulls]
        first = [own & ~jnp.any(one != 0) for own, one in zip(alive, known, strict=True)]
        cold = functools.reduce(jnp.logical_or, first)
        directions, reached = jax.lax.cond(cold, lambda pulls: _cold(pulls, settings), warm, pulls)
        # The search for a gradient of zero finds nothing that a later search could start from.
        found = [jnp.where(own, one, 0) for own, one in zip(alive, reached, strict=True)]
    if sharding is not None:
        directions = [jax.sharding.reshard(one, sharding) for one in directions]
    return directions, found
