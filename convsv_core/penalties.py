"""Penalties on the singular values of a layer, to be added to a training loss.

Each function takes a kernel and its geometry to a 0-d array, differentiable and finite, as its gradient is, for every
kernel: zero, orthogonal, rank-deficient. Sums over singular values are **means over frequencies** of the sum at
one frequency, groups included, so that a weight found at one image size serves at another: for taps that do not wrap
round, sums of even powers do not depend on the size at all.

What is not homogeneous is computed at the kernel's own scale. A value overflows where the numbers that it sums do so in
the answer's dtype (float32 for kernels of 32 bits or fewer, else float64), and a gradient, which has the kernel's
dtype, where its true value does. The gradient of a square passes through numbers of the square's size, so it
vanishes for kernels below about 1e-19 in float32.

>>> import numpy as np
>>> from convsv_core import Conv, penalties
>>> kernel = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
>>> sizes = [float(penalties.orthogonality(kernel, extent, Conv("OIHW"))) for extent in (16, 32)]
>>> bool(abs(sizes[0] - sizes[1]) < 1e-12 * sizes[0])
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from convsv_core.backend import Array, BlockFunction
from convsv_core.clipping import check_bound
from convsv_core.conv import Conv
from convsv_core.evaluation import BLOCK_BYTES, symbol_evaluator
from convsv_core.gram import differences_of, gram_coefficients, gram_evaluator
from convsv_core.operand import Operand, make_operand
from convsv_core.plan import Plan, check_input_shape
from convsv_core.spectrum import make_spectral_operand, operator_norm, squared_frobenius, visited_values
from convsv_core.spectrum import stable_rank as operator_stable_rank

FLOOR = 32
"""Default floor of a logarithm, in units of eps * sigma_max: below it lies little but rounding."""

MOST_OFFSETS = 128
"""Taps of a channel pair up to which every pair of taps may have a product of its own."""

MOST_GRAM_POWER = 8
"""Largest even exponent for which powers of the Gram matrix stand for a decomposition."""


def norm_hinge(kernel: Array, input_shape: tuple[int, ...], conv: Conv, bound: float | Array) -> Array:
    """Penalise an operator norm above a bound: ``max(0, norm - bound)**2``.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.operator_norm`, which also tells what is raised; any padding.
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
    Differentiable, by the kernel and by `bound`, and traceable. Where the maximum is attained more than once the
    gradient is a subgradient. With a bound of 0 it is `squared_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> float(norm_hinge(np.ones((1, 1, 3)), (8,), Conv("OIW"), 1.0))
    4.0
    """
    norm = operator_norm(kernel, input_shape, conv)
    operand = make_operand(kernel, None, conv)
    return operand.run(_squared_excess, arrays=(norm, check_bound(operand, bound)))


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


def squared_norm(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Penalise the operator norm: its square.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.operator_norm`, which also tells what is raised; any padding.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Notes
    -----
    Differentiable (a subgradient where the maximum is attained more than once) and traceable. The spectral norm
    regularisation of Yoshida and Miyato, 2017 (arXiv 1705.10941), with the norm of the layer where they take that
    of its kernel reshaped to a matrix. They weigh half of it.

    Examples
    --------
    >>> import numpy as np
    >>> float(squared_norm(np.ones((1, 1, 3)), (8,), Conv("OIW")))
    9.0
    """
    return operator_norm(kernel, input_shape, conv) ** 2


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
    power = _as_float("p", p)
    if not 1 <= power < math.inf:
        raise ValueError(f"p={p}: wanted a finite number of at least 1 (p = infinity is operator_norm)")
    if power in range(2, MOST_GRAM_POWER + 1, 2):
        return make_operand(kernel, input_shape, conv).run(_even_schatten, int(power))
    return make_spectral_operand(kernel, input_shape, conv, "auto").run(_schatten, power)


