"""All singular values of a circular convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from convsv_core._geometry.plan import IntArray
from convsv_core._symbol.gram import GramOf, gram_evaluator
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, Evaluator, RealPart, symbol_evaluator, symbol_polynomial
from convsv_core._symbol.small_matrices import (
    CLOSED_FORM_SIDE,
    block_singular_values,
    gram_singular_values,
    real_and_complex,
)
from convsv_core.backend import Array, ArraySpec, Backend, BlockWork
from convsv_core.conv import Conv, as_int
from convsv_core.plugins import on_host

__all__ = [
    "BlockValues",
    "decompositions",
    "frequency_singular_values",
    "make_spectral_operand",
    "mean_over_frequencies",
    "singular_values",
    "sorted_values",
    "visited_values",
]

METHODS = ("auto", "svd", "gram")
"""The ways to decompose a frequency's matrix, which `singular_values` describes."""


@on_host
def singular_values(
    kernel: Array,
    input_shape: tuple[int, ...],
    conv: Conv,
    *,
    method: Literal["auto", "svd", "gram"] = "auto",
    max_bytes: int = BLOCK_BYTES,
) -> Array:
    """Compute every singular value of a circular convolution.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or complex128.
    input_shape : tuple of int
        Spatial extents of the layer's input, in the order of ``conv.spatial``. An int stands for every axis.
    conv : Conv
        The geometry.
    method : "auto", "svd" or "gram", default "auto"
        How the matrix of a frequency is decomposed. Matrices of side 1 and 2 always have closed forms, as accurate as
        the SVD.

        - "svd": the SVD. The absolute error of every value is about ``eps * sigma_max``.
        - "gram": the eigenvalues of the Gram matrix, which are cheaper. The error of the largest values is the same.
          The error of the smallest values is up to ``sqrt(eps) * sigma_max``, with the eps of the arithmetic. Kernels
          of 32 bits or fewer are computed in float64 if that is fast in the library (NumPy; PyTorch on a CPU). The
          result is then as accurate as the SVD in float32.
        - "auto": "gram" where such kernels are computed in float64, else "svd".
    max_bytes : int, default 256 MiB
        Budget, in bytes, for the matrices held at one time, not counting the result. Each task (Dask) and each device
        (a mesh of JAX) has its own budget.

    Returns
    -------
    array, shape (count,), real
        Descending; ``count`` is the smaller of the operator's numbers of inputs and outputs. float32 for kernels of
        32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        `kernel` is not an array of an installed library, or not of a floating dtype.
    ValueError
        The shapes do not fit each other, a stride does not divide the input, or the kernel holds NaN or infinity.
        Under tracing every value of such a kernel is NaN instead.
    NotImplementedError
        The padding makes an operator that is not circulant.

    Notes
    -----
    Traceable with `conv` and `input_shape` static. Differentiable, also where values repeat or vanish: the derivative
    of a value that vanishes is 0, or what the library's SVD returns. For JAX kernels on one device of a CPU the values
    are computed with NumPy, from compiled programs too.

    The result of a lazy kernel (Dask) is lazy, and NaN if the kernel is not finite. It is one chunk, because it is
    sorted. The worker that sorts it holds about three times the result. `frequency_singular_values` returns many
    chunks.

    Source: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019, theorem 6.

    Examples
    --------
    A kernel that adds each pixel and its right neighbour has the values ``|1 + exp(i theta)|``:

    >>> import numpy as np
    >>> kernel = np.ones((1, 1, 2))
    >>> singular_values(kernel, (4,), Conv("OIW")).round(3)
    array([2.   , 1.414, 1.414, 0.   ])
    """
    operand = make_spectral_operand(kernel, input_shape, conv, method)
    return operand.run(_singular_values, method, as_int("max_bytes", max_bytes, least=1))


@on_host
def frequency_singular_values(
    kernel: Array,
    input_shape: tuple[int, ...],
    conv: Conv,
    *,
    method: Literal["auto", "svd", "gram"] = "auto",
    max_bytes: int = BLOCK_BYTES,
) -> Array:
    r"""Compute the singular values of a circular convolution at each frequency.

    Parameters
    ----------
    kernel, input_shape, conv, method, max_bytes
        As for `singular_values`, which also says what is raised.

    Returns
    -------
    array, shape (\*grid, groups * values), real
        ``grid`` is ``input_shape // stride`` (`input_shape` when transposed). The index j stands for the angle ``2 pi
        j / grid`` in radians. ``values`` is the smaller side of a group's matrix. The last axis is descending.

    Notes
    -----
    Differentiable and traceable, as `singular_values` is. Source: Sedghi, Gupta and Long, ICLR 2019.

    Examples
    --------
    >>> import numpy as np
    >>> frequency_singular_values(np.ones((1, 1, 2)), (4,), Conv("OIW")).shape
    (4, 1)
    """
    operand = make_spectral_operand(kernel, input_shape, conv, method)
    return operand.run(_frequency_singular_values, method, as_int("max_bytes", max_bytes, least=1))


