"""From the layers of a network to their figures: singular values, norms and certified bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._norm.bounds import norm_bounds
from convsv_core._spectrum.numbers import frobenius_norm
from convsv_core._spectrum.values import frequency_singular_values, singular_values
from convsv_core.backend import Array, Backend
from convsv_core.conv import Conv
from convsv_core.layers import Layer, UnknownExtents, circular_geometry, join_notes, lattice, layer_operators
from convsv_core.plugins import get_backend, one_line
from convsv_core.reports import texts
from convsv_core.reports.certified import folded_upper
from convsv_core.reports.images import by_frequency, top_vectors
from convsv_core.reports.live_models import COMPUTING_FAILS, asking_for_extents, model_layers
from convsv_core.reports.network_report import Report
from convsv_core.reports.placement import Placement
from convsv_core.reports.report import QUANTILES, Bounds, BoundsReport, LayerReport, Row
from convsv_core.reports.views import spectrum_view

__all__ = [
    "CURVE_POINTS",
    "analyze",
    "bounds_reports",
    "declared_bounds",
    "describe",
    "layer_reports",
    "reshaped_norm",
    "with_bounds",
    "with_folded",
    "with_spectrum",
]

CURVE_POINTS = 512
"""Largest number of singular values in a report's curve. A guess: more than a plot has pixels for a layer."""

BOUNDS_RTOL = 1e-2
"""Relative gap of the bounds beside a spectrum. A guess: the padding usually sets the bounds further apart."""

R = TypeVar("R", bound=Row)


def analyze(
    model: object,
    example_input: object = None,
    *,
    linear: bool = False,
    backend: str = "numpy",
    dtype: str | None = None,
    device: str | None = None,
) -> Report[LayerReport]:
    """Report the singular values of every convolution of a model object, as `convsv spectrum` does for a file.

    Parameters
    ----------
    model : object
        A model of a framework that an installed plugin knows, such as a `torch.nn.Module`.
    example_input : object, optional
        An input for the model, from which the extents of each layer's input follow. The adapter of the framework says
        in which form. Without it, layers whose extents are open are reported without figures.
    linear : bool, default False
        Whether to report dense layers too. A dense layer is the convolution of one tap on one pixel.
    backend : str, default "numpy"
        Name of the library to compute with. Kernels are copied to it through the host.
    dtype, device : str, optional
        As for `convsv_core.reports.layer_reports`.

    Returns
    -------
    Report of LayerReport
        A list with one report a layer, in the order of the model. A figure that could not be computed is None, and the
        note says why. Where a batch normalisation surely follows a layer, `folded_upper` is the norm with it. Printed,
        it is the table of `convsv spectrum`; see `convsv_core.Report`.

    Raises
    ------
    TypeError
        `model` is of no framework that an installed plugin knows.
    ValueError
        There is no such backend.

    Notes
    -----
    Neither traceable nor differentiable. The operator reported is the circular one at each layer's extents, whatever
    padding the layer has: Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, ICLR 2019.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
    >>> (report,) = analyze(model, torch.zeros(1, 3, 16, 16))
    >>> report.name, report.kernel_shape, report.input_shape
    ('0', (8, 3, 3, 3), (16, 16))
    """
    computing = get_backend(backend)
    layers = map(asking_for_extents, model_layers(model, example_input, linear=linear))
    name = type(model).__name__
    return Report(
        layer_reports(layers, computing, dtype=dtype, device=device, images=True),
        view=spectrum_view("none"),
        title=f"{name}, with {computing.name}",
        about={"model": name, "backend": computing.name},
    )


def layer_reports(
    layers: Iterable[Layer],
    backend: Backend,
    *,
    bounds: Bounds = "none",
    dtype: str | None = None,
    device: str | None = None,
    images: bool = False,
) -> Iterator[LayerReport]:
    """Yield the report of each layer, in turn.

    A layer that cannot be computed gives a report whose note says why, and the next layers follow.

    Parameters
    ----------
    layers : iterable of Layer
        Layers whose kernels are NumPy arrays.
    backend : Backend
        The library to compute with.
    bounds : {"none", "upper", "both"}, default "none"
        Which bounds of the norm with the layer's own padding to certify; see `declared_bounds`. Of a layer without
        extents, "both" gives the upper one.
    dtype, device : str, optional
        See `Placement`.
    images : bool, default False
        Whether to keep the images of each layer that a page shows: `by_frequency` and `top_vectors`.

    Examples
    --------
    >>> from convsv_core import Conv
    >>> from convsv_core.layers import Layer
    >>> from convsv_core.plugins import get_backend
    >>> layer = Layer("first", np.ones((1, 1, 3, 3)), Conv("OIHW", padding_mode="zeros"), (8, 8))
    >>> (report,) = layer_reports([layer], get_backend("numpy"), bounds="upper")
    >>> round(report.operator_norm, 6), report.norm_upper >= 9
    (9.0, True)
    """
    placement = Placement(backend, dtype, device)
    measure = _spectrum_with_images if images else _spectrum
    for layer in layers:
        report = describe(layer)
        if report.input_shape is not None:
            report = _measured(report, layer, measure, placement)
        if bounds != "none" and not (report.input_shape is not None and report.operator_norm is None):
            report = with_bounds(report, layer, placement, bounds)
        yield with_folded(report, layer, placement, BOUNDS_RTOL)


