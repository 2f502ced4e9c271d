"""Certified norms of a layer's kernel on the host, with what was rounded on its way to the computing library."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._norm.bounds import norm_bounds
from convsv_core._projection.certificate import CERTIFICATE_RTOL
from convsv_core.conv import Conv
from convsv_core.layers import Layer, Operator, layer_operators
from convsv_core.reports.placement import Placement

__all__ = ["ENTRY_EPS", "LayerBounds", "certified_norms", "folded_upper", "layer_operator", "scaled_outputs"]

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
    kernel = scaled_outputs(np.asarray(layer.kernel), layer.conv, layer.normalisation.scale)
    dtype = placement.dtype_of(kernel)
    return certified_norms(kernel, [operator], placement, dtype, rtol=rtol, entry_eps=ENTRY_EPS)[operator]


def scaled_outputs(kernel: HostArray, conv: Conv, scale: HostArray) -> HostArray:
    """Return a kernel in double precision, with the taps of each output channel times its factor.

    Parameters
    ----------
    kernel : numpy.ndarray
        With the axes that ``conv.layout`` names.
    conv : Conv
    scale : numpy.ndarray, shape (outputs,)

    Raises
    ------
    ValueError
        There is another number of output channels, or a factor is not finite.

    Examples
    --------
    >>> scaled_outputs(np.ones((2, 1, 1)), Conv("OIW"), np.asarray([3.0, 4.0])).ravel().tolist()
    [3.0, 4.0]
    """
    wide = kernel.astype(np.result_type(kernel.dtype, np.float64))
    groups = conv.groups if conv.transposed else 1  # the axis O of a transposed kernel has the outputs of one group
    outputs, inputs = conv.layout.index("O"), conv.layout.index("I")
    if scale.shape != (groups * kernel.shape[outputs],):
        raise ValueError(f"{scale.size} factors for a layer of {groups * kernel.shape[outputs]} output channels")
    if not np.isfinite(scale).all():
        raise ValueError("a factor is not finite")
    factors = np.repeat(scale.reshape(groups, -1), kernel.shape[inputs] // groups, axis=0) if groups > 1 else scale
    if groups == 1:
        shape = [1] * kernel.ndim
        shape[outputs] = -1
        return np.asarray(wide * factors.reshape(shape))
    moved = np.moveaxis(wide, (inputs, outputs), (0, 1))
    moved = moved * factors.reshape(*factors.shape, *(1,) * (kernel.ndim - 2))
    return np.asarray(np.moveaxis(moved, (0, 1), (inputs, outputs)))


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

    The arguments are those of `certified_norms`. The norm of the padding is left out.
    """
    array = placement.array(kernel, dtype)
    wide = np.result_type(kernel.dtype, np.float64)
    exact = kernel.astype(wide)
    lost = float(np.linalg.norm((exact - placement.backend.to_numpy(array)).ravel()))
    # The sum of squares has a relative error far below that of one entry in float32, and `norm_bounds` leaves a margin.
    lost += entry_eps * float(np.linalg.norm(exact.ravel()))
    found = {}
    for operator in operators:
        channels = math.prod(kernel.shape[operator.conv.layout.index(letter)] for letter in "OI")
        bounds = norm_bounds(array, operator.conv, rtol=rtol)
        # The norm of a convolution is at most sqrt(taps) times the Frobenius norm of its kernel. The margin that
        # `norm_bounds` leaves for rounding covers the rounding of this sum too.
        shift = math.sqrt(kernel.size // channels) * lost
        found[operator] = LayerBounds(max(0.0, float(bounds.lower) - shift), float(bounds.upper) + shift)
    return found
