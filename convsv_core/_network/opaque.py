"""A kind of map of which only a bound is known."""

from __future__ import annotations

from dataclasses import dataclass

from convsv_core._network.kinds import Kind

__all__ = ["Bounded"]


@dataclass(frozen=True, eq=False)
class Bounded(Kind):
    """A map of one input of which only a bound of its Lipschitz constant is known, such as a layer kept within a bound.

    Nothing is folded into it, and a network that holds one has no lower bound.

    Parameters
    ----------
    bound : float
        At least 0.
    """

    bound: float
