"""Tests of the adapters of JAX's frameworks: linear layers, which are convolutions with one tap."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from convsv_adapters import equinox as on_equinox
from convsv_adapters import flax as on_flax
from convsv_adapters.optax import operator_norm_bound, penalty, projection_operator_norm
from flax import linen, nnx
from jax_models import SLACK, LinenCNN, NnxCNN, equinox_cnn, images

import convsv_core as convsv


def matrix_norm(matrix: Any) -> float:
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def test_linear_layers_are_listed_where_they_are_asked_for() -> None:
    for on, model, example, expected in (
        (on_flax, NnxCNN(nnx.Rngs(0)), images(1, 8, 8, 1), {"head/kernel": (1, 4, 2)}),
        (on_flax, LinenCNN(), images(1, 8, 8, 1), {"Dense_0/kernel": (1, 256, 256), "Dense_1/kernel": (1, 256, 10)}),
        (on_equinox, equinox_cnn(), images(1, 8, 8), {"layers/5/weight": (2, 4, 1)}),
    ):
        plain = on.conv_layers(model, example)
        every = on.conv_layers(model, example, linear=True)
        assert [layer for layer in every if not layer.linear] == plain
        found = [layer for layer in every if layer.linear]
        assert {layer.path: layer.kernel_shape for layer in found} == expected
        for layer in found:
            assert (layer.input_shape, layer.reached, layer.note) == ((1,), True, "")
            assert layer.conv.layout == ("OIW" if on is on_equinox else "WIO")


def test_updates_leave_matrices_within_the_bound() -> None:
    model = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    (layer,) = on_equinox.conv_layers(model, linear=True)
    assert (layer.path, layer.weight_shape) == ("weight", (3, 4))
    params = eqx.filter(model, eqx.is_array)
    tx = optax.chain(optax.sgd(1.0), operator_norm_bound(0.5, [layer]))
    state = tx.init(params)
    gradients = jax.tree.map(lambda leaf: -3 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    for _ in range(2):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        assert params.weight.shape == (3, 4)
        assert 0.49 <= matrix_norm(params.weight) <= 0.5 * SLACK
    np.testing.assert_allclose(params.bias, model.bias + 2 * (params.bias - model.bias) / 2)  # it is not bounded


def test_the_projection_of_a_matrix_clips_its_singular_values() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    tree = {"dense": {"kernel": jnp.asarray(matrix)}}
    bounded = projection_operator_norm(tree, 1.0, layers={"dense/kernel": convsv.Conv("WIO")})
    u, s, vh = np.linalg.svd(matrix.astype(float), full_matrices=False)
    np.testing.assert_allclose(bounded["dense"]["kernel"], (u * np.minimum(s, 1)) @ vh, atol=2e-3)
    assert matrix_norm(bounded["dense"]["kernel"]) <= SLACK
    layers = on_equinox.conv_layers(eqx.nn.Linear(5, 3, key=jax.random.key(0)), linear=True)
    with pytest.raises(ValueError, match=r"has shape \(5, 3\): wanted \(3, 5\)"):
        projection_operator_norm({"weight": tree["dense"]["kernel"]}, 1.0, layers=layers)


def test_the_log_of_the_product_is_a_penalty() -> None:
    rng = np.random.default_rng(0)
    tree = {name: jnp.asarray(rng.standard_normal((3, 3))) for name in ("first", "second")}
    layers = dict.fromkeys(tree, convsv.Conv("WIO"))
    value, gradient = jax.jit(jax.value_and_grad(lambda tree: penalty(tree, layers, "log_lipschitz")))(tree)
    assert float(value) == pytest.approx(sum(math.log(matrix_norm(leaf)) for leaf in tree.values()), rel=1e-5)
    for name, leaf in tree.items():
        assert float(jnp.sum(gradient[name] * leaf)) == pytest.approx(1.0, rel=1e-4)


def test_linear_layers_that_are_no_matrix_have_no_geometry() -> None:
    general = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=nnx.Rngs(0))
    (layer,) = on_flax.conv_layers(general, linear=True)
    assert layer.conv is None
    assert "several axes" in layer.note
    with pytest.raises(ValueError, match="has no geometry"):
        projection_operator_norm(nnx.state(general, nnx.Param), 1.0, layers=[layer])
    own = linen.Dense(3, dot_general=lambda *args, **kwargs: 2 * jax.lax.dot_general(*args, **kwargs))
    (layer,) = on_flax.conv_layers(own, images(1, 4), linear=True)
    assert layer.conv is None
    assert "user's" in layer.note
