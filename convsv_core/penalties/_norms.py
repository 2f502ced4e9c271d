"""Penalties on the operator norm, the largest singular value."""

from __future__ import annotations

import math

from convsv_core._geometry.shapes import check_input_shape
from convsv_core._spectrum.numbers import operator_norm
from convsv_core._spectrum.numbers import stable_rank as operator_stable_rank
from convsv_core._symbol.bound_argument import check_bound
from convsv_core._symbol.operand import Operand, make_operand
from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.plugins import on_host

__all__ = ["norm_hinge", "squared_excess", "squared_norm", "stable_rank"]


@on_host
def norm_hinge(kernel: Array, input_shape: tuple[int, ...], conv: Conv, bound: float | Array) -> Array:
    """Penalise an operator norm above a bound: ``max(0, norm - bound)**2``.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.operator_norm`, which also says what is raised. Any padding is allowed.
    bound : float or 0-d array of the kernel's library
        At least 0.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Raises
    ------
    TypeError
        `bound` is an array of another library, or is not a number.
    ValueError
        `bound` is negative or NaN.

    Notes
    -----
    Differentiable with respect to the kernel and to `bound`, and traceable. Where several singular values are
    the largest, the gradient is a subgradient. With a bound of 0 the penalty is `squared_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> float(norm_hinge(np.ones((1, 1, 3)), (8,), Conv("OIW"), 1.0))
    4.0
    """
    norm = operator_norm(kernel, input_shape, conv)
    operand = make_operand(kernel, None, conv, lattice=True)
    return operand.run(squared_excess, arrays=(norm, check_bound(operand, bound)))


@on_host
def squared_norm(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Penalise the square of the operator norm.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.operator_norm`, which also says what is raised. Any padding is allowed.

    Returns
    -------
    0-d array, real
        float32 for kernels of 32 bits or fewer, else float64.

    Notes
    -----
    Differentiable and traceable. Where several singular values are the largest, the gradient is a subgradient.
    Source: the spectral norm regularisation of Yoshida and Miyato, 2017 (arXiv 1705.10941). They take half of the
    squared norm, and the norm of the kernel reshaped to a matrix instead of the norm of the layer.

    Examples
    --------
    >>> import numpy as np
    >>> float(squared_norm(np.ones((1, 1, 3)), (8,), Conv("OIW")))
    9.0
    """
    return operator_norm(kernel, input_shape, conv) ** 2


@on_host
def stable_rank(kernel: Array, input_shape: tuple[int, ...], conv: Conv) -> Array:
    """Penalise a flat spectrum by the stable rank ``|A|_F**2 / |A|_2**2``, divided by the number of frequencies.

    Parameters
    ----------
    kernel, input_shape, conv
        As for `convsv_core.singular_values`, which also says what is raised.

    Returns
    -------
    0-d array, real
        At most the number of singular values at one frequency; 0 for the zero kernel. float32 for kernels of
        32 bits or fewer, else float64.

    Notes
    -----
    Differentiable and traceable. The gradient is 0 at the zero kernel, and a subgradient where several singular
    values are the largest. `convsv_core.stable_rank` is the stable rank itself. Source: Sanyal, Torr and Dokania,
    *Stable Rank Normalization for Improved Generalization in Neural Networks and GANs*, ICLR 2020. They bound the
    stable rank of the kernel reshaped to a matrix.

    Examples
    --------
    >>> import numpy as np
    >>> float(stable_rank(np.eye(3)[:, :, None, None], (8, 8), Conv("OIHW")))
    3.0
    """
    rank = operator_stable_rank(kernel, input_shape, conv)
    pixels = math.prod(check_input_shape(input_shape, conv))
    return rank / (pixels if conv.transposed else pixels // math.prod(conv.strides))


def squared_excess(operand: Operand, values: Array, limit: Array) -> Array:
    """Return ``max(0, values - limit)**2``; NaN stays NaN."""
    xp = operand.xp
    return xp.where(values <= limit, xp.zeros_like(values), values - limit) ** 2
