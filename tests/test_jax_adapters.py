"""The adapters of flax, equinox and optax: what they find in a model, and what holds after a training step."""

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

import convsv_core as convsv

SLACK = 1 + 1e-6
"""What a certified norm may exceed the bound by."""

TIGHT = 1e-7
"""Gap of the certificates, which are compared with the bound."""

BOUND = 0.5
STEPS = 20


def on_host(kernel: Any) -> np.ndarray[Any, Any]:
    """In a dtype that holds it and NumPy has."""
    return np.asarray(kernel, np.float32 if kernel.dtype == jnp.bfloat16 else None)


def kernels(tree: Any, layers: Any) -> dict[str, Any]:
    """The kernel of each layer, looked up apart from the adapter, on NumPy, which compiles nothing."""
    found = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value").removeprefix("params/")
        found[path] = on_host(leaf) if getattr(leaf, "ndim", 0) else leaf
    return {layer.path: found[layer.path] for layer in layers}


def uppers(tree: Any, layers: Any) -> list[float]:
    """Certified norms for every input size."""
    stored = kernels(tree, layers)
    return [float(convsv.norm_bounds(stored[layer.path], layer.conv, rtol=TIGHT).upper) for layer in layers]


# ---- models ------------------------------------------------------------------------------------------------


class LinenCNN(linen.Module):
    """The network of flax's MNIST example."""

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
    """Two convolutions, batch normalisation, dropout and a list."""

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


# ---- finding layers ----------------------------------------------------------------------------------------


def test_the_cnn_of_flax_is_found_by_tracing_shapes() -> None:
    example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    first, second = on_flax.conv_layers(LinenCNN(), example)
    assert (first.path, first.kernel_shape, first.input_shapes) == ("Conv_0/kernel", (3, 3, 1, 32), ((28, 28),))
    assert (second.path, second.kernel_shape, second.input_shapes) == ("Conv_1/kernel", (3, 3, 32, 64), ((14, 14),))
    assert first.conv == second.conv == convsv.Conv("HWIO", padding="same", padding_mode="zeros")
    assert hash(first) == hash(on_flax.conv_layers(LinenCNN(), example)[0])


