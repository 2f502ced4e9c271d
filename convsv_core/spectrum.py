"""Singular values of a circular convolution, the numbers that follow from them, and the norm of any layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from convsv_core._norm.padded import make_padded_plan, padded_operator_norm
from convsv_core.backend import Array, Backend
from convsv_core.conv import Conv, as_int
from convsv_core.decomposition import (
    CLOSED_FORM_SIDE,
    block_singular_values,
    gram_singular_values,
    safe_sqrt,
    squared_norm,
)
from convsv_core.evaluation import BLOCK_BYTES, Evaluator, RealPart, symbol_evaluator, symbol_polynomial
from convsv_core.gram import GramOf, gram_evaluator
from convsv_core.operand import Operand, check_conv, make_operand
from convsv_core.plan import IntArray, Plan, check_input_shape, is_circulant, resolve_channels
from convsv_core.plugins import backend_of

METHODS = ("auto", "svd", "gram")


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
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    input_shape : tuple of int
        Spatial extents of the layer's input, in the order of ``conv.spatial``. An int stands for every axis.
    conv : Conv
        The geometry.
    method : "auto", "svd" or "gram", default "auto"
        How a frequency's matrix is decomposed. "svd": absolute error about ``eps * sigma_max`` for every
        value. "gram": the eigenvalues of the Gram matrix, cheaper; the same error for the largest
        values and up to ``sqrt(eps) * sigma_max`` for the smallest, with the eps of the arithmetic, which is
        float64 for float32 kernels where the library has it at hand (NumPy; PyTorch on a CPU): there it
        is as good as the SVD in float32. "auto" is "gram" there and "svd" elsewhere. Matrices of side 1
        and 2 have closed forms as good as the SVD, whatever is asked for.
    max_bytes : int, default 256 MiB
        Budget for the matrices held at one time, beside the result itself: by each task or device, where there are
        many (Dask; a mesh of JAX's).

    Returns
    -------
    array, shape (count,), real
        Descending; ``count`` is the smaller of the operator's numbers of inputs and outputs. float32 for
        kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        `kernel` is not an array of an installed library, or not of a floating dtype.
    ValueError
        The shapes do not fit each other, a stride does not divide the input, or the kernel holds NaN
        or infinity (under tracing every value is then NaN).
    NotImplementedError
        The padding makes an operator that is not circulant.

    Notes
    -----
    Differentiable, also where values repeat or vanish (the derivative of a vanishing one is taken as 0 or as
    the library's SVD has it), and traceable with `conv` and `input_shape` static. Of a lazy kernel (Dask) the result
    is lazy too, and NaN where the kernel is not finite. It is one chunk, because it is sorted: the worker that does so
    holds about three times the result. `frequency_singular_values` gives many chunks. Source: Sedghi, Gupta and Long,
    *The Singular Values of Convolutional Layers*, ICLR 2019, theorem 6.

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
        As for `singular_values`, which also tells what is raised.

    Returns
    -------
    array, shape (\*grid, groups * values), real
        ``grid`` is ``input_shape // stride`` (`input_shape` when transposed); the index j stands for the
        angle ``2 pi j / grid`` in radians. ``values`` is the smaller side of a group's matrix. Descending
        along the last axis.

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


def operator_norm(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the operator norm of a layer, with the padding that `conv` declares: its largest singular value.

    Parameters
    ----------
    kernel : array
        Taps, with the axes that ``conv.layout`` names; float16, bfloat16, float32, float64, complex64 or
        complex128.
    input_shape : tuple of int
        Spatial extents of the layer's input, in the order of ``conv.spatial``. An int stands for every axis.
    conv : Conv
        The geometry. Any padding and padding mode: where the operator is not circulant, which has a closed
        form, its norm is found by an iteration.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64. Exact to rounding for circulant operators; for
        others to the tolerance that `convsv_core._norm.padded.padded_operator_norm` states, and never above
        the norm by more than rounding. `norm_bounds` gives a certified upper bound of either.

    Raises
    ------
    TypeError
        `kernel` is not an array of an installed library, or not of a floating dtype.
    ValueError
        The shapes do not fit each other, a stride does not divide the extents of a circular input, or the
        kernel holds NaN or infinity (under tracing the result is then NaN).

    Notes
    -----
    Differentiable and traceable. The gradient is finite for every kernel: where the maximum is attained more
    than once it is a subgradient, and for the zero kernel it is 0. Source: Sedghi, Gupta and Long, ICLR 2019, for
    circulant operators.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = np.ones((1, 1, 3, 3))
    >>> float(operator_norm(kernel, (8, 8), Conv("OIHW")))
    9.0

    With zeros around the image the ends lose a part, and the norm stays below:

    >>> round(float(operator_norm(kernel, (8, 8), Conv("OIHW", padding_mode="zeros"))), 3)
    8.291
    """
    backend = backend_of(kernel)
    check_conv(conv)
    extents = check_input_shape(input_shape, conv)
    circular = conv.padding_mode == "circular" and conv.padding == "same"  # where the stride divides, and must
    shape = tuple(int(extent) for extent in kernel.shape)
    if circular or is_circulant(shape, extents, conv):
        return make_operand(kernel, extents, conv).run(_operator_norm)
    taps, *_ = resolve_channels(shape, conv)
    make_padded_plan(tuple(taps), extents, conv)  # refuses what is impossible now, where the rest is for later
    return backend.run_to_number(padded_operator_norm, kernel, extents, conv)


