"""A penalty on the singular values of convolution kernels in a parameter tree."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from convsv_adapters._jax.trees import Layers, Tree, check_layers, named_leaves
from convsv_adapters._operators import check_penalty, layer_penalty

__all__ = ["penalty"]


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
