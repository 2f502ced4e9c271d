"""Certified norms of a layer's kernel on the host, with what was rounded on its way to the computing library."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._network.norms import euclidean_norm
from convsv_core._norm.bounds import norm_bounds
from convsv_core._projection.certificate import CERTIFICATE_RTOL
from convsv_core.backend import Array
from convsv_core.conv import Conv
from convsv_core.layers import Layer, Operator, layer_operators
from convsv_core.plugins import backend_of
from convsv_core.reports.placement import Placement

__all__ = [
    "ENTRY_EPS",
    "LayerBounds",
    "certified_bounds",
    "certified_norms",
    "folded_upper",
    "layer_operator",
    "scaled_outputs",
]

ENTRY_EPS = 4 * float(np.finfo(np.float64).eps)
"""Relative error of an entry that a few operations in float64 computed.

Proved: a kernel times ``gamma / sqrt(variance + epsilon)`` takes one addition, one root, one division and one product,
with at most ``(0.5 / 2 + 0.5 + 0.5 + 0.5)`` eps of error to first order. The rest is a margin for the second order.
"""


def layer_operator(layer: Layer) -> Operator:
    """Return the operator of a layer with a kernel, for every input size or at the layer's own extents.

    Extents that a reader assumed do not count: a bound has to hold for the extents that the network will see.
    """
    assert layer.conv is not None
    assert layer.kernel is not None
    extents = () if layer.input_shape is None or layer.assumed_extents else (layer.input_shape,)
    (operator,) = layer_operators(tuple(layer.kernel.shape), layer.conv, extents)
    return operator


def certified_norms(
    kernel: HostArray,
    operators: Iterable[Operator],
    placement: Placement,
    dtype: str | None,
    *,
    rtol: float = CERTIFICATE_RTOL,
    entry_eps: float = 0.0,
) -> dict[Operator, float]:
    """Return certified upper bounds of a layer's norm, one for each operator that stands for the layer.

    Parameters
    ----------
    kernel : numpy.ndarray
    operators : iterable of Operator
    placement : Placement
    dtype : str or None
        The dtype to compute in; see `Placement.array`. The rounding of the kernel to it is included.
    rtol : float
        Relative gap of the bounds.
    entry_eps : float, default 0.0
        A bound of the relative error that each entry of `kernel` has already.
    """
    bounds = certified_bounds(kernel, operators, placement, dtype, rtol=rtol, entry_eps=entry_eps)
    return {operator: operator.layer_upper(found.upper) for operator, found in bounds.items()}


def folded_upper(layer: Layer, operator: Operator, placement: Placement, *, rtol: float) -> float:
    """Return a certified upper bound of the norm of a layer with the normalisation behind it.

    Parameters
    ----------
    layer : Layer
        With a kernel, a geometry and a normalisation.
    operator : Operator
        The operator that stands for the layer itself.
    placement, rtol
        As for `certified_norms`.
    """
    assert layer.kernel is not None
    assert layer.conv is not None
    assert layer.normalisation is not None
    scale = np.asarray(layer.normalisation.scale, np.float64)
    if not np.isfinite(scale).all():
        raise ValueError("a factor of the normalisation is not finite")
    kernel = scaled_outputs(np.asarray(layer.kernel), layer.conv, scale)
    dtype = placement.dtype_of(kernel)
    return certified_norms(kernel, [operator], placement, dtype, rtol=rtol, entry_eps=ENTRY_EPS)[operator]


def scaled_outputs(kernel: Array, conv: Conv, scale: Array) -> Array:
    """Return a kernel with the taps of each output channel times its factor.

    Parameters
    ----------
    kernel : array
        With the axes that ``conv.layout`` names.
    conv : Conv
    scale : array, shape (outputs,)
        In the library of the kernel and on its device.

    Returns
    -------
    array
        In the dtype of a product of the two.

    Raises
    ------
    ValueError
        There is another number of output channels.

    Notes
    -----
    Traceable and differentiable. Each entry takes one product.

    Examples
    --------
    >>> scaled_outputs(np.ones((2, 1, 1)), Conv("OIW"), np.asarray([3.0, 4.0])).ravel().tolist()
    [3.0, 4.0]
    """
    xp = backend_of(kernel).namespace(kernel)
    outputs, inputs = conv.layout.index("O"), conv.layout.index("I")
    columns, rows = kernel.shape[outputs], kernel.shape[inputs]
    groups = conv.groups if conv.transposed else 1  # A transposed kernel's axis O is for one group.
    if tuple(scale.shape) != (groups * columns,):
        raise ValueError(f"{math.prod(scale.shape)} factors for a layer of {groups * columns} output channels")
    shape = [1] * kernel.ndim
    shape[outputs] = columns
    if groups == 1:
        return kernel * xp.reshape(scale, tuple(shape))
    # The axis I of a grouped transposed kernel has the inputs of all groups in turn.
    factors = xp.broadcast_to(xp.reshape(scale, (groups, 1, columns)), (groups, rows // groups, columns))
    factors = xp.reshape(factors, (rows, columns))
    shape[inputs] = rows
    return kernel * xp.reshape(factors if inputs < outputs else xp.permute_dims(factors, (1, 0)), tuple(shape))


class LayerBounds(NamedTuple):
    """Certified bounds of the norm of a circular operator, the rounding of its kernel included."""

    lower: float
    upper: float


def certified_bounds(
    kernel: HostArray,
    operators: Iterable[Operator],
    placement: Placement,
    dtype: str | None,
    *,
    rtol: float = CERTIFICATE_RTOL,
    entry_eps: float = 0.0,
) -> dict[Operator, LayerBounds]:
    """Return certified bounds of the supremum of the symbol's norm over all frequencies, for each operator.

    The arguments are as for `certified_norms`. The norm of the padding is left out.
    """
    array = placement.array(kernel, dtype)
    wide = np.result_type(kernel.dtype, np.float64)
    exact = kernel.astype(wide)
    lost = float(euclidean_norm(np.abs(exact - placement.backend.to_numpy(array))))
    # The sum of squares has a relative error far below the eps of float32, and `norm_bounds` leaves a margin.
    lost += entry_eps * float(euclidean_norm(np.abs(exact)))
    found = {}
    for operator in operators:
        channels = math.prod(kernel.shape[operator.conv.layout.index(letter)] for letter in "OI")
        bounds = norm_bounds(array, operator.conv, rtol=rtol)
        # The norm of a convolution is at most sqrt(taps) times the Frobenius norm of its kernel. The margin that
        # `norm_bounds` leaves for rounding covers the rounding of this sum too.
        shift = math.sqrt(kernel.size // channels) * lost
        found[operator] = LayerBounds(max(0.0, float(bounds.lower) - shift), float(bounds.upper) + shift)
    return found
