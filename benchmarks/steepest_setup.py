"""Say how much the benchmark of steepest directions records and measures."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.command import Size
from benchmarks.training_setup import SETUPS as TRAININGS
from benchmarks.training_setup import Setup

__all__ = ["SETUPS", "SteepestSetup"]


@dataclass(frozen=True)
class SteepestSetup:
    """Say how much is recorded and measured.

    Attributes
    ----------
    training : Setup
        The network, its batches, and the plain steps before the recording.
    recorded : int
        Steps whose momenta are recorded. The directions of the last one are measured.
    extent : int
        Extent of the outputs of each layer's circular convolution, on whose frequencies the shares are measured.
    counts : tuple of int
        Numbers of iterations from a cold start.
    warm : tuple of int
        Numbers of iterations that follow on the maximiser of the step before.
    chained : tuple of int
        Numbers of iterations for each recorded step, from the iterations of the step before, as in `ConvMuon`.
    turns : int
        Measured steps of each optimizer.
    settle : int
        Steps of each optimizer before it is measured.
    layers : int or None
        Most layers of one shape whose directions are measured; None for all of them.
    """

    training: Setup
    recorded: int
    extent: int
    counts: tuple[int, ...]
    warm: tuple[int, ...]
    chained: tuple[int, ...]
    turns: int
    settle: int
    layers: int | None


SETUPS = {
    Size.FULL: SteepestSetup(TRAININGS[Size.FULL], 20, 8, (1, 3, 10, 30, 100), (1, 3, 10, 30), (1, 3), 12, 2, None),
    Size.QUICK: SteepestSetup(TRAININGS[Size.QUICK], 4, 4, (1, 10), (1, 3), (1, 3), 4, 1, 1),
    Size.TINY: SteepestSetup(TRAININGS[Size.TINY], 2, 4, (1, 3), (3,), (1,), 2, 1, 1),
}
