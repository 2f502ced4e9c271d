"""A transformation of updates that keeps convolution kernels within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from convsv_adapters._jax.batch_norm import running_statistics
from convsv_adapters._jax.trees import Layers, Tree, as_kernel, as_leaf, check_layers, kept, named_leaves
from convsv_adapters._layers import ConvLayer, operators_of
from convsv_adapters.optax._kernels import bounded_change, empty_dual, make_settings
from convsv_adapters.optax._scales import ScaleBound, scaled_changes
from convsv_core.conv import as_int

__all__ = ["OperatorNormBoundState", "operator_norm_bound"]


class OperatorNormBoundState(NamedTuple):
    """State of `operator_norm_bound`.

    Attributes
    ----------
    count : 0-d array, int32
        Number of updates so far.
    duals : tuple of array or None
        For each layer, the dual variables from which the next projection begins.
    """

    count: jax.Array
    duals: tuple[jax.Array | None, ...]


def operator_norm_bound(
    bound: float,
    layers: Layers,
    every: int = 1,
    *,
    method: str = "rescale",
    steps: int = 10,
    circular: bool = False,
    warm_start: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Change updates so that the updated convolution kernels satisfy a bound on the operator norm.

    It has to be the last of a chain: a later transformation would change the updated parameters.

    Parameters
    ----------
    bound : float
        Largest operator norm, finite and not negative.
    layers : iterable of ConvLayer, or mapping from str
        The geometry of the kernels, as for `projection_operator_norm`.
    every : int, default 1
        Bound the parameters after every `every`-th update, and let the others pass.
    method : {"rescale", "dykstra", "alternating", "newton-schulz"}, default "rescale"
        As for `convsv_core.project`. "rescale" multiplies a kernel by one number, for a small part of the work of
        "dykstra", which moves the kernel less.
    steps : int, default 10
        Largest number of iterations of the other methods.
    circular : bool, default False
        As for `projection_operator_norm`.
    warm_start : bool, default True
        Keep the dual variables of "dykstra" from one update to the next, so that a few steps for each update are
        enough. They are one complex matrix of the channels at each frequency of a grid: for 3 x 3 taps, 545 matrices.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its `update` needs the parameters, and the extra argument `batch_stats` where layers have normalisations.

    Raises
    ------
    ValueError
        From `update` without parameters, or without `batch_stats` where layers have normalisations, and for the reasons
        of `projection_operator_norm`.

    Notes
    -----
    A step of "dykstra" decomposes the matrices at all frequencies of the grid. The check whether a kernel is within the
    bound decomposes about a tenth of them. A program for one device of a CPU calls NumPy code for both, which visits
    few frequencies, and ends at a gap of 1 % (see `convsv_core.project`). On two busy cores, with four convolutions of
    up to 128 channels and batches of 64 images, "rescale" added 17 % to a training step, and "dykstra" 110 to 160 %.

    Layers that ``conv_layers(..., batch_norm="fold")`` lists with a normalisation are bounded together with it, as both
    are in evaluation mode: the factors of the normalisation are made smaller. Their scale depends on running variances,
    which are no parameters, so `update` takes them as ``batch_stats=``, in the forms that `projection_operator_norm`
    takes: ``tx.update(gradients, state, params, batch_stats=batch_stats)``, and with nnx
    ``optimizer.update(model, gradients, batch_stats=nnx.state(model, nnx.BatchStat))``. Give those of the forward pass
    before this update: with them and the updated parameters, the network in evaluation mode is within the bound until
    the next forward pass in training mode.

    Use it within `jax.jit`. The parameters may be sharded; with an explicit mesh, every device projects whole kernels.
    The parameters that `optax.apply_updates` stores satisfy the bound, to a relative 1e-6. For this the norm is lowered
    by the rounding error bound of the subtraction and the addition: in float32, by the order of 1e-6 of it. Updates of
    kernels of 16 bits have 32 bits. The update of a kernel that ends within the bound is unchanged.

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
    settings = make_settings(bound, method, steps)
    layers = kept(layers)
    period = as_int("every", every, least=1)

    def init(params: Tree) -> OperatorNormBoundState:
        chosen = _without_normalisation(check_layers(layers, params, normalised=True))
        named = named_leaves(params)
        keeps = warm_start and method == "dykstra"
        duals = (
            empty_dual(as_kernel(layer, named[layer.path].value), operators_of(layer, circular)[0], settings)
            if keeps
            else None
            for layer in chosen
        )
        return OperatorNormBoundState(jnp.zeros((), jnp.int32), tuple(duals))

    def update(
        updates: Tree, state: OperatorNormBoundState, params: Tree = None, batch_stats: Tree = None, **extra: object
    ) -> tuple[Tree, OperatorNormBoundState]:
        del extra
        if params is None:
            raise ValueError(
                "params is None: operator_norm_bound bounds the updated parameters; wanted "
                "update(updates, state, params)"
            )
        every_layer = check_layers(layers, params, normalised=True)
        check_layers(every_layer, updates, normalised=True)
        chosen = _without_normalisation(every_layer)
        named, places = named_leaves(params), named_leaves(updates)
        kernels = [as_kernel(layer, named[layer.path].value) for layer in chosen]
        leaves, structure = jax.tree.flatten(updates)
        # An update of 16 bits could not reach every kernel of 16 bits.
        changes = [
            jnp.asarray(change, jnp.promote_types(jnp.promote_types(change.dtype, kernel.dtype), jnp.float32))
            for kernel, change in zip(
                kernels, (as_kernel(layer, places[layer.path].value) for layer in chosen), strict=True
            )
        ]
        count = state.count + 1

        def every_change(changes: list[jax.Array], duals: tuple[jax.Array | None, ...]) -> Any:
            pairs = [
                bounded_change(kernel, change, operators_of(layer, circular), settings, dual)
                for kernel, change, layer, dual in zip(kernels, changes, chosen, duals, strict=True)
            ]
            return [change for change, _ in pairs], tuple(dual for _, dual in pairs)

        if period == 1:
            changes, duals = every_change(changes, state.duals)
        else:
            changes, duals = jax.lax.cond(
                count % period == 0, every_change, lambda changes, duals: (changes, duals), changes, state.duals
            )
        for layer, change in zip(chosen, changes, strict=True):
            leaves[places[layer.path].place] = as_leaf(layer, change)
        folded = ScaleBound(settings.bound, [one for one in every_layer if one.normalisation is not None], circular)
        if folded.layers:
            statistics = running_statistics(params, batch_stats)
            paths = dict.fromkeys(path for one in folded.layers for path in (one.path, one.normalisation.scale))
            own = {path: jnp.asarray(leaves[places[path].place]) for path in paths}
            for path, change in scaled_changes(folded, named, own, statistics, count % period == 0).items():
                leaves[places[path].place] = change
        return jax.tree.unflatten(structure, leaves), OperatorNormBoundState(count, duals)

    return optax.GradientTransformationExtraArgs(init, update)


def _without_normalisation(layers: Sequence[ConvLayer]) -> list[ConvLayer]:
    """Return the layers whose own kernels are bounded."""
    return [layer for layer in layers if layer.normalisation is None]
