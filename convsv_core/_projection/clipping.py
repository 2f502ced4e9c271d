"""One clip-and-cut step: the singular values cut off at a bound, the kernel cut back to its support."""

from __future__ import annotations

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._projection.excess import Method, clip_and_cut, clip_between
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, symbol_polynomial
from convsv_core.backend import Array, BlockWork
from convsv_core.conv import Conv
from convsv_core.plugins import backend_of


def clip(
    kernel: Array,
    input_shape: tuple[int, ...],
    conv: Conv,
    bound: float | Array,
    *,
    lower: float | Array | None = None,
) -> Array:
    """Clip the singular values of a circular convolution, then cut the kernel back to its support.

    The clipped operator is the Frobenius-nearest of norm at most `bound` among circular convolutions of full
    support; the cut is the projection back onto kernels of this shape, and can raise the norm above `bound`
    again. One step, as in the paper: the result does **not** promise the bound, which `project` does.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also tells what is raised.
    bound : float or 0-d array of the kernel's library
        Largest singular value to leave, not negative; infinity for none.
    lower : float or 0-d array, optional
        Smallest singular value to leave: smaller ones are raised to it, which keeps a layer invertible.

    Returns
    -------
    array
        Of the kernel's shape, on its device; float32 for kernels of 16 bits, else of its dtype. Equal to the
        kernel, bit for bit, where no singular value exceeds the bound.

    Raises
    ------
    TypeError
        Also where `bound` or `lower` is an array of another library, or no number.
    ValueError
        Also where `bound` or `lower` is negative or NaN, and where `lower` is above `bound`.

    Notes
    -----
    In eager mode only the frequencies above the bound are decomposed, where no `lower` is asked for. The error is that
    of the SVD, ``eps * norm``, or for kernels of 32 bits and fewer, where the library has float64 at hand, that of the
    Gram matrix's eigenvectors, ``eps64 * norm**2 / bound``. Where few of many values of such a kernel exceed the bound
    their vectors are found by iteration instead, which is checked to leave at most ``16 * eps32 * norm``.

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
    limit = check_bound(operand, bound) / operand.scale
    if lower is None:
        return operand.run(_clip, arrays=(limit,))
    least = check_bound(operand, lower, "lower") / operand.scale
    numbers = isinstance(lower, int | float) and isinstance(bound, int | float)
    if lower > bound if numbers else operand.backend.truth(least > limit):
        raise ValueError(f"lower={lower} is above bound={bound}")
    return operand.run(_clip, arrays=(limit, least))


def _clip(operand: Operand, limit: Array, lower: Array | None = None) -> Array:
    xp, wide = operand.xp, operand.widen()
    limits = tuple(xp.astype(one, wide.real_dtype) for one in (limit, lower) if one is not None)
    if wide.backend.lazy:
        places = np.arange(len(wide.plan.frequencies))
        parts = wide.map_blocks(_change_of_block, places, arrays=(xp.stack(limits),), budget=BLOCK_BYTES)
        change = xp.sum(parts, axis=0)
    else:
        change = _change(wide, limits, tested=operand)
    return wide.answer(wide.kernel - change)


def _change(
    operand: Operand, limits: tuple[Array, ...], places: HostArray | None = None, tested: Operand | None = None
) -> Array:
    """Return what clipping to a limit, or between two, takes from the taps."""
    if len(limits) == 2:
        return clip_between(operand, limits[0], limits[1], places)
    method: Method = "gram" if operand.widened else "svd"
    return clip_and_cut(operand, operand.kernel, limits[0], method, places=places, tested=tested)


def _change_of_block(operand: Operand, limits: Array) -> BlockWork:
    """Return a function that gives the change by some frequencies, where a block is a task of its own."""

    def change_of_block(places: Array) -> Array:
        chosen = operand.backend.to_numpy(places)
        return _change(operand, tuple(limits), chosen)[None, ...]

    return BlockWork(change_of_block, 3 * symbol_polynomial(operand).row_bytes)


def check_bound(operand: Operand, bound: float | Array, name: str = "bound") -> Array:
    """`bound` as a 0-d array beside the kernel; raises, by its name, for what is no bound."""
    xp, backend = operand.xp, operand.backend
    if isinstance(bound, bool) or not (isinstance(bound, int | float) or hasattr(bound, "dtype")):
        raise TypeError(f"{name}={bound!r}: wanted a number or a 0-d array of the kernel's library")
    if isinstance(bound, int | float | np.number):
        array = xp.full_like(operand.scale, float(bound))
    else:
        if not backend.owns_array(bound):
            raise TypeError(
                f"kernel is an array of {backend.name}, {name} one of {type(bound).__module__}: wanted one library"
            )
        if bound.ndim != 0:
            raise ValueError(f"{name} has shape {tuple(bound.shape)}: wanted a number or a 0-d array")
        array = xp.astype(bound, operand.real_dtype)
    known = bound >= 0 if isinstance(bound, int | float) else backend.truth(array >= 0)
    if known is False:
        raise ValueError(f"{name}={bound}: wanted a number of at least 0")
    return array
