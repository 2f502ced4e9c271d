"""Draw the kernels of the cases, as ``(rows, columns, *taps)``, before they are put into a layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from convsv_conformance.dense import Array

__all__ = ["FILLS", "Fill", "random_kernel"]

Fill: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], Array]
"""A function from a random generator and a shape to a kernel of that shape."""


def random_kernel(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return independent Gaussian entries, with a squared sum of about 1 for each row."""
    return rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


def _zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape)


def _identity(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return the layer that changes nothing: ones on the diagonal of the tap that reads the pixel itself."""
    kernel: Array = np.zeros(shape)
    centre: Any = (..., *((k - 1) // 2 for k in shape[2:]))
    kernel[centre] = np.eye(shape[0], shape[1])
    return kernel


def _one_hot(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    kernel: Array = np.zeros(shape)
    kernel[0, -1].flat[0] = 1.5
    return kernel


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return a product of rotations and of shifts of half of the channels, which is unitary at every frequency."""
    channels = shape[0]
    kernel: Array = np.zeros(shape)
    corner: Any = (..., *(0 for _ in shape[2:]))
    kernel[corner] = _rotation(rng, channels)
    for axis in range(2, len(shape)):
        shifted = np.arange(channels) < (channels + 1) // 2
        for _ in range(shape[axis] - 1):
            moved = np.where(shifted.reshape(-1, *[1] * (len(shape) - 1)), np.roll(kernel, 1, axis), kernel)
            kernel = np.tensordot(_rotation(rng, channels), moved, axes=1)
    return kernel


def _graded(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return a kernel whose singular values span twelve orders of magnitude and are equal at every frequency."""
    values = np.logspace(0, -12, shape[0])
    return np.asarray(values.reshape(-1, *[1] * (len(shape) - 1)) * _orthogonal(rng, shape))


def _repeated(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return a kernel that has each singular value many times; zero is one of the values."""
    values = np.repeat([2.0, 1.0, 0.0], -(-shape[0] // 3))[: shape[0]]
    return np.asarray(values.reshape(-1, *[1] * (len(shape) - 1)) * _orthogonal(rng, shape))


def _deficient(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return a kernel of rank one at every frequency, so that all other singular values are exactly zero."""
    rows = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)))
    return np.asarray(rows * rng.standard_normal((1, *shape[1:])))


def _leading(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return a kernel with one singular value, of a single tap, far above the others at every frequency."""
    kernel: Array = 0.1 * rng.standard_normal(shape)
    corner: Any = (..., *(0 for _ in shape[2:]))
    kernel[corner] += _deficient(rng, shape[:2])
    return kernel


def _rotation(rng: np.random.Generator, size: int) -> Array:
    q: Array = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return q


FILLS: dict[str, Fill] = {
    "random": random_kernel,
    "zero": _zero,
    "identity": _identity,
    "one-hot": _one_hot,
    "orthogonal": _orthogonal,
    "graded": _graded,
    "repeated": _repeated,
    "deficient": _deficient,
    "leading": _leading,
}
"""The ways to draw a kernel, by the name that a case gives as its `fill`."""
