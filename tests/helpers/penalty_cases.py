"""Every penalty as a function of a layer, and kernels that are hard on a penalty."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from convsv_core import Conv, penalties

EPS = float(np.finfo(np.float64).eps)
CONV = Conv("OIHW")

CALLS: dict[str, Callable[..., Any]] = {
    "norm_hinge": lambda *layer: penalties.norm_hinge(*layer, 0.5),
    "spectrum_hinge": lambda *layer: penalties.spectrum_hinge(*layer, 0.5),
    "squared_norm": penalties.squared_norm,
    "orthogonality": penalties.orthogonality,
    "nuclear": lambda *layer: penalties.schatten(*layer, 1),
    "schatten-1.5": lambda *layer: penalties.schatten(*layer, 1.5),
    "frobenius": lambda *layer: penalties.schatten(*layer, 2),
    "schatten-4": lambda *layer: penalties.schatten(*layer, 4),
    "schatten-6": lambda *layer: penalties.schatten(*layer, 6),
    "log_condition_number": penalties.log_condition_number,
    "log_lipschitz": penalties.log_lipschitz,
    "negative_log_abs_det": penalties.negative_log_abs_det,
    "stable_rank": penalties.stable_rank,
}


def random_kernel(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


def unitary(channels: int = 4) -> Any:
    """An orthogonal layer's kernel: rotations, and a shift of half of the channels along each axis."""
    rng = np.random.default_rng(5)
    first, second, third = (np.linalg.qr(rng.standard_normal((channels, channels)))[0] for _ in range(3))
    half = np.diag((np.arange(channels) < channels // 2) + 0.0)
    stay = np.eye(channels) - half
    kernel = np.zeros((channels, channels, 2, 2))
    for row, along in enumerate((stay, half)):
        for column, across in enumerate((stay, half)):
            kernel[:, :, row, column] = first @ along @ second @ across @ third
    return kernel


HARD = {
    "zero": np.zeros((4, 4, 3, 3)),
    "identity": np.eye(4)[:, :, None, None] * (np.arange(9) == 4).reshape(3, 3),
    "orthogonal": unitary(),
    "deficient": np.ones((4, 4, 3, 3)),
    "repeated": np.diag([2.0, 2.0, 1.0, 1.0])[:, :, None, None],
    "random": random_kernel(4, 4, 3, 3),
}
