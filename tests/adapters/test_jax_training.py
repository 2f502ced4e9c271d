"""Tests of the adapter of optax: kernels after training steps, and the penalty."""

from __future__ import annotations

import os
import subprocess
import sys
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
from jax_models import SLACK, TIGHT, NnxCNN, equinox_cnn, images, on_host, uppers

import convsv_core as convsv

BOUND = 0.5
STEPS = 20


def test_flax_nnx_ends_within_the_bound() -> None:
    model = NnxCNN(nnx.Rngs(0))
    batch = images(4, 8, 8, 1)
    layers = on_flax.conv_layers(model, batch)
    assert max(uppers(nnx.state(model, nnx.Param), layers)) > BOUND
    tx = optax.chain(optax.adam(0.1), operator_norm_bound(BOUND, layers, method="dykstra"))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: NnxCNN, optimizer: nnx.Optimizer[Any]) -> None:
        gradients = nnx.grad(lambda model: jnp.mean((model(batch) - 1) ** 2))(model)
        optimizer.update(model, gradients)

    for _ in range(STEPS):
        step(model, optimizer)
    norms = uppers(nnx.state(model, nnx.Param), layers)
    assert max(norms) <= BOUND * SLACK
    assert max(norms) >= BOUND / 1.02  # of which the grid that stands for every input size takes 1.01


@pytest.mark.thorough
def test_flax_linen_ends_within_the_bound() -> None:
    class Small(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = linen.relu(linen.Conv(4, (3, 3))(x))
            return linen.Dense(2)(linen.ConvTranspose(3, (4, 4), (2, 2))(x).mean((1, 2)))

    model, batch = Small(), images(4, 6, 6, 1)
    params = model.init(jax.random.key(0), batch)
    layers = on_flax.conv_layers(model, batch)
    tx = optax.chain(optax.sgd(0.5), operator_norm_bound(BOUND, layers, method="rescale"))
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradients = jax.grad(lambda params: jnp.mean((model.apply(params, batch) - 1) ** 2))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    assert max(uppers(params, layers)) <= BOUND * SLACK


@pytest.mark.thorough
def test_equinox_ends_within_the_bound_every_other_step() -> None:
    model, batch = equinox_cnn(), images(4, 1, 8, 8)
    layers = on_equinox.conv_layers(model, batch[0])
    tx = optax.chain(optax.adam(0.1), operator_norm_bound(BOUND, layers, every=2, method="dykstra"))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        gradients = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(batch) - 1) ** 2))(model)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    seen = []
    for _ in range(STEPS):
        model, state = step(model, state)
        seen.append(float(convsv.norm_upper_bound(np.asarray(model.layers[0].weight), layers[0].conv, rtol=0.01)))
    assert max(uppers(eqx.filter(model, eqx.is_array), layers)) <= BOUND * SLACK
    assert max(seen[::2]) > BOUND * 1.02
    assert max(seen[1::2]) <= BOUND * SLACK * 1.01
    assert int(state[1].count) == STEPS


def test_the_circular_operator_is_bounded_where_it_is_asked_for() -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 2), jnp.float32)
    layers = {"kernel": (convsv.Conv("HWIO", padding_mode="zeros"), (4, 4))}
    found = projection_operator_norm({"kernel": kernel}, 1.0, layers=layers, circular=True)["kernel"]
    conv = convsv.Conv("HWIO")
    assert float(convsv.norm_bounds(on_host(found), conv, input_shape=(4, 4), rtol=TIGHT).upper) <= SLACK
    nearest = convsv.project(on_host(kernel), (4, 4), conv, 1.0)
    assert np.linalg.norm(on_host(found) - on_host(kernel)) <= 1.01 * np.linalg.norm(nearest.kernel - on_host(kernel))


def test_reflected_padding_counts() -> None:
    layer = nnx.Conv(2, 2, (3,), padding="REFLECT", rngs=nnx.Rngs(0))
    layers = on_flax.conv_layers(layer, images(1, 6, 2))
    state = projection_operator_norm(nnx.state(layer, nnx.Param), 0.25, layers=layers)
    bounds = convsv.norm_bounds(on_host(state["kernel"][...]), layers[0].conv, input_shape=(6,), rtol=TIGHT)
    assert float(bounds.upper) <= 0.25 * SLACK