def frobenius_norm(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the Frobenius norm of a circular convolution: the root of its squared singular values' sum.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also tells what is raised.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Notes
    -----
    Differentiable (0 at the zero kernel) and traceable. It needs no decomposition: every tap occurs
    once for each output pixel, and taps that wrap onto each other are added first.

    Examples
    --------
    >>> import numpy as np
    >>> float(frobenius_norm(np.ones((1, 1, 3, 3)), (8, 8), Conv("OIHW")))
    24.0
    """
    return make_operand(kernel, input_shape, conv).run(_frobenius_norm)


def stable_rank(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the stable rank ``|A|_F^2 / |A|_2^2`` of a circular convolution; 0 for the zero kernel.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also tells what is raised.

    Returns
    -------
    0-d array, real
        Between 1 and the operator's rank.

    Notes
    -----
    Differentiable and traceable.

    Examples
    --------
    The identity on an image of 8 x 8 pixels:

    >>> import numpy as np
    >>> float(stable_rank(np.ones((1, 1, 1, 1)), (8, 8), Conv("OIHW")))
    64.0
    """
    return make_operand(kernel, input_shape, conv).run(_stable_rank)


def condition_number(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the condition number of a circular convolution: its largest over its smallest singular value.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also tells what is raised.

    Returns
    -------
    0-d array, real
        At least 1; infinite where the smallest of the ``min(inputs, outputs)`` values is 0. A singular operator
        whose smallest value rounds to about ``eps * sigma_max`` rather than 0 gives about ``1 / eps``.

    Notes
    -----
    Differentiable where it is finite, and traceable.

    Examples
    --------
    >>> import numpy as np
    >>> float(condition_number(np.asarray([[[2.0, 1.0]]]), (4,), Conv("OIW")))
    3.0
    """
    return make_spectral_operand(kernel, input_shape, conv, "auto").run(_condition_number)


def log_abs_det(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Compute the logarithm of the absolute determinant of a circular convolution.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `singular_values`, which also tells what is raised.

    Returns
    -------
    0-d array, real
        The sum of the logarithms of the singular values; minus infinity for a singular operator.

    Raises
    ------
    ValueError
        Also where the operator is not square: it has as many outputs as inputs if the output channels are
        the input channels times the strides' product (the other way round when transposed).

    Notes
    -----
    Differentiable where it is finite, and traceable. The term of an invertible convolution in a
    normalising flow's likelihood.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = 2.0 * np.eye(3)[:, :, None, None]
    >>> round(float(log_abs_det(kernel, (4, 4), Conv("OIHW"))) / math.log(2))
    48
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    plan = operand.plan
    if not plan.is_square:
        raise ValueError(
            f"the operator is not square, so it has no determinant: each group maps {plan.columns} channels and "
            f"strides {conv.strides} to {plan.rows} channels (kernel shape {tuple(kernel.shape)}, {conv})"
        )
    return operand.run(_log_abs_det)


def make_spectral_operand(kernel: Array, input_shape: object, conv: Conv, method: str) -> Operand:
    """Check a call's arguments and prepare the kernel, in the arithmetic that `method` calls for."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: wanted one of {', '.join(METHODS)}")
    operand = make_operand(kernel, input_shape, conv)
    return operand if method == "svd" or min(operand.plan.block) <= CLOSED_FORM_SIDE else operand.widen()


def _singular_values(operand: Operand, method: str, max_bytes: int) -> Array:
    return sorted_values(operand, visited_values(operand, method, max_bytes))


def sorted_values(operand: Operand, visited: Array) -> Array:
    """Every singular value of the operator, descending, from those at the visited frequencies."""
    xp, plan = operand.xp, operand.plan
    values = operand.answer(visited)
    alone = xp.reshape(values[: plan.self_conjugate, ...], (-1,))
    pairs = xp.reshape(values[plan.self_conjugate :, ...], (-1,))
    values = xp.sort(xp.concat([alone, pairs, pairs]) if plan.real else alone, descending=True, stable=False)
    values = xp.repeat(values, plan.copies) if plan.copies > 1 else values
    unread = math.prod(plan.grid) * plan.groups * (plan.values_per_block - min(plan.block))
    return xp.concat([values, _zeros(operand, values, (unread,))]) if unread else values


def _frequency_singular_values(operand: Operand, method: str, max_bytes: int) -> Array:
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand, method, max_bytes)
    values = xp.reshape(values, (values.shape[0], -1))
    if plan.groups > 1:
        values = xp.sort(values, axis=-1, descending=True, stable=False)
    values = operand.answer(values)
    unread = plan.groups * (plan.values_per_block - min(plan.block))
    if unread:
        values = xp.concat([values, _zeros(operand, values, (values.shape[0], unread))], axis=-1)
    visit, _ = plan.full_grid()
    values = operand.backend.take(values, visit, 0)
    return xp.reshape(values, (*plan.grid, -1))


def _operator_norm(operand: Operand) -> Array:
    # The Gram matrix squares the small values away and keeps the largest: its eigenvalues do for the norm.
    return operand.answer(operand.xp.max(visited_values(operand, "gram", BLOCK_BYTES, first_only=True)))


def _frobenius_norm(operand: Operand) -> Array:
    return operand.answer(safe_sqrt(operand.xp, squared_frobenius(operand)))


def _stable_rank(operand: Operand) -> Array:
    xp = operand.xp
    norm = xp.max(visited_values(operand, "gram", BLOCK_BYTES, first_only=True))
    nonzero = norm > 0
    squared = xp.where(nonzero, norm, xp.ones_like(norm)) ** 2
    rank = xp.where(nonzero, squared_frobenius(operand) / squared, xp.zeros_like(norm))
    return operand.answer(rank, scaled=False)


def _condition_number(operand: Operand) -> Array:
    xp, plan = operand.xp, operand.plan
    values = operand.answer(visited_values(operand, "auto", BLOCK_BYTES))
    largest, smallest = xp.max(values), xp.min(values)
    if plan.values_per_block > min(plan.block):
        smallest = smallest * 0
    invertible = smallest > 0
    ratio = largest / xp.where(invertible, smallest, xp.ones_like(smallest))
    otherwise = xp.where(xp.isnan(smallest), smallest, xp.full_like(smallest, math.inf))
    return xp.where(invertible, ratio, otherwise)


def _log_abs_det(operand: Operand) -> Array:
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand, "auto", BLOCK_BYTES)
    positive = values > 0
    logs = xp.log(xp.where(positive, values, xp.ones_like(values)))
    logs = xp.where(positive, logs, xp.where(xp.isnan(values), values, xp.full_like(values, -math.inf)))
    weights = operand.backend.constant(plan.weights() * plan.copies, values)
    weights = xp.reshape(xp.astype(weights, values.dtype, copy=False), (-1, 1, 1))
    total = xp.sum(weights * logs)
    count = math.prod(plan.grid) * plan.groups * plan.values_per_block
    unread = plan.values_per_block > min(plan.block)
    total = total + count * xp.log(operand.scale) if not unread else xp.full_like(total, -math.inf)
    return operand.answer(total, scaled=False)


