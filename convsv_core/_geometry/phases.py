"""Phases of plane waves at the frequencies of a grid."""

from __future__ import annotations

import numpy as np

from convsv_core._geometry.plan import HostArray, IntArray

__all__ = ["unit_phases"]

QUARTER_TURN = 2e-15
"""Real and imaginary parts of phases below this size are set to 0.

Rounding leaves at most ``2.6e-16 * 3 pi / 2 = 1.3e-15`` of a part that is 0 in exact arithmetic: an angle is
computed by a product and a division. Measured for denominators up to 4e6: 1.1e-15. All other parts of a phase
with denominator n are at least ``1.4 / n``: far larger for every grid that fits into memory.
"""


def unit_phases(numerators: IntArray, denominator: int) -> HostArray:
    """Return ``exp(2 pi i m / denominator)`` for the integers m; quarter turns are exact.

    The integers are reduced modulo the denominator first, so that large ones lose no accuracy.
    """
    phases = np.asarray(np.exp(2j * np.pi * (numerators % denominator) / denominator))
    # Tiny parts would make imaginary parts of real matrices denormal, and arithmetic with such numbers is slow.
    phases.real[np.abs(phases.real) < QUARTER_TURN] = 0
    phases.imag[np.abs(phases.imag) < QUARTER_TURN] = 0
    return phases
