"""The layers that `ConvMuon` moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from convsv_adapters._layers import step_factor
from convsv_adapters.torch._layers import conv_layers, listed_modules
from convsv_core import Conv
from convsv_core.layers import lattice

__all__ = ["FoundGeometry", "Geometry", "find_geometries"]


@dataclass(frozen=True)
class Geometry:
    """Hold the geometry of a layer for steps in its operator norm: static and hashable.

    Attributes
    ----------
    conv : Conv
        The convolution on the infinite lattice. A linear layer is a convolution with one tap.
    """

    conv: Conv

    def factor(self, weight: torch.Tensor, scaling: str) -> float:
        """Return the operator norm of a step with a learning rate of 1."""
        return step_factor(self._kernel_shape(weight), self.conv, scaling)

    def as_kernel(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight with the axes that the layout names."""
        return weight.reshape(self._kernel_shape(weight))

    def _kernel_shape(self, weight: torch.Tensor) -> tuple[int, ...]:
        return (*weight.shape, *[1] * (len(self.conv.layout) - weight.ndim))


class FoundGeometry(NamedTuple):
    """Hold a weight, its module and its geometry."""

    parameter: nn.Parameter
    module: nn.Module
    geometry: Geometry


def find_geometries(model: nn.Module) -> list[FoundGeometry]:
    """Return the weights of a model's convolutions and linear layers that are parameters, each once.

    Raises
    ------
    ValueError
        A lazy layer has no weight yet.
    """
    for name, module in listed_modules(model, linear=True, batch_norm=None).items():
        if is_lazy(module._parameters.get("weight")):
            raise ValueError(
                f"the layer {name!r} is a {type(module).__name__} without a weight: wanted a forward pass before this "
                f"call"
            )
    found: dict[nn.Parameter, FoundGeometry] = {}
    for layer in conv_layers(model, linear=True):
        parameter = layer.module._parameters.get("weight")
        if parameter is not None and layer.conv is not None:
            found.setdefault(parameter, FoundGeometry(parameter, layer.module, Geometry(lattice(layer.conv))))
    return list(found.values())
