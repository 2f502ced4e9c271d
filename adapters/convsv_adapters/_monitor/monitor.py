"""The part of a monitor that does not depend on the framework."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from convsv_adapters._layers import ConvLayer, geometry_of, operators_of
from convsv_adapters._monitor.figures import measure_layer
from convsv_adapters._monitor.logs import Log, as_writes, entries
from convsv_adapters._monitor.measurement import Measurement
from convsv_core.conv import as_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Monitor"]


class Monitor:
    """Measure layers after every so many steps, keep the figures, and write them to a log.

    Parameters
    ----------
    every : int, default 100
        Measure after every `every`-th step.
    log : optional
        Where to write: TensorBoard's `SummaryWriter` or another object with `add_scalar`; a function of one dict, such
        as `wandb.log`; the path of a CSV file, to which rows are appended; or a list of these.
    points : int, default 16
        Largest extent, along each axis, at which a layer is decomposed for its smallest singular value and its
        histogram. A guess: on 16 x 16 points the work is a small share of 100 training steps.
    histograms : bool, default False
        Write every singular value of each layer too: as a histogram to a `SummaryWriter`, as an array to a function.

    Attributes
    ----------
    steps : int
        Number of steps so far.
    measurements : list of Measurement
        All measurements so far.
    left_out : dict of str to str
        Why layers are not measured, by name.
    """

    def __init__(
        self, every: int = 100, log: Log = None, *, points: int = 16, histograms: bool = False, **others: Any
    ) -> None:
        super().__init__(**others)
        self.every, self.points = as_int("every", every, least=1), as_int("points", points, least=1)
        self.histograms, self.steps = bool(histograms), 0
        self.measurements: list[Measurement] = []
        self.left_out: dict[str, str] = {}
        self._writes = as_writes(log)

    def _measurable(self, layers: Iterable[ConvLayer]) -> list[ConvLayer]:
        """Return the layers that have figures, and note why others have none."""
        found = []
        for layer in layers:
            try:
                geometry_of(layer)
                operators_of(layer, circular=False)
            except ValueError as error:
                self.left_out[layer.name] = str(error)
            else:
                found.append(layer)
        return found

    def _record(self, layers: Iterable[ConvLayer], kernels: Iterable[Any]) -> dict[str, float]:
        """Measure layers with their kernels, keep and write the figures, and return the numbers by FIGURE/LAYER."""
        figures = [
            measure_layer(layer, kernel, self.points, keep_values=self.histograms)
            for layer, kernel in zip(layers, kernels, strict=True)
        ]
        for write in self._writes:
            write(self.steps, figures)
        self.measurements.append(Measurement(self.steps, tuple(one.without_values() for one in figures)))
        return entries(figures)

    def step(self) -> bool:
        """Count an optimizer step, measure if it is due, and return whether it was."""
        self.steps += 1
        if self.steps % self.every:
            return False
        self.measure()
        return True

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers of the last measurement by FIGURE/LAYER; none before the first."""
        return entries(self.measurements[-1].layers) if self.measurements else {}

    def finish(self) -> None:
        """Measure the final weights of a training, unless the last step did so."""
        if self.steps % self.every:
            self.measure()

    def measure(self) -> dict[str, float]:
        """Measure now, and return the numbers by FIGURE/LAYER, as in "certified_norm/conv1"."""
        raise NotImplementedError

    def plot(self) -> Figure:
        """Draw every figure over the steps, one panel for each, with layers coloured by depth.

        Returns
        -------
        matplotlib.figure.Figure
            Save it by its method `savefig`. It needs matplotlib, which the extra `cli` has.

        Raises
        ------
        ValueError
            Nothing was measured yet.
        """
        from convsv_adapters._monitor.plot import draw_measurements

        return draw_measurements(self.measurements)
