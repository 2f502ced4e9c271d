"""Sums of coefficients whose phases agree at every frequency of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import IntArray
from convsv_core.backend import Array, Backend

__all__ = ["Folded", "fold"]


class Folded(NamedTuple):
    """Hold the coefficients of a trigonometric polynomial on a grid.

    Attributes
    ----------
    coefficients : array, shape (len(places[0]), len(places[1]), ..., further axes)
    places : list of int array
        For each axis, the offsets of the coefficients modulo the period.
    """

    coefficients: Array
    places: list[IntArray]


def fold(backend: Backend, coefficients: Array, offsets: Sequence[tuple[int, ...]], periods: tuple[int, ...]) -> Folded:
    """Add the coefficients whose offsets agree modulo the period of their axis.

    The phases of such offsets agree at every frequency of the grid. This happens where a kernel wraps round.

    Parameters
    ----------
    backend : Backend
        The library of `coefficients`.
    coefficients : array, shape (len(offsets[0]), len(offsets[1]), ..., further axes)
    offsets : sequence of tuple of int
        The offsets along each axis.
    periods : tuple of int
        The period of each axis. 0 is the infinite lattice, where no two offsets agree.
    """
    xp = backend.namespace(coefficients)
    places = []
    for axis, (along, period) in enumerate(zip(offsets, periods, strict=True)):
        remainders = np.asarray(along) % period if period else np.asarray(along)
        distinct = np.unique(remainders)
        if len(distinct) < len(remainders):
            table = backend.asarray_like((distinct[:, None] == remainders) + 0.0, coefficients)
            table = xp.astype(table, coefficients.dtype, copy=False)
            coefficients = xp.moveaxis(xp.tensordot(table, coefficients, axes=((1,), (axis,))), 0, axis)
            remainders = distinct
        places.append(remainders)
    return Folded(coefficients, places)
