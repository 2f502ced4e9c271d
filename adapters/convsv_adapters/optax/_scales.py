"""Batch normalisations with the layers that they follow, within a bound on the norm in evaluation mode.

The factors of the normalisation are what is made smaller. In training a normalisation divides by the spread of the
layer's outputs, so a smaller kernel soon comes with a smaller running variance, and the map would be as large as
before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from convsv_adapters._jax.batch_norm import bounded_kernel
from convsv_adapters._jax.trees import Leaf
from convsv_adapters._layers import ConvLayer, operators_of
from convsv_adapters.optax._kernels import explicit_sharding, on_every_device
from convsv_core import norm_upper_bound
from convsv_core.conv import Conv
from convsv_core.training import CERTIFICATE_RTOL

__all__ = ["ScaleBound", "bounded_scales", "scaled_changes"]

ROUNDING = 6
"""Largest relative rounding error of an entry of a kernel times its scale, in eps.

Proved: a sum, a root and its inverse, two products and a power take six operations, with half an eps of error each but
for the root's inverse, which XLA computes within two. The rest is a margin.
"""

FINE_RTOL = 0.01
"""Largest relative gap of the norm by which a map above its bound is made smaller. A guess: 545 frequencies."""


class ScaleBound:
    """A bound of the norm of layers with their normalisations, for every update.

    Parameters
    ----------
    bound : float
    layers : sequence of ConvLayer
        Layers with normalisations.
    circular : bool
        As for `projection_operator_norm`.
    """

    def __init__(self, bound: float, layers: Sequence[ConvLayer], circular: bool) -> None:
        self.bound, self.layers = bound, layers
        operators = [operators_of(layer, circular) for layer in layers]
        # Operators of a layer differ in their extents and in the norm of the padding. The bound is of every size.
        self.convs = [own[0].conv for own in operators]
        self.padding_norms = [max(one.padding_norm for one in own) for own in operators]


def bounded_scales(
    chosen: ScaleBound,
    named: Mapping[str, Leaf],
    statistics: Mapping[str, Leaf],
    before: Mapping[str, Leaf] | None = None,
) -> dict[str, jax.Array]:
    """Return the factors of normalisations, by path, with which all maps are within the bound once they are stored.

    Parameters
    ----------
    chosen : ScaleBound
    named, statistics : mapping from str to Leaf
        As for `bounded_kernel`; `named` holds the factors before the bound.
    before : mapping from str to Leaf, optional
        The parameters before an update to which a change is added. By default the factors are stored as they are.

    Returns
    -------
    dict from str to array
        In at least float32. Factors of maps within the bound are the given ones.
    """
    shares: dict[str, jax.Array] = {}
    for layer, conv, padding_norm in zip(chosen.layers, chosen.convs, chosen.padding_norms, strict=True):
        path = layer.normalisation.scale
        kernel = _whole(bounded_kernel(layer, named, statistics))
        lost = None
        if before is not None:
            # Adding a change to the factors rounds with the eps of the old ones, however small the new ones are.
            old = jnp.asarray(before[path].value)
            error = jnp.abs(old).astype(jnp.promote_types(old.dtype, jnp.float32)) * float(jnp.finfo(jnp.float32).eps)
            lost = _whole(bounded_kernel(layer, {**named, path: Leaf(before[path].place, error)}, statistics))
        rounding = 2 * (float(jnp.finfo(named[path].value.dtype).eps) + float(jnp.finfo(jnp.float32).eps))
        share = _share(kernel, lost, conv, chosen.bound / padding_norm, rounding)
        shares[path] = share if path not in shares else jnp.minimum(shares[path], share)
    found = {}
    for path, share in shares.items():
        stored = jnp.asarray(named[path].value)
        wide = stored.astype(jnp.promote_types(stored.dtype, jnp.float32))
        found[path] = jnp.where(share < 1, wide * share.astype(wide.dtype), wide)
    return found


def _whole(kernel: jax.Array) -> jax.Array:
    """Return a kernel that is a constant to differentiation, with a whole copy on each device of an explicit mesh."""
    whole = on_every_device(kernel, explicit_sharding(kernel))
    assert whole is not None
    return jax.lax.stop_gradient(whole)


def scaled_changes(
    chosen: ScaleBound,
    named: Mapping[str, Leaf],
    changes: Mapping[str, jax.Array],
    statistics: Mapping[str, Leaf],
    due: jax.Array,
) -> dict[str, jax.Array]:
    """Return the changes of normalisations' factors, by path, after which all maps are within a bound.

    Parameters
    ----------
    chosen : ScaleBound
    named : mapping from str to Leaf
        The parameters before the update.
    changes : mapping from str to array
        The changes of the parameters of the maps.
    statistics : mapping from str to Leaf
        As for `bounded_kernel`.
    due : 0-d array of bool
        Whether this update is to be bounded.
    """
    stored = {path: jnp.asarray(named[path].value) for path in changes}
    factors = {layer.normalisation.scale for layer in chosen.layers}
    # A change of 16 bits could not reach every factor of 16 bits.
    wide = {
        path: change.astype(jnp.promote_types(jnp.promote_types(change.dtype, stored[path].dtype), jnp.float32))
        if path in factors
        else change
        for path, change in changes.items()
    }

    def bounded(changes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        updated = {
            path: Leaf(named[path].place, (stored[path] + change).astype(stored[path].dtype))
            for path, change in changes.items()
        }
        found = {}
        for path, scale in bounded_scales(chosen, updated, statistics, named).items():
            target = (scale - stored[path].astype(scale.dtype)).astype(changes[path].dtype)
            same = scale == updated[path].value.astype(scale.dtype)
            found[path] = jnp.where(same, changes[path], target)
        return found

    def kept(changes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: changes[path] for path in factors}

    return jax.lax.cond(due, bounded, kept, wide)


# This function stands alone, so that layers of one shape and geometry are compiled once.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _share(kernel: jax.Array, lost: jax.Array | None, conv: Conv, bound: float, rounding: float) -> jax.Array:
    """Return the factor, at most 1, with which a kernel is within a bound after its product with the factor is stored.

    `lost` holds bounds of the absolute errors of the stored entries, and `rounding` bounds the relative ones.
    """
    limit = bound / (1 + CERTIFICATE_RTOL)
    own = ROUNDING * float(jnp.finfo(kernel.dtype).eps)
    size = _sum_of_taps(kernel, conv)

    def smaller(kernel: jax.Array) -> jax.Array:
        upper = norm_upper_bound(kernel, conv, rtol=FINE_RTOL).astype(kernel.dtype)
        left = limit if lost is None else jnp.maximum(limit - _sum_of_taps(lost, conv), 0)
        share = left / jnp.maximum(upper + (own + rounding) * size, jnp.finfo(kernel.dtype).tiny)
        return jnp.where(upper + own * size <= limit, jnp.ones((), kernel.dtype), share)

    inside = norm_upper_bound(kernel, conv).astype(kernel.dtype) + own * size <= limit
    return jax.lax.cond(inside, lambda kernel: jnp.ones((), kernel.dtype), smaller, kernel)


def _sum_of_taps(kernel: jax.Array, conv: Conv) -> jax.Array:
    """Return the sum of the Frobenius norms of the taps, which bounds the norm of a convolution."""
    axes = tuple(conv.layout.index(letter) for letter in "OI")
    return jnp.sum(jnp.sqrt(jnp.sum(jnp.abs(kernel) ** 2, axis=axes)))
