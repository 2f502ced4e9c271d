"""Penalties on the operator norm."""

from __future__ import annotations

import math

from convsv_core.backend import Array
from convsv_core.clipping import check_bound
from convsv_core.conv import Conv
from convsv_core.operand import make_operand
from convsv_core.penalties._means import squared_excess
from convsv_core.plan import check_input_shape
from convsv_core.spectrum import operator_norm
from convsv_core.spectrum import stable_rank as operator_stable_rank


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
    return operand.run(squared_excess, arrays=(norm, check_bound(operand, bound)))


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
