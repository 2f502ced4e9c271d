"""The projection of a stored network: kernels that satisfy a bound as the file will hold them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convsv_core._geometry.padding import padding_norm
from convsv_core.analysis import COMPUTING_FAILS, Row, compute_dtype, geometry_of, joined
from convsv_core.backend import Backend
from convsv_core.bounds import norm_bounds
from convsv_core.certificate import CERTIFICATE_RTOL
from convsv_core.conv import Conv
from convsv_core.layers import Layer
from convsv_core.plan import HostArray
from convsv_core.projection import Projection, ProjectionMethod, project

STORED_EPS = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2.0**-23,
    "float64": 2.0**-52,
    "complex64": 2.0**-23,
    "complex128": 2.0**-52,
}
"""Spacing of the numbers at 1, for every dtype of `Stored`."""

SHRINKINGS = 12
"""How often a rounded kernel is brought back under the bound, by twice as much each time."""


@dataclass(frozen=True, eq=False)
class ProjectionReport(Row):
    """What became of one convolution. Norms are certified upper bounds, with the layer's own padding.

    Attributes
    ----------
    norm_before, norm_after : float or None
        Under zero padding for every input size, and for circular padding where the stride divides the extents.
        `norm_after` is that of the kernel as the file stores it.
    distance : float or None
        Frobenius norm of the change of the stored kernel; 0 where it stays bit for bit.
    iterations : int or None
    converged : bool or None
        See `Projection`.
    bound : float
    selected : bool
        Whether the layer was to be projected.
    kernel : numpy.ndarray or None
        What is to be stored in place of the layer's own; None where that stays.
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
        """The certified norm of what is stored."""
        return self.norm_after

    @property
    def failed(self) -> bool:
        """Whether the layer was to be projected, and is not shown to be within the bound."""
        return self.selected and not (self.norm_after is not None and self.norm_after <= self.bound)