def test_an_nnx_model_is_found_and_left_as_it_is() -> None:
    model = NnxCNN(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    first, second = on_flax.conv_layers(model, images(2, 9, 9, 1))
    assert (first.name, first.path, first.input_shapes) == ("first", "first/kernel", ((9, 9),))
    assert (second.name, second.path, second.input_shapes) == ("rest/0", "rest/0/kernel", ((9, 9),))
    assert (second.conv.strides, second.conv.groups, second.kernel_shape) == ((2, 2), 2, (3, 3, 2, 4))
    assert second.conv.pads((3, 3)) == ((1, 1), (1, 1))  # 9 elements to 5, as JAX pads these
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert type(model.first) is nnx.Conv
    assert not model.dropout.deterministic
    assert [layer.input_shapes for layer in on_flax.conv_layers(model)] == [(), ()]


def test_an_equinox_model_is_found_and_left_as_it_is() -> None:
    model = equinox_cnn()
    first, second = on_equinox.conv_layers(model, images(1, 8, 8))
    assert (first.path, first.input_shapes) == ("layers/0/weight", ((8, 8),))
    assert first.conv == convsv.Conv("OIHW", padding=1, padding_mode="zeros")
    assert (second.path, second.input_shapes) == ("layers/3/weight", ((4, 4),))
    assert second.conv == convsv.Conv("OIHW")
    assert type(model.layers[0]) is eqx.nn.Conv2d


def test_a_layer_used_at_two_extents_is_one() -> None:
    class Twice(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            layer = linen.Conv(2, (3,), strides=2, name="layer")
            x = layer(layer(x))
            return linen.Dropout(0.5, deterministic=not train)(x)

    (layer,) = on_flax.conv_layers(Twice(), (images(1, 9, 2), True))
    assert layer.input_shapes == ((9,), (5,))
    (layer,) = on_flax.conv_layers(Twice(), {"x": images(1, 8, 2), "train": False})
    assert layer.input_shapes == ((8,), (4,))
    assert layer.conv.padding == "same"


def test_what_no_conv_expresses_has_a_note() -> None:
    rngs = nnx.Rngs(0)
    key = jax.random.key(0)
    cases: list[tuple[Any, Any, str]] = [
        (nnx.Conv(1, 1, (3,), input_dilation=2, rngs=rngs), on_flax, "dilated"),
        (nnx.Conv(1, 1, (1,), mask=jnp.zeros((1, 1, 1)), rngs=rngs), on_flax, "mask"),
        (eqx.nn.ConvTranspose1d(4, 4, 3, groups=2, key=key), on_equinox, "groups"),
        (eqx.nn.WeightNorm(eqx.nn.Conv1d(1, 1, 3, key=key)), on_equinox, "WeightNorm"),
    ]
    for model, adapter, words in cases:
        (layer,) = adapter.conv_layers(model)
        assert layer.conv is None
        assert words in layer.note
    (layer,) = on_flax.conv_layers(linen.ConvLocal(2, (3,)), images(1, 4, 2))
    assert layer.conv is None
    assert "place to place" in layer.note
    with pytest.raises(ValueError, match=r"no geometry: its kernel differs"):
        penalty({"kernel": jnp.zeros(layer.kernel_shape)}, [layer], bound=1.0)


def test_stacked_kernels_have_a_note() -> None:
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return linen.Conv(2, (3,))(x), None

    stacked = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    (layer,) = on_flax.conv_layers(stacked(), (images(1, 4, 2), None))
    assert layer.conv is None
    assert "scan" in layer.note


def test_boxed_and_rematerialised_kernels_are_found() -> None:
    class Boxed(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            initialiser = linen.with_partitioning(linen.initializers.lecun_normal(), (None, None, "model"))
            return linen.remat(linen.Conv)(2, (3,), kernel_init=initialiser, name="layer")(x)

    model = Boxed()
    variables = model.init(jax.random.key(0), images(1, 6, 2))
    layers = on_flax.conv_layers(model, images(1, 6, 2))
    assert [(layer.path, layer.kernel_shape, layer.note) for layer in layers] == [("layer/kernel", (3, 2, 2), "")]
    for tree in variables, variables["params"]:
        found = projection_operator_norm(tree, 0.1, layers=layers, method="rescale")
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        assert max(uppers(found, layers)) <= 0.1 * SLACK
    (report,) = convsv.analyze(model.bind(variables), images(1, 6, 2))
    assert report.input_shape == (6,)


def test_what_cannot_be_found_is_asked_for() -> None:
    with pytest.raises(ValueError, match="example_input is None"):
        on_flax.conv_layers(LinenCNN())
    with pytest.raises(TypeError, match=r"wanted a flax\.nnx\.Module"):
        on_flax.conv_layers(object())
    with pytest.raises(TypeError, match=r"wanted an equinox\.Module"):
        on_equinox.conv_layers(object())
    tree = {"conv": {"kernel": jnp.ones((3, 3, 1, 2))}}
    with pytest.raises(TypeError, match=r"carries no geometry.*'conv/kernel' \(3, 3, 1, 2\)"):
        projection_operator_norm(tree, 1.0, layers=None)  # type: ignore[arg-type]
    conv = convsv.Conv("HWIO")
    with pytest.raises(ValueError, match=r"no kernel at 'other/kernel'.*'conv/kernel'"):
        projection_operator_norm(tree, 1.0, layers={"other/kernel": conv})
    with pytest.raises(TypeError, match="wanted ConvLayer objects"):
        projection_operator_norm(tree, 1.0, layers={"conv/kernel": "HWIO"})
    with pytest.raises(ValueError, match="circular=True: the extents"):
        projection_operator_norm(tree, 1.0, layers={"conv/kernel": conv}, circular=True)
    with pytest.raises(ValueError, match="repeats pixels"):
        projection_operator_norm(tree, 1.0, layers={"conv/kernel": convsv.Conv("HWIO", padding_mode="reflect")})
    with pytest.raises(ValueError, match="bound=-1"):
        projection_operator_norm(tree, -1, layers={"conv/kernel": conv})
    with pytest.raises(ValueError, match="kind='norm'"):
        penalty(tree, {"conv/kernel": conv}, "norm")


# ---- the framework's own convolution -----------------------------------------------------------------------


def dense_norm(function: Any, shape: tuple[int, ...]) -> float:
    matrix = jax.jacobian(lambda x: function(x).reshape(-1))(jnp.zeros(shape, jnp.float64))
    return float(np.linalg.norm(np.asarray(matrix).reshape(matrix.shape[0], -1), 2))


FLAX_GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"strides": 2, "padding": "VALID", "kernel_dilation": 2},
    {"strides": 2, "feature_group_count": 2, "padding": ((2, 0), (0, 1))},
    {"padding": "CIRCULAR", "strides": 2, "kernel_dilation": (1, 2)},
    {"padding": "REFLECT", "kernel_dilation": (2, 1)},
]


@pytest.mark.parametrize("geometry", FLAX_GEOMETRIES, ids=str)
def test_the_operator_is_that_of_nnx(geometry: dict[str, Any]) -> None:
    extents = (6, 7) if geometry.get("strides") == 2 and geometry.get("padding") != "CIRCULAR" else (6, 4)
    layer = nnx.Conv(2, 4, (3, 2), use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **geometry)
    (found,) = on_flax.conv_layers(layer, images(1, *extents, 2))
    norm = convsv.operator_norm(np.asarray(layer.kernel[...]), found.input_shape, found.conv)
    expected = dense_norm(layer, (1, *extents, 2))
    assert abs(float(norm) - expected) <= 1e3 * np.finfo(np.float64).eps * expected


def test_causal_padding_is_that_of_flax() -> None:
    layer = linen.Conv(3, (3,), use_bias=False, padding="CAUSAL", param_dtype=jnp.float64)
    variables = layer.init(jax.random.key(0), images(1, 5, 2))
    (found,) = on_flax.conv_layers(layer.bind(variables), images(1, 5, 2))
    norm = convsv.operator_norm(np.asarray(variables["params"]["kernel"]), found.input_shape, found.conv)
    expected = dense_norm(lambda x: layer.apply(variables, x), (1, 5, 2))
    assert abs(float(norm) - expected) <= 1e3 * np.finfo(np.float64).eps * expected


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("geometry", [{}, {"padding": "CIRCULAR"}, {"padding": ((1, 2),)}], ids=str)
def test_the_transposed_operator_is_that_of_flax(geometry: dict[str, Any], transpose_kernel: bool) -> None:
    layer = linen.ConvTranspose(
        3, (4,), (2,), use_bias=False, param_dtype=jnp.float64, transpose_kernel=transpose_kernel, **geometry
    )
    variables = layer.init(jax.random.key(0), images(1, 5, 2))
    (found,) = on_flax.conv_layers(layer.bind(variables), images(1, 5, 2))
    expected = dense_norm(lambda x: layer.apply(variables, x), (1, 5, 2))
    kernel = np.asarray(variables["params"]["kernel"])
    if geometry.get("padding") == ((1, 2),):  # 9 outputs, where the core has 10 alone
        assert expected <= float(convsv.norm_bounds(kernel, found.conv).upper)
        return
    norm = convsv.operator_norm(kernel, found.input_shape, found.conv)
    assert abs(float(norm) - expected) <= 1e3 * np.finfo(np.float64).eps * expected


EQUINOX_GEOMETRIES: list[tuple[Any, dict[str, Any]]] = [
    (eqx.nn.Conv1d, {"padding": "SAME_LOWER", "stride": 2, "dilation": 2}),
    (eqx.nn.Conv1d, {"padding": "SAME", "padding_mode": "CIRCULAR", "stride": 2, "groups": 2}),
    (eqx.nn.Conv1d, {"padding": ((2, 1),), "padding_mode": "REPLICATE"}),
    (eqx.nn.ConvTranspose1d, {"padding": ((1, 2),), "stride": 2, "output_padding": 1}),
    (eqx.nn.ConvTranspose1d, {"padding": "SAME", "stride": 2, "padding_mode": "CIRCULAR"}),
]


@pytest.mark.parametrize(("kind", "geometry"), EQUINOX_GEOMETRIES, ids=str)
def test_the_operator_is_that_of_equinox(kind: Any, geometry: dict[str, Any]) -> None:
    layer = kind(2, 4, 4, use_bias=False, dtype=jnp.float64, key=jax.random.key(0), **geometry)
    (found,) = on_equinox.conv_layers(layer, jnp.zeros((2, 6)))
    norm = convsv.operator_norm(np.asarray(layer.weight), found.input_shape, found.conv)
    expected = dense_norm(layer, (2, 6))
    assert abs(float(norm) - expected) <= 1e3 * np.finfo(np.float64).eps * expected


def test_a_model_object_goes_to_one_call() -> None:
    model = NnxCNN(nnx.Rngs(0))
    first, second = convsv.analyze(model, images(1, 8, 8, 1))
    assert (first.name, first.input_shape, second.name) == ("first", (8, 8), "rest/0")
    expected = convsv.operator_norm(np.asarray(model.first.kernel[...]), (8, 8), convsv.Conv("HWIO"))
    assert first.operator_norm == pytest.approx(float(expected), rel=100 * float(np.finfo(np.float32).eps))

    layer = linen.Conv(3, (3,))
    variables = layer.init(jax.random.key(0), images(1, 6, 2))
    (report,) = on_flax.analyze(layer.bind(variables), images(1, 6, 2))
    assert report.kernel_shape == (3, 2, 3)
    with pytest.raises(ValueError, match=r"wanted model\.bind\(variables\)"):
        convsv.analyze(layer, images(1, 6, 2))

    reports = on_equinox.analyze(equinox_cnn(), images(1, 8, 8))
    assert [report.input_shape for report in reports] == [(8, 8), (4, 4)]
    assert None not in [report.operator_norm for report in reports]


# ---- training ----------------------------------------------------------------------------------------------


def test_flax_nnx_ends_within_the_bound() -> None:
    model = NnxCNN(nnx.Rngs(0))
    batch = images(4, 8, 8, 1)
    layers = on_flax.conv_layers(model, batch)
    assert max(uppers(nnx.state(model, nnx.Param), layers)) > BOUND
    tx = optax.chain(optax.adam(0.1), operator_norm_bound(BOUND, layers))
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
    tx = optax.chain(optax.adam(0.1), operator_norm_bound(BOUND, layers, every=2))
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64], ids=str)
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


def test_sharded_parameters_stay_sharded_and_within_the_bound() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
