"""Tests of JAX functions, and models of flax and equinox, as graphs of maps: each computes what JAX computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convsv_adapters._jax.graph import model_graph
from flax import linen, nnx
from jax import lax
from jax_models import LinenCNN, NnxCNN, equinox_cnn
from network_graphs import difference, unsupported

import convsv_core as convsv
from convsv_core._network.attained import NUDGE
from convsv_core.networks import Normalize

TOLERANCE = 1e-10
"""Largest difference from JAX in double precision, in units of the largest element of the output."""

IMAGE = (1, 8, 8, 4)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def check(model: Any, x: jax.Array, tolerance: float = TOLERANCE) -> Any:
    """Check that the graph of a model computes what the model computes, and return the graph."""
    graph = model_graph(model, x)
    assert unsupported(graph) == []
    assert difference(graph, [np.asarray(x)], np.asarray(model(x))) < tolerance
    return graph


def convolve(x: jax.Array, kernel: jax.Array, padding: Any, stride: Any = (1, 1), **geometry: Any) -> jax.Array:
    numbers = geometry.pop("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=numbers, **geometry)


# ---- primitives --------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[jax.Array], Any]] = {
    "convolution": lambda x: convolve(x, normal(3, 2, 2, 6), "SAME", (2, 1), feature_group_count=2),
    "kernel's axes": lambda x: convolve(
        x, normal(6, 3, 2, 4), [(2, -1), (0, 3)], rhs_dilation=(1, 2), dimension_numbers=("NHWC", "OWHI", "NCHW")
    ),
    "transposed": lambda x: convolve(
        x, normal(3, 2, 2, 6), [(2, 1), (0, 3)], lhs_dilation=(2, 3), rhs_dilation=(1, 2), feature_group_count=2
    ),
    "transposed, strided": lambda x: convolve(x, normal(3, 2, 4, 6), [(2, -1), (0, 3)], (2, 2), lhs_dilation=(2, 1)),
    "circular": lambda x: jnp.pad(x, ((0, 0), (1, 2), (2, 0), (0, 0)), mode="wrap"),
    "reflect": lambda x: jnp.pad(x, ((0, 0), (1, 2), (2, 0), (0, 0)), mode="reflect"),
    "edge": lambda x: jnp.pad(x, ((0, 0), (1, 2), (2, 0), (0, 0)), mode="edge"),
    "symmetric": lambda x: jnp.pad(x, ((0, 0), (1, 2), (2, 0), (0, 0)), mode="symmetric"),
    "zeros and gaps": lambda x: lax.pad(x, 0.5, ((0, 0, 0), (1, -2, 1), (0, 0, 2), (0, 0, 0))) * 2,
    "products": lambda x: jnp.einsum("bhwc,cd->bdhw", x, normal(4, 5)) @ normal(8, 3),
    "stacked products": lambda x: jnp.einsum("bhwc,hcd->bdhw", x, normal(8, 4, 2)) + normal(8, 8) @ x[..., 0],
    "branches": lambda x: jnp.einsum("bhwc,bhvc->bhwv", x, x) * x[..., :1],
    "average pooling": lambda x: linen.avg_pool(x, (3, 3), (2, 2), padding="SAME", count_include_pad=False),
    "pooling": lambda x: linen.max_pool(linen.avg_pool(x, (3, 3), (2, 2), padding="SAME"), (2, 2)),
    "resizing": lambda x: jax.image.resize(jax.image.resize(x, (1, 13, 16, 4), "bilinear"), (1, 5, 16, 4), "bicubic"),
    "nearest": lambda x: jax.image.resize(x, (1, 13, 5, 4), "nearest"),
    "reductions": lambda x: (
        x.mean((1, 2)) + x.sum(3)[:, 0, :4] + x.max((1, 2)) - x.min((1, 2)) + jnp.cumsum(x, 1)[:, 1, 1]
    ),
    "parts": lambda x: jnp.concatenate([*jnp.split(x, 2, -1)[::-1], x[..., jnp.array([2, 0])][:, ::-1], x], -1)[
        :, 1:5:2
    ],
    "copies": lambda x: jnp.repeat(jnp.tile(jnp.roll(x, 3, 2), (1, 2, 1, 1)), 2, 2) + jnp.stack([x[:, 0, 0]] * 2)[0, 0],
    "arithmetic": lambda x: (2 - x / 2 + 3 * x - normal(4)) * x + 1 / x - jnp.maximum(x, 1 - x) + jnp.minimum(x, 0.3),
    "powers": lambda x: x**2 + x**3 + x**0.5 + lax.rsqrt(x) + jnp.exp(x) + jnp.log1p(x) + jnp.expm1(x) + lax.erfc(x),
    "masks": lambda x: (
        jnp.where(jnp.arange(4) > 1, x, 2 * x) + jnp.where(jnp.arange(4) > 1, 0.5, x) + jnp.clip(x, 0, 0.5)
    ),
    "softmax": lambda x: jax.nn.softmax(x) + jax.nn.log_softmax(x, (1, 2)) + jax.nn.softmax(x, (1, 2)),
    "calls": lambda x: jax.checkpoint(jax.jit(jax.nn.relu))(x) + lax.stop_gradient(jax.vmap(jnp.tanh)(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_primitives_are_described_exactly(name: str) -> None:
    check(FUNCTIONS[name], jnp.abs(normal(*IMAGE)) + 0.1)


@pytest.mark.parametrize("slope", [0.1])
@pytest.mark.parametrize(
    ("function", "op"),
    [
        *((function, function.__name__) for function in (jax.nn.selu, jax.nn.softplus, jax.nn.hard_sigmoid)),
        (jax.nn.hard_swish, "hard_swish"),
        (jax.nn.gelu, "gelu_tanh"),
        (lambda x: jax.nn.gelu(x, approximate=False), "gelu"),
        (jax.nn.mish, "mish"),
        (lambda x: jax.nn.elu(x, 0.7), "elu"),
        (lambda x: jax.nn.celu(x, 0.7), "celu"),
        (jax.nn.leaky_relu, "leaky_relu"),
        (lambda x: jnp.where(x > 0, x, normal(4) * x), "leaky_relu"),
        (jax.nn.log_sigmoid, "log_sigmoid"),
        (jax.nn.soft_sign, "softsign"),
        (jax.nn.hard_tanh, "clip"),
    ],
)
def test_functions_of_one_number_are_recognised(function: Callable[[jax.Array], Any], op: str, slope: float) -> None:
    graph = check(lambda x: function(slope * x), 10 * normal(*IMAGE))
    assert [node.op for node in graph if node.op not in ("mul", "copy")] == ["input", op]


def test_a_function_that_only_resembles_one_is_not_taken_for_it() -> None:
    graph = model_graph(lambda x: 0.5 * x * (1 + jnp.tanh(0.79 * (x + 0.044715 * x**3))), normal(*IMAGE))
    assert "gelu_tanh" not in [node.op for node in graph]
    graph = model_graph(lambda x: jnp.where(x > 0.1, x, 0.1 * x), normal(*IMAGE))
    assert unsupported(graph) == ["gt", "select_n"]


# ---- models ------------------------------------------------------------------------------------------------


def test_models_of_flax() -> None:
    x = normal(1, 28, 28, 1)
    module = LinenCNN()
    graph = check(module.bind(module.init(jax.random.key(0), x)), x, 1e-6)
    assert [node.name for node in graph][:4] == ["input", "Conv_0", "LinenCNN/Conv_0/add", "LinenCNN/max"]
    model = NnxCNN(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"deterministic=False.*training mode.*wanted model\.eval"):
        convsv.lipschitz(model, x)
    model.eval()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    graph = check(model, x, 1e-6)
    assert {"first", "rest/0"} < {node.name for node in graph}
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_models_of_equinox() -> None:
    model = eqx.nn.inference_mode(equinox_cnn())
    graph = check(model, normal(1, 8, 8).astype("float32"), 1e-6)
    assert {"layers/0", "layers/3"} < {node.name for node in graph}
    key = jax.random.key(0)
    layers = [eqx.nn.Conv2d(2, 4, 3, padding="SAME", padding_mode="CIRCULAR", key=key), eqx.nn.AdaptiveAvgPool2d(2)]
    check(eqx.nn.Sequential([*layers, eqx.nn.ConvTranspose2d(4, 2, 3, 2, key=key)]), normal(2, 8, 8), 1e-6)


def test_layer_normalisation_is_recognised() -> None:
    rngs, x = nnx.Rngs(0), normal(*IMAGE)
    double = {"param_dtype": jnp.float64, "rngs": rngs}
    models = [nnx.LayerNorm(4, **double), nnx.RMSNorm(4, **double), nnx.LayerNorm(4, use_fast_variance=False, **double)]
    models += [eqx.nn.LayerNorm((8, 8, 4)), eqx.nn.GroupNorm(2, 8), jax.nn.standardize]
    for model in models:
        image = x[0] if isinstance(model, eqx.nn.LayerNorm | eqx.nn.GroupNorm) else x
        graph = check(model, image)
        assert sum(isinstance(node.kind, Normalize) for node in graph) == 1
        assert not convsv.lipschitz(model, image).missing
    # The variance of another array is none.
    graph = model_graph(
        lambda x: (x - x.mean(3, keepdims=True)) * lax.rsqrt(jnp.var(2 * x, 3, keepdims=True) + 1e-5), x
    )
    assert not any(isinstance(node.kind, Normalize) for node in graph)


def test_batch_normalisation_in_evaluation_mode() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            return linen.BatchNorm(use_running_average=not train)(linen.Conv(4, (3, 3))(x))

    x = normal(*IMAGE)
    variables = Net().init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.2, variables)
    bound = Net().bind(variables)
    check(bound, x, 1e-6)
    found = convsv.lipschitz(bound, x)
    assert not found.missing
    assert found.log10_upper < found.log10_product
    with pytest.raises(ValueError, match="batch_stats"):
        convsv.lipschitz(bound, {"x": x, "train": True})
    with pytest.raises(ValueError, match=r"wanted model\.bind\(variables\)"):
        convsv.lipschitz(Net(), x)


def test_shapes_alone_are_an_input_too() -> None:
    kernel = normal(3, 3, 4, 4)
    of_shape = convsv.lipschitz(lambda x: convolve(x, kernel, "SAME"), jax.ShapeDtypeStruct(IMAGE, "float64"))
    of_array = convsv.lipschitz(lambda x: convolve(x, kernel, "SAME"), normal(*IMAGE))
    assert of_shape.upper == of_array.upper


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * jax.random.normal(jax.random.key(0), x.shape), "random numbers"),
        (lambda x: x if x.sum() > 0 else -x, "TracerBoolConversionError.*control flow"),
        (lambda x: jnp.ones(3), "nothing that depends on its input"),
        (lambda x: convolve(x, normal(3, 3, 3, 4), "SAME"), "feature dimension.*input of the right shape"),
        (eqx.nn.Dropout(0.5), "requires a key.*evaluation mode"),
    ],
)
def test_what_is_no_fixed_map_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convsv.lipschitz(function, normal(*IMAGE))


def test_a_model_needs_an_input_of_floating_point_numbers() -> None:
    model = NnxCNN(nnx.Rngs(0))
    with pytest.raises(ValueError, match="example_input=None"):
        convsv.lipschitz(model)
    with pytest.raises(ValueError, match=r"int32: wanted floating-point"):
        convsv.lipschitz(jnp.tanh, jnp.zeros(3, jnp.int32))
    with pytest.raises(TypeError, match="wanted a model of a framework"):
        convsv.lipschitz(np.tanh, np.zeros(3))


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: lax.scan(lambda c, a: (c + a, c), x[0, 0], x[0])[0], "scan"),
        (lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: 2 * c, x), "while"),
        (lambda x: lax.cond(True, jnp.sin, jnp.cos, x) + lax.sort(x), "sort"),
        (jnp.floor, "floor"),
        (lambda x: x[jnp.argmax(x[:, 0, 0])], "argmax"),
    ],
)
def test_what_has_no_rule_is_named_with_the_bound_up_to_it(function: Callable[[jax.Array], Any], op: str) -> None:
    found = convsv.lipschitz(lambda x: function(2 * x), normal(*IMAGE), lower=False)
    assert found.upper == np.inf
    assert op in [missing.op for missing in found.missing]
    assert found.missing[0].log10_before < 4


# ---- figures -----------------------------------------------------------------------------------------------

ACTIVATIONS = (jax.nn.relu, jax.nn.silu, jax.nn.gelu, jax.nn.elu, jnp.tanh, jax.nn.leaky_relu, jax.nn.hard_swish)

AROUND = ((0, 0), (1, 1), (1, 1), (0, 0))


def random_network(seed: int) -> Callable[[jax.Array], jax.Array]:
    """Return a function of images of two channels, with random layers and branches."""
    random = np.random.default_rng(seed)
    steps: list[Callable[[jax.Array], jax.Array]] = []
    channels = 2
    for depth in range(int(random.integers(2, 5))):
        kernel = 0.5 * normal(3, 3, channels, int(random.integers(1, 4)), seed=100 * seed + depth)
        square = 0.3 * normal(3, 3, channels, channels, seed=100 * seed + depth)
        activation = ACTIVATIONS[int(random.integers(len(ACTIVATIONS)))]
        scale = 1 + 0.5 * normal(kernel.shape[-1], seed=seed)
        kind = int(random.integers(6))
        mode = str(random.choice(["wrap", "reflect", "edge"]))
        if kind == 0:
            steps.append(lambda x, k=kernel, s=scale, f=activation: f(convolve(x, k, "SAME", (2, 1)) * s + 1))
        elif kind == 1:
            steps.append(lambda x, k=kernel, f=activation: f(convolve(x, k, [(2, 1), (1, 2)], lhs_dilation=(2, 2))))
        elif kind == 2:
            steps.append(lambda x, k=kernel, m=mode: convolve(jnp.pad(x, AROUND, mode=m), k, "VALID"))
        elif kind == 3:
            steps.append(lambda x, k=square, f=activation: x + f(convolve(x, k, "SAME")))
        elif kind == 4:
            steps.append(lambda x, k=kernel: jnp.concatenate([x, convolve(x, k, "SAME", rhs_dilation=(2, 1))], -1))
        else:
            steps.append(lambda x, k=square, f=activation: linen.max_pool(f(convolve(x, k, "SAME")), (2, 2)))
        channels = channels if kind in (3, 5) else kernel.shape[-1] + (channels if kind == 4 else 0)

    def network(x: jax.Array) -> jax.Array:
        for step in steps:
            x = step(x)
        return x

    return network


def check_sound(seed: int) -> None:
    network, x = random_network(seed), normal(1, 6, 6, 2, seed=seed)
    assert difference(model_graph(network, x), [np.asarray(x)], np.asarray(network(x))) < TOLERANCE
    found = convsv.lipschitz(network, x, search=1)
    assert not found.missing
    assert found.log10_upper <= found.log10_product + 1e-9
    jacobian = jax.jit(jax.jacobian(lambda flat: network(flat.reshape(x.shape)).ravel()))
    attained = [np.linalg.norm(np.asarray(jacobian(scale * x.ravel())), 2) for scale in (1.0, 0.1, 3.0)]
    assert max(attained) <= found.upper
    assert found.lower is not None
    assert found.lower <= attained[0] * (1 + 100 * NUDGE)  # at an input beside the example


@pytest.mark.parametrize("seed", range(3))
def test_no_jacobian_is_above_the_bound(seed: int) -> None:
    check_sound(seed)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(3, 23))
def test_no_jacobian_of_many_networks_is_above_the_bound(seed: int) -> None:
    check_sound(seed)
