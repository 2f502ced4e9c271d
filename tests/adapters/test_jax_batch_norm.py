"""Tests of the adapters of JAX's frameworks: batch normalisations in evaluation mode, within a bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from convsv_adapters import equinox as on_equinox
from convsv_adapters import flax as on_flax
from convsv_adapters.optax import conv_muon, operator_norm_bound, penalty, projection_operator_norm
from flax import linen, nnx
from jax_models import images

import convsv_core as convsv

BATCH, IMAGE = images(8, 6, 6, 2), images(1, 6, 6, 2)
LABELS = jnp.arange(8) % 3


# ---- networks: a stem, a residual block, a linear layer with a normalisation, and one that stands alone ----------


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            return linen.BatchNorm(use_running_average=not train, momentum=0.8)(x)

        x = linen.relu(norm(linen.Conv(4, (3, 3), padding="REFLECT")(norm(x))))
        branch = norm(linen.Conv(4, (3, 3))(linen.relu(norm(linen.Conv(4, (3, 3))(x)))))
        x = (x + branch) / 2
        return linen.Dense(3)(linen.tanh(norm(linen.Dense(5)(x.mean((1, 2))))))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.start = nnx.BatchNorm(2, momentum=0.8, rngs=rngs)
        self.convs = nnx.List([nnx.Conv(n, 4, (3, 3), padding=p, rngs=rngs) for n, p in ((2, "REFLECT"), (4, "SAME"))])
        self.second = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(4, momentum=0.8, rngs=rngs) for _ in range(3)])
        self.dense, self.head = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.last = nnx.BatchNorm(5, momentum=0.8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norms[0](self.convs[0](self.start(x))))
        branch = nnx.relu(self.norms[1](self.convs[1](x)))
        x = (x + self.norms[2](self.second(branch))) / 2
        return self.head(nnx.tanh(self.last(self.dense(x.mean((1, 2))))))


class EquinoxNet(eqx.Module):
    start: eqx.nn.BatchNorm
    convs: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]
    dense: eqx.nn.Linear
    last: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array, mode: str) -> None:
        keys = jax.random.split(key, 5)
        norms = [eqx.nn.BatchNorm(n, "batch", momentum=0.8, mode=mode, dtype="float32") for n in (2, 4, 4, 4, 5)]
        self.start, *self.norms, self.last = norms
        modes = ("REFLECT", "ZEROS", "ZEROS")
        self.convs = [
            eqx.nn.Conv2d(n, 4, 3, padding="SAME", padding_mode=m, key=k, dtype=jnp.float32)
            for n, m, k in zip((2, 4, 4), modes, keys, strict=False)
        ]
        self.dense, self.head = (
            eqx.nn.Linear(*n, key=k, dtype="float32") for n, k in (((4, 5), keys[3]), ((5, 3), keys[4]))
        )

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x, state = self.start(x, state)
        x, state = self.norms[0](self.convs[0](x), state)
        x = jax.nn.relu(x)
        branch, state = self.norms[1](self.convs[1](x), state)
        branch, state = self.norms[2](self.convs[2](jax.nn.relu(branch)), state)
        x, state = self.last(self.dense(((x + branch) / 2).mean((1, 2))), state)
        return self.head(jnp.tanh(x)), state


def loss_of(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


class Training(NamedTuple):
    """One epoch of a training, and the network in evaluation mode with the arguments of `lipschitz`."""

    epoch: Callable[[], None]
    network: Callable[[], tuple[Any, Any]]


def linen_training(**options: Any) -> Training:
    model = LinenNet()
    held = {"variables": model.init(jax.random.key(0), BATCH)}
    layers = on_flax.conv_layers(model, BATCH, linear=True, batch_norm="fold")
    tx = optax.chain(optax.adam(0.1), operator_norm_bound(1.0, layers, method="rescale", **options))
    held["state"] = tx.init(held["variables"]["params"])

    @jax.jit
    def step(variables: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, changed = model.apply(given, 3 * BATCH, train=True, mutable=["batch_stats"])
            return loss_of(logits), changed["batch_stats"]

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(gradients, state, variables["params"], batch_stats=stats)
        return {"params": optax.apply_updates(variables["params"], updates), "batch_stats": stats}, state

    def epoch() -> None:
        for _ in range(4):
            held["variables"], held["state"] = step(held["variables"], held["state"])

    return Training(epoch, lambda: (model.bind(held["variables"]), IMAGE))


def nnx_training(**options: Any) -> Training:
    model = NnxNet(nnx.Rngs(0))
    layers = on_flax.conv_layers(model, BATCH, linear=True, batch_norm="fold")
    bound = operator_norm_bound(1.0, layers, method="rescale", **options)
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(0.1), bound), wrt=nnx.Param)

    @nnx.jit
    def step(model: NnxNet, optimizer: nnx.Optimizer) -> None:
        gradients = nnx.grad(lambda model: loss_of(model(3 * BATCH)))(model)
        optimizer.update(model, gradients, batch_stats=nnx.state(model, nnx.BatchStat))

    def epoch() -> None:
        model.train()
        for _ in range(4):
            step(model, optimizer)
        model.eval()

    return Training(epoch, lambda: (model, IMAGE))


def equinox_training(mode: str = "ema", **options: Any) -> Training:
    model, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0), mode)
    batch = jnp.moveaxis(BATCH, -1, 1)
    layers = on_equinox.conv_layers(model, (batch[0], state), linear=True, batch_norm="fold")
    tx = optax.chain(optax.adam(0.1), operator_norm_bound(1.0, layers, method="rescale", **options))
    held = {"model": model, "state": state, "tx": tx.init(eqx.filter(model, eqx.is_inexact_array))}

    @eqx.filter_jit
    def step(model: Any, state: Any, tx_state: Any) -> Any:
        def loss(model: Any, state: Any) -> Any:
            logits, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(3 * batch, state)
            return loss_of(logits), state

        gradients, state = eqx.filter_grad(loss, has_aux=True)(model, state)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, tx_state = tx.update(gradients, tx_state, params, batch_stats=state)
        return eqx.apply_updates(model, updates), state, tx_state

    def epoch() -> None:
        for _ in range(4):
            held["model"], held["state"], held["tx"] = step(held["model"], held["state"], held["tx"])

    def network() -> tuple[Any, Any]:
        model, state = eqx.nn.inference_mode(held["model"]), held["state"]
        return (lambda x: model(x, jax.tree.map(lambda leaf: leaf, state))[0]), batch[0]

    return Training(epoch, network)


TRAININGS = {
    "linen": linen_training,
    "nnx": nnx_training,
    "equinox": equinox_training,
    "equinox, batch": lambda **options: equinox_training("batch", **options),
}


@pytest.mark.parametrize(
    "name", [name if "batch" not in name else pytest.param(name, marks=pytest.mark.thorough) for name in TRAININGS]
)
def test_a_bound_of_one_is_a_network_of_constant_one_after_every_epoch(name: str) -> None:
    training = TRAININGS[name]()
    for _ in range(2):
        training.epoch()
        network, example = training.network()
        found = convsv.lipschitz(network, example)
        assert not found.missing
        assert found.upper <= 1
        assert found.lower is not None
        assert 0 < found.lower <= found.upper
    largest = max(node.log10_upper for node in found.nodes[1:])
    assert largest > -0.02  # a map is at its bound


@pytest.mark.parametrize("name", ["linen", "nnx", "equinox"])
def test_layers_are_listed_with_the_normalisations_that_follow_them(name: str) -> None:
    if name == "equinox":
        model, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0), "ema")
        layers = on_equinox.conv_layers(model, (IMAGE[0].transpose(2, 0, 1), state), linear=True, batch_norm="fold")
        pairs = {"convs/0": "norms/0", "convs/1": "norms/1", "convs/2": "norms/2", "dense": "last", "start": "start"}
        head = "head"
    elif name == "nnx":
        layers = on_flax.conv_layers(NnxNet(nnx.Rngs(0)), IMAGE, linear=True, batch_norm="fold")
        pairs = {"convs/0": "norms/0", "convs/1": "norms/1", "second": "norms/2", "dense": "last", "start": "start"}
        head = "head"
    else:
        layers = on_flax.conv_layers(LinenNet(), IMAGE, linear=True, batch_norm="fold")
        # The outer layer of nested calls is made first, and its name has the lower number.
        pairs = {"Conv_0": "BatchNorm_1", "Conv_1": "BatchNorm_3", "Conv_2": "BatchNorm_2"}
        pairs |= {"Dense_1": "BatchNorm_4", "BatchNorm_0": "BatchNorm_0"}
        head = "Dense_0"
    assert {layer.name: layer.normalisation.name for layer in layers if layer.normalisation is not None} == pairs
    assert [layer.name for layer in layers if layer.normalisation is None] == [head]
    assert len(layers) == len(pairs) + 1 == len(set(layers))


class Shared(nnx.Module):
    """A convolution whose output is used with a normalisation, with another one, and without any."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.norm, self.other = nnx.BatchNorm(2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.checkpoint(lambda x: self.conv(x))(x)
        return self.norm(x=y) + self.other(y, use_running_average=True) + y + self.norm(x)


