"""Say how much the training benchmark trains and measures."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.command import Size

__all__ = ["SETUPS", "Setup"]


@dataclass(frozen=True)
class Setup:
    """Say how much is trained and measured.

    Attributes
    ----------
    widths : tuple of int
        Channels of each stage of the `ResNet`.
    blocks : int
        Blocks of each stage.
    batch, extent : int
        Images of a step, and their pixels along an axis.
    free_steps : int
        Plain steps from the random weights to the weights that every method starts from.
    settle : int
        Periods of each method before it is measured, as the first projection has the longest way.
    every : int
        Period of the method that projects seldom.
    turns : int
        Measured steps, a multiple of `every`.
    limit : float
        A method is measured no more when its measured steps have taken so many seconds, at the end of a period. The
        steps before the measured ones have the same limit.
    """

    widths: tuple[int, ...]
    blocks: int
    batch: int
    extent: int
    free_steps: int
    settle: int
    every: int
    turns: int
    limit: float


SETUPS = {
    Size.FULL: Setup((16, 32, 64), 5, 128, 32, free_steps=20, settle=3, every=10, turns=30, limit=120.0),
    Size.QUICK: Setup((4, 8), 1, 8, 8, free_steps=5, settle=1, every=2, turns=4, limit=60.0),
    Size.TINY: Setup((4, 8), 1, 4, 8, free_steps=1, settle=1, every=2, turns=4, limit=60.0),
}
