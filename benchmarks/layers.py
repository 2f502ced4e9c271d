"""Find the convolutions whose norm is measured: trained ones from files, Gaussian ones, and those of ResNet-18."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.command import Size
from benchmarks.shapes import RESNET_18, HostArray, Shape, square
from convsv_core.layers import Layer, ModelError
from convsv_core.reports import read_model

__all__ = ["GAUSSIAN", "RESNET", "SUFFIXES", "TRAINED", "FixedShape", "find_layers", "fixed", "trained_layers"]

SUFFIXES = (".onnx", ".pth", ".pt", ".safetensors", ".npz")
TRAINED, GAUSSIAN, RESNET = "trained", "Gaussian", "ResNet-18 at 224"
EXTENT = 56
"""Extent of the inputs of trained and Gaussian layers: that of the first stage of ResNet-18 at 224 pixels."""

MOST_CHANNELS = 32
"""Largest number of channels of a trained layer that is measured unless everything is: a guess, for speed."""


@dataclass(frozen=True)
class FixedShape(Shape):
    """Describe a convolution whose kernel does not depend on its name and extents.

    Attributes
    ----------
    weights : numpy.ndarray, shape (*taps, inputs, outputs), float32
    layer : str
        Its name in a trained network.
    """

    weights: HostArray | None = field(default=None, repr=False, compare=False)
    layer: str = ""

    @property
    def label(self) -> str:
        """Return the layer's name and geometry."""
        return f"{self.layer} {super().label}".strip()

    def kernel(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the weights."""
        if self.weights is None:
            raise ValueError(f"{self.name}: no weights")
        return self.weights


def fixed(shape: Shape) -> FixedShape:
    """Return the same convolution, with the kernel that it has now."""
    values = {entry.name: getattr(shape, entry.name) for entry in fields(shape)}
    return FixedShape(**values, weights=shape.kernel())


GAUSSIANS = [fixed(square("Gaussian", 3, width, width, EXTENT)) for width in (64, 128, 256)]
SMALL_GAUSSIANS = [fixed(square("Gaussian", 3, 16, 16, EXTENT))]


def find_layers(places: Sequence[Path], size: Size) -> dict[str, list[Shape]]:
    """Return the convolutions to measure, by group.

    Parameters
    ----------
    places : sequence of Path
        Model files, or folders that hold some. Without any, the network that comes with the package is read.
    size : Size
        Only `Size.FULL` has large layers.
    """
    trained = list(trained_layers(places))
    if size is Size.FULL:
        return {TRAINED: trained, GAUSSIAN: [*GAUSSIANS], RESNET: RESNET_18}
    small = [shape for shape in trained if max(shape.inputs, shape.outputs) <= MOST_CHANNELS]
    return {TRAINED: small, GAUSSIAN: [*SMALL_GAUSSIANS], RESNET: []}


def trained_layers(places: Sequence[Path]) -> Iterator[Shape]:
    """Yield the dense two-dimensional layers of more than one tap in model files, or in the package's network."""
    if not places:
        bundled = importlib.resources.files("convsv_adapters") / "data" / "digits.onnx"
        with importlib.resources.as_file(bundled) as path:
            yield from _dense_layers(path)
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and path.suffix in SUFFIXES:
                yield from _dense_layers(path)


def _dense_layers(path: Path) -> Iterator[Shape]:
    """Yield the layers of a network that have two axes, more than one tap and no groups."""
    try:
        layers = read_model(path)
    except ModelError as error:
        raise click.BadParameter(str(error), param_hint="--networks") from None
    for layer in layers:
        shape = _dense(path.stem, layer)
        if shape is not None:
            yield shape


def _dense(network: str, layer: Layer) -> Shape | None:
    conv, kernel = layer.conv, layer.kernel
    if conv is None or kernel is None or conv.ndim != 2 or conv.groups > 1 or conv.transposed:
        return None
    weights = np.transpose(kernel, [conv.layout.index(letter) for letter in "HWIO"]).astype(np.float32)
    *taps, inputs, outputs = weights.shape
    if max(taps) == 1:
        return None
    return FixedShape(
        network,
        tuple(taps),
        inputs,
        outputs,
        (EXTENT, EXTENT),
        conv.strides,
        conv.dilations,
        weights=np.ascontiguousarray(weights),
        layer=layer.name,
    )