def test_each_use_of_an_output_counts() -> None:
    layers = on_flax.conv_layers(Shared(nnx.Rngs(0)), IMAGE, batch_norm="fold")
    found = [(layer.name, layer.normalisation and layer.normalisation.name) for layer in layers]
    assert found == [("conv", None), ("conv", "norm"), ("conv", "other"), ("norm", "norm")]


class Turned(nnx.Module):
    """Normalisations that do not scale the channels of the layer before them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv, self.dense = nnx.Conv(2, 6, (3, 3), rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.rows, self.columns = nnx.BatchNorm(6, axis=1, rngs=rngs), nnx.BatchNorm(6, axis=-1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.rows(self.conv(x))
        # The dense layer sees rows here, and its result is turned by the axis of `vmap`.
        return self.columns(jax.vmap(self.dense, in_axes=1, out_axes=1)(x).swapaxes(1, 3))


def test_normalisations_of_other_axes_stand_alone() -> None:
    layers = on_flax.conv_layers(Turned(nnx.Rngs(0)), IMAGE, linear=True, batch_norm="fold")
    found = [(layer.name, layer.normalisation and layer.normalisation.name) for layer in layers]
    assert found == [("conv", None), ("dense", None), ("columns", "columns"), ("rows", "rows")]


def random_variables(model: Any) -> Any:
    """Return variables of a linen model with random numbers, of which variances are positive."""
    leaves, structure = jax.tree.flatten(model.init(jax.random.key(0), BATCH))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    variables = jax.tree.unflatten(
        structure, [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
    return {**variables, "batch_stats": jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.1, variables["batch_stats"])}


def test_the_projection_makes_the_factors_smaller_and_leaves_kernels_alone() -> None:
    model = LinenNet()
    variables = random_variables(model)
    layers = on_flax.conv_layers(model, BATCH, linear=True, batch_norm="fold")
    bounded = projection_operator_norm(variables, 1.0, layers=layers, method="rescale")
    alone = projection_operator_norm(
        variables["params"], 1.0, layers=layers, batch_stats=variables["batch_stats"], method="rescale"
    )
    assert jax.tree.map(jnp.shape, bounded) == jax.tree.map(jnp.shape, variables)
    assert convsv.lipschitz(model.bind(bounded), IMAGE).upper <= 1
    for place in range(3):
        before, after = (tree["params"][f"Conv_{place}"]["kernel"] for tree in (variables, bounded))
        assert bool(jnp.all(before == after))
        before, after = (tree["params"][f"BatchNorm_{place + 1}"]["scale"] for tree in (variables, bounded))
        np.testing.assert_allclose(after / before, after[0] / before[0], rtol=1e-6)
        np.testing.assert_array_equal(alone[f"BatchNorm_{place + 1}"]["scale"], after)
    # What is within the bound stays, bit for bit, though the statistics are those of another collection.
    folded = [layer for layer in layers if layer.normalisation is not None]
    again = projection_operator_norm(bounded, 1.0, layers=folded)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), bounded, again))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_stored_numbers_are_within_the_bound(dtype: str) -> None:
    """Factors of 16 bits, and factors that an update moves far, are rounded towards the inside."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 4)).astype(dtype)
    model = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    layers = on_flax.conv_layers(model, images(1, 6, 6, 4), batch_norm="fold")
    params = {"layers": {"0": {"kernel": kernel}, "1": {"scale": jnp.asarray([1, -2, 0.5, 3], dtype)}}}
    stats = {"layers": {"1": {"var": jnp.asarray([0.1, 2, 3, 1e-4], "float32")}}}
    tx = operator_norm_bound(0.7, layers)
    for scale in (0.0, 1.0, 50.0):
        updates = jax.tree.map(lambda leaf, s=scale: -s * leaf / 3, params)
        changed, _ = tx.update(updates, tx.init(params), params, batch_stats=stats)
        stored = optax.apply_updates(params, changed)["layers"]
        own, factors = (np.asarray(stored[k][n], np.float64) for k, n in (("0", "kernel"), ("1", "scale")))
        folded = own * factors / np.sqrt(np.asarray(stats["layers"]["1"]["var"], np.float64) + 1e-5)
        upper = float(convsv.norm_bounds(folded, convsv.Conv("HWIO"), rtol=1e-6).upper)
        assert upper <= 0.7
        assert upper > (0.66 if dtype != "bfloat16" else 0.6)


