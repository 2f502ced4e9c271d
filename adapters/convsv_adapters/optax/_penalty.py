"""A penalty on the singular values of the convolution kernels in a tree of parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from convsv_adapters._jax.batch_norm import bounded_kernel, running_statistics
from convsv_adapters._jax.trees import Layers, Tree, check_layers, named_leaves
from convsv_adapters._layers import check_penalty, layer_penalty

__all__ = ["penalty"]


def penalty(
    tree: Tree, layers: Layers, kind: str = "norm_hinge", *, batch_stats: Tree = None, **options: Any
) -> jax.Array:
    """Sum a penalty on the singular values over convolution kernels, to add to a loss.

    The operator of each layer is the circular one at the largest of its extents, whatever padding the layer has. But
    "log_lipschitz" is of the certified upper bound of the layer with its own padding: summed over all layers, linear
    ones too, it is the logarithm of the product.

    Parameters
    ----------
    tree : pytree of arrays
        The parameters.
    layers : iterable of ConvLayer, or mapping from str
        The geometry of the kernels, as for `projection_operator_norm`.
    kind : str, default "norm_hinge"
        A function of `convsv_core.penalties`.
    batch_stats : pytree, optional
        The running statistics, as for `projection_operator_norm`. A layer with a normalisation counts with it.
    **options
        Arguments of the penalty, such as ``bound=1.0``.

    Returns
    -------
    0-d array
        Differentiable by `tree` and traceable. For layers without extents, "norm_hinge" and "squared_norm" take the
        upper bound for every input size, and "orthogonality" takes the infinite lattice.

    Raises
    ------
    TypeError
        `layers` gives no geometry.
    ValueError
        There is no such `kind`, `tree` has no leaf at a layer's path, or the penalty needs extents that are not known.

    Examples
    --------
    >>> from convsv_core import Conv
    >>> tree = {"kernel": jnp.ones((3, 3, 1, 1))}
    >>> layers = {"kernel": (Conv("HWIO"), (8, 8))}
    >>> float(penalty(tree, layers, "norm_hinge", bound=1.0))
    64.0
    """
    check_penalty(kind)
    chosen = check_layers(layers, tree, normalised=True)
    named, statistics = named_leaves(tree), running_statistics(tree, batch_stats)
    parts = [layer_penalty(layer, bounded_kernel(layer, named, statistics), kind, options) for layer in chosen]
    return functools.reduce(jnp.add, parts)
