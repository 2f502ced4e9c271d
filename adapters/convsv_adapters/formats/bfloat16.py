"""bfloat16, which NumPy lacks: the upper half of a float32."""

from __future__ import annotations

import numpy as np

from convsv_adapters.parameters import HostArray

__all__ = ["from_bfloat16_bits", "to_bfloat16_bits"]


def to_bfloat16_bits(array: HostArray) -> HostArray:
    """Return the little-endian 16-bit patterns of real numbers that bfloat16 holds exactly."""
    return (array.astype("<f4").view("<u4") >> 16).astype("<u2")


def from_bfloat16_bits(bits: HostArray) -> HostArray:
    """Return the float32 numbers of 16-bit patterns; the inverse of `to_bfloat16_bits`.

    Examples
    --------
    >>> from_bfloat16_bits(to_bfloat16_bits(np.array([1.5, -0.25]))).tolist()
    [1.5, -0.25]
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)
