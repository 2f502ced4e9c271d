"""A callback of Keras that measures convolutions in training."""

from __future__ import annotations

import math
from typing import Any

import keras

from convsv_adapters._monitor import Log, Monitor
from convsv_adapters.keras._layers import conv_layers

__all__ = ["SpectrumMonitor"]


class SpectrumMonitor(Monitor, keras.callbacks.Callback):  # type: ignore[misc]
    """Measure every convolution of the model after every so many batches of training, and change nothing.

    Each kernel has its certified norm, the norm of its reshaped matrix, its stable rank and its smallest singular
    value: see `LayerFigures`, which says what is certified and what is sampled.

    Parameters
    ----------
    example_input : optional
        As for `conv_layers`. Without it the stable rank is not known.
    every : int, default 100
        Batches from one measurement to the next. There is one more at the end of training.
    log : optional
        Where to write: an object with `add_scalar`, such as the `SummaryWriter` of PyTorch or tensorboardX; a function
        of one dict, such as `wandb.log`; the path of a CSV file, to which rows are appended; or a list of these. The
        dict has the key "step", and keys such as "certified_norm/sequential/conv2d/kernel".
    points : int, default 16
        Largest extent, along each axis, at which a layer is decomposed for its smallest singular value and its
        histogram.
    histograms : bool, default False
        Write every singular value of each layer too: as a histogram to a `SummaryWriter`, as an array to a function.

    Attributes
    ----------
    steps : int
        Number of batches so far.
    measurements : list of Measurement
        All measurements so far: `step` and `layers`, a tuple of `LayerFigures`. The method `plot` draws them.
    left_out : dict of str to str
        Why kernels are not measured, by name.

    Notes
    -----
    The logs of an epoch get ``"certified_norm"``, the largest one of the last measurement.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])
    >>> monitor = SpectrumMonitor((1, 8, 8, 1))  # model.fit(..., callbacks=[monitor])
    >>> sorted(monitor.measure(model))[0]
    'certified_norm/sequential.../kernel'
    """

    def __init__(
        self,
        example_input: Any = None,
        every: int = 100,
        log: Log = None,
        *,
        points: int = 16,
        histograms: bool = False,
    ) -> None:
        super().__init__(every, log, points=points, histograms=histograms)
        self.example_input = example_input

    def measure(self, model: keras.Model | None = None) -> dict[str, float]:
        """Measure the convolutions of `model`, or of the model that is trained, and return the numbers."""
        model = self.model if model is None else model  # on JAX, reading `self.model` writes the trainer's state back
        found = conv_layers(model, self.example_input)
        self.left_out |= {layer.name: layer.note for layer in found if layer.unknown_forward}
        layers = self._measurable(layer for layer in found if not layer.unknown_forward)
        return self._record(layers, [layer.kernel for layer in layers])

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measure if it is due."""
        self.step()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the largest norm of the last measurement."""
        if logs is not None and self.measurements:
            norms = [one.certified_norm for one in self.measurements[-1].layers]
            logs["certified_norm"] = math.nan if any(map(math.isnan, norms)) else max(norms, default=math.nan)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Measure the final weights, unless the last batch did so."""
        self.finish()