def project_layers(
    layers: Sequence[Layer],
    backend: Backend,
    bound: float,
    *,
    method: ProjectionMethod = "dykstra",
    rtol: float = 1e-2,
    max_iterations: int = 200,
    selected: Callable[[str], bool] | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Iterator[ProjectionReport]:
    """Yield the projection of each layer of a network, in turn.

    A kernel within the bound stays as it is. Any other is projected for every input size (`project` without an input
    shape), rounded to the dtype that the file stores, and shrunk by a few roundings if these have carried it
    over the bound: what is certified is what is stored. Layers that share their weights are projected as one, for each
    of their geometries in turn, until the kernel is within the bound in all of them.

    A layer whose padding repeats pixels is held to the bound at its own extents, by what its padding adds to the norm
    of the kernel (`convsv_core._norm.padded.padding_norm`).

    Parameters
    ----------
    layers : sequence of Layer
    backend : Backend
        The library to compute with.
    bound : float
        Not negative.
    method : {"dykstra", "alternating", "rescale", "newton-schulz"}, default "dykstra"
    rtol, max_iterations
        See `project`; here looser, because a network takes a while.
    selected : callable, optional
        Whether to project the layer of a name; all if not given.
    dtype, device : str, optional
        As for `analyse`.

    Yields
    ------
    ProjectionReport
        A layer that cannot be handled has `failed`, and a note that says why.
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.stored is not None and (selected is None or selected(layer.name)):
            groups.setdefault(layer.stored.key, []).append(layer)
    found: dict[str, Projected | str] = {}
    nearest = functools.partial(project, method=method, rtol=rtol, max_iterations=max_iterations)
    make = functools.partial(_projected, backend=backend, bound=bound, nearest=nearest, dtype=dtype, device=device)
    for layer in layers:
        report = ProjectionReport(layer.name, **geometry_of(layer), note=layer.note, bound=bound)
        group = groups.get(layer.stored.key, []) if layer.stored is not None else []
        if selected is not None and not selected(layer.name):
            others = f": its weights are those of {group[0].name}, which was" if group else ""
            yield replace(report, selected=False, note=joined("not selected" + others, report.note))
            continue
        if layer.kernel is None or layer.conv is None:
            yield report
            continue
        key = layer.stored.key if layer.stored is not None else f"\0{layer.name}"
        if key not in found:
            try:
                found[key] = make(group or [layer])
            except COMPUTING_FAILS as error:
                found[key] = " ".join(str(error).split()) or repr(error)
        yield _reported(report, layer, group, found[key])


@dataclass(frozen=True, eq=False)
class Projected:
    """What became of a stored kernel.

    Attributes
    ----------
    kernel : numpy.ndarray or None
        None where the old one stays.
    before, after : dict from Geometry to float
        Certified norms.
    distance, iterations, converged
        As in `ProjectionReport`; of all geometries together.
    note : str
    """

    kernel: HostArray | None
    before: dict[Geometry, float]
    after: dict[Geometry, float]
    distance: float
    iterations: int
    converged: bool
    note: str = ""


@dataclass(frozen=True)
class Geometry:
    """How a layer uses its kernel: a convolution, and the factor that its own padding adds to the supremum."""

    conv: Conv
    factor: float

    @classmethod
    def of(cls, layer: Layer) -> Geometry:
        """Of a layer with a kernel; ValueError where its extents matter and are unknown."""
        conv = layer.conv
        assert conv is not None
        assert layer.kernel is not None
        bare = replace(conv, padding="valid", padding_mode="zeros")
        if conv.padding_mode == "zeros":
            return cls(bare, 1.0)
        if layer.input_shape is None and conv.padding_mode == "circular":
            return cls(conv, 1.0)  # which norm_bounds refuses where the padding repeats pixels
        if layer.input_shape is None:
            raise ValueError("a bound for its own padding needs the layer's extents")
        widened = 1 + 8 * float(np.finfo(np.float64).eps)
        factor = padding_norm(tuple(layer.kernel.shape), layer.input_shape, conv)
        return cls(bare, factor * widened if factor > 1 else 1.0)


def rounded_to(kernel: HostArray, dtype: str) -> HostArray:
    """Round numbers to those that a stored dtype holds; bfloat16's come as float32.

    Examples
    --------
    >>> rounded_to(np.array([1 + 2**-9, 1 + 3 * 2**-8]), "bfloat16").tolist()
    [1.0, 1.015625]
    """
    if dtype != "bfloat16":
        return np.asarray(kernel.astype(dtype))
    bits = kernel.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _projected(
    layers: Sequence[Layer],
    *,
    backend: Backend,
    bound: float,
    nearest: Callable[..., Projection],
    dtype: str | None,
    device: str | None,
) -> Projected:
    """Project the one kernel that the layers share."""
    kernel, stored = np.asarray(layers[0].kernel), layers[0].stored
    chosen = compute_dtype(kernel, backend, dtype, device)
    geometries = list(dict.fromkeys(map(Geometry.of, layers)))
    norms = functools.partial(_norms, geometries=geometries, backend=backend, dtype=chosen, device=device)
    before = norms(kernel)
    if max(before.values()) <= bound:
        return Projected(None, before, before, 0.0, 0, True)
    if stored is None:
        unchanged = "its weights are not stored as such, but computed from others, and cannot be replaced"
        return Projected(None, before, before, 0.0, 0, False, unchanged)
    wide, iterations, converged = kernel, 0, True
    for geometry in geometries:
        array = backend.asarray(wide, dtype=chosen, device=device)
        result = nearest(array, None, geometry.conv, bound / geometry.factor)
        wide = backend.to_numpy(result.kernel)
        iterations += result.iterations
        converged = converged and bool(result.converged)
    new = rounded_to(wide, stored.dtype)
    after = norms(new)
    wide = wide.astype(np.result_type(wide.dtype, np.float64))
    for attempt in range(SHRINKINGS):
        largest = max(after.values())
        if largest <= bound:
            break
        wide = wide * (bound / largest * (1 - 2**attempt * STORED_EPS[stored.dtype]))
        new = rounded_to(wide, stored.dtype)
        after = norms(new)
    change = new.astype(wide.dtype) - kernel
    distance = float(np.sqrt(np.sum(np.real(change * np.conj(change)))))
    return Projected(new.astype(kernel.dtype), before, after, distance, iterations, converged)


def _norms(
    kernel: HostArray, *, geometries: Sequence[Geometry], backend: Backend, dtype: str | None, device: str | None
) -> dict[Geometry, float]:
    """Certified norms of a kernel on the host in each geometry, with what rounding to the computing dtype changes."""
    array = backend.asarray(kernel, dtype=dtype, device=device)
    wide = np.result_type(kernel.dtype, np.float64)
    lost = float(np.linalg.norm((kernel.astype(wide) - backend.to_numpy(array)).ravel()))
    found = {}
    for geometry in geometries:
        channels = math.prod(kernel.shape[geometry.conv.layout.index(letter)] for letter in "OI")
        upper = float(norm_bounds(array, geometry.conv, rtol=CERTIFICATE_RTOL).upper)
        found[geometry] = (upper + math.sqrt(kernel.size // channels) * lost) * geometry.factor
    return found


def _reported(
    report: ProjectionReport, layer: Layer, group: Sequence[Layer], projected: Projected | str
) -> ProjectionReport:
    if isinstance(projected, str):
        return replace(report, note=joined(report.note, projected))
    geometry = Geometry.of(layer)
    shared = [other.name for other in group if other is not layer]
    return replace(
        report,
        norm_before=projected.before[geometry],
        norm_after=projected.after[geometry],
        distance=projected.distance,
        iterations=projected.iterations,
        converged=projected.converged,
        kernel=projected.kernel,
        note=joined(report.note, f"its weights are those of {', '.join(shared)} too" if shared else "", projected.note),
    )
