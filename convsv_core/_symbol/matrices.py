"""The symbol of a circular convolution: one small matrix for each frequency.

The singular values of the convolution are the singular values of all these matrices.
"""

from __future__ import annotations

import numpy as np

from convsv_core._geometry.phases import unit_phases
from convsv_core._geometry.plan import HostArray, Plan
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, symbol_evaluator
from convsv_core.backend import Array, BlockWork
from convsv_core.conv import Conv

__all__ = ["expand", "symbol", "with_column_phases"]


def symbol(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    r"""Compute the symbol of a circular convolution: its matrix at each frequency of the grid.

    The frequency of index j is ``theta = 2 pi j / grid`` (radians). Its matrix is the sum over the taps t
    ``A(theta) = sum_t K_t exp(i q_t . theta)``, where ``q_t`` is the offset of the tap from the output, in
    outputs. A stride s splits the input's elements into classes, by their indices modulo s. Each class acts
    as a set of input channels of its own. The transposed layer has the adjoint matrices.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    input_shape : tuple of int
        Spatial extents of the layer's input, in the order of ``conv.spatial``. An int stands for every axis.
    conv : Conv
        The geometry.

    Returns
    -------
    array, shape (\*grid, groups, rows, columns), complex
        ``grid`` is ``input_shape // stride`` (`input_shape` when transposed). Rows are the output channels
        of one group. Columns are its input channels, repeated for every class of a stride: (class, channel),
        with the classes in row-major order. When transposed, rows and columns change places. complex64 for
        kernels of 32 bits or fewer, else complex128.

    Raises
    ------
    TypeError
        `kernel` is not an array of an installed library, or not of a floating dtype.
    ValueError
        The shapes do not fit each other, or the kernel holds NaN or infinity. Under tracing the result of such
        a kernel is NaN instead.
    NotImplementedError
        The padding makes an operator that is not circulant.

    Notes
    -----
    Differentiable and traceable; linear in the kernel. The whole symbol is held in memory. `singular_values`
    needs less. Source: Sedghi, Gupta and Long, ICLR 2019, section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = np.ones((2, 3, 3, 3))
    >>> symbol(kernel, (8, 8), Conv("OIHW")).shape
    (8, 8, 1, 2, 3)
    """
    return make_operand(kernel, input_shape, conv, all_residues=True).run(_symbol)


def _symbol(operand: Operand) -> Array:
    """Return the symbol on the whole grid."""
    plan = operand.plan
    matrices = operand.map_blocks(_matrices_of_block, plan.frequencies, budget=BLOCK_BYTES)
    full = with_column_phases(operand, expand(operand, matrices))
    if plan.conv.transposed:
        full = operand.backend.adjoint(full)
    return operand.answer(operand.xp.reshape(full, (*plan.grid, *full.shape[1:])))


def _matrices_of_block(operand: Operand) -> BlockWork:
    """Return the work that evaluates the symbol at a block of frequencies."""
    evaluate = symbol_evaluator(operand)
    return BlockWork(evaluate, evaluate.row_bytes)


def expand(operand: Operand, visited: Array, *, conjugate: bool = True) -> Array:
    """Return values for the whole grid, in row-major order, from values at the visited frequencies.

    Parameters
    ----------
    visited : array, shape (visited, ...)
    conjugate : bool, default True
        Whether the value at a frequency is the conjugate of the value at the opposite one.

    Returns
    -------
    array, shape (prod(grid), ...)
    """
    xp, backend = operand.xp, operand.backend
    visit, mirrored = operand.plan.full_grid()
    full = backend.take(visited, visit, 0)
    if conjugate and mirrored.any():
        flags = backend.asarray_like(mirrored.reshape(-1, *(1,) * (full.ndim - 1)), visited)
        full = xp.where(flags, backend.conj(full), full)
    return full


def with_column_phases(operand: Operand, full: Array) -> Array:
    """Multiply the columns of matrices, shape (prod(grid), ..., columns), by the phases that the plan left out."""
    phases = _column_phases(operand.plan)
    if np.all(phases == 1):
        return full
    phases = np.repeat(phases, operand.plan.columns, axis=1)
    phases = phases.reshape(phases.shape[0], *(1,) * (full.ndim - 2), phases.shape[1])
    return full * operand.xp.astype(operand.backend.asarray_like(phases, full), operand.complex_dtype, copy=False)


def _column_phases(plan: Plan) -> HostArray:
    """Return ``exp(i base . theta)`` for every frequency of the grid and every class of the stride."""
    phases = np.ones((1, 1), complex)
    for axis in plan.axes:
        along = unit_phases(np.outer(np.arange(axis.grid), axis.bases), axis.grid)
        phases = phases[:, None, :, None] * along[None, :, None, :]
        phases = phases.reshape(phases.shape[0] * phases.shape[1], -1)
    return phases
