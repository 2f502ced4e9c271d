"""The figures of one layer at one step of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import convsv_core
from convsv_adapters._layers import ConvLayer, geometry_of, operators_of
from convsv_core.dtypes import answer_dtype
from convsv_core.layers import circular_geometry
from convsv_core.plugins import backend_of
from convsv_core.reports import reshaped_norm

__all__ = ["FIGURES", "LayerFigures", "measure_layer"]

FIGURES = ("certified_norm", "reshaped_norm", "stable_rank", "smallest_singular_value")
"""The figures of a layer that are numbers, in the order of the columns of a CSV file."""

NORM_RTOL = 1e-2
"""Relative gap of the certified norm, if nothing else sets its bounds apart. It is the gap of a report's bounds."""


@dataclass(frozen=True, eq=False)
class LayerFigures:
    """The figures of one layer. A figure of a kernel with NaN or infinity is NaN.

    Attributes
    ----------
    name : str
        The layer's name, as `conv_layers` gives it.
    certified_norm : float
        Upper bound of the norm of the layer with its own padding, rounding included, for every input size; for padding
        that repeats pixels, for the extents of the example input. It is within 1 % of the supremum of the symbol's
        norm, times the norm of the padding.
    reshaped_norm : float
        Norm of the kernel reshaped into a matrix: what frameworks call the spectral norm. It bounds nothing.
    stable_rank : float or None
        Stable rank of the circular convolution at the layer's extents: its squared Frobenius norm over its squared
        norm. If the extents are larger than the sampled ones, the norm is replaced by its upper bound, so that the
        figure is a lower bound. None where the extents are not known.
    smallest_singular_value : float
        The smallest of `singular_values`. No input size is known to have a smaller or a larger one, unless the sampled
        extents are the layer's own.
    sampled_shape : tuple of int
        The extents at which the circular convolution was decomposed: the layer's own, cut at the monitor's `points`.
    singular_values : numpy.ndarray or None
        Every singular value at the sampled extents, descending; None unless histograms were asked for.
    """

    name: str
    certified_norm: float
    reshaped_norm: float
    stable_rank: float | None
    smallest_singular_value: float
    sampled_shape: tuple[int, ...]
    singular_values: np.ndarray[Any, Any] | None = field(default=None, repr=False)

    def numbers(self) -> dict[str, float]:
        """Return the figures that are known numbers, by name."""
        return {name: value for name in FIGURES if (value := getattr(self, name)) is not None}

    def without_values(self) -> LayerFigures:
        """Return the figures without the array of singular values."""
        return replace(self, singular_values=None)


def measure_layer(layer: ConvLayer, kernel: Any, points: int, *, keep_values: bool = False) -> LayerFigures:
    """Compute the figures of a layer from its kernel, in the kernel's library and on its device.

    Parameters
    ----------
    layer : ConvLayer
    kernel : array
        The layer's kernel, of ``layer.kernel_shape``, not traced.
    points : int
        Largest extent, along each axis, at which the circular convolution is decomposed. It is rounded up to a
        multiple of the stride.
    keep_values : bool, default False
        Whether to keep every singular value for a histogram.

    Raises
    ------
    ValueError
        The layer has no geometry, or its padding repeats pixels and its extents are not known.
    """
    conv = geometry_of(layer)
    backend = backend_of(kernel)
    xp = backend.namespace(kernel)
    kernel = xp.astype(backend.stop_gradient(kernel), getattr(xp, answer_dtype(kernel)), copy=False)
    (operator,) = operators_of(layer, circular=False)
    largest = layer.largest_input_shape
    sampled, circular = circular_geometry(conv, tuple(min(n, points) for n in largest or (points,) * conv.ndim))
    if not bool(xp.all(xp.isfinite(kernel))):
        return LayerFigures(layer.name, *(math.nan,) * 4, sampled_shape=sampled)
    upper = float(convsv_core.norm_bounds(kernel, operator.conv, rtol=NORM_RTOL).upper)
    values = backend.to_numpy(convsv_core.singular_values(kernel, sampled, circular))
    rank = None
    if largest is not None:
        whole, _ = circular_geometry(conv, largest)
        norm = float(values[0]) if whole == sampled else upper
        frobenius = float(convsv_core.frobenius_norm(kernel, whole, circular))
        rank = (frobenius / norm) ** 2 if norm > 0 else 0.0
    return LayerFigures(
        layer.name,
        operator.layer_upper(upper),
        float(reshaped_norm(backend, kernel, conv.layout)),
        rank,
        float(values[-1]),
        sampled,
        values if keep_values else None,
    )
