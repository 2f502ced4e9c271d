"""Penalties that sum a function of every singular value."""

from __future__ import annotations

import math

from convsv_core._spectrum.numbers import squared_frobenius
from convsv_core._spectrum.values import make_spectral_operand, mean_over_frequencies, visited_values
from convsv_core._symbol.bound_argument import check_bound
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core.backend import Array
from convsv_core.conv import Conv, as_float
from convsv_core.penalties._gram import mean_over_grams, squared_gram
from convsv_core.penalties._norms import squared_excess
from convsv_core.plugins import on_host

__all__ = ["orthogonality", "schatten", "spectrum_hinge"]

MOST_GRAM_POWER = 8
"""Largest even exponent of `schatten` that is computed by powers of the Gram matrix instead of a decomposition.

A guess. Up to 8 a frequency needs one product of matrices beside its Gram matrix.
"""


@on_host
def spectrum_hinge(kernel: Array, input_shape: tuple[int, ...], conv: Conv, bound: float | Array) -> Array:
    """Penalise every singular value above a bound by the mean over frequencies of ``sum max(0, sigma - bound)**2``.

    Times the number of frequencies, it is the squared Frobenius distance to the circular convolutions of norm at
    most `bound`, whose kernels may be as large as the image.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also says what is raised.
    bound : float or 0-d array of the kernel's library
        As for `norm_hinge`, which also says what is raised.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Notes
    -----
    Continuously differentiable with respect to the kernel and to `bound`, and traceable.

    Examples
    --------
    The singular values of this kernel are 2, 1.414, 1.414 and 0:

    >>> import numpy as np
    >>> float(spectrum_hinge(np.ones((1, 1, 2)), (4,), Conv("OIW"), 1.5))
    0.0625
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    return operand.run(_spectrum_hinge, arrays=(check_bound(operand, bound) / operand.scale,))


@on_host
def orthogonality(kernel: Array, input_shape: tuple[int, ...] | None, conv: Conv) -> Array:
    """Penalise a layer that is not orthogonal, by the mean over frequencies of ``sum (sigma**2 - 1)**2``.

    At one frequency with the matrix A, the sum is ``|A A* - I|_F**2`` if A is wide, and ``|A* A - I|_F**2`` if A
    is tall. It is 0 for a semi-orthogonal layer, which keeps the length of every input, or whose transpose keeps
    the length of every output. A singular value that is 0 because no tap reads some input elements counts 1.

    Parameters
    ----------
    kernel, conv
        As for `convsv_core.singular_values`, which also says what is raised.
    input_shape : tuple of int or None
        Spatial extents of the layer's input. None is the infinite lattice. Its value is the value of every input
        that is so large that no product of two taps wraps round.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Notes
    -----
    Differentiable everywhere and traceable. No decomposition is needed, and no frequency for kernels of few taps.
    The Gram matrix is a trigonometric polynomial with the coefficients ``G_s = sum K_p K_p-s*``, the correlations
    of the taps. By Parseval's theorem the mean is ``sum over s of |G_s - delta_s I|_F**2``, after coefficients
    that agree on the grid have been added.

    Source: the orthogonal convolution penalty of Wang, Chen, Chakraborty and Yu, *Orthogonal Convolutional Neural
    Networks*, CVPR 2020, here for circular padding. Its term at ``s = 0`` is, for a wide layer, the soft
    orthogonality of the kernel reshaped to a matrix: Xie, Xiong and Pu, CVPR 2017, and Bansal, Chen and Wang,
    NeurIPS 2018. That term alone does not make the layer orthogonal.

    Examples
    --------
    A shift is orthogonal. Twice a shift has the singular value 2 everywhere:

    >>> import numpy as np
    >>> float(orthogonality(np.asarray([[[0.0, 0.0, 2.0]]]), (8,), Conv("OIW")))
    9.0
    """
    return make_operand(kernel, input_shape, conv, lattice=True).run(_orthogonality)


@on_host
def schatten(kernel: Array, input_shape: tuple[int, ...], conv: Conv, p: float) -> Array:
    """Penalise all singular values by the mean over frequencies of ``sum sigma**p``.

    It is the p-th power of the operator's Schatten norm, divided by the number of frequencies. No root is taken,
    for two reasons. The power adds up over groups and layers. For p above 1 it has a derivative everywhere, even
    at 0.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also says what is raised.
    p : float
        At least 1. The exponent 1 gives the nuclear norm, 2 the squared Frobenius norm. The exponents 2, 4, 6 and
        8 need no decomposition.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        `p` is not a number.
    ValueError
        `p` is below 1, infinite or NaN.

    Notes
    -----
    Differentiable and traceable with `p` static. For p = 1 and a singular value of 0 the gradient is a
    subgradient, up to rounding.

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
    """Return the hinge, with the limit at the operand's own scale."""
    # Kernel and limit share the scale, and the penalty is homogeneous of degree 2 in them together.
    squares = squared_excess(operand, visited_values(operand), limit)
    return _answer_square(operand, mean_over_frequencies(operand, squares))


def _orthogonality(operand: Operand) -> Array:
    return operand.answer(squared_gram(operand, 1.0) + operand.plan.unread_values, scaled=False)


def _even_schatten(operand: Operand, power: int) -> Array:
    """Return the sum for an even exponent, as a trace of a power of the Gram matrix."""
    xp, plan = operand.xp, operand.plan
    if power == 2:
        return _answer_square(operand, squared_frobenius(operand) / math.prod(plan.grid))
    if power == 4:
        return operand.answer(squared_gram(operand, 0.0), scaled=False)
    trace = mean_over_grams(operand, _trace_of_power, power)
    # Complex products that overflow are NaN; the sum of their powers is infinite.
    trace = xp.where(xp.isnan(trace), xp.full_like(trace, math.inf), trace)
    return operand.answer(trace, scaled=False)


def _trace_of_power(operand: Operand, gram: Array, power: int) -> Array:
    """Return the trace of ``G**(power / 2)`` for each Gram matrix G, summed over groups.

    It is the inner product of two lower powers.
    """
    xp = operand.xp
    gram = gram * operand.scale * operand.scale
    square = xp.matmul(gram, gram)
    return xp.sum(xp.real(operand.backend.conj(gram if power == 6 else square) * square), axis=(-3, -2, -1))


def _schatten(operand: Operand, power: float) -> Array:
    values = visited_values(operand) * operand.scale
    return operand.answer(mean_over_frequencies(operand, values if power == 1 else values**power), scaled=False)


def _answer_square(operand: Operand, value: Array) -> Array:
    """Return the result for a value that is homogeneous of degree 2, given at the operand's own scale."""
    return operand.answer(value * operand.scale)
