"""The projection of a stored network: kernels that satisfy a bound as the file will hold them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._projection.certificate import CERTIFICATE_RTOL
from convsv_core._projection.projection import Projection, ProjectionMethod, project
from convsv_core.backend import Backend
from convsv_core.layers import Layer, Operator, Stored, join_notes
from convsv_core.plugins import one_line
from convsv_core.reports.analysis import with_folded
from convsv_core.reports.certified import certified_norms, layer_operator
from convsv_core.reports.live_models import COMPUTING_FAILS
from convsv_core.reports.placement import Placement
from convsv_core.reports.report import ProjectionReport

__all__ = ["STORED_EPS", "project_layers", "rounded_to"]

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
"""Number of attempts to bring a rounded kernel back under the bound, each by twice as much as the last. A guess.

The last attempt gives up 2048 units of the stored dtype's eps.
"""

Projector = Callable[..., Projection]
"""Projects a kernel: `project` with all arguments given but the first four."""


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

    A kernel within the bound stays as it is. Any other kernel is projected for every input size (`project` without an
    input shape) and rounded to the dtype that the file stores. If rounding carries it over the bound, it is shrunk by
    a few roundings. The certificate belongs to the stored kernel. Layers that share their weights are projected
    together, for each of their operators in turn, until the kernel is within the bound for all of them.

    A layer whose padding repeats pixels is held to the bound at its own extents (`layer_operators`). A dense layer is
    projected as the convolution of one tap. A batch normalisation behind a layer stays as it is: `folded_upper` is the
    certified norm of the two with the weights as they are stored.

    Parameters
    ----------
    layers : sequence of Layer
        Layers whose kernels are NumPy arrays. A layer whose `stored` is None is not projected, and its note says so.
    backend : Backend
        The library to compute with.
    bound : float
        Not negative.
    method : {"dykstra", "alternating", "rescale", "newton-schulz"}, default "dykstra"
    rtol, max_iterations
        See `project`. The defaults are looser here, because a network takes longer than one layer.
    selected : callable, optional
        Tells by a layer's name whether to project the layer. By default all layers are projected.
    dtype, device : str, optional
        As for `layer_reports`.

    Yields
    ------
    ProjectionReport
        A layer that cannot be projected has `failed`, and a note that says why.

    Examples
    --------
    >>> from convsv_core import Conv
    >>> from convsv_core.layers import Layer, Stored
    >>> from convsv_core.plugins import get_backend
    >>> conv, stored = Conv("OIHW", padding_mode="zeros"), Stored("first.weight", "float32")
    >>> layer = Layer("first", np.ones((1, 1, 3, 3), np.float32), conv, (8, 8), stored=stored)
    >>> (report,) = project_layers([layer], get_backend("numpy"), 1.0)
    >>> report.norm_before >= 9, report.norm_after <= 1, report.kernel.shape
    (True, True, (1, 1, 3, 3))
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.stored is not None and (selected is None or selected(layer.name)):
            groups.setdefault(layer.stored.key, []).append(layer)
    found: dict[str, Projected | str] = {}
    nearest = functools.partial(project, method=method, rtol=rtol, max_iterations=max_iterations)
    placement = Placement(backend, dtype, device)
    for layer in layers:
        report = ProjectionReport.of(layer, bound=bound)
        group = groups.get(layer.stored.key, []) if layer.stored is not None else []
        if selected is not None and not selected(layer.name):
            others = f": its weights are those of {group[0].name}, which was" if group else ""
            yield replace(report, selected=False, note=join_notes("not selected" + others, report.note))
            continue
        if layer.kernel is None or layer.conv is None:
            yield report
            continue
        key = layer.stored.key if layer.stored is not None else f"\0{layer.name}"
        if key not in found:
            try:
                found[key] = _project(group or [layer], placement, bound, nearest)
            except COMPUTING_FAILS as error:
                found[key] = one_line(error)
        result = found[key]
        yield with_folded(
            _reported(report, layer, group, result),
            layer if isinstance(result, str) or result.kernel is None else replace(layer, kernel=result.kernel),
            placement,
            CERTIFICATE_RTOL,
            every_size=layer.assumed_extents,
        )


def rounded_to(kernel: HostArray, dtype: str) -> HostArray:
    """Round numbers to those that a stored dtype holds. Numbers of bfloat16 come as float32.

    Examples
    --------
    >>> rounded_to(np.array([1 + 2**-9, 1 + 3 * 2**-8]), "bfloat16").tolist()
    [1.0, 1.015625]
    """
    if dtype != "bfloat16":
        return np.asarray(kernel.astype(dtype))
    bits = kernel.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@dataclass(frozen=True, eq=False)
class Projected:
    """The projection of a stored kernel.

    Attributes
    ----------
    kernel : numpy.ndarray or None
        The new kernel; None where the old one stays.
    before, after : dict from Operator to float
        Certified norms of the layer that each operator stands for.
    distance, iterations, converged
        As in `ProjectionReport`, for all operators together.
    note : str
    """

    kernel: HostArray | None
    before: dict[Operator, float]
    after: dict[Operator, float]
    distance: float = 0.0
    iterations: int = 0
    converged: bool = True
    note: str = ""


def _project(layers: Sequence[Layer], placement: Placement, bound: float, nearest: Projector) -> Projected:
    """Project the one kernel that the layers share."""
    kernel, stored = np.asarray(layers[0].kernel), layers[0].stored
    dtype = placement.dtype_of(kernel)
    operators = list(dict.fromkeys(map(layer_operator, layers)))
    norms = functools.partial(certified_norms, operators=operators, placement=placement, dtype=dtype)
    before = norms(kernel)
    if max(before.values()) <= bound:
        return Projected(None, before, before)
    if stored is None:
        unchanged = (
            "its weights are not stored in this file as they are: they are computed from other tensors, or stand in "
            "another file, so they cannot be replaced"
        )
        return Projected(None, before, before, converged=False, note=unchanged)
    wide, iterations, converged = kernel, 0, True
    for operator in operators:
        result = nearest(placement.array(wide, dtype), None, operator.conv, operator.limit(bound))
        wide = placement.backend.to_numpy(result.kernel)
        iterations += result.iterations
        converged = converged and bool(result.converged)
    new, after = _rounded(wide, stored, bound, norms)
    change = new.astype(np.result_type(new.dtype, np.float64)) - kernel
    distance = float(np.sqrt(np.sum(np.real(change * np.conj(change)))))
    return Projected(new.astype(kernel.dtype), before, after, distance, iterations, converged)


def _rounded(
    kernel: HostArray, stored: Stored, bound: float, norms: Callable[[HostArray], dict[Operator, float]]
) -> tuple[HostArray, dict[Operator, float]]:
    """Round a kernel to the stored dtype, shrinking it until its norms are within the bound; and return the norms."""
    new = rounded_to(kernel, stored.dtype)
    after = norms(new)
    wide = kernel.astype(np.result_type(kernel.dtype, np.float64))
    for attempt in range(SHRINKINGS):
        largest = max(after.values())
        if largest <= bound:
            break
        wide = wide * (bound / largest * (1 - 2**attempt * STORED_EPS[stored.dtype]))
        new = rounded_to(wide, stored.dtype)
        after = norms(new)
    return new, after


def _reported(
    report: ProjectionReport, layer: Layer, group: Sequence[Layer], projected: Projected | str
) -> ProjectionReport:
    """Return the report with the projection of the layer's kernel, or with the reason why there is none."""
    if isinstance(projected, str):
        return report.with_note(projected)
    operator = layer_operator(layer)
    shared = [other.name for other in group if other is not layer]
    return replace(
        report.with_note(f"its weights are those of {', '.join(shared)} too" if shared else "", projected.note),
        norm_before=projected.before[operator],
        norm_after=projected.after[operator],
        distance=projected.distance,
        iterations=projected.iterations,
        converged=projected.converged,
        kernel=projected.kernel,
    )
