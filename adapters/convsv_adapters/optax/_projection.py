"""A projection of trees of parameters, like the functions of `optax.projections`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from convsv_adapters._jax.batch_norm import running_statistics
from convsv_adapters._jax.trees import Layers, Leaf, Tree, as_kernel, as_leaf, check_layers, named_leaves
from convsv_adapters._layers import operators_of
from convsv_adapters.optax._kernels import bounded, make_settings
from convsv_adapters.optax._scales import ScaleBound, bounded_scales

__all__ = ["projection_operator_norm"]


def projection_operator_norm(
    tree: Tree,
    bound: float = 1.0,
    *,
    layers: Layers,
    method: str = "dykstra",
    steps: int = 30,
    circular: bool = False,
    batch_stats: Tree = None,
) -> Tree:
    r"""Project convolution kernels onto the ball of the operator norm.

    Solves, for each kernel K that `layers` names and the operator A of its layer,

        minimise \|X - K\|_F over kernels X of K's shape, subject to \|A(X)\| <= bound,

    and leaves the other leaves as they are. "dykstra" approaches the solution from within the ball by some steps. The
    other methods give other kernels within the ball.

    Parameters
    ----------
    tree : pytree of arrays
        Such as flax's ``variables["params"]``, ``nnx.state(model, nnx.Param)``, or an equinox model.
    bound : float, default 1.0
        Largest operator norm, finite and not negative.
    layers : iterable of ConvLayer, or mapping from str
        The geometry of the kernels, since a tree carries none. Either the result of `conv_layers` of
        `convsv_adapters.flax` or `convsv_adapters.equinox`, or a mapping from the path of a kernel in the tree to a
        `convsv_core.Conv` or to ``(conv, input_shape)``. ``conv_layers(..., linear=True)`` has linear layers too. In a
        mapping, a matrix is a linear layer: ``Conv("WIO")`` for one of shape (inputs, outputs).
    method : {"dykstra", "alternating", "rescale", "newton-schulz"}, default "dykstra"
    steps : int, default 30
        Number of iterations. `method` and `steps` are as for `convsv_core.project`.
    circular : bool, default False
        Bound the circular convolution at each of the layer's extents, as in the paper, in place of the layer with its
        own padding for every input size. Extents that the stride does not divide are rounded up to multiples. With
        other padding, the norm of the layer can be larger.
    batch_stats : pytree, optional
        The running statistics, for layers that ``conv_layers(..., batch_norm="fold")`` lists with a normalisation:
        flax's ``variables["batch_stats"]`` or ``nnx.state(model, nnx.BatchStat)``, or equinox's `State`. Not needed
        where `tree` holds them, as linen's `variables` and ``nnx.state(model)`` do. Such a layer is bounded together
        with its normalisation, as both are in evaluation mode: the factors of the normalisation are multiplied by one
        number, and the kernel is left alone. The bound holds for these running statistics.

    Returns
    -------
    pytree
        A tree with the structure, shapes and dtypes of `tree`.

    Raises
    ------
    TypeError
        `layers` gives no geometry.
    ValueError
        `tree` has no leaf at a layer's path, or one of another shape, or there are no running statistics. Extents are
        missing that `circular` or padding that repeats pixels needs. Or `bound`, `method` or `steps` is impossible.

    Notes
    -----
    Traceable by `jax.jit`, where all arguments but `tree` are static. A constant to differentiation. NaN or infinity in
    a kernel gives NaN. The stored kernels satisfy the bound, to a relative 1e-6. For kernels of 16 bits, the norm is
    lowered by the rounding error bound: of the order of the dtype's eps times the root of the number of taps and
    channels. A kernel within the bound comes back bit for bit.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from convsv_core import Conv
    >>> tree = {"kernel": 3 * jnp.ones((3, 3, 1, 1)), "bias": jnp.ones(1)}
    >>> bounded = projection_operator_norm(tree, 1.0, layers={"kernel": Conv("HWIO", padding_mode="zeros")})
    >>> bool(bounded["kernel"].sum() <= 1)
    True
    """
    settings = make_settings(bound, method, steps)
    chosen = check_layers(layers, tree, normalised=True)
    leaves, structure = jax.tree.flatten(tree)
    named = named_leaves(tree)
    for layer in [layer for layer in chosen if layer.normalisation is None]:
        leaf = named[layer.path]
        kernel = bounded(as_kernel(layer, leaf.value), operators_of(layer, circular), settings)
        leaves[leaf.place] = as_leaf(layer, kernel)
    folded = ScaleBound(settings.bound, [layer for layer in chosen if layer.normalisation is not None], circular)
    if folded.layers:
        changed = {path: Leaf(leaf.place, leaves[leaf.place]) for path, leaf in named.items()}
        for path, scale in bounded_scales(folded, changed, running_statistics(tree, batch_stats)).items():
            leaves[named[path].place] = scale.astype(jnp.asarray(named[path].value).dtype)
    return jax.tree.unflatten(structure, leaves)
