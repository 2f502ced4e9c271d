"""The convolutions whose norm is measured: trained ones read from files, Gaussian ones, and ResNet-18's."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.shapes import Shape, square
from convsv_core.layers import Layer, ModelError
from convsv_core.reports import read_model

SUFFIXES = (".onnx", ".pth", ".pt", ".safetensors", ".npz")
TRAINED, GAUSSIAN, RESNET = "trained", "Gaussian", "ResNet-18 at 224"
EXTENT = 56


@dataclass(frozen=True)
class FixedShape(Shape):
    """A convolution whose kernel stays the same whatever its name and extents.

    Attributes
    ----------
    weights : numpy.ndarray, shape (*taps, inputs, outputs), float32
    layer : str
        Its name in a trained network.
    """

    weights: np.ndarray[Any, Any] | None = field(default=None, repr=False, compare=False)
    layer: str = ""

    @property
    def label(self) -> str:
        """The layer's name and geometry."""
        return f"{self.layer} {super().label}".strip()

    def kernel(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The weights."""
        if self.weights is None:
            raise ValueError(f"{self.name}: no weights")
        return self.weights


def fixed(shape: Shape) -> FixedShape:
    """The same convolution, with the kernel that it has now."""
    values = {entry.name: getattr(shape, entry.name) for entry in fields(shape)}
    return FixedShape(**values, weights=shape.kernel())


# Columns: taps, inputs, outputs, extent, stride, multiplicity; without the three 1 x 1 ones.
RESNET_18 = [
    square("ResNet-18", *row)
    for row in (
        (7, 3, 64, 224, 2, 1),
        (3, 64, 64, 56, 1, 4),
        (3, 64, 128, 56, 2, 1),
        (3, 128, 128, 28, 1, 3),
        (3, 128, 256, 28, 2, 1),
        (3, 256, 256, 14, 1, 3),
        (3, 256, 512, 14, 2, 1),
        (3, 512, 512, 7, 1, 3),
    )
]
GAUSSIANS = [fixed(square("Gaussian", 3, width, width, EXTENT)) for width in (64, 128, 256)]
QUICK_GAUSSIANS = [fixed(square("Gaussian", 3, 16, 16, EXTENT))]


def find_layers(places: Sequence[Path], *, quick: bool) -> dict[str, list[Shape]]:
    """The convolutions to measure, by group.

    Parameters
    ----------
    places : sequence of Path
        Model files, or folders that hold some; the network that comes with the package where there are none.
    quick : bool
        Only small layers.
    """
    groups: dict[str, list[Shape]] = {TRAINED: list(_trained(places)), GAUSSIAN: [*GAUSSIANS], RESNET: RESNET_18}
    if quick:
        groups |= {GAUSSIAN: [*QUICK_GAUSSIANS], RESNET: []}
        groups[TRAINED] = [shape for shape in groups[TRAINED] if max(shape.inputs, shape.outputs) <= 32]
    return groups


def _trained(places: Sequence[Path]) -> Iterator[Shape]:
    if not places:
        bundled = importlib.resources.files("convsv_adapters") / "data" / "digits.onnx"
        with importlib.resources.as_file(bundled) as path:
            yield from _of_network(path)
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and path.suffix in SUFFIXES:
                yield from _of_network(path)


def _of_network(path: Path) -> Iterator[Shape]:
    """The dense layers of a network: of two axes, with more than one tap and without groups."""
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
