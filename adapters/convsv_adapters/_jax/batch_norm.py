"""Batch normalisations of JAX models: where their numbers are, and the kernel of a layer with the one behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from convsv_adapters._jax.following import Following
from convsv_adapters._jax.trees import Leaf, Tree, as_kernel, is_alone, named_leaves
from convsv_adapters._layers import ConvLayer, geometry_of, make_layer, one_tap_conv, with_normalisation
from convsv_core.reports.certified import scaled_outputs

__all__ = ["BatchNorm", "bounded_kernel", "check_batch_norm", "normalised_layers", "running_statistics"]

STATISTICS = "batch_stats"
"""The collection of flax's running statistics, with which a path may begin."""


@dataclass(frozen=True)
class BatchNorm:
    """A batch normalisation of a model: static, hashable and comparable.

    Attributes
    ----------
    name : str
        Path of the module in the model.
    scale : str
        Path of the factors in the tree of parameters; "" if it has none.
    variance : str
        Path of the running variance in the tree of running statistics.
    shape : tuple of int
        Shape of factors and variance.
    epsilon : float
    own_forward : bool
        Whether a class of the user's computes the forward pass.
    count, momentum : str, float
        Equinox's "batch" mode: the path of the number of updates, and the share of the variance that each one keeps.
        The running variance begins at 0 there, and is divided by ``1 - momentum ** count``. Elsewhere "" and 0.
    """

    name: str
    scale: str
    variance: str
    shape: tuple[int, ...]
    epsilon: float
    own_forward: bool = False
    count: str = ""
    momentum: float = 0.0


def check_batch_norm(batch_norm: object, example_input: object) -> None:
    """Raise ValueError unless `batch_norm` is None, or is "fold" beside an input."""
    if batch_norm not in (None, "fold"):
        raise ValueError(f"batch_norm={batch_norm!r}: wanted 'fold' or None")
    if batch_norm is not None and example_input is None:
        raise ValueError("batch_norm='fold' needs an example_input, to find the layers that the normalisations follow")


def normalised_layers(
    layers: Sequence[ConvLayer], norms: Mapping[str, BatchNorm], following: Following
) -> list[ConvLayer]:
    """Return the layers of a model, each once for each normalisation behind it, and normalisations that stand alone.

    Raises
    ------
    ValueError
        The call did not reach a normalisation, or one has no factors that could be made smaller.
    """
    for name, norm in norms.items():
        if name not in following.reached:
            raise ValueError(
                f"the normalisation {name!r} was not reached by the call, or within a loop alone, so it is not known "
                f"which layer it follows: wanted an example_input that reaches it, or batch_norm=None"
            )
        if not norm.scale:
            raise ValueError(
                f"the normalisation {name!r} has no factors, so its scale cannot be made smaller, and a smaller "
                f"kernel would soon have a smaller running variance: wanted use_scale=True (flax) or "
                f"channelwise_affine=True (equinox), or batch_norm=None"
            )
    found: list[ConvLayer] = []
    for layer in layers:
        behind = [name for own, name in following.pairs if own == layer.name]
        if not behind or layer.name in following.bare:
            found.append(layer)
        found += [
            with_normalisation(layer, norms[name], unknown_forward=norms[name].own_forward)
            for name in norms
            if name in behind
        ]
    return found + [_alone(norm) for name, norm in norms.items() if name in following.alone]


def _alone(norm: BatchNorm) -> ConvLayer:
    """Return a normalisation that follows no layer, as a convolution of each channel by itself."""
    channels = math.prod(norm.shape)
    return make_layer(
        name=norm.name,
        path=norm.scale,
        kernel_shape=(1, 1, channels),
        conv=one_tap_conv("WIO", channels),
        input_shapes=((1,),),
        normalisation=norm,
        unknown_forward=norm.own_forward,
    )


def running_statistics(tree: Tree, batch_stats: Tree) -> dict[str, Leaf]:
    """Return the leaves among which running variances are looked up: those of `batch_stats`, or else of the tree."""
    return named_leaves(tree if batch_stats is None else batch_stats)


def bounded_kernel(layer: ConvLayer, named: Mapping[str, Leaf], statistics: Mapping[str, Leaf]) -> jax.Array:
    """Return the kernel whose norm is a layer's: the stored one, or the one of a layer and its normalisation.

    Parameters
    ----------
    layer : ConvLayer
    named : mapping from str to Leaf
        The leaves of the parameters, by path.
    statistics : mapping from str to Leaf
        The leaves from `running_statistics`.

    Returns
    -------
    array
        With the axes that ``layer.conv.layout`` names. In at least float32 where there is a normalisation: each entry
        has a relative rounding error of a few eps.

    Raises
    ------
    ValueError
        There are no factors or no running variance at the normalisation's paths.
    """
    norm: BatchNorm | None = layer.normalisation
    if norm is None:
        return as_kernel(layer, named[layer.path].value)
    scale = _factors(norm, named, statistics)
    if is_alone(layer):
        return jnp.reshape(scale, layer.kernel_shape)
    kernel = as_kernel(layer, named[layer.path].value)
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return scaled_outputs(kernel, geometry_of(layer), scale)


def _factors(norm: BatchNorm, named: Mapping[str, Leaf], statistics: Mapping[str, Leaf]) -> jax.Array:
    """Return the number by which a normalisation multiplies each channel in evaluation mode."""
    weight = _stored(norm, norm.scale, named, "parameters")
    variance = _stored(norm, norm.variance, statistics, "running statistics")
    for array, path in ((weight, norm.scale), (variance, norm.variance)):
        if tuple(array.shape) != norm.shape:
            raise ValueError(f"the array at {path!r} has shape {tuple(array.shape)}: wanted {norm.shape}, its layer's")
    if norm.count:
        count = _stored(norm, norm.count, statistics, "running statistics")
        power = jnp.asarray(norm.momentum, variance.dtype) ** count
        variance = variance / jnp.where(count == 0, 1, 1 - power)
    return weight * jax.lax.rsqrt(variance + norm.epsilon)


def _stored(norm: BatchNorm, path: str, leaves: Mapping[str, Leaf], what: str) -> jax.Array:
    leaf = leaves.get(path) or leaves.get(f"{STATISTICS}/{path}")
    if leaf is None:
        raise ValueError(
            f"the normalisation {norm.name!r} has nothing at {path!r} among the {what}: wanted batch_stats, the "
            f"running statistics of flax or the State of equinox, or a tree of variables that holds them"
        )
    array = jnp.asarray(leaf.value)
    return array if jnp.issubdtype(array.dtype, jnp.integer) else array.astype(jnp.promote_types(array.dtype, "f4"))
