"""Residual networks of He et al. for small images, with batch normalisation or without."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RESNET_32", "ResNet"]

RESNET_32 = {"widths": (16, 32, 64), "blocks": 5}
"""Arguments of the network that the paper trains on CIFAR-10: `widths` and `blocks` of `ResNet`."""


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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, classes) of images (n, channels, height, width)."""
        return self.head(self.blocks(F.relu(self.stem(images))).mean(dim=(2, 3)))


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