def bounds_reports(
    layers: Iterable[Layer],
    backend: Backend,
    *,
    rtol: float = 1e-3,
    dtype: str | None = None,
    device: str | None = None,
) -> Iterator[BoundsReport]:
    """Yield certified bounds of each layer's norm for every input size, in turn.

    The bounds hold for zero, "valid" and circular padding. A layer whose padding repeats pixels beyond that has a note
    and no bounds.

    Parameters
    ----------
    layers, backend, dtype, device
        As for `layer_reports`.
    rtol : float, default 1e-3
        Relative gap to reach.

    Examples
    --------
    >>> from convsv_core import Conv
    >>> from convsv_core.layers import Layer
    >>> from convsv_core.plugins import get_backend
    >>> layer = Layer("first", np.ones((1, 1, 3, 3)), Conv("OIHW", padding_mode="zeros"), (8, 8))
    >>> (report,) = bounds_reports([layer], get_backend("numpy"))
    >>> report.lower <= 9 <= report.upper, report.converged
    (True, True)
    """
    placement = Placement(backend, dtype, device)
    for layer in layers:
        report = _measured(BoundsReport.of(layer), layer, functools.partial(_bounds, rtol=rtol), placement)
        yield with_folded(report, layer, placement, rtol, every_size=True)


def with_bounds(report: LayerReport, layer: Layer, placement: Placement, bounds: Bounds) -> LayerReport:
    """Return the report with the norm of the reshaped kernel, and the bounds that are asked for."""
    measure: Callable[[LayerReport, Array, Conv, Backend], LayerReport] = _as_it_is
    if bounds != "none":
        measure = functools.partial(_declared, extents=layer.input_shape, exact=bounds == "both")
    return _measured(report, layer, measure, placement)


def with_folded(report: R, layer: Layer, placement: Placement, rtol: float, *, every_size: bool = False) -> R:
    """Return the report with the norm of the layer and its normalisation, if there is one and the bound is known.

    With `every_size`, the layer's own extents are not used, and a layer whose norm depends on them has no figure.
    """
    if layer.normalisation is None or layer.kernel is None or layer.conv is None:
        return report
    known = () if every_size or layer.input_shape is None else (layer.input_shape,)
    try:
        (operator,) = layer_operators(tuple(layer.kernel.shape), layer.conv, known)
        upper = folded_upper(layer, operator, placement, rtol=rtol)
    except UnknownExtents:
        return report
    except COMPUTING_FAILS as error:
        return report.with_note(f"no norm with {layer.normalisation.name}: {one_line(error)}")
    return replace(report, folded_upper=upper, normalisation=layer.normalisation.name)


def declared_bounds(
    kernel: Array, conv: Conv, extents: tuple[int, ...] | None, *, rtol: float = BOUNDS_RTOL, exact: bool = False
) -> tuple[float | None, float]:
    """Certify bounds of a layer's norm with the padding that the layer declares.

    Parameters
    ----------
    kernel : array
    conv : Conv
    extents : tuple of int or None
        Extents of the layer's input. The upper bound does not need them under zero padding, nor under circular padding
        without a stride that repeats no pixel.
    rtol : float, default `BOUNDS_RTOL`
        Relative gap in the supremum of the symbol's norm.
    exact : bool, default False
        Whether to compute the lower bound too: the exact norm less its rounding. Without circular padding that takes
        an iteration on images (`norm_bounds` with an input shape).

    Returns
    -------
    lower, upper : float
        `lower` is None unless `exact`. `upper` is the supremum over all frequencies times the norm of the padding.

    Raises
    ------
    ValueError
        The extents are None and needed, or they are no input of the layer.
    """
    if extents is None and (exact or (conv.padding_mode == "circular" and max(conv.strides) > 1)):
        raise UnknownExtents("a bound for the layer's own padding needs the layer's extents")
    if exact:
        found = norm_bounds(kernel, conv, input_shape=extents, rtol=rtol)
        return float(found.lower), float(found.upper)
    (operator,) = layer_operators(tuple(kernel.shape), conv, () if extents is None else (extents,))
    return None, operator.layer_upper(float(norm_bounds(kernel, operator.conv, rtol=rtol).upper))


def describe(layer: Layer) -> LayerReport:
    """Report a layer's geometry, without figures."""
    conv, extents, note = layer.conv, layer.input_shape, layer.note
    if conv is not None and extents is not None and len(extents) == conv.ndim:
        rounded, _ = circular_geometry(conv, extents)
        if rounded != extents:
            change = f"extents {texts.extents(extents)} taken as {texts.extents(rounded)}, a multiple of the stride"
            note = join_notes(change, note)
        extents = rounded
    return LayerReport.of(layer, input_shape=extents, note=note)


