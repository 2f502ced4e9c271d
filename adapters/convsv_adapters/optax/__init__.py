"""Operator norms in training with optax: a projection, transformations of updates, an optimizer, and a penalty.

>>> import jax.numpy as jnp
>>> import optax
>>> from flax import nnx
>>> from convsv_adapters.flax import conv_layers
>>> model = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
>>> layers = conv_layers(model, jnp.zeros((1, 32, 32, 3)))
>>> bounded = optax.chain(optax.adam(1e-3), operator_norm_bound(1.0, layers))
>>> optimizer = nnx.Optimizer(model, bounded, wrt=nnx.Param)

A tree of parameters carries no geometry. The argument `layers` gives it: see `projection_operator_norm`.
"""

from convsv_adapters._layers import ConvLayer
from convsv_adapters.optax._muon import SteepestDirectionState, conv_muon, scale_by_steepest_direction
from convsv_adapters.optax._penalty import penalty
from convsv_adapters.optax._projection import projection_operator_norm
from convsv_adapters.optax._transform import OperatorNormBoundState, operator_norm_bound

__all__ = [
    "ConvLayer",
    "OperatorNormBoundState",
    "SteepestDirectionState",
    "conv_muon",
    "operator_norm_bound",
    "penalty",
    "projection_operator_norm",
    "scale_by_steepest_direction",
]
