"""List the convolutions that are measured: every distinct one of some well-known networks.

A convolution that a network holds several times is listed once, with its multiplicity.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from convsv_core import Conv

__all__ = [
    "CONV_TASNET",
    "DEPTHWISE_960",
    "GROUPS",
    "MOBILENET_V2",
    "NETWORKS",
    "QUICK",
    "R3D_18",
    "RESNET_18",
    "RESNET_32",
    "RESNET_50",
    "SYMBOL_TOO_LARGE",
    "VGG_16",
    "WAVENET",
    "HostArray",
    "Shape",
    "convolution",
    "select",
    "square",
]

HostArray: TypeAlias = np.ndarray[Any, Any]

SPATIAL_LETTERS = "DHW"
"""Letters of the spatial axes in a layout; a layout of fewer axes has the last ones."""


@dataclass(frozen=True)
class Shape:
    """Describe one convolution: where it occurs, its geometry, and its input's extents.

    Attributes
    ----------
    network : str
    taps : tuple of int
        Kernel extents.
    inputs, outputs : int
        Channels.
    extents : tuple of int
        Spatial extents of the input.
    stride, dilation : tuple of int
    groups : int
    multiplicity : int
        How often the network holds it; 0 for one that was picked to be measured alone.
    """

    network: str
    taps: tuple[int, ...]
    inputs: int
    outputs: int
    extents: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    multiplicity: int = 1

    @property
    def conv(self) -> Conv:
        """Return the description that `convsv` takes; the layout is the paper's, spatial axes first."""
        layout = f"{SPATIAL_LETTERS[-len(self.taps) :]}IO"
        return Conv(layout, stride=self.stride, dilation=self.dilation, groups=self.groups)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Return the extents of the kernel array in the layout of `conv`."""
        return (*self.taps, self.inputs // self.groups, self.outputs)

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the number of frequencies along each axis."""
        return tuple(extent // stride for extent, stride in zip(self.extents, self.stride, strict=True))

    @property
    def label(self) -> str:
        """Return a name that tells all but the network, such as ``3x3 64->64 @56x56``."""
        parts = [
            "x".join(map(str, self.taps)) if len(self.taps) > 1 else f"k{self.taps[0]}",
            f"{self.inputs}->{self.outputs}",
        ]
        for letter, values in (("s", self.stride), ("d", self.dilation)):
            if max(values) > 1:
                parts.append(letter + ",".join(map(str, values if len(set(values)) > 1 else values[:1])))
        if self.groups > 1:
            parts.append(f"g{self.groups}")
        return " ".join([*parts, "@" + "x".join(map(str, self.extents))])

    @property
    def name(self) -> str:
        """Return `network` and `label`: the text that ``--only`` is matched with."""
        return f"{self.network} {self.label}"

    def kernel(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return a random kernel with the variance of He's initialisation, which depends on the name alone."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        scale = math.sqrt(2 / math.prod(self.kernel_shape[:-1]))
        return (scale * rng.standard_normal(self.kernel_shape)).astype(np.float32)


def convolution(
    network: str,
    taps: tuple[int, ...],
    inputs: int,
    outputs: int,
    extents: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    times: int = 1,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> Shape:
    """Make a `Shape`; an int for the extents, stride or dilation stands for every axis. `times` is its multiplicity."""
    extents, stride, dilation = (
        value if isinstance(value, tuple) else (value,) * len(taps) for value in (extents, stride, dilation)
    )
    return Shape(network, taps, inputs, outputs, extents, stride, dilation, groups, times)


def square(
    network: str, size: int, inputs: int, outputs: int, extent: int, stride: int = 1, times: int = 1, groups: int = 1
) -> Shape:
    """Make a two-dimensional convolution with equal axes."""
    return convolution(network, (size, size), inputs, outputs, extent, stride, times, groups)


def _squares(network: str, rows: Sequence[tuple[int, int, int, int, int, int]]) -> list[Shape]:
    """Make the convolutions of a network from rows of size, inputs, outputs, extent, stride and multiplicity."""
    return [square(network, *row) for row in rows]


RESNET_18 = _squares(
    "ResNet-18",
    (
        (7, 3, 64, 224, 2, 1),
        (3, 64, 64, 56, 1, 4),
        (3, 64, 128, 56, 2, 1),
        (3, 128, 128, 28, 1, 3),
        (3, 128, 256, 28, 2, 1),
        (3, 256, 256, 14, 1, 3),
        (3, 256, 512, 14, 2, 1),
        (3, 512, 512, 7, 1, 3),
    ),
)
"""Without the three convolutions of 1 x 1 taps."""

RESNET_50 = _squares(
    "ResNet-50",
    (
        (7, 3, 64, 224, 2, 1),
        (1, 64, 64, 56, 1, 1),
        (1, 256, 64, 56, 1, 2),
        (3, 64, 64, 56, 1, 3),
        (1, 64, 256, 56, 1, 4),
        (1, 256, 128, 56, 1, 1),
        (3, 128, 128, 56, 2, 1),
        (1, 256, 512, 56, 2, 1),
        (1, 128, 512, 28, 1, 4),
        (1, 512, 128, 28, 1, 3),
        (3, 128, 128, 28, 1, 3),
        (1, 512, 256, 28, 1, 1),
        (3, 256, 256, 28, 2, 1),
        (1, 512, 1024, 28, 2, 1),
        (1, 256, 1024, 14, 1, 6),
        (1, 1024, 256, 14, 1, 5),
        (3, 256, 256, 14, 1, 5),
        (1, 1024, 512, 14, 1, 1),
        (3, 512, 512, 14, 2, 1),
        (1, 1024, 2048, 14, 2, 1),
        (1, 512, 2048, 7, 1, 3),
        (1, 2048, 512, 7, 1, 2),
        (3, 512, 512, 7, 1, 2),
    ),
)
RESNET_32 = _squares(
    "ResNet-32",
    (
        (3, 3, 16, 32, 1, 1),
        (3, 16, 16, 32, 1, 10),
        (3, 16, 32, 32, 2, 1),
        (3, 32, 32, 16, 1, 9),
        (3, 32, 64, 16, 2, 1),
        (3, 64, 64, 8, 1, 9),
    ),
)
VGG_16 = _squares(
    "VGG-16",
    (
        (3, 3, 64, 224, 1, 1),
        (3, 64, 64, 224, 1, 1),
        (3, 64, 128, 112, 1, 1),
        (3, 128, 128, 112, 1, 1),
        (3, 128, 256, 56, 1, 1),
        (3, 256, 256, 56, 1, 2),
        (3, 256, 512, 28, 1, 1),
        (3, 512, 512, 28, 1, 2),
        (3, 512, 512, 14, 1, 3),
    ),
)
MOBILENET_V2 = [
    square("MobileNet-V2", 3, channels, channels, extent, stride, times, groups=channels)
    for channels, extent, stride, times in (
        (32, 112, 1, 1),
        (96, 112, 2, 1),
        (144, 56, 1, 1),
        (144, 56, 2, 1),
        (192, 28, 1, 2),
        (192, 28, 2, 1),
        (384, 14, 1, 4),
        (576, 14, 1, 2),
        (576, 14, 2, 1),
        (960, 7, 1, 3),
    )
]
"""The depthwise convolutions."""

DEPTHWISE_960 = [square("depthwise", 3, 960, 960, extent, times=0, groups=960) for extent in (14, 112)]
R3D_18 = [
    convolution("R3D-18", (3, 7, 7), 3, 64, (16, 112, 112), (1, 2, 2)),
    convolution("R3D-18", (3, 3, 3), 64, 64, (16, 56, 56), 1, 4),
    convolution("R3D-18", (3, 3, 3), 64, 128, (16, 56, 56), 2),
    convolution("R3D-18", (1, 1, 1), 64, 128, (16, 56, 56), 2),
    convolution("R3D-18", (3, 3, 3), 128, 128, (8, 28, 28), 1, 3),
    convolution("R3D-18", (3, 3, 3), 128, 256, (8, 28, 28), 2),
    convolution("R3D-18", (1, 1, 1), 128, 256, (8, 28, 28), 2),
    convolution("R3D-18", (3, 3, 3), 256, 256, (4, 14, 14), 1, 3),
    convolution("R3D-18", (3, 3, 3), 256, 512, (4, 14, 14), 2),
    convolution("R3D-18", (1, 1, 1), 256, 512, (4, 14, 14), 2),
    convolution("R3D-18", (3, 3, 3), 512, 512, (2, 7, 7), 1, 3),
]
"""Clips of 16 frames."""

CONV_TASNET = [
    convolution("Conv-TasNet", (16,), 1, 512, 32_000, stride=8),
    convolution("Conv-TasNet", (1,), 512, 128, 4_000),
    convolution("Conv-TasNet", (1,), 128, 512, 4_000, times=24),
    *(convolution("Conv-TasNet", (3,), 512, 512, 4_000, dilation=2**i, groups=512, times=3) for i in range(8)),
]
"""Four seconds at 8 kHz: 32,000 samples, 4,000 frames."""

WAVENET = [convolution("WaveNet", (2,), 64, 128, 16_000, dilation=dilation, times=3) for dilation in (1, 16, 512)]
"""One second at 16 kHz: the smallest, a middle one and the largest of the ten dilations."""

NETWORKS = [
    *RESNET_50,
    *RESNET_32,
    *MOBILENET_V2,
    *DEPTHWISE_960,
    *VGG_16,
    *R3D_18,
    *CONV_TASNET,
    *WAVENET,
]
QUICK = [
    RESNET_32[0],
    RESNET_32[1],
    RESNET_32[4],
    RESNET_32[5],
    square("small", 1, 64, 32, 14, times=0),
    square("small", 1, 64, 128, 14, stride=2, times=0),
    square("small", 3, 96, 96, 14, times=0, groups=96),
    square("small", 7, 3, 32, 56, stride=2, times=0),
    convolution("R3D-18", (3, 3, 3), 8, 16, (4, 14, 14), 2, times=0),
    convolution("small", (2,), 16, 32, 1_000, dilation=4, times=0),
    convolution("small", (5,), 16, 16, 12, dilation=3, groups=2, times=0),
]
"""Small shapes of every kind."""

SYMBOL_TOO_LARGE = square("large symbol", 3, 128, 128, 256, times=0)
"""The whole symbol takes 8.6 GB in complex64."""

GROUPS: dict[str, list[Shape]] = {
    "ResNet-50 3x3 and 7x7": [shape for shape in RESNET_50 if max(shape.taps) > 1],
    "ResNet-50 1x1": [shape for shape in RESNET_50 if max(shape.taps) == 1],
    "depthwise 3x3, 960 channels, 14": DEPTHWISE_960[:1],
    "depthwise 3x3, 960 channels, 112": DEPTHWISE_960[1:],
    "first layer 7x7 s2": RESNET_50[:1],
    "ResNet-32": RESNET_32,
    "MobileNet-V2 depthwise": MOBILENET_V2,
    "VGG-16": VGG_16,
    "R3D-18 (3-D)": R3D_18,
    "Conv-TasNet and WaveNet (1-D)": [*CONV_TASNET, *WAVENET],
    "small shapes": QUICK[4:],
}
"""Rows of the summary: each sums the distinct convolutions that it lists, and counts each of them once."""


def select(shapes: Sequence[Shape], pattern: str | None) -> list[Shape]:
    """Return the shapes whose name holds `pattern`, which may have the wildcards of a shell; all of them for None."""
    if pattern is None:
        return list(shapes)
    return [shape for shape in shapes if fnmatch.fnmatch(shape.name.lower(), f"*{pattern.lower()}*")]
