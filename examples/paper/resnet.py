"""Residual networks of He et al.: for small images, with batch normalisation or without, and for large ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RESNET_32", "RESNET_50", "BottleneckResNet", "ResNet"]

RESNET_32 = {"widths": (16, 32, 64), "blocks": 5}
"""Arguments of the network that the paper trains on CIFAR-10: `widths` and `blocks` of `ResNet`."""

RESNET_50 = {"widths": (64, 128, 256, 512), "blocks": (3, 4, 6, 3)}
"""Arguments of the network for ImageNet: `widths` and `blocks` of `BottleneckResNet`."""


class ResNet(nn.Module):
    """Stages of residual blocks, global average pooling and a linear head.

    Each stage but the first begins with a stride of 2. A shortcut has no parameters: it takes every other pixel
    and appends channels of zeros. Source: He et al., *Deep Residual Learning for Image Recognition*, CVPR
    2016, section 4.2.

    Parameters
    ----------
    widths : sequence of int
        Channels of each stage.
    blocks : int
        Residual blocks of each stage. A block has two convolutions.
    channels, classes : int
    batch_norm : bool, default True
        Whether batch normalisation follows each convolution; if not, the convolutions have biases.
    """

    def __init__(
        self, widths: Sequence[int], blocks: int, *, channels: int = 3, classes: int = 10, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.stem = _conv(channels, widths[0], 1, batch_norm)
        stages = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise([widths[0], *widths])):
            stages.append(_Block(inputs, outputs, 2 if number else 1, batch_norm))
            stages.extend(_Block(outputs, outputs, 1, batch_norm) for _ in range(blocks - 1))
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) of images (n, channels, height, width)."""
        return self.head(self.blocks(F.relu(self.stem(images))).mean(dim=(2, 3)))


class BottleneckResNet(nn.Module):
    """Stages of bottleneck blocks for large images, global average pooling and a linear head.

    The stem is a 7 x 7 convolution of stride 2 and a maximum over 3 x 3 pixels, of stride 2 again. Each stage but the
    first halves the extents, in the 3 x 3 convolution of its first block. The shortcut of a stage's first block is a
    1 x 1 convolution. Source: He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, table 1.

    Parameters
    ----------
    widths : sequence of int
        Channels of the 3 x 3 convolutions of each stage; its blocks return four times as many.
    blocks : sequence of int
        Blocks of each stage. A block has three convolutions.
    channels, classes : int
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], *, channels: int = 3, classes: int = 1000) -> None:
        super().__init__()
        self.stem = _normalised(channels, widths[0], 7, 2)
        stages, inputs = [], widths[0]
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for place in range(count):
                stages.append(_Bottleneck(inputs, width, 2 if number and not place else 1))
                inputs = EXPANSION * width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) of images (n, channels, height, width)."""
        hidden = F.max_pool2d(F.relu(self.stem(images)), 3, stride=2, padding=1)
        return self.head(self.blocks(hidden).mean(dim=(2, 3)))


EXPANSION = 4
"""Channels that a bottleneck block returns, over those of its 3 x 3 convolution; from the paper."""


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.reduce = _normalised(inputs, width, 1, 1)
        self.middle = _normalised(width, width, 3, stride)
        self.expand = _normalised(width, outputs, 1, 1)
        self.shortcut = nn.Identity() if inputs == outputs else _normalised(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.middle(F.relu(self.reduce(x))))
        return F.relu(self.shortcut(x) + self.expand(hidden))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, stride, batch_norm)
        self.second = _conv(outputs, outputs, 1, batch_norm)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(shortcut + self.second(F.relu(self.first(x))))


def _conv(inputs: int, outputs: int, stride: int, batch_norm: bool) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not batch_norm)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if batch_norm else conv


def _normalised(inputs: int, outputs: int, taps: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, taps, stride=stride, padding=taps // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
