"""One clip-and-cut step: clip the singular values at a bound, and cut the kernel back to its support."""

from __future__ import annotations

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._projection.excess import Method, clip_and_cut, clip_between
from convsv_core._symbol.bound_argument import check_bound
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, symbol_polynomial
from convsv_core.backend import Array, ArraySpec, BlockWork
from convsv_core.conv import Conv
from convsv_core.dtypes import COMPLEX_OF
from convsv_core.plugins import backend_of, on_host

__all__ = ["clip"]


@on_host
def clip(
    kernel: Array,
    input_shape: tuple[int, ...],
    conv: Conv,
    bound: float | Array,
    *,
    lower: float | Array | None = None,
) -> Array:
    """Clip the singular values of a circular convolution, then cut the kernel back to its support.

    The clipped operator is the Frobenius-nearest one of norm at most `bound` among circular convolutions of full
    support. The cut projects it onto kernels of the given shape, and can raise the norm above `bound` again. This is
    one step, as in the paper. The result does **not** promise the bound; the result of `project` does.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also says what is raised.
    bound : float or 0-d array of the kernel's library
        Largest singular value to leave: at least 0. Infinity clips nothing.
    lower : float or 0-d array, optional
        Smallest singular value to leave. Smaller values are raised to it, which keeps a layer invertible.

    Returns
    -------
    array
        A kernel of the same shape, on the same device. float32 for kernels of 16 bits, else of the kernel's dtype. It
        equals the kernel, bit for bit, if no singular value exceeds the bound.

    Raises
    ------
    TypeError
        Also if `bound` or `lower` is an array of another library, or no number.
    ValueError
        Also if `bound` or `lower` is negative or NaN, or if `lower` is above `bound`.

    Notes
    -----
    Without `lower`, eager mode decomposes only the frequencies above the bound. The error depends on the method,
    which depends on the kernel:

    - the SVD, for kernels of 64 bits and for libraries without fast float64: ``eps * norm``;
    - eigenvectors of Gram matrices in float64, for kernels of 32 bits or fewer: ``eps64 * norm**2 / bound``;
    - an iteration for the leading singular vectors, if few of many values exceed the bound: ``16 * eps32 * norm``.
      The iteration's result is checked.

    JAX kernels on one device of a CPU are clipped with NumPy, from compiled programs too.

    Traceable. A constant for differentiation: gradients neither flow through it nor fail, because singular vectors
    have no derivative where values repeat. If taps of a kernel larger than the input wrap onto each other, they share
    the change equally.

    Sources: Sedghi, Gupta and Long, ICLR 2019, section 3; Lefkimmatis, Ward and Unser, IEEE Transactions on Image
    Processing, 2013.

    Examples
    --------
    >>> import numpy as np
    >>> float(clip(np.asarray([[[3.0]]]), (4,), Conv("OIW"), 1.0)[0, 0, 0])
    1.0
    """
    operand = make_operand(backend_of(kernel).stop_gradient(kernel), input_shape, conv)
    limit = check_bound(operand, bound) / operand.scale
    if lower is None:
        return operand.run(_clip_or_host, arrays=(limit,))
    least = check_bound(operand, lower, "lower") / operand.scale
    numbers = isinstance(lower, int | float) and isinstance(bound, int | float)
    if lower > bound if numbers else operand.backend.truth(least > limit):
        raise ValueError(f"lower={lower} is above bound={bound}")
    return operand.run(_clip_or_host, arrays=(limit, least))


def _clip_or_host(operand: Operand, *limits: Array) -> Array:
    """Return the clipped kernel, from the host where a program of the library can call it."""
    if not operand.backend.compiles:
        return _clip(operand, *limits)
    shape, dtype = tuple(operand.kernel.shape), operand.answered_in
    results = (ArraySpec(shape, dtype if operand.plan.real else COMPLEX_OF[dtype]),)
    (clipped,) = operand.call_host(_clipped, arrays=limits, results=results, otherwise=_clipped)
    return operand.or_nan(clipped)


def _clipped(operand: Operand, *limits: Array) -> tuple[Array, ...]:
    return (_clip(operand, *limits),)


def _clip(operand: Operand, limit: Array, lower: Array | None = None) -> Array:
    """Return the clipped kernel: one task for each block of frequencies if the library is lazy."""
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
    """Return the change of the taps by clipping to a limit, or between a lower and an upper limit.

    `limits` holds the upper limit and, if there is one, the lower limit. `tested` is the operand for the tests.
    """
    if len(limits) == 2:
        return clip_between(operand, limits[0], limits[1], places)
    method: Method = "gram" if operand.widened else "svd"
    return clip_and_cut(operand, operand.kernel, limits[0], method, places=places, tested=tested)


def _change_of_block(operand: Operand, limits: Array) -> BlockWork:
    """Return the work that computes the change of the taps by a block of frequencies.

    A lazy library computes each block as a task of its own.
    """

    def change_of_block(places: Array) -> Array:
        chosen = operand.backend.to_numpy(places)
        return _change(operand, tuple(limits), chosen)[None, ...]

    return BlockWork(change_of_block, 3 * symbol_polynomial(operand).row_bytes)
