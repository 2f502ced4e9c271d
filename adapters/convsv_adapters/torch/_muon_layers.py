"""The layers that `ConvMuon` moves, and the factors of their learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from convsv_adapters.torch._layers import conv_layers
from convsv_core import Conv
from convsv_core.layers import lattice

__all__ = ["SCALINGS", "FoundGeometry", "Geometry", "find_geometries"]

SCALINGS = ("rms", "operator")
"""The factors of the learning rate, which `ConvMuon` describes."""


@dataclass(frozen=True)
class Geometry:
    """Hold the geometry of a layer for steps in its operator norm: static and hashable.

    Attributes
    ----------
    conv : Conv
        The convolution on the infinite lattice. A linear layer is a convolution with one tap.
    gain : float
        Number of output elements of an image for each input element.
    """

    conv: Conv
    gain: float

    def factor(self, scaling: str) -> float:
        """Return the certified norm of a step with a learning rate of 1."""
        return math.sqrt(self.gain) if scaling == "rms" else 1.0

    def as_kernel(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight with the axes that the layout names."""
        return weight.reshape(*weight.shape, *[1] * (len(self.conv.layout) - weight.ndim))


class FoundGeometry(NamedTuple):
    """Hold a weight, its module and its geometry."""

    parameter: nn.Parameter
    module: nn.Module
    geometry: Geometry


def find_geometries(model: nn.Module) -> list[FoundGeometry]:
    """Return the weights of a model's convolutions and linear layers that are parameters, each once."""
    found: dict[nn.Parameter, FoundGeometry] = {}
    for layer in conv_layers(model):
        parameter = layer.module._parameters.get("weight")
        if parameter is None or layer.conv is None:
            continue
        conv, module = lattice(layer.conv), layer.module
        strides = math.prod(conv.strides)
        gain = module.out_channels / module.in_channels * (strides if conv.transposed else 1 / strides)
        found.setdefault(parameter, FoundGeometry(parameter, module, Geometry(conv, gain)))
    for module in model.modules():
        parameter = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and parameter is not None and not nn.parameter.is_lazy(parameter):
            gain = module.out_features / module.in_features
            found.setdefault(parameter, FoundGeometry(parameter, module, Geometry(Conv("OIW"), gain)))
    return list(found.values())