def make_spectral_operand(kernel: Array, input_shape: object, conv: Conv, method: str) -> Operand:
    """Check the arguments of a call, and return the operand in the arithmetic that `method` needs."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: wanted one of {', '.join(METHODS)}")
    return _in_arithmetic(make_operand(kernel, input_shape, conv), method)


def _in_arithmetic(operand: Operand, method: str) -> Operand:
    """Return the operand in the arithmetic that `method` needs."""
    return operand if method == "svd" or min(operand.plan.block) <= CLOSED_FORM_SIDE else operand.widen()


def _singular_values(operand: Operand, method: str, max_bytes: int) -> Array:
    """Return every singular value of an operand, descending, from the host where a program can call it."""
    if not operand.backend.compiles:
        return sorted_values(operand, visited_values(operand, method, max_bytes))
    plan = operand.plan
    pairs = (len(plan.frequencies) - plan.self_conjugate) if plan.real else 0
    count = (plan.self_conjugate + 2 * pairs) * plan.groups * min(plan.block) * plan.copies
    shape = (count + math.prod(plan.grid) * plan.unread_values,)
    (values,) = operand.call_host(
        _all_values,
        method,
        max_bytes,
        results=(ArraySpec(shape, operand.answered_in),),
        otherwise=_all_values,
    )
    return operand.or_nan(values)


def _all_values(operand: Operand, method: str, max_bytes: int) -> tuple[Array, ...]:
    """Return every singular value of an operand without `finite`, descending."""
    operand = _in_arithmetic(operand, method)
    return (sorted_values(operand, visited_values(operand, method, max_bytes)),)


def sorted_values(operand: Operand, visited: Array) -> Array:
    """Return every singular value of the operator, descending, from the values at the visited frequencies."""
    xp, plan = operand.xp, operand.plan
    values = operand.answer(visited)
    alone = xp.reshape(values[: plan.self_conjugate, ...], (-1,))
    pairs = xp.reshape(values[plan.self_conjugate :, ...], (-1,))
    values = xp.sort(xp.concat([alone, pairs, pairs]) if plan.real else alone, descending=True, stable=False)
    values = xp.repeat(values, plan.copies) if plan.copies > 1 else values
    unread = math.prod(plan.grid) * plan.unread_values
    return xp.concat([values, _zeros(operand, values, (unread,))]) if unread else values


def _frequency_singular_values(operand: Operand, method: str, max_bytes: int) -> Array:
    """Return the singular values of an operand at each frequency of the grid."""
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand, method, max_bytes)
    values = xp.reshape(values, (values.shape[0], -1))
    if plan.groups > 1:
        values = xp.sort(values, axis=-1, descending=True, stable=False)
    values = operand.answer(values)
    if plan.unread_values:
        values = xp.concat([values, _zeros(operand, values, (values.shape[0], plan.unread_values))], axis=-1)
    visit, _ = plan.full_grid()
    values = operand.backend.take(values, visit, 0)
    return xp.reshape(values, (*plan.grid, -1))


def visited_values(operand: Operand, method: str = "auto", max_bytes: int = BLOCK_BYTES) -> Array:
    """Return the singular values at the visited frequencies, descending: shape (visited, groups, values)."""
    gram = _by_gram(operand, method)
    return operand.backend.concatenate(
        [
            operand.map_blocks(_work_on_values, frequencies, gram, real, budget=max_bytes)
            for real, frequencies in real_and_complex(operand.plan)
        ]
    )


@dataclass(frozen=True)
class BlockValues:
    """Compute the singular values at the frequencies of the given indices, descending.

    Attributes
    ----------
    backend : Backend
    evaluate : Evaluator
        It returns the symbol's matrices or, with `gram`, their Gram matrices.
    gram : bool
    """

    backend: Backend
    evaluate: Evaluator
    gram: bool

    def __call__(self, frequencies: Array) -> Array:
        """Return the values: shape (B, groups, values)."""
        values_of = gram_singular_values if self.gram else block_singular_values
        return values_of(self.backend, self.evaluate(frequencies))


def decompositions(operand: Operand, method: str) -> list[tuple[BlockValues, IntArray]]:
    """Return the parts of the visited frequencies, each with the function that computes its values.

    See `real_and_complex` for the parts.
    """
    gram = _by_gram(operand, method)
    return [
        (_values_of_block(operand, gram, real), frequencies) for real, frequencies in real_and_complex(operand.plan)
    ]


def _by_gram(operand: Operand, method: str) -> bool:
    """Tell whether the values are computed from Gram matrices."""
    gram = method == "gram" or (method == "auto" and operand.widened)
    return gram and min(operand.plan.block) > CLOSED_FORM_SIDE


def _work_on_values(operand: Operand, gram: bool, real: bool) -> BlockWork:
    """Return the work that computes the values at a block of frequencies."""
    values = _values_of_block(operand, gram, real)
    return BlockWork(values, values.evaluate.row_bytes)


def _values_of_block(operand: Operand, gram: bool, real: bool) -> BlockValues:
    """Return the function that computes values; `real` says that the symbol is real at these frequencies."""
    evaluate: Evaluator
    if real:  # There are few such frequencies. An FFT would compute the symbol at all frequencies.
        evaluate = RealPart(operand, symbol_polynomial(operand))
        evaluate = GramOf(operand, evaluate) if gram else evaluate
    else:
        evaluate = symbol_evaluator(operand)
        evaluate = gram_evaluator(operand, evaluate) if gram else evaluate
    return BlockValues(operand.backend, evaluate, gram)


def mean_over_frequencies(operand: Operand, values: Array) -> Array:
    """Return the mean over all frequencies of the sum over the other axes, from values at the visited frequencies."""
    xp, plan = operand.xp, operand.plan
    weights = operand.backend.asarray_like(plan.weights() / math.prod(plan.periods), values)
    weights = xp.reshape(xp.astype(weights, values.dtype, copy=False), (-1, *(1,) * (values.ndim - 1)))
    return xp.sum(weights * values)


def _zeros(operand: Operand, like: Array, shape: tuple[int, ...]) -> Array:
    """Return the singular values of inputs that no tap reads: 0, or NaN where a traced kernel is not finite."""
    xp = operand.xp
    return xp.broadcast_to(xp.min(like) * 0, shape)
