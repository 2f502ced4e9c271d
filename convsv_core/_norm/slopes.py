"""Derivatives of largest norms, each at one frequency of its own.

At the maximiser the symbol is ``A = sum_p exp(i p theta) K_p``. The derivative of its norm is ``Re u* dA v`` for a pair
of singular vectors u and v.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import phases_on_host
from convsv_core._symbol.singular_pairs import largest_pairs

__all__ = ["slopes_at"]


def slopes_at(operand: Operand, places: Sequence[int], squares: Sequence[float]) -> HostArray:
    """Return the derivative of each kernel's norm at one of the visited frequencies.

    Parameters
    ----------
    operand : Operand
        Of NumPy arrays. Its groups are those of one kernel after another.
    places : sequence of int
        A place among the visited frequencies for each kernel.
    squares : sequence of float
        The largest eigenvalue of each kernel's Gram matrices there, at the operand's scale, to rounding.

    Returns
    -------
    array, of the shape of the operand's kernel
        The derivative of each kernel's norm, at the places of this kernel. It is 0 at a zero kernel.
    """
    backend, plan = operand.backend, operand.plan
    taps = operand.taps()
    offsets, groups, rows, columns = taps.shape
    count, each = len(places), groups // len(places)
    phases = phases_on_host(plan, plan.frequencies[np.asarray(places)], operand.computed_in)
    with backend.computation_context(operand.kernel):
        apart = taps.reshape(offsets, count, each * rows * columns).transpose(1, 0, 2)
        if plan.real:  # Two real products are half of the work of a complex product.
            waves = np.stack([phases.real, phases.imag], axis=1)
            parts = np.matmul(waves, apart)
            matrices = backend.complex(parts[:, 0], parts[:, 1])
        else:
            matrices = np.matmul(phases[:, None, :], apart)[:, 0]
        matrices = matrices.reshape(count, each, rows, columns)
        found = largest_pairs(matrices, np.asarray(squares))
        pairs = np.conj(found.left)[:, :, None] * found.right[:, None, :]
        pairs[found.values == 0] = 0
        if plan.real:  # The real part of the product of the phases with the pair.
            waves = np.stack([phases.real, -phases.imag], axis=2)
            parts = np.stack([pairs.real, pairs.imag], axis=1).reshape(count, 2, rows * columns)
            changes = np.matmul(waves, parts)
        else:
            changes = phases[:, :, None] * pairs.reshape(count, 1, rows * columns)
    changes = changes.reshape(count, offsets, rows, columns).transpose(1, 0, 2, 3)
    if each == 1:
        return operand.from_taps(changes.reshape(offsets, groups, rows, columns))
    slopes = np.zeros((offsets, count, each, rows, columns), operand.kernel.dtype)
    slopes[:, np.arange(count), found.groups] = changes
    return operand.from_taps(slopes.reshape(offsets, groups, rows, columns))