def visited_values(operand: Operand, method: str, max_bytes: int, *, first_only: bool = False) -> Array:
    """Singular values at the visited frequencies, descending: (visited, groups, values); 1 if `first_only`."""
    gram = _by_gram(operand, method)
    return operand.backend.concatenate(
        [
            operand.map_blocks(_values_of_block, frequencies, gram, real, first_only, budget=max_bytes)
            for real, frequencies in real_and_complex(operand.plan)
        ]
    )


@dataclass(frozen=True)
class BlockValues:
    """A function from frequency indices to the singular values there, descending; the largest if `first_only`.

    `evaluate` gives the symbol, or its Gram matrix if `gram`.
    """

    backend: Backend
    evaluate: Evaluator
    gram: bool
    first_only: bool

    def __call__(self, frequencies: Array) -> Array:
        """The values: shape (B, groups, values)."""
        values_of = gram_singular_values if self.gram else block_singular_values
        values = values_of(self.backend, self.evaluate(frequencies))
        return values[..., :1] if self.first_only else values


def decompositions(operand: Operand, method: str) -> list[tuple[BlockValues, IntArray]]:
    """What to compute at which of the visited frequencies; see `real_and_complex`."""
    gram = _by_gram(operand, method)
    return [
        (_values_of_block(operand, gram, real, False)[0], frequencies)
        for real, frequencies in real_and_complex(operand.plan)
    ]