@pytest.mark.thorough
def test_only_every_so_many_updates_are_bounded() -> None:
    training = nnx_training(every=4)
    training.epoch()
    assert convsv.lipschitz(*training.network()).upper <= 1


def test_the_penalty_of_a_layer_with_its_normalisation() -> None:
    model = LinenNet()
    variables = random_variables(model)
    layers = on_flax.conv_layers(model, BATCH, linear=True, batch_norm="fold")

    def product(params: Any) -> jax.Array:
        return penalty(params, layers, "log_lipschitz", batch_stats=variables["batch_stats"])

    value, gradient = jax.jit(jax.value_and_grad(product))(variables["params"])
    whole = jax.jit(lambda variables: penalty(variables, layers, "log_lipschitz"))(variables)
    assert float(whole) == pytest.approx(float(value), rel=1e-6)
    # The norm of each map is linear in its factors, and in its kernel.
    for name in ("BatchNorm_0", "BatchNorm_2"):
        own = variables["params"][name]["scale"]
        assert float(jnp.sum(gradient[name]["scale"] * own)) == pytest.approx(1, rel=1e-3)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.all(jnp.isfinite(leaf))), gradient))


def test_wrong_calls() -> None:
    model = nnx.Sequential(nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    layers = on_flax.conv_layers(model, IMAGE, batch_norm="fold")
    params = nnx.state(model, nnx.Param)
    tx = operator_norm_bound(1.0, layers)
    with pytest.raises(ValueError, match=r"nothing at 'layers/1/var'.*wanted batch_stats"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="comes with its normalisation"):
        conv_muon(0.1, layers).init(params)
    with pytest.raises(ValueError, match="batch_norm='both'"):
        on_flax.conv_layers(model, IMAGE, batch_norm="both")
    with pytest.raises(ValueError, match="needs an example_input"):
        on_flax.conv_layers(model, batch_norm="fold")
    with pytest.raises(ValueError, match="has no factors"):
        on_flax.conv_layers(nnx.BatchNorm(2, use_scale=False, rngs=nnx.Rngs(0)), IMAGE, batch_norm="fold")
    other, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0), "ema")
    with pytest.raises(ValueError, match=r"wanted an example_input that holds the model's equinox\.nn\.State"):
        on_equinox.conv_layers(Held(other.start, state), jnp.zeros((2, 4, 4)), batch_norm="fold")
    with pytest.raises(ValueError, match="was not reached"):
        on_equinox.conv_layers(Unused(other.start), (jnp.zeros((2, 4, 4)), state), batch_norm="fold")


class Unused(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        return 2 * x, state


class Held(eqx.Module):
    norm: eqx.nn.BatchNorm
    state: eqx.nn.State

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x, self.state, inference=True)[0]
