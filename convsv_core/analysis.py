"""From the layers of a network to the rows of a report: the figures of `convsv spectrum` and `convsv norm`."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from convsv_core._geometry.padding import padding_norm
from convsv_core.backend import Array, Backend
from convsv_core.bounds import norm_bounds
from convsv_core.conv import Conv
from convsv_core.layers import Layer, ModelError, ReadOptions
from convsv_core.plan import HostArray
from convsv_core.plugins import plugins
from convsv_core.spectrum import frobenius_norm, singular_values

CURVE_POINTS = 512
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

Bounds: TypeAlias = Literal["none", "upper", "both"]
BOUNDS: tuple[Bounds, ...] = ("none", "upper", "both")

BOUNDS_RTOL = 1e-2
"""Gap of the bounds beside a spectrum: as a rule the padding alone sets them further apart."""

# Among them NumPy's and PyTorch's LinAlgError, and what the libraries raise when a device is out of memory.
COMPUTING_FAILS = (ArithmeticError, MemoryError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class Row:
    """What any report knows of one convolution. A figure that could not be had is None, and `note` says why.

    Attributes
    ----------
    name : str
    kernel_shape, stride, dilation : tuple of int or None
    layout : str or None
    groups : int or None
    transposed : bool
    reshaped_norm : float or None
        Norm of the kernel reshaped into a matrix of O rows: see `reshaped_norm`.
    note : str
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

    @property
    def norm(self) -> float | None:
        """The operator's norm, as exactly as the report has it."""
        raise NotImplementedError

    @property
    def factor(self) -> float | None:
        """How many times larger the operator's norm is than `reshaped_norm`; None if that is 0 or unknown."""
        if self.norm is None or not self.reshaped_norm:
            return None
        return self.norm / self.reshaped_norm


@dataclass(frozen=True, eq=False)
class LayerReport(Row):
    """The figures of one convolution, from all of its singular values.

    The operator is the circular one of stride `stride` on an input of extents `input_shape`, whatever
    padding the layer has itself.

    Attributes
    ----------
    input_shape : tuple of int or None
        The layer's own extents, or where a stride does not divide them the next multiples, which `note`
        then says.
    operator_norm, smallest_singular_value : float or None
    condition_number : float or None
        Their quotient; infinite if the smallest value is 0.
    stable_rank : float or None
        ``|A|_F^2 / |A|_2^2``.
    norm_lower, norm_upper : float or None
        Certified bounds of the norm with the layer's own padding: see `declared_bounds`.
    quantiles : tuple of float or None
        Of all singular values, at the shares `QUANTILES`, interpolated linearly between neighbours.
    curve : numpy.ndarray or None
        The singular values, descending, at `CURVE_POINTS` ranks that are equally spaced from the first to
        the last; all of them if they are no more.
    """

    input_shape: tuple[int, ...] | None = None
    operator_norm: float | None = None
    smallest_singular_value: float | None = None
    condition_number: float | None = None
    stable_rank: float | None = None
    norm_lower: float | None = None
    norm_upper: float | None = None
    quantiles: tuple[float, ...] | None = None
    curve: np.ndarray[Any, Any] | None = None

    @property
    def norm(self) -> float | None:
        """The largest singular value."""
        return self.operator_norm


