"""Compare the weights of two models, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from convsv_core.backend import Backend
from convsv_core.layers import Operator, UnknownExtents, lattice
from convsv_core.plugins import one_line
from convsv_core.reports.analysis import COMPUTING_FAILS
from convsv_core.reports.certified import certified_bounds, layer_operator
from convsv_core.reports.matching import Pair
from convsv_core.reports.placement import Placement
from convsv_core.reports.report import DifferenceReport

__all__ = ["difference_reports"]

DIFFERENCE_EPS = float(np.finfo(np.float64).eps)
"""Relative error of the difference of two numbers in float64: half an eps, doubled for complex numbers."""


def difference_reports(
    pairs: Sequence[Pair], backend: Backend, *, dtype: str | None = None, device: str | None = None
) -> Iterator[DifferenceReport]:
    """Yield the figures of each layer that two models share, in turn.

    The difference is taken in double precision. Its rounding and the rounding to the computing dtype are part of the
    bounds.

    Parameters
    ----------
    pairs : sequence of Pair
    backend : Backend
        The library to compute with.
    dtype, device : str, optional
        As for `layer_reports`.
    """
    placement = Placement(backend, dtype, device)
    for pair in pairs:
        row = DifferenceReport.of(pair.layer, other_name=pair.other_name)
        try:
            yield _measured(row, pair, placement)
        except COMPUTING_FAILS as error:
            yield row.with_note(one_line(error))


def _measured(row: DifferenceReport, pair: Pair, placement: Placement) -> DifferenceReport:
    layer, note = pair.layer, ""
    kernel, conv = np.asarray(layer.kernel), layer.conv
    assert conv is not None
    operator, padded = Operator(lattice(conv), None), None
    try:
        operator = padded = layer_operator(layer)
    except UnknownExtents as error:
        note = one_line(error)
    wide = np.result_type(kernel.dtype, pair.other.dtype, np.float64)
    difference = kernel.astype(wide) - pair.other.astype(wide)
    changed = certified_bounds(
        difference, [operator], placement, placement.dtype_of(difference), entry_eps=DIFFERENCE_EPS
    )[operator]
    original = certified_bounds(kernel, [operator], placement, placement.dtype_of(kernel))[operator]
    if not difference.any():
        changed = changed._replace(upper=0.0)
    share = changed.upper / original.lower if original.lower > 0 else math.inf if changed.upper else 0.0
    return replace(
        row.with_note(note),
        difference_upper=None if padded is None else padded.layer_upper(changed.upper),
        norm_upper=None if padded is None else padded.layer_upper(original.upper),
        share=math.nextafter(share, math.inf) if share else 0.0,
    )