LESS_USUAL = [pytest.param(dtype, marks=pytest.mark.thorough) for dtype in (jnp.float16, jnp.float64)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, *LESS_USUAL], ids=str)
def test_stored_kernels_satisfy_the_bound_in_every_dtype(dtype: Any) -> None:
    keys = jax.random.split(jax.random.key(0))
    conv = convsv.Conv("HWIO", padding_mode="zeros")
    params = {"kernel": jax.random.normal(keys[0], (3, 3, 2, 4), dtype)}
    change = {"kernel": 100 * jax.random.normal(keys[1], (3, 3, 2, 4), dtype)}
    tx = operator_norm_bound(1.0, {"kernel": conv}, method="rescale")
    updates, state = jax.jit(tx.update)(change, tx.init(params), params)
    stored = optax.apply_updates(params, updates)
    assert stored["kernel"].dtype == dtype
    assert float(convsv.norm_bounds(on_host(stored["kernel"]), conv, rtol=TIGHT).upper) <= SLACK
    again, _ = tx.update({"kernel": jnp.zeros_like(stored["kernel"])}, state, stored)
    assert not jnp.any(again["kernel"])

    projected = projection_operator_norm(params, 1.0, layers={"kernel": conv}, method="rescale")
    assert projected["kernel"].dtype == dtype
    assert float(convsv.norm_bounds(on_host(projected["kernel"]), conv, rtol=TIGHT).upper) <= SLACK
    twice = projection_operator_norm(projected, 1.0, layers={"kernel": conv}, method="rescale")
    assert jnp.array_equal(twice["kernel"], projected["kernel"])


def test_updates_need_parameters() -> None:
    tx = operator_norm_bound(1.0, {"kernel": convsv.Conv("WIO")})
    params = {"kernel": jnp.ones((3, 1, 1))}
    with pytest.raises(ValueError, match="params is None"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="no kernel at 'kernel'"):
        tx.update({"other": params["kernel"]}, tx.init(params), params)


def test_a_bound_of_zero_and_nan() -> None:
    layers = {"kernel": convsv.Conv("WIO")}
    found = projection_operator_norm({"kernel": jnp.ones((3, 1, 1))}, 0, layers=layers, method="rescale")
    assert not jnp.any(found["kernel"])
    tree = {"kernel": jnp.full((3, 1, 1), jnp.nan)}
    found = projection_operator_norm(tree, 1.0, layers=layers, method="rescale")
    assert jnp.all(jnp.isnan(found["kernel"]))


def test_the_penalty_is_that_of_the_core_and_differentiable() -> None:
    model = NnxCNN(nnx.Rngs(0))
    layers = on_flax.conv_layers(model, images(1, 9, 9, 1))
    state = nnx.state(model, nnx.Param)
    found, gradient = jax.jit(jax.value_and_grad(lambda tree: penalty(tree, layers, bound=0.1)))(state)
    conv = convsv.Conv("HWIO", stride=2, groups=2)
    expected = convsv.penalties.norm_hinge(on_host(model.first.kernel[...]), (9, 9), convsv.Conv("HWIO"), 0.1)
    expected += convsv.penalties.norm_hinge(on_host(model.rest[0].kernel[...]), (10, 10), conv, 0.1)
    assert abs(float(found) - float(expected)) <= 100 * np.finfo(np.float32).eps * float(expected)
    assert float(jnp.linalg.norm(gradient["first"]["kernel"][...])) > 0
    assert not jnp.any(gradient["head"]["kernel"][...])

    unknown = [layer for layer in on_flax.conv_layers(model) if layer.name == "first"]
    upper = float(convsv.norm_upper_bound(on_host(model.first.kernel[...]), convsv.Conv("HWIO")))
    hinge = float(penalty(state, unknown, bound=0.1))
    assert abs(hinge - (upper - 0.1) ** 2) <= 100 * np.finfo(np.float32).eps * hinge
    with pytest.raises(ValueError, match="the extents of the layer 'first'"):
        penalty(state, unknown, "schatten", p=4)


SHARDED = """
import jax, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import convsv_core as convsv
from convsv_adapters.optax import operator_norm_bound

assert jax.device_count() == 8
conv = convsv.Conv("WIO", padding_mode="zeros")
kernel = jax.random.normal(jax.random.key(0), (3, 4, 8))
tx = optax.chain(optax.sgd(0.1), operator_norm_bound(1.0, {"kernel": conv}))

@jax.jit
def step(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

def trained(kernel):
    params = {"kernel": kernel}
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params["kernel"]

alone = np.asarray(trained(kernel))
replicated, sharded = P(), P(None, None, "devices")
for kind, spec in (AxisType.Auto, replicated), (AxisType.Auto, sharded), (AxisType.Explicit, sharded):
    sharding = NamedSharding(jax.make_mesh((8,), ("devices",), axis_types=(kind,)), spec)
    found = trained(jax.device_put(kernel, sharding))
    assert len(found.sharding.device_set) == 8
    assert found.sharding.is_equivalent_to(sharding, 3), found.sharding
    stored = np.asarray(jax.device_get(found))
    eps = np.finfo(stored.dtype).eps
    assert np.abs(stored - alone).max() <= 1e6 * eps * np.abs(alone).max()  # of iterations that branch on comparisons
    assert convsv.norm_bounds(stored, conv, rtol=1e-7).upper <= 1 + 1e-6
print("done")
"""


@pytest.mark.thorough
def test_sharded_parameters_stay_sharded_and_within_the_bound() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
