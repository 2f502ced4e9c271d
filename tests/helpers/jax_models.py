"""Networks of flax and equinox, their kernels, and the certified norms of the kernels."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import convsv_core as convsv

__all__ = ["SLACK", "TIGHT", "LinenCNN", "NnxCNN", "equinox_cnn", "images", "kernels", "on_host", "uppers"]

SLACK = 1 + 1e-6
"""Factor by which a certified norm may exceed the bound."""

TIGHT = 1e-7
"""Relative gap of the certificates that are compared with the bound."""


def on_host(kernel: Any) -> np.ndarray[Any, Any]:
    """Return a kernel as a NumPy array, of float32 in place of bfloat16."""
    return np.asarray(kernel, np.float32 if kernel.dtype == jnp.bfloat16 else None)


def kernels(tree: Any, layers: Any) -> dict[str, Any]:
    """Return the kernel of each layer, found without the adapter, as NumPy arrays, for which nothing is compiled."""
    found = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value").removeprefix("params/")
        found[path] = on_host(leaf) if getattr(leaf, "ndim", 0) else leaf
    return {layer.path: found[layer.path] for layer in layers}


def uppers(tree: Any, layers: Any) -> list[float]:
    """Return the certified norms for every input size."""
    stored = kernels(tree, layers)
    return [float(convsv.norm_bounds(stored[layer.path], layer.conv, rtol=TIGHT).upper) for layer in layers]


class LinenCNN(linen.Module):
    """Network of flax's MNIST example."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(features=32, kernel_size=(3, 3))(x)
        x = linen.relu(x)
        x = linen.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = linen.Conv(features=64, kernel_size=(3, 3))(x)
        x = linen.relu(x)
        x = linen.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = linen.Dense(features=256)(x)
        x = linen.relu(x)
        return linen.Dense(features=10)(x)


class NnxCNN(nnx.Module):
    """Network with two convolutions, batch normalisation, dropout and a list."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.rest = nnx.List([nnx.Conv(4, 4, (3, 3), strides=2, feature_group_count=2, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.first(x)))
        x = nnx.relu(self.rest[0](x))
        return self.head(self.dropout(x.mean((1, 2))))


def equinox_cnn() -> eqx.nn.Sequential:
    keys = jax.random.split(jax.random.key(0), 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 4, 3, padding=1, dtype=jnp.float32, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(4, 4, 3, padding="SAME", padding_mode="CIRCULAR", dtype=jnp.float32, key=keys[1]),
            eqx.nn.Lambda(lambda x: x.mean((1, 2))),
            eqx.nn.Linear(4, 2, dtype=jnp.float32, key=keys[2]),
        ]
    )


def images(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape, jnp.float32)