def _by_gram(operand: Operand, method: str) -> bool:
    gram = method == "gram" or (method == "auto" and operand.widened)
    return gram and min(operand.plan.block) > CLOSED_FORM_SIDE


def _values_of_block(operand: Operand, gram: bool, real: bool, first_only: bool) -> tuple[BlockValues, int]:
    evaluate: Evaluator
    if real:  # few frequencies, so that a transform of them all would be too much
        evaluate = RealPart(operand, symbol_polynomial(operand))
        evaluate = GramOf(operand, evaluate) if gram else evaluate
    else:
        evaluate = symbol_evaluator(operand)
        evaluate = gram_evaluator(operand, evaluate) if gram else evaluate
    return BlockValues(operand.backend, evaluate, gram, first_only), evaluate.row_bytes


def real_and_complex(plan: Plan) -> list[tuple[bool, IntArray]]:
    """The visited frequencies in their order, those apart at which the symbol is decomposed in real arithmetic.

    The symbol of a real kernel is real where a frequency is its own conjugate (everywhere, for 1x1 kernels), and
    real decompositions take a third of the time; closed forms do not gain.
    """
    alone = plan.self_conjugate if plan.real and min(plan.block) > CLOSED_FORM_SIDE else 0
    parts = [(True, plan.frequencies[:alone]), (False, plan.frequencies[alone:])]
    return [(real, frequencies) for real, frequencies in parts if len(frequencies)]


def squared_frobenius(operand: Operand) -> Array:
    """Sum of all squared singular values, at the operand's own scale."""
    xp, plan = operand.xp, operand.plan
    taps = operand.taps()
    taps = xp.reshape(taps, (*(len(axis.offsets) for axis in plan.axes), -1))
    for index, axis in enumerate(plan.axes):
        places = np.asarray(axis.offsets) % axis.period
        folded = np.unique(places)
        if len(folded) < len(places):
            fold = xp.astype(operand.backend.constant((folded[:, None] == places) + 0.0, taps), taps.dtype, copy=False)
            taps = xp.moveaxis(xp.tensordot(fold, taps, axes=((1,), (index,))), 0, index)
    return squared_norm(xp, taps) * math.prod(plan.grid)


def _zeros(operand: Operand, like: Array, shape: tuple[int, ...]) -> Array:
    """Singular values of the input elements that no tap reads; NaN where the kernel is, under tracing."""
    xp = operand.xp
    return xp.broadcast_to(xp.min(like) * 0, shape)
