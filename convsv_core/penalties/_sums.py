"""Penalties that sum a power of every singular value."""

from __future__ import annotations

import math

from convsv_core.backend import Array
from convsv_core.clipping import check_bound
from convsv_core.conv import Conv, as_float
from convsv_core.evaluation import BLOCK_BYTES
from convsv_core.operand import Operand, make_operand
from convsv_core.penalties._gram import mean_over_grams, squared_gram
from convsv_core.penalties._means import mean, squared_excess
from convsv_core.spectrum import make_spectral_operand, squared_frobenius, visited_values

MOST_GRAM_POWER = 8
"""Largest even exponent for which powers of the Gram matrix stand for a decomposition."""


def spectrum_hinge(kernel: Array, input_shape: tuple[int, ...], conv: Conv, bound: float | Array) -> Array:
    """Penalise every singular value above a bound: the mean over frequencies of ``sum max(0, sigma - bound)**2``.

    It is the squared Frobenius distance, per frequency, to the operators of norm at most `bound` among circular
    convolutions of full support.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also tells what is raised.
    bound : float or 0-d array of the kernel's library
        Not negative.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        Also where `bound` is an array of another library, or no number.
    ValueError
        Also where `bound` is negative or NaN.

    Notes
    -----
    Continuously differentiable, by the kernel and by `bound`, and traceable.

    Examples
    --------
    The values of this kernel are 2, 1.414, 1.414 and 0:

    >>> import numpy as np
    >>> float(spectrum_hinge(np.ones((1, 1, 2)), (4,), Conv("OIW"), 1.5))
    0.0625
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    return operand.run(_spectrum_hinge, arrays=(check_bound(operand, bound) / operand.scale,))


def orthogonality(kernel: Array, input_shape: tuple[int, ...] | None, conv: Conv) -> Array:
    """Penalise what keeps a layer from being orthogonal: the mean over frequencies of ``sum (sigma**2 - 1)**2``.

    The sum is over all singular values, of which there are as many as the smaller side of a frequency's matrix A has
    rows. So it is ``|A A* - I|_F**2`` where A is wide, ``|A* A - I|_F**2`` where it is tall, and 0 for a
    semi-orthogonal layer: one that keeps the length of every input, or whose transpose does. Where a stride leaves
    input elements unread, the singular values that they make 0 count, 1 each.

    Parameters
    ----------
    kernel, conv
        As for `convsv_core.singular_values`, which also tells what is raised.
    input_shape : tuple of int or None
        Spatial extents of the layer's input. None is the infinite lattice, whose value every input has that is too
        large for products of taps to wrap round.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Notes
    -----
    Differentiable everywhere and traceable. It needs no decomposition and, for kernels of few taps, no frequencies:
    the Gram matrix is a polynomial whose coefficients ``G_s = sum K_p K_p-s*`` are correlations of the taps, and by
    Parseval's theorem the mean is ``sum over s of |G_s - delta_s I|_F**2``, coefficients added that coincide on
    the grid.

    The orthogonal convolution penalty of Wang, Chen, Chakraborty and Yu, *Orthogonal Convolutional Neural Networks*,
    CVPR 2020, for circular padding. Its term at ``s = 0`` for a wide layer is the soft orthogonality of the kernel
    reshaped to a matrix of Xie, Xiong and Pu, CVPR 2017, and Bansal, Chen and Wang, NeurIPS 2018, which alone does
    not make the layer orthogonal.

    Examples
    --------
    A shift is orthogonal; twice a shift has sigma 2:

    >>> import numpy as np
    >>> float(orthogonality(np.asarray([[[0.0, 0.0, 2.0]]]), (8,), Conv("OIW")))
    9.0
    """
    return make_operand(kernel, input_shape, conv).run(_orthogonality)


def schatten(kernel: Array, input_shape: tuple[int, ...], conv: Conv, p: float) -> Array:
    """Penalise all singular values: the mean over frequencies of ``sum sigma**p``.

    It is the p-th power of the operator's Schatten norm over the number of frequencies. The root is not taken: the
    power adds up over groups and layers, and for p above 1 it has a derivative everywhere, zero included.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also tells what is raised.
    p : float
        At least 1. 1 is the nuclear norm, 2 the squared Frobenius norm. 2, 4, 6 and 8 need no decomposition.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        Also where `p` is no number.
    ValueError
        Also where `p` is below 1, infinite or NaN.

    Notes
    -----
    Differentiable and traceable with `p` static. For p = 1 the gradient is a subgradient, to rounding, where a
    singular value vanishes.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = np.asarray([[[2.0]]])
    >>> [float(schatten(kernel, (8,), Conv("OIW"), p)) for p in (1, 2, 3)]
    [2.0, 4.0, 8.0]
    """
    power = as_float("p", p)
    if not 1 <= power < math.inf:
        raise ValueError(f"p={p}: wanted a finite number of at least 1 (p = infinity is operator_norm)")
    if power in range(2, MOST_GRAM_POWER + 1, 2):
        return make_operand(kernel, input_shape, conv).run(_even_schatten, int(power))
    return make_spectral_operand(kernel, input_shape, conv, "auto").run(_schatten, power)


def _spectrum_hinge(operand: Operand, limit: Array) -> Array:
    # Kernel and bound together are homogeneous of degree 2, so the scale may come last.
    squares = squared_excess(operand, visited_values(operand, "auto", BLOCK_BYTES), limit)
    return _answer_square(operand, mean(operand, squares))


def _orthogonality(operand: Operand) -> Array:
    plan = operand.plan
    unread = plan.groups * (plan.values_per_block - min(plan.block))
    return operand.answer(squared_gram(operand, 1.0) + unread, scaled=False)


def _even_schatten(operand: Operand, power: int) -> Array:
    xp, plan = operand.xp, operand.plan
    if power == 2:
        return _answer_square(operand, squared_frobenius(operand) / math.prod(plan.grid))
    if power == 4:
        return operand.answer(squared_gram(operand, 0.0), scaled=False)
    trace = mean_over_grams(operand, _trace_of_power, power)
    trace = xp.where(xp.isnan(trace), xp.full_like(trace, math.inf), trace)  # of products that overflowed
    return operand.answer(trace, scaled=False)


def _trace_of_power(operand: Operand, gram: Array, power: int) -> Array:
    """Of a Hermitian matrix's power, as the inner product of its two halves."""
    xp = operand.xp
    gram = gram * operand.scale * operand.scale
    square = xp.matmul(gram, gram)
    return xp.sum(xp.real(operand.backend.conj(gram if power == 6 else square) * square), axis=(-3, -2, -1))


def _schatten(operand: Operand, power: float) -> Array:
    values = visited_values(operand, "auto", BLOCK_BYTES) * operand.scale
    return operand.answer(mean(operand, values if power == 1 else values**power), scaled=False)


def _answer_square(operand: Operand, value: Array) -> Array:
    """The answer for a result that is homogeneous of degree 2, given at the operand's own scale."""
    return operand.answer(value * operand.scale)
