"""A PyTorch network with norms above the bounds of the tests, its training, and the norms that it asks for."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from convsv_adapters.torch import _shared_norms, conv_layers
from torch import nn

import convsv_core as convsv

__all__ = ["DEVICES", "SLACK", "certified", "images", "network", "recorded_norms", "train"]

SLACK = 1 + 1e-6
"""Factor by which a certified norm may exceed the bound, as in `convsv_core.project`."""

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def network() -> nn.Sequential:
    """Return a network with norms above 1, and one layer of each kind of geometry that the hook distinguishes."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2), nn.ReLU()),
        nn.Conv2d(8, 6, 3, padding="same", dilation=2, padding_mode="reflect"),
        nn.Dropout(),
        nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    with torch.no_grad():
        for layer in conv_layers(model):
            layer.weight.mul_(4)
    return model


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, batch: Any = None) -> None:
    batch = images() if batch is None else batch
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def certified(layer: Any) -> float:
    """Return an upper bound of the norm of the layer with its own padding."""
    weight = layer.weight.detach()
    extents = None if layer.conv.padding_mode == "zeros" else layer.input_shape
    return float(convsv.norm_bounds(weight, layer.conv, input_shape=extents).upper)


def recorded_norms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Return a list to which each computation of shared norms adds the number of kernels, and if it has derivatives.

    The models of other tests, which may not be gone yet, are not known any more.
    """
    counts: list[tuple[int, bool]] = []
    compute = _shared_norms.norms_of_groups

    def counted(groups: Any, *, derivatives: bool) -> Any:
        counts.append((sum(len(group.kernels) for group in groups), derivatives))
        return compute(groups, derivatives=derivatives)

    monkeypatch.setattr(_shared_norms, "norms_of_groups", counted)
    monkeypatch.setattr(_shared_norms, "_askers", weakref.WeakKeyDictionary())
    return counts
