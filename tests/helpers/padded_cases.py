"""Layers of every padding on small images, with their dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from convsv_conformance.dense import dense_matrix

from convsv_core import Conv

__all__ = ["Case", "cases"]


@dataclass(frozen=True)
class Case:
    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    conv: Conv

    def kernel(self, *, complex_values: bool = False) -> Any:
        rng = np.random.default_rng(sum(self.kernel_shape))
        real = rng.standard_normal(self.kernel_shape)
        return real + 1j * rng.standard_normal(self.kernel_shape) if complex_values else real

    def matrix(self, kernel: Any) -> Any:
        conv = self.conv
        taps = tuple(kernel.shape[conv.layout.index(letter)] for letter in conv.spatial)
        return dense_matrix(
            kernel,
            self.input_shape,
            conv.layout,
            stride=conv.strides,
            dilation=conv.dilations,
            groups=conv.groups,
            pads=conv.pads(taps),
            padding_mode=conv.padding_mode,
            transposed=conv.transposed,
        )

    def norm(self, kernel: Any) -> float:
        return float(np.linalg.norm(self.matrix(kernel), 2))


def cases() -> dict[str, Case]:
    found = {}
    for mode in ("zeros", "reflect", "replicate", "circular"):
        found |= {
            f"same-{mode}": Case((3, 2, 3, 3), (6, 5), Conv("OIHW", padding_mode=mode)),
            f"even-{mode}": Case((2, 3, 4, 2), (5, 6), Conv("OIHW", padding=(2, 1), padding_mode=mode)),
            f"asymmetric-{mode}": Case((3, 2, 3, 2), (5, 4), Conv("HWIO", padding=((2, 0), (1, 3)), padding_mode=mode)),
            f"strided-{mode}": Case(
                (4, 2, 3, 5), (7, 8), Conv("OIHW", stride=(2, 3), padding=(1, 2), padding_mode=mode)
            ),
            f"dilated-{mode}": Case(
                (4, 2, 3, 2), (7, 6), Conv("OIHW", dilation=(2, 3), groups=2, padding=(2, 2), padding_mode=mode)
            ),
            f"depthwise-{mode}": Case((3, 1, 3, 3), (5, 5), Conv("OIHW", groups=3, padding=1, padding_mode=mode)),
            f"1d-{mode}": Case((2, 3, 5), (6,), Conv("OIW", padding=4, padding_mode=mode)),
            f"3d-{mode}": Case((2, 1, 2, 3, 2), (3, 2, 4), Conv("OIDHW", padding=1, padding_mode=mode)),
            f"transposed-{mode}": Case(
                (4, 1, 4, 4), (3, 4), Conv("IOHW", stride=2, groups=2, padding=1, padding_mode=mode, transposed=True)
            ),
            f"one-channel-{mode}": Case((1, 1, 3, 3), (6, 6), Conv("OIHW", padding=2, padding_mode=mode)),
        }
    return found | {
        "valid": Case((3, 2, 3, 2), (6, 5), Conv("OIHW", padding="valid", padding_mode="zeros")),
        "valid-strided": Case((3, 2, 3, 2), (6, 5), Conv("OIHW", padding="valid", stride=2, padding_mode="zeros")),
        "one-output": Case((3, 2, 6, 5), (6, 5), Conv("OIHW", padding="valid", padding_mode="zeros")),
        "tall-5": Case((1, 1, 5, 1), (8, 8), Conv("OIHW", padding_mode="zeros")),
        "tall-4": Case((2, 2, 4, 2), (8, 8), Conv("OIHW", padding_mode="zeros")),
        "kernel-larger-zeros": Case((2, 2, 7, 5), (3, 2), Conv("OIHW", padding=(3, 2), padding_mode="zeros")),
        "kernel-larger-replicate": Case((2, 2, 7, 5), (3, 2), Conv("OIHW", padding=(3, 2), padding_mode="replicate")),
        "kernel-larger-circulant": Case((2, 2, 9), (4,), Conv("OIW")),
        "one-pixel": Case((2, 2, 3, 3), (1, 1), Conv("OIHW", padding=2, padding_mode="replicate")),
        "taps-on-zeros-only": Case((1, 1, 2), (2,), Conv("OIW", padding=3, stride=4, padding_mode="zeros")),
    }
