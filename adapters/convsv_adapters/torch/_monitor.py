"""A monitor of a PyTorch model's convolutions in training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from convsv_adapters._layers import ConvLayer
from convsv_adapters._monitor import Log, Monitor
from convsv_adapters.torch._exchange import process_rank, refuse_flat_parameters
from convsv_adapters.torch._forward import in_evaluation_mode
from convsv_adapters.torch._layers import COMPUTED_IN_FORWARD, conv_layers, without_autocast
from convsv_adapters.torch._own_forward import uses_its_weight
from convsv_adapters.torch._step_hook import OptimizerHook, check_optimizer
from convsv_adapters.torch._targets import gathered

__all__ = ["SpectrumMonitor"]


class SpectrumMonitor(Monitor, OptimizerHook):
    """Measure a model's convolutions after every so many steps, and change nothing.

    Each layer has its certified norm, the norm of its reshaped kernel, its stable rank and its smallest singular value:
    see `LayerFigures`, which says what is certified and what is sampled.

    Parameters
    ----------
    model : torch.nn.Module
    example_input : tensor, tuple, list or mapping, optional
        As for `conv_layers`. Without it the stable rank is not known, and layers whose padding repeats pixels are left
        out.
    every : int, default 100
        Measure after every `every`-th step.
    log : optional
        Where to write: TensorBoard's `SummaryWriter` or another object with `add_scalar`; a function of one dict, such
        as `wandb.log`; the path of a CSV file, to which rows are appended; or a list of these. The dict has the key
        "step", and keys such as "certified_norm/conv1".
    layers : iterable of ConvLayer, optional
        The layers to measure: a part of the result of `conv_layers`, by default all.
    points : int, default 16
        Largest extent, along each axis, at which a layer is decomposed for its smallest singular value and its
        histogram.
    histograms : bool, default False
        Write every singular value of each layer too: as a histogram to a `SummaryWriter`, as an array to a function.

    Attributes
    ----------
    layers : list of ConvLayer
        The layers that are measured.
    steps : int
        Number of steps so far.
    measurements : list of Measurement
        All measurements so far: `step` and `layers`, a tuple of `LayerFigures`. On ranks other than 0 it is empty.
    left_out : dict of str to str
        Why layers are not measured, by name.

    Raises
    ------
    TypeError
        `model` is not a module or holds flat parameters of FSDP1, or `log` is of no kind that is known.
    ValueError
        An argument is impossible, or no layer can be measured.

    Notes
    -----
    Call `step()` after each optimizer step, or `attach(optimizer)` once. The kernels are measured on their device. In a
    distributed training rank 0 measures, and every rank has to count the steps, as sharded weights are gathered.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    >>> monitor = SpectrumMonitor(model, torch.zeros(1, 3, 16, 16), every=10, log=print)
    >>> sorted(monitor.measure())[:2]  # prints the same numbers with the step
    {'step': 0, 'certified_norm/0': ...}
    ['certified_norm/0', 'certified_norm/2']
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: object = None,
        every: int = 100,
        log: Log = None,
        *,
        layers: Iterable[ConvLayer] | None = None,
        points: int = 16,
        histograms: bool = False,
    ) -> None:
        super().__init__(every, log, points=points, histograms=histograms)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__qualname__}: wanted a torch.nn.Module; are arguments swapped?")
        refuse_flat_parameters(model)
        found = conv_layers(model, example_input) if layers is None else list(layers)
        self.left_out = {layer.name: COMPUTED_IN_FORWARD for layer in found if layer.computed_in_forward}
        self.left_out |= {layer.name: layer.note for layer in found if not uses_its_weight(layer)}
        self.layers = self._measurable(layer for layer in found if layer.name not in self.left_out)
        if not self.layers:
            reasons = "; ".join(self.left_out.values()) or "it has none"
            raise ValueError(f"model has no convolution that can be measured: {reasons}")

    def attach(self, optimizer: torch.optim.Optimizer) -> SpectrumMonitor:
        """Count the steps of an optimizer from now on, and return this monitor."""
        check_optimizer(optimizer)
        self._follow_steps(optimizer)
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def measure(self) -> dict[str, float]:
        """Measure now, and return the numbers by FIGURE/LAYER, as in "certified_norm/conv1"; none on other ranks."""
        with torch.no_grad():
            kernels = [_current_kernel(layer) for layer in self.layers]
            if process_rank():
                return {}
            with without_autocast(kernels[0]):
                return self._record(self.layers, kernels)


def _current_kernel(layer: ConvLayer) -> torch.Tensor:
    """Return the kernel that evaluation would use now, from all ranks if it is sharded.

    Reading a parametrised weight can change the state of its parametrization, as the power iteration of PyTorch's
    `spectral_norm` does in training mode. That state is restored.
    """
    if not nn.utils.parametrize.is_parametrized(layer.module, "weight"):
        return gathered(layer.kernel)
    with in_evaluation_mode(layer.module.parametrizations):
        return gathered(layer.kernel)