def log_condition_number(
    kernel: Array, input_shape: tuple[int, ...], conv: Conv, *, floor: float | None = None
) -> Array:
    """Penalise an uneven spectrum: ``log(sigma_max / sigma_min)`` over all singular values of the operator.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also tells what is raised.
    floor : float, optional
        Least quotient ``sigma_min / sigma_max`` that is told from 0: 32 times the answer's eps unless given.

    Returns
    -------
    0-d array, real
        At least 0 and at most ``-log(floor)``, which singular operators get; 0 for the zero operator. float32 for
        kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        Also where `floor` is no number.
    ValueError
        Also where `floor` is not between 0, itself excluded, and 1.

    Notes
    -----
    Differentiable and traceable with `floor` static. The gradient is that of the two values where the quotient is above
    the floor (a subgradient where either is repeated), else 0.

    Examples
    --------
    >>> import numpy as np
    >>> round(float(log_condition_number(np.asarray([[[2.0, 1.0]]]), (4,), Conv("OIW"))) / math.log(3), 9)
    1.0
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    return operand.run(_log_condition_number, _check_floor(operand, floor))


def negative_log_abs_det(
    kernel: Array, input_shape: tuple[int, ...], conv: Conv, *, floor: float | None = None
) -> Array:
    """Penalise a vanishing determinant: minus the mean over frequencies of ``sum log(sigma)``.

    It is `convsv_core.log_abs_det`, negated, over the number of frequencies.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also tells what is raised.
    floor : float, optional
        Relative to sigma_max, the least value that a logarithm is taken of: 32 times the answer's eps unless given.
        Smaller singular values count as the floor; those of the zero operator as the smallest normal number of the
        answer's dtype.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        Also where `floor` is no number.
    ValueError
        Also where the operator is not square, or `floor` is not between 0, itself excluded, and 1.

    Notes
    -----
    Differentiable and traceable with `floor` static. Values at the floor have a gradient of 0: the floor itself is a
    constant to differentiation. The likelihood term of an invertible convolution in a normalising flow, as in
    Hoogeboom, van den Berg and Welling, *Emerging Convolutions for Generative Normalizing Flows*, ICML 2019.

    Examples
    --------
    >>> import numpy as np
    >>> kernel = 0.5 * np.eye(3)[:, :, None, None]
    >>> round(float(negative_log_abs_det(kernel, (4, 4), Conv("OIHW"))) / math.log(2), 9)
    3.0
    """
    operand = make_spectral_operand(kernel, input_shape, conv, "auto")
    plan = operand.plan
    if not plan.is_square:
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}, with {conv} no square operator: each group maps "
            f"{plan.columns} channels and strides {conv.strides} to {plan.rows} channels; wanted one with a determinant"
        )
    return operand.run(_negative_log_abs_det, _check_floor(operand, floor))


def stable_rank(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Penalise a flat spectrum: the stable rank ``|A|_F**2 / |A|_2**2`` over the number of frequencies.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also tells what is raised.

    Returns
    -------
    0-d array, real
        At most the singular values of one frequency, and 0 for the zero kernel. float32 for kernels of 32 bits or
        fewer, else float64.

    Notes
    -----
    Differentiable (a subgradient of the norm where it is attained more than once, and 0 at the zero kernel) and
    traceable. `convsv_core.stable_rank` is the stable rank itself. Sanyal, Torr and Dokania, *Stable Rank
    Normalization for Improved Generalization in Neural Networks and GANs*, ICLR 2020, bound that of the kernel
    reshaped to a matrix.

    Examples
    --------
    >>> import numpy as np
    >>> float(stable_rank(np.eye(3)[:, :, None, None], (8, 8), Conv("OIHW")))
    3.0
    """
    rank = operator_stable_rank(kernel, input_shape, conv)
    pixels = math.prod(check_input_shape(input_shape, conv))
    return rank / (pixels if conv.transposed else pixels // math.prod(conv.strides))


def _squared_excess(operand: Operand, value: Array, limit: Array) -> Array:
    xp = operand.xp
    return xp.where(value <= limit, xp.zeros_like(value), value - limit) ** 2  # NaN stays


def _spectrum_hinge(operand: Operand, limit: Array) -> Array:
    # Kernel and bound together are homogeneous of degree 2, so the scale may come last.
    squares = _squared_excess(operand, visited_values(operand, "auto", BLOCK_BYTES), limit)
    return _answer_square(operand, _mean(operand, squares))


def _orthogonality(operand: Operand) -> Array:
    plan = operand.plan
    unread = plan.groups * (plan.values_per_block - min(plan.block))
    return operand.answer(_squared_gram(operand, 1.0) + unread, scaled=False)


def _even_schatten(operand: Operand, power: int) -> Array:
    xp, plan = operand.xp, operand.plan
    if power == 2:
        return _answer_square(operand, squared_frobenius(operand) / math.prod(plan.grid))
    if power == 4:
        return operand.answer(_squared_gram(operand, 0.0), scaled=False)
    trace = _mean_over_grams(operand, _trace_of_power, power)
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
    return operand.answer(_mean(operand, values if power == 1 else values**power), scaled=False)


def _log_condition_number(operand: Operand, floor: float) -> Array:
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand, "auto", BLOCK_BYTES)
    largest, smallest = xp.max(values), xp.min(values)
    if plan.values_per_block > min(plan.block):
        smallest = smallest * 0
    is_above = smallest > floor * largest
    one = xp.ones_like(largest)
    log_quotient = xp.log(xp.where(is_above, largest, one)) - xp.log(xp.where(is_above, smallest, one))
    floored = xp.where(largest > 0, xp.full_like(largest, -math.log(floor)), xp.zeros_like(largest))
    return operand.answer(xp.where(is_above, log_quotient, floored), scaled=False)


def _negative_log_abs_det(operand: Operand, floor: float) -> Array:
    xp, plan = operand.xp, operand.plan
    values = visited_values(operand, "auto", BLOCK_BYTES)
    limits = xp.finfo(getattr(xp, operand.answered_in))
    least = floor * xp.max(operand.backend.stop_gradient(values))
    least = xp.clip(least, float(limits.smallest_normal), None)
    is_above = values > least
    logs = xp.where(is_above, xp.log(xp.where(is_above, values, xp.ones_like(values))), xp.log(least))
    unread = plan.groups * (plan.values_per_block - min(plan.block))
    total = _mean(operand, logs) + unread * xp.log(least) + plan.groups * plan.values_per_block * xp.log(operand.scale)
    return operand.answer(-total, scaled=False)


