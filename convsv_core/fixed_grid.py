"""An upper bound of the norm for every input size, from a grid that shapes alone decide."""

from __future__ import annotations

import functools
import math

from convsv_core._geometry.padding import check_repeats_no_pixel, lattice
from convsv_core.backend import Array, BlockFunction
from convsv_core.conv import Conv
from convsv_core.decomposition import safe_sqrt
from convsv_core.evaluation import BLOCK_BYTES
from convsv_core.gram import gram_coefficients, gram_polynomial, gram_rounding
from convsv_core.operand import Operand, check_conv, make_operand
from convsv_core.plan import make_plan
from convsv_core.plugins import backend_of


def norm_upper_bound(kernel: Array, conv: Conv, *, rtol: float = 0.1) -> Array:
    r"""Bound the operator norm of a convolution from above for every input size, traceably.

    The largest norm of the symbol on a fixed grid, times the most that the norm can rise between its points:
    for use in a training step, where `norm_bounds` cannot be traced.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    conv : Conv
        The geometry; of its padding the same is asked as by `norm_bounds` without an input shape.
    rtol : float, default 0.1
        The bound is at most ``(1 + rtol)`` times the norm over all frequencies, and its rounding error. The cost
        grows with ``rtol ** (-ndim / 2)``: 61 frequencies for a real kernel of 3 x 3 taps at the default, and
        545 at 0.01.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64. At least the norm of the layer for every input
        size, and for circular, zero and 'valid' padding alike, rounding included.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `norm_bounds`. NaN or infinity in the kernel gives NaN under tracing.

    Notes
    -----
    Along axis i the symbol A is, with centred taps, of exponential type ``d_i``, half the span of its offsets. On a
    uniform grid of ``N_i`` points no angle is further than ``pi / N_i`` from a point, and with
    ``D = sum_i d_i pi / N_i < pi / 2`` the Bernstein-Szego inequality gives

        max over the grid of \|A\| <= norm <= max over the grid of \|A\| / cos(D).

    On a full grid ``prod_i cos(d_i pi / N_i)``, which is larger, may stand for ``cos(D)``: go to the nearest grid
    line along one axis, then to the maximiser on that line, and so on. The ``N_i`` are the least with which each
    of the factors is at least ``(1 + rtol) ** (-1 / axes)``.

    Traceable with `conv` and `rtol` static. Differentiable: the gradient is that of ``u v*`` at the grid's
    maximiser, times the constant factor; a subgradient where there are many, and 0 for the zero kernel. The
    rounding error, of which `norm_bounds` tells, is a constant factor to differentiation.

    Examples
    --------
    >>> import numpy as np
    >>> bound = norm_upper_bound(np.ones((1, 1, 3, 3)), Conv("OIHW"))
    >>> bool(9.0 <= bound <= 9.0 * 1.1)
    True
    """
    if not isinstance(rtol, int | float) or isinstance(rtol, bool) or not rtol > 0:
        raise ValueError(f"rtol={rtol!r}: wanted a positive number")
    check_conv(conv)
    backend_of(kernel)  # raises TypeError for an object without a shape
    shape = tuple(int(extent) for extent in kernel.shape)
    check_repeats_no_pixel(shape, conv)
    extents, circular, factor = every_size_grid(shape, conv, rtol)
    return make_operand(kernel, extents, circular).widen().run(_upper_bound, factor)


@functools.lru_cache(maxsize=256)
def every_size_grid(kernel_shape: tuple[int, ...], conv: Conv, rtol: float) -> tuple[tuple[int, ...], Conv, float]:
    """Extents and circular convolution of a fine enough grid, and how far the norm can rise between its points."""
    plan = make_plan(kernel_shape, False, None, conv)
    axes, types = plan.axes, plan.exponential_types.tolist()
    active = sum(kind > 0 for kind in types)
    largest = math.acos((1 + rtol) ** (-1 / max(active, 1)))
    points = [max(1, math.ceil(kind * math.pi / largest)) for kind in types]
    cosines = [math.cos(kind * math.pi / count) for kind, count in zip(types, points, strict=True)]
    strides = (1,) * conv.ndim if conv.transposed else conv.strides
    # `points` count the frequencies of one period, of which the offsets' common divisor makes several.
    extents = tuple(n * axis.step * stride for n, axis, stride in zip(points, axes, strides, strict=True))
    return extents, lattice(conv), 1 / math.prod(cosines)


def _upper_bound(operand: Operand, factor: float) -> Array:
    return operand.answer(grid_upper_bound(operand, factor))


def grid_upper_bound(operand: Operand, factor: float = 1.0) -> Array:
    """The largest norm on the operand's grid, at its scale, times a factor; rounding, the answer's too, included."""
    xp, backend = operand.xp, operand.backend
    coefficients = gram_coefficients(operand)
    frequencies = operand.plan.frequencies
    squares = operand.map_blocks(_squares_of_block, frequencies, arrays=(coefficients,), budget=BLOCK_BYTES)
    norm = safe_sqrt(xp, xp.max(squares))
    known = backend.stop_gradient(norm)
    is_zero = known == 0
    share = gram_rounding(operand, coefficients) / xp.where(is_zero, xp.ones_like(known), known) ** 2
    widened = xp.sqrt(1 + xp.where(is_zero, xp.zeros_like(share), share))
    eps = operand.answer_eps
    return norm * widened * (factor * (1 + 4 * eps))


def _squares_of_block(operand: Operand, coefficients: Array) -> tuple[BlockFunction, int]:
    xp, backend = operand.xp, operand.backend
    evaluate = gram_polynomial(operand, coefficients)

    def largest(frequencies: Array) -> Array:
        grams = evaluate(frequencies)
        values = xp.real(grams[..., 0, 0]) if grams.shape[-1] == 1 else backend.eigvalsh(grams)[..., -1]
        return xp.max(values, axis=-1)

    return largest, 2 * evaluate.row_bytes
