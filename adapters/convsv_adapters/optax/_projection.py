"""A projection of parameter trees, as optax has projections."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from convsv_adapters._jax.trees import Layers, Tree, check_layers, named_leaves
from convsv_adapters.optax._kernels import bounded, operators_of, settings_of

__all__ = ["projection_operator_norm"]


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
    settings = settings_of(bound, method, steps)
    chosen = check_layers(layers, tree)
    leaves, structure = jax.tree.flatten(tree)
    named = named_leaves(tree)
    for layer in chosen:
        place, kernel = named[layer.path]
        leaves[place] = bounded(jnp.asarray(kernel), operators_of(layer, circular), settings)
    return jax.tree.unflatten(structure, leaves)
