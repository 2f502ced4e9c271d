"""Steps of `conv_muon`: their norms, the parts that optax's AdamW does, and PyTorch's steps for the same gradients."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from convsv_adapters._layers import make_layer  # noqa: E402
from convsv_adapters.optax import conv_muon, operator_norm_bound, scale_by_steepest_direction  # noqa: E402

import convsv_core as convsv  # noqa: E402
from convsv_core import Conv  # noqa: E402
from convsv_core.layers import lattice  # noqa: E402

LAYERS = {
    "one/kernel": Conv("HWIO", padding_mode="zeros"),
    "two/kernel": Conv("HWIO", stride=2, padding_mode="zeros", groups=2),
}
SLACK = 1 + 1e-5


def tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"one": {"kernel": (3, 3, 2, 4), "bias": (4,)}, "two": {"kernel": (3, 3, 2, 6)}, "dense": (6, 2)}
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda one: isinstance(one, tuple))


def steps(optimizer: Any, count: int) -> list[Any]:
    """Return the parameters before and after each of `count` compiled steps, whose gradients are drawn."""
    params = tree()
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    found = [params]
    for seed in range(count):
        params, state = step(params, state, tree(seed + 1))
        found.append(params)
    return found


def test_the_norm_of_a_step_is_the_rate_times_the_factor_and_the_rest_is_adamw() -> None:
    found = steps(conv_muon(0.1, LAYERS, adam_learning_rate=1e-2, adam_weight_decay=0.1), 3)
    factors = {"one/kernel": (4 / 2) ** 0.5, "two/kernel": (6 / (4 * 4)) ** 0.5}
    for before, after in itertools.pairwise(found):
        for path, conv in LAYERS.items():
            name, leaf = path.split("/")
            change = np.asarray(after[name][leaf] - before[name][leaf])
            norm = float(convsv.norm_bounds(change, lattice(conv)).upper)
            assert 0.84 * 0.1 * factors[path] <= norm <= 0.1 * factors[path] * 1.001 * SLACK
    adamw = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    others = steps(adamw, 3)
    np.testing.assert_allclose(found[-1]["dense"], others[-1]["dense"], rtol=1e-6)
    np.testing.assert_allclose(found[-1]["one"]["bias"], others[-1]["one"]["bias"], rtol=1e-6)


@pytest.mark.thorough
def test_steps_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    from convsv_adapters.torch import ConvMuon

    layer = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)
    optimizer = ConvMuon(layer, lr=0.1, weight_decay=0.2)
    path = "one/kernel"
    transform = conv_muon(0.1, {path: LAYERS[path]}, weight_decay=0.2)
    params = {"one": {"kernel": tree()["one"]["kernel"]}}
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.asarray(params["one"]["kernel"]).transpose(3, 2, 0, 1)))
    state = transform.init(params)
    update = jax.jit(transform.update)
    for seed in range(3):
        gradients = {"one": {"kernel": tree(seed + 1)["one"]["kernel"]}}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        layer.weight.grad = torch.tensor(np.asarray(gradients["one"]["kernel"]).transpose(3, 2, 0, 1).copy())
        optimizer.step()
    ours = np.asarray(params["one"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(ours, layer.weight.detach().numpy(), atol=1e-4)


def test_a_gradient_of_nan_gives_nan_and_other_leaves_pass() -> None:
    transform = scale_by_steepest_direction({"kernel": Conv("WIO", padding_mode="zeros")}, method="flat")
    gradients = {"kernel": jnp.full((3, 2, 2), jnp.nan), "bias": jnp.arange(2.0)}
    updates, _ = jax.jit(transform.update)(gradients, transform.init(gradients))
    assert bool(jnp.isnan(updates["kernel"]).all())
    assert updates["bias"].tolist() == [0.0, 1.0]


def test_linear_layers_take_the_polar_factor() -> None:
    optimizer = conv_muon(0.1, {"dense": Conv("WIO"), "one/kernel": LAYERS["one/kernel"]})
    before, after = steps(optimizer, 1)
    u, _, vh = np.linalg.svd(np.asarray(tree(1)["dense"]), full_matrices=False)
    change = np.asarray(after["dense"] - before["dense"])
    np.testing.assert_allclose(change, -0.1 * (2 / 6) ** 0.5 * (u @ vh), atol=1e-5)


def test_a_first_gradient_of_zero_leaves_later_updates_as_good() -> None:
    transform = scale_by_steepest_direction(LAYERS)
    update = jax.jit(transform.update)
    zero = jax.tree.map(jnp.zeros_like, tree())
    wanted, _ = update(tree(), transform.init(tree()))
    updates, state = update(zero, transform.init(tree()))
    assert not any(np.any(one) for one in jax.tree.leaves(updates))
    assert not any(np.any(one) for one in jax.tree.leaves(state.matrices))
    updates, _ = update(tree(), state)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), updates, wanted)


def test_rates_and_momentum_may_be_injected() -> None:
    nnx = pytest.importorskip("flax.nnx")
    from convsv_adapters.flax import conv_layers

    model = nnx.Sequential(nnx.Conv(2, 3, (3,), rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    layers = conv_layers(model, jnp.zeros((1, 8, 2)), linear=True)
    injected = optax.inject_hyperparams(conv_muon, static_args=("iterations",))
    optimizer = nnx.Optimizer(model, injected(0.1, layers), wrt=nnx.Param)
    before = np.asarray(model.layers[1].kernel[...])
    optimizer.opt_state.hyperparams["learning_rate"][...] = jnp.asarray(0.3)
    optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((1, 8, 2))) ** 2).sum())(model))
    change = np.asarray(model.layers[1].kernel[...]) - before
    assert np.linalg.norm(change, 2) == pytest.approx(0.3 * (2 / 3) ** 0.5, rel=1e-5)
    with pytest.raises(TypeError, match=r"static_args=\('iterations',\)"):
        optax.inject_hyperparams(conv_muon)(0.1, LAYERS).init(tree())


@pytest.mark.parametrize(
    "make", [lambda layers: conv_muon(0.1, layers), lambda layers: operator_norm_bound(1.0, layers)]
)
def test_layers_may_be_an_iterator(make: Any) -> None:
    kernel = jnp.ones((3, 2, 2))
    layer = make_layer(name="one", path="one", kernel_shape=(3, 2, 2), conv=Conv("WIO", padding_mode="zeros"))
    transform = make(iter([layer]))
    params = {"one": kernel}
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates["one"].shape == kernel.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [({"method": "newton"}, "method='newton'"), ({"scaling": "w"}, "scaling='w'"), ({"momentum": 1.0}, "momentum=1.0")],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scale_by_steepest_direction(LAYERS, **options)


SHARDED = """
import jax, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import convsv_core as convsv
from convsv_adapters.optax import conv_muon

conv = convsv.Conv("WIO", padding_mode="zeros")
kernel, gradient = (jax.random.normal(jax.random.key(seed), (3, 4, 8)) for seed in range(2))
tx = conv_muon(0.1, {"kernel": conv})

@jax.jit
def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

def trained(place):
    params, gradients = {"kernel": place(kernel)}, {"kernel": place(gradient)}
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state, gradients)
    return params["kernel"]

alone = np.asarray(trained(lambda array: array))
spec = P(None, None, "devices")
for kind in (AxisType.Auto, AxisType.Explicit):
    sharding = NamedSharding(jax.make_mesh((4,), ("devices",), axis_types=(kind,)), spec)
    found = trained(lambda array: jax.device_put(array, sharding))
    assert found.sharding.is_equivalent_to(sharding, 3), found.sharding
    np.testing.assert_allclose(np.asarray(jax.device_get(found)), alone, atol=1e-4)
print("done")
"""


@pytest.mark.thorough
def test_sharded_parameters_take_the_steps_of_whole_ones() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
