"""The norm of a long kernel with blocks of side 1 on a fine cover of the torus, by one Fourier transform a group."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._norm.cells import Cover, cover
from convsv_core._symbol.gram import GramPolynomial, half_differences
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.transform import LEVEL_EPS, is_long

__all__ = ["TransformedCover", "transformed_cover", "transforms_pay"]

GROUP_POINTS = 1 << 20
"""Most points of the cover, which bounds the memory of one transform: 16 MiB, of which a few are held.

It was chosen so that 20,000 taps, with 7e5 points at a relative gap of 1e-3, are decided by the first cover.
"""

ALL_POINTS = 1 << 24
"""Most points of the cover times groups, which bounds the time. Measured with NumPy: about two seconds."""


class TransformedCover(NamedTuple):
    """The first cells of a search, with the squared norms at their centres.

    Attributes
    ----------
    cover : Cover
    squares : float array, shape (cells,)
        The largest squared norm among the groups, as computed.
    rounding : float
        A bound of the error of `squares` from the transform alone.
    """

    cover: Cover
    squares: HostArray
    rounding: float


def transforms_pay(operand: Operand) -> bool:
    """Return whether the norm on a cover is found by transforms: the kernel is long and its blocks have side 1."""
    return is_long(operand) and min(operand.plan.block) == 1


def transformed_cover(gram: GramPolynomial, types: HostArray, finest: float, coarsest: float) -> TransformedCover:
    """Return the finest affordable cover of the torus, and the squared norms at its centres.

    Parameters
    ----------
    gram : GramPolynomial
        With blocks of side 1.
    types : float array, shape (ndim,)
        Exponential type along each axis.
    finest, coarsest : float
        The reach of the cover's cells is `finest` times a power of 3. It exceeds `coarsest` in no case.
    """
    plan, backend = gram.operand.plan, gram.operand.backend
    reach, found = finest, cover(types, coarsest, fast=True)
    while 3 * reach <= coarsest and _points(types, reach) > min(GROUP_POINTS, ALL_POINTS // plan.groups):
        reach *= 3
    if reach <= coarsest:
        found = cover(types, reach, fast=True)
    points, active = found.points, np.flatnonzero(types > 0)
    coefficients = backend.to_numpy(gram.coefficients)[:, :, 0, 0].astype(complex)
    differences = half_differences(plan)[:, active]
    opposite = np.ravel_multi_index(tuple((-differences[1:] % points).T), points)
    places = np.ravel_multi_index(tuple((differences % points).T), points)
    largest = np.full(math.prod(points), -np.inf)
    for group in coefficients.T:
        table = np.zeros(math.prod(points), complex)
        np.add.at(table, places, group)
        np.add.at(table, opposite, group[1:].conj())
        values = np.fft.ifftn(table.reshape(points), norm="forward").real
        np.maximum(largest, values.reshape(-1), out=largest)
    moduli = float((2 * np.abs(coefficients)).sum(axis=0).max())
    rounding = LEVEL_EPS * float(np.finfo(float).eps) * math.log2(max(len(largest), 2)) * moduli
    return TransformedCover(found, largest[np.ravel_multi_index(tuple(found.places.T), points)], rounding)


def _points(types: HostArray, reach: float) -> float:
    """Return about how many points a cover of this reach has."""
    active = types[types > 0]
    return math.prod((len(active) * np.pi * active / reach).tolist())
