"""The rows of every report on networks: what is known of one convolution, and of all that a model has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from convsv_core._geometry.plan import HostArray
from convsv_core.layers import Layer, join_notes
from convsv_core.reports.images import TopVectors

__all__ = [
    "BOUNDS",
    "QUANTILES",
    "Bounds",
    "BoundsReport",
    "DifferenceReport",
    "LayerReport",
    "ModelReport",
    "ProjectionReport",
    "Row",
]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Shares of the singular values at which a report gives quantiles."""

Bounds: TypeAlias = Literal["none", "upper", "both"]
"""The type of an entry of `BOUNDS`."""

BOUNDS: tuple[Bounds, ...] = ("none", "upper", "both")
"""Choices of the certified bounds of a layer's norm with its own padding."""


@dataclass(frozen=True, eq=False)
class Row:
    """Facts about one convolution that every report has. A figure that could not be computed is None.

    Attributes
    ----------
    name : str
    kernel_shape, stride, dilation : tuple of int or None
    layout : str or None
    groups : int or None
    transposed : bool
    reshaped_norm : float or None
        Norm of the kernel reshaped into a matrix of O rows: see `convsv_core.reports.analysis.reshaped_norm`.
    linear : bool
        Whether the layer is a dense one, which is the convolution of one tap on one pixel.
    normalisation : str or None
        The name of the batch normalisation that surely follows the layer and acts on nothing else.
    folded_upper : float or None
        Certified upper bound of the norm of the layer with that normalisation at inference.
    note : str
        For people: an assumption that was made, or why a figure is None.
    """

    name: str
    kernel_shape: tuple[int, ...] | None = None
    layout: str | None = None
    stride: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    groups: int | None = None
    transposed: bool = False
    reshaped_norm: float | None = None
    note: str = ""
    linear: bool = False
    normalisation: str | None = None
    folded_upper: float | None = None

    @classmethod
    def of(cls, layer: Layer, **fields: Any) -> Self:
        """Return the report of a layer: its name, geometry and note, and the given fields."""
        known: dict[str, Any] = {"note": layer.note, "linear": layer.linear}
        if layer.kernel is not None:
            known["kernel_shape"] = tuple(layer.kernel.shape)
        if layer.conv is not None:
            conv = layer.conv
            known |= {"layout": conv.layout, "stride": conv.strides, "dilation": conv.dilations}
            known |= {"groups": conv.groups, "transposed": conv.transposed}
        return cls(layer.name, **known | fields)

    def with_note(self, *notes: str) -> Self:
        """Return the report with more notes, of which some may be empty."""
        return replace(self, note=join_notes(self.note, *notes))

    @property
    def norm(self) -> float | None:
        """The operator's norm, as exactly as the report has it."""
        raise NotImplementedError

    @property
    def has_figures(self) -> bool:
        """Return whether anything is known of the norm."""
        return self.norm is not None

    @property
    def factor(self) -> float | None:
        """The operator's norm divided by `reshaped_norm`; None if one is unknown or `reshaped_norm` is 0."""
        if self.norm is None or not self.reshaped_norm:
            return None
        return self.norm / self.reshaped_norm


@dataclass(frozen=True, eq=False)
class LayerReport(Row):
    """The figures of one convolution, from all of its singular values.

    They describe the circular operator of stride `stride` on an input of extents `input_shape`, whatever padding the
    layer has.

    Attributes
    ----------
    input_shape : tuple of int or None
        The layer's own extents. Where the stride does not divide them, they are rounded up to the next multiples, and
        `note` says so.
    operator_norm, smallest_singular_value : float or None
    condition_number : float or None
        ``operator_norm / smallest_singular_value``; infinite if the smallest value is 0.
    stable_rank : float or None
        ``|A|_F^2 / |A|_2^2``.
    norm_lower, norm_upper : float or None
        Certified bounds of the norm with the layer's own padding: see `convsv_core.reports.analysis.declared_bounds`.
    quantiles : tuple of float or None
        Quantiles of all singular values at the shares `QUANTILES`, interpolated linearly between neighbours.
    curve : numpy.ndarray or None
        The singular values, descending, at `convsv_core.reports.analysis.CURVE_POINTS` ranks that are equally spaced
        from the first to the last. If there are fewer values, the curve holds all of them.
    by_frequency : numpy.ndarray or None
        The largest singular value at each frequency, with frequency 0 in the middle of each axis: see
        `convsv_core.reports.images.by_frequency`.
    top_vectors : TopVectors or None
        Singular vectors of the largest singular value.
    """

    input_shape: tuple[int, ...] | None = None
    operator_norm: float | None = None
    smallest_singular_value: float | None = None
    condition_number: float | None = None
    stable_rank: float | None = None
    norm_lower: float | None = None
    norm_upper: float | None = None
    quantiles: tuple[float, ...] | None = None
    curve: HostArray | None = None
    by_frequency: HostArray | None = None
    top_vectors: TopVectors | None = None

    @property
    def norm(self) -> float | None:
        """The largest singular value."""
        return self.operator_norm

    @property
    def has_figures(self) -> bool:
        """Return whether the norm is known, or a bound of it that needs no extents."""
        return self.norm is not None or self.norm_upper is not None


