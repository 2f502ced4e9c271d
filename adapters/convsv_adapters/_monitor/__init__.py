"""Measure the convolutions of a model in training, without changing them: what every framework's monitor shares."""

from convsv_adapters._monitor.figures import LayerFigures
from convsv_adapters._monitor.logs import Log
from convsv_adapters._monitor.measurement import Measurement
from convsv_adapters._monitor.monitor import Monitor

__all__ = ["LayerFigures", "Log", "Measurement", "Monitor"]
