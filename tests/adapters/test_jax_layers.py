"""Tests of the adapters of flax and equinox: the layers that they find in a model, and their operators."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convsv_adapters import equinox as on_equinox
from convsv_adapters import flax as on_flax
from convsv_adapters.optax import penalty, projection_operator_norm
from flax import linen, nnx
from jax_models import SLACK, LinenCNN, NnxCNN, equinox_cnn, images, uppers

import convsv_core as convsv


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
        assert layer.computed_in_forward == (words == "WeightNorm")
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
    with pytest.raises(ValueError, match=r"extents of the layer 'conv' .*circular=True"):
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
