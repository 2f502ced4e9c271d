"""Operator norms in training with optax: a projection, a transformation of updates, and a penalty.

>>> import jax.numpy as jnp
>>> import optax
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

from convsv_adapters._jax.trees import ConvLayer
from convsv_adapters.optax._penalty import penalty
from convsv_adapters.optax._projection import projection_operator_norm
from convsv_adapters.optax._transform import OperatorNormBoundState, operator_norm_bound

__all__ = ["ConvLayer", "OperatorNormBoundState", "operator_norm_bound", "penalty", "projection_operator_norm"]
