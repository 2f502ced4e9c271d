"""Tests of the PyTorch adapter: which layer a batch normalisation follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from convsv_adapters.torch import conv_layers
from torch import nn
from torch.nn import functional as F


class Forward(nn.Module):
    """A convolution, two normalisations, a linear layer, and a forward pass of the caller's."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.linear, self.call = nn.Linear(3, 3), forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def _shared(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.conv(x)) + m.other(m.conv(x[..., ::2, ::2])).mean()


def _used_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return m.other(m.norm(y) + y)


def _changed_in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    y.mul_(2)
    return m.other(m.norm(y))


def _changed_by_an_alias(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    y.detach().mul_(2)
    return m.other(m.norm(y))


def _returned(m: Any, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    y = m.conv(x)
    return {"features": [y, m.other(m.norm(y))]}


def _looked_at(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = nn.Identity()(m.conv(x))
    assert (y.shape[1], y.size(0), y.dtype, y.is_contiguous()) == (3, 1, torch.float32, True)
    return m.other(m.norm(y))


def _on_another_axis(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The normalisation takes axis 1, which is not the axis that the linear layer makes."""
    return m.other(m.norm(m.linear(torch.zeros(1, 3, 3))[..., None])) + m.conv(x)[..., :3, :1]


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.other(m.norm(m.conv(x))), {("conv", "norm"), ("other", "other")}),
        (lambda m, x: m.other(F.relu(m.norm(m.conv(x)))), {("conv", "norm"), ("other", "other")}),
        (lambda m, x: m.other(m.norm(F.relu(m.conv(x)))), {("conv", ""), ("norm", "norm"), ("other", "other")}),
        (_looked_at, {("conv", "norm"), ("other", "other")}),
        (_shared, {("conv", "norm"), ("conv", "other")}),
        (_used_twice, {("conv", ""), ("conv", "norm"), ("other", "other")}),
        (_returned, {("conv", ""), ("conv", "norm"), ("other", "other")}),
        (_changed_in_place, {("conv", ""), ("norm", "norm"), ("other", "other")}),
        (_changed_by_an_alias, {("conv", ""), ("norm", "norm"), ("other", "other")}),
        (_on_another_axis, {("linear", ""), ("conv", ""), ("norm", "norm"), ("other", "other")}),
    ],
)
def test_a_normalisation_follows_the_layer_whose_output_it_takes(
    forward: Callable[..., Any], expected: set[tuple[str, str]]
) -> None:
    model = Forward(forward)
    if forward is not _on_another_axis:
        del model.linear
    names = {module: name for name, module in model.named_modules()}
    found = conv_layers(model, torch.randn(1, 2, 6, 6), linear=True, batch_norm="fold")
    assert {(layer.name, names.get(layer.normalisation, "")) for layer in found} == expected
    assert len(found) == len(expected)
