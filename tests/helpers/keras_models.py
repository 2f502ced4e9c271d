"""Keras models for tests of files: the matrices of their layers, and random models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

__all__ = ["dense_norms", "random_model", "weighted"]

layers = keras.layers


def weighted(model: Any) -> Any:
    """Yield the convolutions and dense layers of a model, those of nested models too."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from weighted(layer)
        elif "conv" in type(layer).__name__.lower() or isinstance(layer, layers.Dense):
            yield layer


def dense_norms(layer: Any, extents: tuple[int, ...]) -> list[float]:
    """Return the norm of each kernel of a live layer: the layer without its bias on every unit image, in float64."""
    return [_norm(cls, config, _host(kernel), extents) for cls, config, kernel in _kernels(layer)]


def _kernels(layer: Any) -> list[tuple[Any, dict[str, Any], Any]]:
    """Return each kernel of a layer with the class and the configuration of the layer that has this kernel alone."""
    config = layer.get_config()
    if not hasattr(layer, "pointwise_kernel"):
        return [(type(layer), config, layer.kernel)]
    rank = len(config["kernel_size"])
    first = layers.DepthwiseConv1D if rank == 1 else layers.DepthwiseConv2D
    second = layers.Conv1D if rank == 1 else layers.Conv2D
    kept = {key: config[key] for key in ("kernel_size", "strides", "padding", "dilation_rate")}
    return [
        (first, {**kept, "depth_multiplier": layer.depthwise_kernel.shape[-1]}, layer.depthwise_kernel),
        (second, {"filters": layer.pointwise_kernel.shape[-1], "kernel_size": 1}, layer.pointwise_kernel),
    ]


def _norm(cls: Any, config: dict[str, Any], kernel: np.ndarray, extents: tuple[int, ...]) -> float:
    wide = cls.from_config({**config, "name": "wide", "dtype": "float64", "use_bias": False, "activation": "linear"})
    channels = kernel.shape[-1] if "Transpose" in cls.__name__ else kernel.shape[-2] * config.get("groups", 1)
    shape = (channels,) if cls is layers.Dense else (*extents, channels)
    count = int(np.prod(shape))
    wide.build((None, *shape))
    wide.set_weights([kernel.astype(np.float64)])
    images = _host(wide(np.eye(count).reshape(count, *shape)))
    return float(np.linalg.norm(images.reshape(count, -1), 2))


def _host(array: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(array))


def random_model(seed: int) -> Any:
    """Return a random model of convolutions of every kind, some of them in nested models, with large weights."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 3))
    channels = int(rng.integers(1, 4)) * 2
    images = keras.Input((*(12,) * rank, channels))
    x = images
    for index in range(int(rng.integers(2, 5))):
        kind = str(rng.choice(["Conv", "Conv", "Depthwise", "Separable", "Transpose", "nested"]))
        x = _random_layer(kind, rank, index, rng)(x)
        if rng.random() < 0.3:
            x = layers.BatchNormalization()(x)
    head = layers.GlobalAveragePooling1D() if rank == 1 else layers.GlobalAveragePooling2D()
    model = keras.Model(images, layers.Dense(3)(head(x)))
    for layer in weighted(model):
        factor = 0.2 + 4 * rng.random()
        layer.set_weights([factor * _host(weight) for weight in layer.weights])
    return model


def _random_layer(kind: str, rank: int, index: int, rng: np.random.Generator) -> Any:
    if kind == "nested":
        kinds = [str(one) for one in rng.choice(["Conv", "Depthwise", "Transpose"], size=2)]
        inner = [_random_layer(one, rank, number, rng) for number, one in enumerate(kinds)]
        return keras.Sequential(inner, name=f"nested{index}")
    strides = int(rng.integers(1, 3))
    facts: dict[str, Any] = {
        "kernel_size": int(rng.integers(1, 4)),
        "padding": "same" if rng.random() < 0.8 else "valid",
        "use_bias": bool(rng.random() < 0.7),
        "dtype": str(rng.choice(["float32", "float32", "float64", "float16", "bfloat16", "mixed_float16"])),
        "strides": strides,
        "dilation_rate": 1 if strides > 1 else int(rng.integers(1, 3)),
    }
    if rng.random() < 0.5:
        facts["name"] = f"{kind.lower()}{index}"
    filters = 2 * int(rng.integers(1, 4))
    if kind == "Conv":
        return getattr(layers, f"Conv{rank}D")(filters, groups=int(rng.integers(1, 3)), **facts)
    if kind == "Transpose":
        return getattr(layers, f"Conv{rank}DTranspose")(filters, **facts)
    multiplier = int(rng.integers(1, 3))
    if kind == "Depthwise":
        return getattr(layers, f"DepthwiseConv{rank}D")(depth_multiplier=multiplier, **facts)
    return getattr(layers, f"SeparableConv{rank}D")(filters, depth_multiplier=multiplier, **facts)
