"""An upper bound of the norm for every input size, from a grid that shapes alone decide."""

from __future__ import annotations

from convsv_core._geometry.padding import check_repeats_no_pixel
from convsv_core._geometry.shapes import check_input_shape
from convsv_core._norm.every_size import EverySizeGrid, every_size_grid
from convsv_core._norm.largest import norm_on_grid
from convsv_core._symbol.operand import Operand, make_operand, shape_of
from convsv_core.backend import Array
from convsv_core.conv import Conv, check_positive
from convsv_core.plugins import on_host

__all__ = ["grid_for", "grid_upper_bound", "norm_upper_bound", "operand_on"]


@on_host
def norm_upper_bound(kernel: Array, conv: Conv, *, rtol: float = 0.1) -> Array:
    r"""Bound the operator norm of a convolution from above for every input size, traceably.

    The bound is the largest norm of the symbol on a fixed grid, times a factor that bounds how far the norm can rise
    between the grid's points. It serves training steps, where `norm_bounds` cannot be traced.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    conv : Conv
        The geometry. The padding must be one that `norm_bounds` takes without an input shape.
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
    line along one axis, then to the maximiser on that line, and so on. The ``N_i`` are the smallest numbers with which
    each factor is at least ``(1 + rtol) ** (-1 / axes)``.

    Traceable with `conv` and `rtol` static. Differentiable: the gradient is that of ``u v*`` at the grid's
    maximiser, times the constant factor. It is a subgradient where there are many maximisers, and 0 for the zero
    kernel. JAX kernels on one device of a CPU are bounded with NumPy, from compiled programs too. The widening for
    rounding errors (see `norm_bounds`) is a constant factor to differentiation. Programs of XLA take subnormal entries
    for 0: a compiled bound is then the bound of the kernel without these entries.

    Examples
    --------
    >>> import numpy as np
    >>> bound = norm_upper_bound(np.ones((1, 1, 3, 3)), Conv("OIHW"))
    >>> bool(9.0 <= bound <= 9.0 * 1.1)
    True
    """
    check_positive("rtol", rtol)
    shape = shape_of(kernel, conv)
    check_repeats_no_pixel(shape, conv)
    grid = every_size_grid(shape, conv, rtol)
    operand = make_operand(kernel, grid.input_shape, grid.conv)
    return operand.answer_upper(grid_upper_bound(operand, grid.factor))


def grid_for(kernel_shape: tuple[int, ...], input_shape: object, conv: Conv, rise: float) -> EverySizeGrid:
    """Return the grid of a user's input shape or, for None, a grid that stands for every size.

    Parameters
    ----------
    kernel_shape : tuple of int
    input_shape : object
        The user's argument.
    conv : Conv
    rise : float
        The largest relative rise of a norm between the points of a grid that stands for every size.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        `input_shape` does not fit, or it is None and the padding repeats pixels.
    """
    if input_shape is None:
        check_repeats_no_pixel(kernel_shape, conv)
        return every_size_grid(kernel_shape, conv, rise)
    return EverySizeGrid(check_input_shape(input_shape, conv), conv, 1.0)


def operand_on(kernel: Array, grid: EverySizeGrid, name: str = "kernel") -> Operand:
    """Return the operand of a kernel on a grid, with a hint in the error for padding that is not circular."""
    try:
        return make_operand(kernel, grid.input_shape, grid.conv, name=name)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{error}; input_shape=None bounds circular, zero and 'valid' padding of every size"
        ) from None


def grid_upper_bound(operand: Operand, factor: float = 1.0) -> Array:
    """Return the largest norm on the operand's grid, at its scale, times a factor; all rounding is included."""
    found = norm_on_grid(operand, exact=False)
    return found.norm * (found.widening * (factor * (1 + 4 * operand.answer_eps)))
