"""One clip-and-cut step: the singular values cut off at a bound, the kernel cut back to its support."""

from __future__ import annotations

import math

import numpy as np

from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.evaluation import BLOCK_BYTES, symbol_polynomial
from convsv_core.operand import Operand, make_operand
from convsv_core.plugins import backend_of


def clip(kernel: Array, input_shape: tuple[int, ...], conv: Conv, bound: float | Array) -> Array:
    """Clip the singular values of a circular convolution from above, then cut the kernel back to its support.

    The clipped operator is the Frobenius-nearest of norm at most `bound` among circular convolutions of full
    support; the cut is the projection back onto kernels of this shape, and can raise the norm above `bound`
    again. One step, as in the paper: the result does **not** promise the bound.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also tells what is raised.
    bound : float or 0-d array of the kernel's library
        Largest singular value to leave, not negative.

    Returns
    -------
    array
        Of the kernel's shape, on its device; float32 for kernels of 16 bits, else of its dtype. Equal to the
        kernel, bit for bit, where no singular value exceeds the bound.

    Raises
    ------
    TypeError
        Also where `bound` is an array of another library, or no number.
    ValueError
        Also where `bound` is negative or NaN.

    Notes
    -----
    Traceable. A constant to differentiation (gradients neither flow through it nor fail): the derivative of
    singular vectors does not exist where values repeat. Where a kernel larger than the input has taps
    that wrap onto each other, they share the change equally. Source: Sedghi, Gupta and Long, ICLR 2019,
    section 3; Lefkimmatis, Ward and Unser, IEEE Transactions on Image Processing, 2013.

    Examples
    --------
    >>> import numpy as np
    >>> float(clip(np.asarray([[[3.0]]]), (4,), Conv("OIW"), 1.0)[0, 0, 0])
    1.0
    """
    operand = make_operand(backend_of(kernel).stop_gradient(kernel), input_shape, conv)
    return operand.run(_clip, arrays=(check_bound(operand, bound) / operand.scale,))


def _clip(operand: Operand, limit: Array) -> Array:
    xp, backend, plan = operand.xp, operand.backend, operand.plan
    conv = plan.conv
    symbol = symbol_polynomial(operand)
    weights = xp.astype(backend.constant(plan.weights(), operand.scale), operand.real_dtype, copy=False)

    def excess_taps(frequencies: Array) -> Array:
        """What the block's excess over the bound contributes to each tap, with a leading axis of 1."""
        u, s, vh = backend.svd(symbol(frequencies[:, 1:]))
        excess = xp.clip(s - limit, 0.0, None) * xp.take(weights, frequencies[:, 0], axis=0)[:, None, None]
        matrices = xp.matmul(u * xp.astype(excess, operand.complex_dtype)[..., None, :], vh)
        inverse = backend.adjoint(symbol.phases(frequencies[:, 1:]))
        flat = xp.reshape(matrices, (matrices.shape[0], -1))
        return xp.reshape(xp.matmul(inverse, flat), (1, -1, *matrices.shape[1:]))

    numbered = np.concatenate([np.arange(len(plan.frequencies))[:, None], plan.frequencies], axis=1)
    parts = backend.map_blocks(
        excess_taps, numbered, operand.kernel, row_bytes=4 * symbol.row_bytes, budget=BLOCK_BYTES
    )
    change = operand.from_taps(xp.sum(parts, axis=0)) / math.prod(plan.periods)
    change = xp.real(change) if plan.real else change
    order = [conv.spatial.index(letter) for letter in conv.layout if letter in conv.spatial]
    sharing = plan.sharing().transpose(order)
    spatial = [n if letter in conv.spatial else 1 for letter, n in zip(conv.layout, operand.kernel.shape, strict=True)]
    divisor = backend.constant(sharing.reshape(spatial).astype(float), change)
    return operand.answer(operand.kernel - change / xp.astype(divisor, operand.real_dtype, copy=False))


def check_bound(operand: Operand, bound: float | Array) -> Array:
    """`bound` as a 0-d array beside the kernel; raises for what is no bound."""
    xp, backend = operand.xp, operand.backend
    if isinstance(bound, bool) or not (isinstance(bound, int | float) or hasattr(bound, "dtype")):
        raise TypeError(f"bound={bound!r}: wanted a number or a 0-d array of the kernel's library")
    if isinstance(bound, int | float | np.number):
        array = xp.full_like(operand.scale, float(bound))
    else:
        if not backend.owns(bound):
            raise TypeError(
                f"kernel is an array of {backend.name}, bound one of {type(bound).__module__}: wanted one library"
            )
        if bound.ndim != 0:
            raise ValueError(f"bound has shape {tuple(bound.shape)}: wanted a number or a 0-d array")
        array = xp.astype(bound, operand.real_dtype)
    if backend.truth(array >= 0) is False:
        raise ValueError(f"bound={bound}: wanted a number of at least 0")
    return array
