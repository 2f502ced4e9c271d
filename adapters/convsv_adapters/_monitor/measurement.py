"""The figures of a model at one step of a training."""

from __future__ import annotations

from typing import NamedTuple

from convsv_adapters._monitor.figures import LayerFigures

__all__ = ["Measurement"]


class Measurement(NamedTuple):
    """The figures of every layer at one step.

    Attributes
    ----------
    step : int
        Number of optimizer steps before the measurement.
    layers : tuple of LayerFigures
        In the order of the model, without the arrays of singular values, which are written to the log alone.
    """

    step: int
    layers: tuple[LayerFigures, ...]
