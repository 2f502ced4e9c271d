"""Layers of flax and equinox whose kernels a wrapper computes, and dense layers: the true norm, or no figure."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convsv_adapters import equinox as equinox_adapter
from convsv_adapters import flax as flax_adapter
from flax import linen, nnx

import convsv_core as convsv

SHAPE = (6, 5, 3)


def true_norm(function: Any, shape: tuple[int, ...]) -> float:
    """Return the norm of an affine map of one image, applied to the identity."""
    size = int(np.prod(shape))
    images = jnp.eye(size).reshape(size, *shape)
    zero = np.asarray(function(jnp.zeros(shape)))
    rows = [np.asarray(function(image)) - zero for image in images]
    return float(np.linalg.norm(np.stack(rows).reshape(size, -1).astype(float), 2))


def far_apart(array: jax.Array) -> jax.Array:
    """Return numbers that make a false figure differ from the true one by more than a factor of 2."""
    return jnp.asarray(5 * np.random.default_rng(0).normal(size=array.shape), array.dtype)


# ---- nnx -----------------------------------------------------------------------------------------------------------


class Wrapped(nnx.Module):
    def __init__(self, wrapper: Any) -> None:
        rngs = nnx.Rngs(0)
        self.conv = wrapper(nnx.Conv(3, 4, (3, 3), padding="CIRCULAR", rngs=rngs))
        self.plain = nnx.Conv(4, 2, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.plain(self.conv(x))


NNX = {
    "weight": lambda layer: nnx.WeightNorm(layer, rngs=nnx.Rngs(1)),
    "weight of all": lambda layer: nnx.WeightNorm(layer, feature_axes=None, use_scale=False, rngs=nnx.Rngs(1)),
    "spectral": lambda layer: nnx.SpectralNorm(layer, rngs=nnx.Rngs(1)),
    "both": lambda layer: nnx.SpectralNorm(nnx.WeightNorm(layer, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(1)),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name: str) -> None:
    model = Wrapped(NNX[name])
    inner = next(node for _, node in nnx.iter_graph(model.conv) if isinstance(node, nnx.Conv))
    inner.kernel[...] = far_apart(inner.kernel[...])
    stored = np.asarray(inner.kernel[...])
    wrapped, plain = convsv.analyze(model, jnp.zeros((1, *SHAPE)))
    np.testing.assert_array_equal(stored, np.asarray(inner.kernel[...]))  # the model stays as it was
    model.eval()
    graph, state = nnx.split(model)

    @jax.jit
    def conv(state: Any, image: jax.Array) -> jax.Array:
        return nnx.merge(graph, state).conv(image[None])[0]

    norm = true_norm(lambda image: conv(state, image), SHAPE)
    assert wrapped.operator_norm == pytest.approx(norm, rel=1e-4)
    assert "for the example_input" in wrapped.note
    assert plain.operator_norm == pytest.approx(np.linalg.norm(np.asarray(model.plain.kernel[...])[0, 0], 2), rel=1e-5)
    without, _ = convsv.analyze(model)
    assert (without.operator_norm, without.norm_upper) == (None, None)
    assert "computed in the forward pass by" in without.note
    (layer, _) = flax_adapter.conv_layers(model, jnp.zeros((1, *SHAPE)))
    assert layer.computed_in_forward
    assert layer.conv is None


def test_an_nnx_layer_that_is_called_twice_has_no_figure() -> None:
    class Twice(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.SpectralNorm(nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.conv(self.conv(x))

    (row,) = convsv.analyze(Twice(), jnp.zeros((1, *SHAPE)))
    assert row.operator_norm is None
    assert "called 2 times" in row.note


# ---- linen ---------------------------------------------------------------------------------------------------------


class LinenWrapped(linen.Module):
    wrapper: str

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = linen.Conv(4, (3, 3), padding="CIRCULAR", name="inner")
        if self.wrapper == "weight":
            return linen.WeightNorm(conv)(x)
        return linen.SpectralNorm(conv)(x, update_stats=train)


@pytest.mark.parametrize("wrapper", ["weight", "spectral"])
def test_linen(wrapper: str) -> None:
    model = LinenWrapped(wrapper)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    kernel = variables["params"]["inner"]["kernel"]
    variables = {
        **variables,
        "params": {**variables["params"], "inner": {**variables["params"]["inner"], "kernel": far_apart(kernel)}},
    }
    (row,) = convsv.analyze(model.bind(variables), jnp.zeros((1, *SHAPE)))
    norm = true_norm(jax.jit(lambda image: model.apply(variables, image[None])[0]), SHAPE)
    assert row.operator_norm == pytest.approx(norm, rel=1e-4)
    assert row.name == "inner"
    (layer,) = flax_adapter.conv_layers(model, jnp.zeros((1, *SHAPE)))
    assert layer.computed_in_forward


# ---- equinox -------------------------------------------------------------------------------------------------------


def circular(key: jax.Array) -> eqx.nn.Conv2d:
    return eqx.nn.Conv2d(3, 4, 3, padding="SAME", padding_mode="CIRCULAR", key=key)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_equinox_weight_norm(axis: int | None) -> None:
    layer = circular(jax.random.key(0))
    model = eqx.nn.WeightNorm(layer, axis=axis)
    model = eqx.tree_at(lambda one: (one.layer.weight, one.g), model, replace_fn=far_apart)
    image = jnp.zeros((3, 6, 5))
    (row,) = convsv.analyze(model, image)
    assert row.operator_norm == pytest.approx(true_norm(jax.jit(lambda image: model(image)), (3, 6, 5)), rel=1e-4)
    (without,) = convsv.analyze(model)
    assert without.operator_norm is None
    assert "by WeightNorm: wanted an example_input" in without.note


def test_equinox_spectral_norm() -> None:
    def make(key: jax.Array) -> eqx.nn.SpectralNorm:
        return eqx.nn.SpectralNorm(circular(key), "weight", key=key)

    model, state = eqx.nn.make_with_state(make)(jax.random.key(0))
    model = eqx.tree_at(lambda one: one.layer.weight, model, replace_fn=far_apart)
    (row,) = convsv.analyze(model, (jnp.zeros((3, 6, 5)), state))
    inference = eqx.nn.inference_mode(model)
    norm = true_norm(jax.jit(lambda image: inference(image, state)[0]), (3, 6, 5))
    assert row.operator_norm == pytest.approx(norm, rel=1e-4)
    (layer,) = equinox_adapter.conv_layers(model)
    assert layer.conv is None


# ---- dense layers --------------------------------------------------------------------------------------------------


def test_dense_layers() -> None:
    class Nnx(nnx.Module):
        def __init__(self) -> None:
            self.fc = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
            self.normed = nnx.WeightNorm(nnx.Linear(5, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.normed(self.fc(x))

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.WeightNorm(linen.Dense(2, name="normed"))(linen.Dense(5, name="fc")(x))

    first = Nnx()
    x = jnp.zeros((1, 3))
    second = Linen().bind(Linen().init(jax.random.key(0), x))
    keys = jax.random.split(jax.random.key(0))
    third = eqx.nn.Sequential([eqx.nn.Linear(3, 5, key=keys[0]), eqx.nn.WeightNorm(eqx.nn.Linear(5, 2, key=keys[1]))])
    truths = [first.fc.kernel[...], second.variables["params"]["fc"]["kernel"], third.layers[0].weight]
    for model, truth, example in zip((first, second, third), truths, (x, x, x[0]), strict=True):
        assert convsv.analyze(model, example) == []
        fc, normed = convsv.analyze(model, example, linear=True)
        assert fc.linear
        assert fc.operator_norm == pytest.approx(np.linalg.norm(np.asarray(truth), 2), rel=1e-5)
        assert normed.operator_norm is None
        assert "WeightNorm" in normed.note


class Doubled(eqx.nn.Conv2d):
    def __call__(self, image: jax.Array, *, key: Any = None) -> jax.Array:
        return 2 * super().__call__(image)


class Named(eqx.nn.Conv2d):
    """A class of another name that changes nothing."""


def test_a_class_with_a_call_of_its_own_has_no_figure() -> None:
    image = jnp.zeros((3, 8, 8))
    for kind, has_figure in ((Doubled, False), (Named, True)):
        (report,) = convsv.analyze(kind(3, 4, 3, key=jax.random.key(0)), image)
        assert (report.operator_norm is not None) is has_figure