@dataclass(frozen=True, eq=False)
class BoundsReport(Row):
    """Certified bounds of the norm of one convolution, for every input size: see `norm_bounds`.

    Attributes
    ----------
    lower, upper : float or None
    frequency : tuple of float or None
        Angles, in radians, one an axis, at which `lower` is attained.
    evaluations : int or None
        Number of matrices of the symbol whose norm was computed.
    converged : bool or None
        Whether the bounds reached the gap that was asked for.
    """

    lower: float | None = None
    upper: float | None = None
    frequency: tuple[float, ...] | None = None
    evaluations: int | None = None
    converged: bool | None = None

    @property
    def norm(self) -> float | None:
        """The lower bound, which some frequency attains."""
        return self.lower


@dataclass(frozen=True, eq=False)
class ProjectionReport(Row):
    """The projection of one convolution. Norms are certified upper bounds, with the layer's own padding.

    Attributes
    ----------
    norm_before, norm_after : float or None
        Upper bounds for every input size under zero padding, and under circular padding where the stride divides the
        extents. Under other padding they hold for the layer's own extents. `norm_after` belongs to the kernel as the
        file stores it.
    distance : float or None
        Frobenius norm of the change of the stored kernel; 0 where no bit changes.
    iterations : int or None
    converged : bool or None
        See `Projection`.
    bound : float
    selected : bool
        Whether the layer was to be projected.
    kernel : numpy.ndarray or None
        The kernel to store in place of the layer's own; None where the layer keeps its own.
    """

    norm_before: float | None = None
    norm_after: float | None = None
    distance: float | None = None
    iterations: int | None = None
    converged: bool | None = None
    bound: float = math.inf
    selected: bool = True
    kernel: HostArray | None = None

    @property
    def norm(self) -> float | None:
        """The certified norm of the stored kernel."""
        return self.norm_after

    @property
    def failed(self) -> bool:
        """Return whether the layer was to be projected, and is not shown to be within the bound."""
        return self.selected and not (self.norm_after is not None and self.norm_after <= self.bound)


@dataclass(frozen=True, eq=False)
class DifferenceReport(Row):
    """The difference between the weights that two models have for one layer. Norms are certified upper bounds.

    Attributes
    ----------
    other_name : str
        The layer's name in the second model; `name` is the one in the first model.
    difference_upper : float or None
        Bound of the norm of the layer whose weights are the difference. Like `norm_upper` it holds for the layer's own
        padding, for every input size where the padding repeats no pixel.
    norm_upper : float or None
        Bound of the norm of the layer in the first model.
    share : float or None
        Bound of the norm of the difference, divided by the norm in the first model. Both are suprema over all
        frequencies, because the norm of the padding is a factor of both. Infinite if the first model's weights are 0.
    place : int
        The layer's place among the compared layers, in the order of the first model.
    """

    other_name: str = ""
    difference_upper: float | None = None
    norm_upper: float | None = None
    share: float | None = None
    place: int = 0

    @property
    def norm(self) -> float | None:
        """The certified norm of the difference."""
        return self.difference_upper

    @property
    def has_figures(self) -> bool:
        """Return whether anything is known of the difference."""
        return self.share is not None


@dataclass(frozen=True)
class ModelReport:
    """The figures of one model file.

    Attributes
    ----------
    path : Path
        The path as it was given.
    layers : list of LayerReport
        One report a convolution, in the order of the network, as `convsv_core.analyze` gives them, but without
        curves. Empty if the model `failed`.
    note : str
        For people: why there are no layers, such as a file that cannot be read or workers that died of it.
    """

    path: Path
    layers: list[LayerReport]
    note: str = ""

    @property
    def failed(self) -> bool:
        """Return whether the model has no figures."""
        return not self.layers