@dataclass(frozen=True, eq=False)
class BoundsReport(Row):
    """Certified bounds of the norm of one convolution, for every input size: see `norm_bounds`.

    Attributes
    ----------
    lower, upper : float or None
    frequency : tuple of float or None
        Angles at which `lower` is attained, one an axis.
    evaluations : int or None
    converged : bool or None
        Whether the gap asked for was reached.
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


R = TypeVar("R", bound=Row)


def read_model(path: Path, options: ReadOptions | None = None) -> list[Layer]:
    """Read every convolution of a trained network with the first reader that knows its format.

    Parameters
    ----------
    path : Path
    options : ReadOptions, optional
        Shapes of the network's inputs, and what else the file may leave open.

    Returns
    -------
    list of Layer
        In the order of the network, from its input on.

    Raises
    ------
    ModelError
        No reader knows the format, or the file cannot be read. One line.
    """
    loaded = plugins()
    try:
        layers = loaded.manager.hook.convsv_read_model(path=path, options=options or ReadOptions())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    if layers is None:
        known = [name for name, _ in loaded.manager.list_name_plugin() if name.startswith("convsv.readers:")]
        readers = ", ".join(sorted(name.partition(":")[2] for name in known))
        raise ModelError(f"{path}: in no format that is known here ({readers or 'no reader is installed'})")
    return list(layers)


def write_model(path: Path, kernels: Mapping[str, HostArray], target: Path) -> None:
    """Write the model at `path` to `target` with other kernels, and nothing else changed.

    Parameters
    ----------
    path, target : Path
        Two files.
    kernels : mapping from str to numpy.ndarray
        By the key of ``layer.stored``. Their entries are such as the stored dtype holds exactly.

    Raises
    ------
    ModelError
        No plugin writes the format, or not such a model of it. One line.
    OSError
        A file cannot be read or written.
    """
    if not kernels:
        shutil.copyfile(path, target)
    elif plugins().manager.hook.convsv_write_model(path=path, kernels=kernels, target=target) is None:
        raise ModelError(f"{path}: in no format that can be written here")


def analyse(
    layers: Iterable[Layer],
    backend: Backend,
    *,
    bounds: Bounds = "none",
    dtype: str | None = None,
    device: str | None = None,
) -> Iterator[LayerReport]:
    """Yield the report of each layer, in turn.

    A layer that cannot be handled gives a report whose note says why, and the next ones follow.

    Parameters
    ----------
    layers : iterable of Layer
    backend : Backend
        The library to compute with.
    bounds : {"none", "upper", "both"}, default "none"
        Which bounds of the norm with the layer's own padding to certify; see `declared_bounds`.
    dtype : str, optional
        Such as "float64". By default float64 for kernels stored so where the library has it, else float32;
        complex kernels stay as they are.
    device : str, optional
        Such as "cuda:0"; the library's default if not given.
    """
    for layer in layers:
        report = describe(layer)
        if report.input_shape is not None:
            report = _measured(report, layer, _spectrum, backend, dtype, device)
        if bounds != "none" and not (report.input_shape is not None and report.operator_norm is None):
            report = with_bounds(report, layer, backend, bounds=bounds, dtype=dtype, device=device)
        yield report


def with_bounds(
    report: LayerReport,
    layer: Layer,
    backend: Backend,
    *,
    bounds: Bounds,
    dtype: str | None = None,
    device: str | None = None,
) -> LayerReport:
    """The report with the norm of the reshaped kernel, and the bounds that are asked for; see `analyse`."""
    measure: Callable[[LayerReport, Array, Conv, Backend], LayerReport] = _as_it_is
    if bounds != "none":
        measure = functools.partial(_declared, extents=layer.input_shape, exact=bounds == "both")
    return _measured(report, layer, measure, backend, dtype, device)


def certify(
    layers: Iterable[Layer],
    backend: Backend,
    *,
    rtol: float = 1e-3,
    dtype: str | None = None,
    device: str | None = None,
) -> Iterator[BoundsReport]:
    """Yield certified bounds of each layer's norm for every input size, in turn; see `analyse`.

    They hold for zero, "valid" and circular padding. A layer whose padding repeats pixels beyond that gets a note
    in place of them.

    Parameters
    ----------
    layers, backend, dtype, device
        As for `analyse`.
    rtol : float, default 1e-3
        Relative gap to reach.
    """
    for layer in layers:
        report = BoundsReport(layer.name, **geometry_of(layer), note=layer.note)
        if reason := _repeats_pixels(layer):
            yield replace(report, note=joined(report.note, reason))
        else:
            yield _measured(report, layer, functools.partial(_bounds, rtol=rtol), backend, dtype, device)


def declared_bounds(
    kernel: Array, conv: Conv, extents: tuple[int, ...] | None, *, rtol: float = BOUNDS_RTOL, exact: bool = False
) -> tuple[float | None, float]:
    """Certify bounds of a layer's norm with the padding that it declares.

    Parameters
    ----------
    kernel : array
    conv : Conv
    extents : tuple of int or None
        Of the layer's input. None will do for the upper bound under zero padding.
    rtol : float, default `BOUNDS_RTOL`
        Relative gap in the supremum of the symbol's norm.
    exact : bool, default False
        Whether to find the lower bound too: the exact norm, less its rounding, which without circular padding takes
        an iteration on images (`norm_bounds` with an input shape).

    Returns
    -------
    lower, upper : float
        `lower` is None unless `exact`. `upper` is the supremum over all frequencies times the norm of the padding,
        which is 1 for zero padding.

    Raises
    ------
    ValueError
        The extents are None, or no input of the layer, and are needed.
    """
    if extents is None and (exact or conv.padding_mode != "zeros"):
        raise ValueError("bounds for its own padding need the layer's extents")
    if exact:
        found = norm_bounds(kernel, conv, input_shape=extents, rtol=rtol)
        return float(found.lower), float(found.upper)
    upper = float(norm_bounds(kernel, replace(conv, padding="valid", padding_mode="zeros"), rtol=rtol).upper)
    if extents is None or conv.padding_mode == "zeros":
        return None, upper
    widened = 1 + 8 * float(np.finfo(np.float64).eps)
    return None, upper * padding_norm(tuple(kernel.shape), extents, conv) * widened


def describe(layer: Layer) -> LayerReport:
    """Report a layer's geometry, with no figures."""
    conv, extents, note = layer.conv, layer.input_shape, layer.note
    if conv is not None and not conv.transposed and extents is not None and len(extents) == conv.ndim:
        rounded = tuple(-(-n // s) * s for n, s in zip(extents, conv.strides, strict=True))
        if rounded != extents:
            change = f"extents {_by(extents)} taken as {_by(rounded)}, a multiple of the stride"
            note = joined(change, note)
        extents = rounded
    return LayerReport(layer.name, **geometry_of(layer), input_shape=extents, note=note)


def reshaped_norm(backend: Backend, kernel: Array, layout: str) -> Array:
    """Norm of the kernel as a matrix with a row for each index of the axis O, and all else in columns.

    It is what frameworks call the spectral norm of a layer: PyTorch's `spectral_norm` for `Conv` (its
    ``dim=0``) as for `ConvTranspose` (``dim=1``), and Keras's `SpectralNormalization`. It is not the norm
    of the convolution, and bounds it from neither side.

    Parameters
    ----------
    backend : Backend
        Of `kernel`.
    kernel : array
    layout : str
        As in `Conv`.

    Returns
    -------
    0-d array, real
    """
    xp = backend.namespace(kernel)
    rows = xp.moveaxis(kernel, layout.index("O"), 0)
    return backend.svdvals(xp.reshape(rows, (rows.shape[0], -1)))[0]


def geometry_of(layer: Layer) -> dict[str, Any]:
    """What a `Row` says of the layer's shape."""
    conv = layer.conv
    known = {} if layer.kernel is None else {"kernel_shape": tuple(layer.kernel.shape)}
    if conv is None:
        return known
    return {
        **known,
        "layout": conv.layout,
        "stride": conv.strides,
        "dilation": conv.dilations,
        "groups": conv.groups,
        "transposed": conv.transposed,
    }


def _repeats_pixels(layer: Layer) -> str:
    """Why bounds for every input size do not hold for the layer's own padding, or ""."""
    conv = layer.conv
    if conv is None or layer.kernel is None or conv.padding_mode == "zeros":
        return ""
    if conv.padding_mode != "circular":
        return (
            f"{conv.padding_mode} padding repeats pixels: its norm depends on the extents and can exceed any bound here"
        )
    taps = [layer.kernel.shape[conv.layout.index(letter)] for letter in conv.spatial]
    reach = [d * (k - 1) for k, d in zip(taps, conv.dilations, strict=True)]
    pads = conv.pads(tuple(taps))
    if any(sum(pad) > r for pad, r in zip(pads, reach, strict=True)):
        return f"circular padding {pads} gives more outputs than inputs: its norm can exceed any bound here"
    return ""


def _measured(
    report: R,
    layer: Layer,
    measure: Callable[[R, Array, Conv, Backend], R],
    backend: Backend,
    dtype: str | None,
    device: str | None,
) -> R:
    """The report with its figures, or with a note that says why there are none."""
    if layer.kernel is None or layer.conv is None:
        return report
    try:
        chosen = compute_dtype(layer.kernel, backend, dtype, device)
        kernel = backend.asarray(layer.kernel, dtype=chosen, device=device)
        report = measure(report, kernel, layer.conv, backend)
        norm = float(backend.to_numpy(reshaped_norm(backend, kernel, layer.conv.layout)))
        return replace(report, reshaped_norm=norm)
    except COMPUTING_FAILS as error:
        return replace(report, note=joined(report.note, " ".join(str(error).split()) or repr(error)))


def _spectrum(report: LayerReport, kernel: Array, conv: Conv, backend: Backend) -> LayerReport:
    circular = circular_like(conv)
    assert report.input_shape is not None
    values = backend.to_numpy(singular_values(kernel, report.input_shape, circular))
    frobenius = float(backend.to_numpy(frobenius_norm(kernel, report.input_shape, circular)))
    return with_spectrum(report, values, frobenius)


def with_spectrum(report: LayerReport, values: HostArray, frobenius: float) -> LayerReport:
    """The report with the figures that follow from all singular values, descending, and the Frobenius norm."""
    largest, smallest = float(values[0]), float(values[-1])
    note = report.note
    if smallest <= float(np.finfo(values.dtype).eps) * largest:
        note = joined(note, f"singular to the precision of {values.dtype}")
    ranks = np.linspace(0, len(values) - 1, min(len(values), CURVE_POINTS)).round().astype(int)
    return replace(
        report,
        operator_norm=largest,
        smallest_singular_value=smallest,
        condition_number=largest / smallest if smallest > 0 else math.inf,
        stable_rank=(frobenius / largest) ** 2 if largest > 0 else 0.0,
        quantiles=_quantiles(values),
        note=note,
        curve=values[ranks],
    )


def _quantiles(values: HostArray) -> tuple[float, ...]:
    """The quantiles `QUANTILES` of descending values, with linear interpolation as `numpy.quantile` has it."""
    places = (1 - np.asarray(QUANTILES)) * (len(values) - 1)
    above, below = (values[rounded(places).astype(int)].astype(np.float64) for rounded in (np.floor, np.ceil))
    return tuple(float(value) for value in above + (below - above) * (places % 1))


def circular_like(conv: Conv) -> Conv:
    """The geometry of `conv` with circular padding, whose operator a spectrum is of."""
    return Conv(conv.layout, conv.strides, conv.dilations, conv.groups, transposed=conv.transposed)


def _as_it_is(report: LayerReport, kernel: Array, conv: Conv, backend: Backend) -> LayerReport:
    return report


def _declared(
    report: LayerReport,
    kernel: Array,
    conv: Conv,
    backend: Backend,
    *,
    extents: tuple[int, ...] | None,
    exact: bool,
) -> LayerReport:
    lower, upper = declared_bounds(kernel, conv, extents, exact=exact)
    return replace(report, norm_lower=lower, norm_upper=upper)


def _bounds(report: BoundsReport, kernel: Array, conv: Conv, backend: Backend, *, rtol: float) -> BoundsReport:
    found = norm_bounds(kernel, conv, rtol=rtol)
    return replace(
        report,
        lower=float(backend.to_numpy(found.lower)),
        upper=float(backend.to_numpy(found.upper)),
        frequency=found.frequency,
        evaluations=found.evaluations,
        converged=found.converged,
        note=report.note if found.converged else joined(report.note, f"gap of {rtol:g} not reached"),
    )


def compute_dtype(stored: Any, backend: Backend, dtype: str | None, device: str | None) -> str | None:
    """Name the dtype to compute in: the one asked for, else float64 for what is stored so, else float32.

    None, which leaves an array as it is, for complex kernels.
    """
    if dtype is not None or stored.dtype.kind != "f":
        return dtype
    return "float64" if stored.dtype.itemsize > 4 and "float64" in backend.dtypes(device) else "float32"


def _by(extents: tuple[int, ...]) -> str:
    return "x".join(map(str, extents))


def joined(*notes: str) -> str:
    """Make one note of several, of which some may be empty."""
    return "; ".join(filter(None, notes))
