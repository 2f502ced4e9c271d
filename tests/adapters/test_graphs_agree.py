"""Tests that PyTorch, JAX, ONNX and Keras give one figure for one network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from jax import lax
from onnx import helper, numpy_helper
from torch import nn

import convsv_core as convsv

RTOL = 1e-6
"""Relative difference of the figures that is allowed. The scales of a normalisation are rounded in different ways."""

IMAGE = (1, 3, 16, 16)


class Network(nn.Module):
    """Convolutions of several geometries, normalisation, pooling, a residual and a dense block, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.second = nn.Conv2d(6, 6, 1)
        self.circular = nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(10, 4, 4, stride=2, padding=1)
        self.head = nn.Linear(4, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = x + self.second(F.gelu(self.first(x)))
        x = torch.cat([x, F.silu(self.circular(x))], 1)
        x = F.avg_pool2d(F.leaky_relu(self.up(x), 0.1), 2)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    return Network()


def arrays(network: Network) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.detach().numpy() for name, tensor in network.state_dict().items()}


def jax_function(w: dict[str, Any]) -> Any:
    """Return the network as a function of JAX arrays, with channels first."""

    def conv(x: jax.Array, name: str, padding: Any, **geometry: Any) -> jax.Array:
        numbers = ("NCHW", "OIHW", "NCHW")
        stride = geometry.pop("stride", (1, 1))
        y = lax.conv_general_dilated(x, w[f"{name}.weight"], stride, padding, dimension_numbers=numbers, **geometry)
        return y + w[f"{name}.bias"][:, None, None] if f"{name}.bias" in w else y

    def function(x: jax.Array) -> jax.Array:
        x = conv(x, "stem", [(1, 1)] * 2, stride=(2, 2))
        mean, variance, scale, shift = (
            w[f"norm.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = jax.nn.relu((x - mean) * (lax.rsqrt(variance + 1e-5) * scale) + shift)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))
        branch = jax.nn.gelu(conv(x, "first", "SAME", feature_group_count=2), approximate=False)
        x = x + conv(branch, "second", "VALID")
        padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap")
        x = jnp.concatenate([x, jax.nn.silu(conv(padded, "circular", "VALID"))], 1)
        # PyTorch's transposed layer is the convolution of the spread input with the reversed taps.
        kernel = jnp.swapaxes(w["up.weight"][:, :, ::-1, ::-1], 0, 1)
        numbers = ("NCHW", "OIHW", "NCHW")
        x = lax.conv_general_dilated(x, kernel, (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2), dimension_numbers=numbers)
        x = jax.nn.leaky_relu(x + w["up.bias"][:, None, None], 0.1)
        x = lax.reduce_window(x, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
        return x.mean((2, 3)) @ w["head.weight"].T + w["head.bias"]

    return function


def onnx_model(w: dict[str, Any]) -> onnx.ModelProto:
    """Return the network as an ONNX model."""
    constants = {**w, "half": np.float32(0.5), "one": np.float32(1), "root": np.float32(np.sqrt(2))}
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "stem.weight"], ["a"], strides=[2, 2], pads=[1] * 4),
        node(
            "BatchNormalization",
            ["a", *(f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var"))],
            ["b"],
        ),
        node("Relu", ["b"], ["c"]),
        node("MaxPool", ["c"], ["d"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        node("Conv", ["d", "first.weight", "first.bias"], ["e"], pads=[1] * 4, group=2),
        # GELU as exporters write it.
        node("Div", ["e", "root"], ["f"]),
        node("Erf", ["f"], ["g"]),
        node("Add", ["g", "one"], ["h"]),
        node("Mul", ["e", "h"], ["i"]),
        node("Mul", ["i", "half"], ["j"]),
        node("Conv", ["j", "second.weight", "second.bias"], ["k"]),
        node("Add", ["d", "k"], ["l"]),
        node("Pad", ["l", "pads"], ["m"], mode="wrap"),
        node("Conv", ["m", "circular.weight", "circular.bias"], ["n"]),
        node("Sigmoid", ["n"], ["o"]),
        node("Mul", ["n", "o"], ["p"]),
        node("Concat", ["l", "p"], ["q"], axis=1),
        node("ConvTranspose", ["q", "up.weight", "up.bias"], ["r"], strides=[2, 2], pads=[1] * 4),
        node("LeakyRelu", ["r"], ["s"], alpha=0.1),
        node("AveragePool", ["s"], ["t"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["t"], ["u"]),
        node("Flatten", ["u"], ["v"]),
        node("Gemm", ["v", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    initializers = [numpy_helper.from_array(np.asarray(one), name) for name, one in constants.items()]
    initializers.append(numpy_helper.from_array(pads, "pads"))
    value = helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(nodes, "network", [value("x", kind, IMAGE)], [value("y", kind, (1, 5))], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_one_figure_for_one_network(network: Network, tmp_path: Path) -> None:
    x = torch.randn(IMAGE, generator=torch.Generator().manual_seed(1))
    w = arrays(network)
    function, model = jax_function({name: jnp.asarray(one) for name, one in w.items()}), onnx_model(w)
    with torch.no_grad():
        np.testing.assert_allclose(network(x).numpy(), function(jnp.asarray(x.numpy())), atol=1e-5)
    onnx.save(model, path := tmp_path / "network.onnx")
    import onnxruntime

    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(network(x).numpy(), found, atol=1e-5)
    of_torch = convsv.lipschitz(network, x, search=1)
    of_jax = convsv.lipschitz(function, jnp.asarray(x.numpy()), search=1)
    of_onnx = convsv.lipschitz(path, lower=False)
    assert not of_torch.missing
    assert of_torch.lower is not None
    assert of_torch.lower <= of_torch.upper
    for other in (of_jax, of_onnx):
        assert other.upper == pytest.approx(of_torch.upper, rel=RTOL)
        assert 10**other.log10_product == pytest.approx(10**of_torch.log10_product, rel=RTOL)
    assert of_jax.lower == pytest.approx(of_torch.lower, rel=1e-3)


# ---- Keras -------------------------------------------------------------------------------------------------

BACKEND = keras.backend.backend()


class Rebuilt(NamedTuple):
    """A Keras model, and the same network in PyTorch with channels first."""

    keras: keras.Model
    torch: nn.Module


def rebuilt() -> Rebuilt:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((12, 12, 2))
    x = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="stem")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.add([x, layers.Conv2D(4, 1, activation="silu", name="branch")(x)])
    x = layers.Conv2DTranspose(3, 4, strides=2, padding="same", name="up")(layers.MaxPooling2D(2)(x))
    outputs = layers.Dense(5, name="head")(layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x)))
    model = keras.Model(inputs, outputs)
    random = np.random.default_rng(0)
    for weight in model.weights:
        low = 0.5 if weight.path.endswith(("variance", "gamma")) else -0.5
        weight.assign(random.uniform(low, 1.0, weight.shape))

    weights = {
        name: [torch.from_numpy(np.array(one)) for one in model.get_layer(name).get_weights()]
        for name in ("stem", "norm", "branch", "up", "head")
    }

    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
                kernel, bias = weights[name]
                return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride)

            x = F.relu(conv(F.pad(x, (0, 1, 0, 1)), "stem", 2))
            gamma, beta, mean, variance = weights["norm"]
            x = F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3)
            x = F.max_pool2d(x + F.silu(conv(x, "branch")), 2)
            kernel, bias = weights["up"]
            x = F.conv_transpose2d(x, kernel.permute(3, 2, 0, 1), bias, 2, 1)
            kernel, bias = weights["head"]
            return x.mean((2, 3)) @ kernel + bias

    return Rebuilt(model, Same().eval())


@pytest.mark.skipif(BACKEND == "numpy", reason="Keras has no graphs on NumPy")
def test_keras_gives_the_figure_of_the_same_network() -> None:
    model, same = rebuilt()
    image = np.random.default_rng(1).normal(size=(1, 12, 12, 2)).astype("float32")
    first = torch.from_numpy(image).permute(0, 3, 1, 2)
    with torch.no_grad():
        value = keras.ops.convert_to_numpy(model(image, training=False))
        np.testing.assert_allclose(value, same(first).numpy(), atol=1e-5)
    wanted = convsv.lipschitz(same, first, search=1)
    found = convsv.lipschitz(model, image, search=1)
    assert not found.missing
    assert found.upper == pytest.approx(wanted.upper, rel=RTOL)
    assert found.lower == pytest.approx(wanted.lower, rel=1e-3)
    for shape in (None, (1, 12, 12, 2), keras.KerasTensor((1, 12, 12, 2))):
        assert convsv.lipschitz(model, shape, lower=False).upper == pytest.approx(wanted.upper, rel=RTOL)
    with pytest.raises(ValueError, match="does not fix its input's shape"):
        convsv.lipschitz(keras.Sequential([keras.Input((None, None, 2)), keras.layers.Conv2D(2, 3)]))


@pytest.mark.skipif(BACKEND != "torch", reason="the process that has started this one runs the others")
@pytest.mark.parametrize("other", [pytest.param("jax", marks=pytest.mark.thorough), "numpy"])
def test_keras_on_another_backend(other: str) -> None:
    environment = os.environ | {"KERAS_BACKEND": other}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", "keras_gives", __file__]
    if other == "numpy":
        code = (
            "import convsv_core, keras; model = keras.Sequential([keras.Input((8, 8, 2)), keras.layers.Conv2D(2, 3)]); "
            "convsv_core.lipschitz(model)"
        )
        command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if other == "numpy":
        assert "has no graphs: wanted torch or jax" in run.stderr.splitlines()[-1]
        return
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
