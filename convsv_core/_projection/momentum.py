"""Nesterov's momentum with a restart, for iterations that approach a fixed point."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from convsv_core.backend import Array

__all__ = ["Momentum", "next_momentum"]


class Momentum(NamedTuple):
    """Hold the momentum after a step.

    Attributes
    ----------
    following : 0-d array
        Nesterov's number for the next step.
    beyond : 0-d array
        The distance from the result of this step to the start of the next one, as a share of this step's length.
    """

    following: Array
    beyond: Array


def next_momentum(xp: ModuleType, momentum: Array, turned: Array, growth: float = 1.0) -> Momentum:
    """Return the momentum after a step.

    Parameters
    ----------
    xp : module
        The arrays' namespace.
    momentum : 0-d array
        1 at first, later `Momentum.following`.
    turned : 0-d boolean array
        Whether the step went back against the momentum, which then begins anew.
    growth : float, default 1
        The factor by which the length of a step grows to the next one.

    Notes
    -----
    Sources: Beck and Teboulle, SIAM Journal on Imaging Sciences, 2009; for the restart O'Donoghue and Candes,
    *Foundations of Computational Mathematics*, 2015.
    """
    momentum = xp.where(turned, xp.ones_like(momentum), momentum)
    following = (1 + xp.sqrt(1 + 4 / growth * momentum**2)) / 2
    return Momentum(following, (momentum - 1) / following)
