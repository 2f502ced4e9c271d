"""The largest norm on a circular grid that is too large to visit every frequency, by branch and bound."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray
from convsv_core._norm.torus import TorusNorms

__all__ = ["GridSearch", "search_grid"]


class GridSearch(NamedTuple):
    """Hold an upper bound of the largest norm on a grid, and the indices of the frequency of the best norm."""

    upper: float
    frequency: tuple[int, ...]


def search_grid(norms: TorusNorms, rtol: float, supremum: float, near: tuple[float, ...]) -> GridSearch:
    """Raise `norms.best` towards the largest norm on the grid, and return an upper bound of it.

    Parameters
    ----------
    norms : TorusNorms
        The norms of the grid's operand.
    rtol : float
        The relative gap to reach.
    supremum : float
        An upper bound of the norm over all frequencies.
    near : tuple of float
        The angles of a large norm. The search begins with the grid's frequencies next to them.
    """
    axes = norms.operand.plan.axes
    periods = np.asarray([axis.period for axis in axes])

    def angles(places: HostArray) -> HostArray:
        return np.asarray(2 * np.pi * (places % periods) / periods)

    def answer(upper: float) -> GridSearch:
        found = np.rint(norms.best_angles / (2 * np.pi) * periods).astype(int) % periods
        return GridSearch(min(upper, supremum), tuple(int(j) for j in found))

    exact = np.asarray([angle * axis.grid / (2 * np.pi) for angle, axis in zip(near, axes, strict=True)])
    around = np.asarray(list(itertools.product(*zip(np.floor(exact), np.ceil(exact), strict=True)))).astype(int)
    norms.upper(angles(np.unique(around % periods, axis=0)))
    # Each row of `first` and `last` is a box of frequencies, both ends included. Boxes are split until one is left.
    first, last = np.zeros((1, len(axes)), int), (periods - 1)[None, :]
    if norms.operand.plan.real:  # Half of the last axis covers one frequency of each conjugate pair.
        last[:, -1] = periods[-1] // 2
    settled = 0.0
    while len(first):
        middle = (first + last) // 2
        values = norms.upper(angles(middle))
        delta = np.maximum(middle - first, last - middle) * 2 * np.pi / periods
        distance = np.maximum(
            np.arccos(np.minimum(values / max(supremum, np.finfo(float).tiny), 1)) - delta @ norms.types, 0.0
        )
        corners = np.stack([np.asarray(s) * delta for s in itertools.product((-1, 1), repeat=len(axes))], axis=1)
        change = norms.variation(norms.reach(corners))
        bounds = np.minimum(supremum * np.cos(distance), np.sqrt(values**2 + change))
        undecided = (bounds > (1 + rtol) * norms.best) & np.any(last > first, axis=1)
        settled = max(settled, float(np.max(bounds, where=~undecided, initial=0.0)))
        first, last, delta = first[undecided], last[undecided], delta[undecided]
        if not norms.affords(2 * len(first)):
            return answer(max(settled, float(np.max(bounds[undecided], initial=0.0))))
        # Halve the axis along which the symbol can change most.
        axis = np.argmax(np.where(last > first, (delta + 1e-9) * (norms.types + 1e-9), 0.0), axis=1)
        chosen = np.arange(len(axes)) == axis[:, None]
        middle = (first + last) // 2
        first, last = (
            np.concatenate([first, np.where(chosen, middle + 1, first)]),
            np.concatenate([np.where(chosen, middle, last), last]),
        )
    return answer(max(settled, norms.best))
