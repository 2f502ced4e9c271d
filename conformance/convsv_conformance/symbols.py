"""Give the symbol of a case at any frequency by its definition, and search for the symbol's largest norm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from convsv_conformance.cases import Case
from convsv_conformance.dense import Array, same_pads

__all__ = ["climb", "frequency_grid", "symbol_at", "symbol_norms"]


def symbol_at(case: Case, values: Array, angles: Array) -> Array:
    """Return the matrices of the symbol at each row of `angles`: shape (len(angles), groups, rows, columns).

    A tap reads the pixel at ``tap * dilation - padding`` from the output's pixel. This distance is a residue modulo
    the stride, and an offset in units of the stride, which gives the phase.
    """
    layout, stride = case.layout, case.stride
    spatial = [axis for axis, letter in enumerate(layout) if letter not in "OI"]
    order = [layout.index(letter) for letter in ("IO" if case.transposed else "OI")] + spatial
    weights = values.transpose(order).astype(complex)
    weights = weights.conj() if case.transposed else weights  # a transpose is the adjoint of the conjugate
    outputs, inputs, *taps = weights.shape
    weights = weights.reshape(case.groups, outputs // case.groups, inputs, *taps)
    pads = same_pads(case.taps, stride, case.dilation) if case.padding is None else case.padding
    found = np.zeros((len(angles), *weights.shape[:2], math.prod(stride), inputs), complex)
    for tap in np.ndindex(*taps):
        read = [t * d - before for t, d, (before, _) in zip(tap, case.dilation, pads, strict=True)]
        offset, residue = zip(*map(divmod, read, stride), strict=True)
        phases = np.exp(1j * angles @ np.asarray(offset, float))
        found[:, :, :, np.ravel_multi_index(residue, stride)] += phases[:, None, None, None] * weights[..., *tap]
    matrices = found.reshape(*found.shape[:3], -1)
    return matrices.conj().swapaxes(-1, -2) if case.transposed else matrices


def symbol_norms(case: Case, values: Array, angles: Array) -> Array:
    """Return the norm of the symbol at each row of `angles`: the largest over the groups."""
    norms: Array = np.linalg.norm(symbol_at(case, values, angles), 2, axis=(-2, -1)).max(axis=-1)
    return norms


def frequency_grid(points: int, ndim: int) -> Array:
    """Return the angles of a grid with `points` points on each axis, one row for each point."""
    return np.indices((points,) * ndim).reshape(ndim, -1).T * (2 * math.pi / points)


CLIMB_EPS = 8
"""Smallest relative gain, in eps of float64, for which a search moves. A guess: rounding on a plateau gains less.

Without it, a search on a plateau walks to ever larger angles, whose rounding errors are larger.
"""


def climb(norms_at: Callable[[Array], Array], places: Array, step: float) -> float:
    """Return the highest local maximum that a pattern search finds from `places`, whose first steps are `step` wide."""
    norms = norms_at(places)
    moves = np.asarray(list(itertools.product((-1, 0, 1), repeat=places.shape[1])), float)
    while step > 1e-9:
        tried = places[:, None] + step * moves
        found = norms_at(tried.reshape(-1, places.shape[1])).reshape(tried.shape[:2])
        better = found.max(axis=1) > norms * (1 + CLIMB_EPS * np.finfo(float).eps)
        places = np.where(better[:, None], tried[np.arange(len(tried)), found.argmax(axis=1)], places)
        norms = np.maximum(norms, found.max(axis=1))
        step = step if better.any() else step / 3
    return float(norms.max())