def _squared_gram(operand: Operand, shift: float) -> Array:
    """The mean over frequencies of ``|G - shift I|_F**2``, with G the Gram matrix at the user's scale."""
    if not _pairs_are_cheaper(operand.plan):
        return _mean_over_grams(operand, _squared_distances, shift)
    upper = operand.xp.astype(gram_coefficients(operand), operand.complex_dtype, copy=False)
    lower = operand.backend.adjoint(operand.xp.flip(upper[1:, ...], axis=0))
    coefficients, centre = _fold(operand, operand.xp.concat([lower, upper], axis=0))
    total = operand.xp.sum(_squared_distances(operand, coefficients[centre : centre + 1, ...], shift))
    for others in (coefficients[:centre, ...], coefficients[centre + 1 :, ...]):
        total = total + operand.xp.sum(_squared_distances(operand, others, 0.0))
    return total


def _squared_distances(operand: Operand, grams: Array, shift: float) -> Array:
    """``|G - shift I|_F**2`` of Gram matrices, given at the operand's own scale, summed over groups.

    By parts, because a complex product that overflows is NaN, not infinite.
    """
    xp, scale = operand.xp, operand.scale
    identity = operand.backend.constant(shift * np.eye(grams.shape[-1]), operand.kernel)
    identity = xp.astype(identity, operand.real_dtype, copy=False)
    real, imaginary = xp.real(grams) * scale * scale - identity, xp.imag(grams) * scale * scale
    return xp.sum(real**2 + imaginary**2, axis=(-3, -2, -1))


def _pairs_are_cheaper(plan: Plan) -> bool:
    """Whether a product for every pair of taps is less work than products at every frequency.

    On the infinite lattice there are no frequencies to visit.
    """
    offsets = math.prod(len(axis.offsets) for axis in plan.axes)
    side = min(plan.block)
    of_pairs, of_frequencies = offsets**2 * side, 8 * len(plan.frequencies) * (offsets + side)
    return not all(plan.periods) or (offsets <= MOST_OFFSETS and of_pairs <= of_frequencies)


def _fold(operand: Operand, coefficients: Array) -> tuple[Array, int]:
    """Add coefficients whose phases are the same at every frequency of the grid; also the place of difference 0."""
    xp, plan = operand.xp, operand.plan
    matrices = coefficients.shape[1:]
    differences = [differences_of(axis.offsets) for axis in plan.axes]
    folded = xp.reshape(coefficients, (*map(len, differences), *matrices))
    centre = 0
    for index, (axis, along) in enumerate(zip(plan.axes, differences, strict=True)):
        places = np.asarray(along) % axis.period if axis.period else np.asarray(along)
        distinct = np.unique(places)
        if len(distinct) < len(places):
            table = operand.backend.constant((distinct[:, None] == places) + 0.0, folded)
            table, places = xp.astype(table, folded.dtype), distinct
            folded = xp.moveaxis(xp.tensordot(table, folded, axes=((1,), (index,))), 0, index)
        centre = centre * len(places) + int(np.flatnonzero(places == 0)[0])
    return xp.reshape(folded, (-1, *matrices)), centre


def _mean_over_grams(operand: Operand, function: Callable[[Operand, Array, Any], Array], parameter: float) -> Array:
    """The mean over frequencies of ``function(operand, grams, parameter)``, with grams at the operand's own scale."""
    parts = operand.map_blocks(_of_grams, operand.plan.frequencies, function, parameter, budget=BLOCK_BYTES)
    return _mean(operand, parts)


def _of_grams(
    operand: Operand, function: Callable[[Operand, Array, Any], Array], parameter: float
) -> tuple[BlockFunction, int]:
    evaluate = gram_evaluator(operand, symbol_evaluator(operand))
    return lambda frequencies: function(operand, evaluate(frequencies), parameter), 2 * evaluate.row_bytes


def _mean(operand: Operand, values: Array) -> Array:
    """The mean over frequencies of the sum over all other axes; the first axis is that of the visited ones."""
    xp, plan = operand.xp, operand.plan
    weights = operand.backend.constant(plan.weights() / math.prod(plan.periods), values)
    weights = xp.reshape(xp.astype(weights, values.dtype, copy=False), (-1, *(1,) * (values.ndim - 1)))
    return xp.sum(weights * values)


def _answer_square(operand: Operand, value: Array) -> Array:
    """The answer for a result that is homogeneous of degree 2, given at the operand's own scale."""
    return operand.answer(value * operand.scale)


def _check_floor(operand: Operand, floor: float | None) -> float:
    if floor is None:
        return FLOOR * operand.answer_eps
    number = _as_float("floor", floor)
    if not 0 < number < 1:
        raise ValueError(f"floor={floor}: wanted a number between 0 and 1, relative to the largest singular value")
    return number


def _as_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: wanted a number, not {type(value).__name__}")
    return float(value)