def reshaped_norm(backend: Backend, kernel: Array, layout: str) -> Array:
    """Compute the norm of the kernel as a matrix with a row for each index of the axis O, and all else in columns.

    Frameworks call it the spectral norm of a layer: PyTorch's `spectral_norm` does so for `Conv` (its ``dim=0``) and
    for `ConvTranspose` (``dim=1``), and so does Keras's `SpectralNormalization`. It is not the norm of the
    convolution, and bounds that norm from neither side.

    Parameters
    ----------
    backend : Backend
        The backend that owns `kernel`.
    kernel : array
    layout : str
        As in `Conv`.

    Returns
    -------
    0-d array, real

    Examples
    --------
    >>> from convsv_core.plugins import get_backend
    >>> float(round(reshaped_norm(get_backend("numpy"), np.ones((1, 1, 3, 3)), "OIHW"), 6))
    3.0
    """
    xp = backend.namespace(kernel)
    rows = xp.moveaxis(kernel, layout.index("O"), 0)
    return backend.svdvals(xp.reshape(rows, (rows.shape[0], -1)))[0]


def with_spectrum(report: LayerReport, values: HostArray, frobenius: float) -> LayerReport:
    """Return the report with the figures that follow from all singular values, descending, and the Frobenius norm."""
    largest, smallest = float(values[0]), float(values[-1])
    singular = smallest <= float(np.finfo(values.dtype).eps) * largest
    ranks = np.linspace(0, len(values) - 1, min(len(values), CURVE_POINTS)).round().astype(int)
    return replace(
        report.with_note(f"singular to the precision of {values.dtype}" if singular else ""),
        operator_norm=largest,
        smallest_singular_value=smallest,
        condition_number=largest / smallest if smallest > 0 else math.inf,
        stable_rank=(frobenius / largest) ** 2 if largest > 0 else 0.0,
        quantiles=_quantiles(values),
        curve=values[ranks],
    )


def _measured(report: R, layer: Layer, measure: Callable[[R, Array, Conv, Backend], R], placement: Placement) -> R:
    """Return the report with its figures, or with a note that says why there are none."""
    if layer.kernel is None or layer.conv is None:
        return report
    backend = placement.backend
    try:
        kernel = placement.array(layer.kernel, placement.dtype_of(layer.kernel))
        report = measure(report, kernel, layer.conv, backend)
        norm = float(backend.to_numpy(reshaped_norm(backend, kernel, layer.conv.layout)))
        return replace(report, reshaped_norm=norm)
    except COMPUTING_FAILS as error:
        return report.with_note(one_line(error))


def _as_it_is(report: LayerReport, kernel: Array, conv: Conv, backend: Backend) -> LayerReport:
    return report


def _spectrum(report: LayerReport, kernel: Array, conv: Conv, backend: Backend) -> LayerReport:
    circular = lattice(conv)
    assert report.input_shape is not None
    values = backend.to_numpy(singular_values(kernel, report.input_shape, circular))
    frobenius = float(backend.to_numpy(frobenius_norm(kernel, report.input_shape, circular)))
    return with_spectrum(report, values, frobenius)


def _spectrum_with_images(report: LayerReport, kernel: Array, conv: Conv, backend: Backend) -> LayerReport:
    circular, extents = lattice(conv), report.input_shape
    assert extents is not None
    found = backend.to_numpy(frequency_singular_values(kernel, extents, circular))
    frobenius = float(backend.to_numpy(frobenius_norm(kernel, extents, circular)))
    largest = found[..., 0]
    peak = tuple(int(j) for j in np.unravel_index(np.argmax(largest), largest.shape))
    return replace(
        with_spectrum(report, np.sort(found, axis=None)[::-1], frobenius),
        by_frequency=by_frequency(largest),
        top_vectors=top_vectors(backend.to_numpy(kernel), circular, extents, peak),
    )


def _declared(
    report: LayerReport,
    kernel: Array,
    conv: Conv,
    backend: Backend,
    *,
    extents: tuple[int, ...] | None,
    exact: bool,
) -> LayerReport:
    # The upper bound alone needs no extents under most paddings.
    lower, upper = declared_bounds(kernel, conv, extents, exact=exact and extents is not None)
    return replace(report, norm_lower=lower, norm_upper=upper)


def _bounds(report: BoundsReport, kernel: Array, conv: Conv, backend: Backend, *, rtol: float) -> BoundsReport:
    found = norm_bounds(kernel, conv, rtol=rtol)
    return replace(
        report.with_note("" if found.converged else f"gap of {rtol:g} not reached"),
        lower=float(backend.to_numpy(found.lower)),
        upper=float(backend.to_numpy(found.upper)),
        frequency=found.frequency,
        evaluations=found.evaluations,
        converged=found.converged,
    )


def _quantiles(values: HostArray) -> tuple[float, ...]:
    """Return the quantiles `QUANTILES` of descending values, with linear interpolation as in `numpy.quantile`."""
    places = (1 - np.asarray(QUANTILES)) * (len(values) - 1)
    above, below = (values[rounded(places).astype(int)].astype(np.float64) for rounded in (np.floor, np.ceil))
    return tuple(float(value) for value in above + (below - above) * (places % 1))
