"""Parameters that `ConvMuon` is given in other ways than all at once, and gradients that are zero or not finite."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from convsv_adapters.torch import ConvMuon
from torch import nn

import convsv_core as convsv


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 2))


def backward(model: nn.Module) -> None:
    model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).square().mean().backward()


def algorithms(optimizer: ConvMuon) -> list[tuple[str, float, list[str] | None]]:
    return [(one["algorithm"], one["lr"], one.get("param_names")) for one in optimizer.param_groups]


def test_named_parameters_take_the_steps_of_unnamed_ones() -> None:
    model = network()
    wanted = [
        ("steepest", 0.02, ["0.weight", "3.weight"]),
        ("adamw", 3e-4, ["0.bias", "1.weight", "1.bias", "3.bias"]),
    ]
    assert algorithms(ConvMuon(model, params=model.named_parameters())) == wanted
    assert algorithms(ConvMuon(model, params=[{"params": list(model.named_parameters())}])) == wanted


def test_a_set_of_parameters_is_refused() -> None:
    model = network()
    with pytest.raises(TypeError, match="params is a set"):
        ConvMuon(model, params=[{"params": set(model.parameters())}])


def test_the_rate_of_a_group_of_adamw_is_its_own() -> None:
    model = network()
    group = {"params": list(model.parameters()), "algorithm": "adamw", "lr": 0.5, "weight_decay": 0.1}
    optimizer = ConvMuon(model, params=[group])
    assert algorithms(optimizer) == [("adamw", 0.5, None)]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    optimizer = ConvMuon(model)
    for lr, one in zip((0.7, 0.8), optimizer.param_groups, strict=True):
        one["lr"] = lr
    again = ConvMuon(model, params=optimizer.param_groups)
    assert algorithms(again) == [("steepest", 0.7, None), ("adamw", 0.8, None)]


def test_a_layer_that_is_frozen_at_first_is_trained_later() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = ConvMuon(model, lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    backward(model)
    optimizer.step()
    assert torch.equal(model[0].weight, before["0.weight"])
    model[0].requires_grad_(True)
    backward(model)
    optimizer.step()
    assert not torch.equal(model[0].weight.detach(), before["0.weight"])


@pytest.mark.parametrize("lazy", [nn.LazyLinear(2), nn.LazyConv2d(2, 3)])
def test_a_lazy_layer_without_a_weight_is_refused(lazy: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"the layer '1' is a Lazy\w+ without a weight: wanted a forward pass"):
        ConvMuon(nn.Sequential(nn.Conv2d(3, 4, 3), lazy))


def test_a_first_gradient_of_zero_leaves_later_steps_as_good() -> None:
    layer = nn.Conv2d(8, 8, 3, bias=False)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(8, 8, 3, 3, generator=generator)
    upper = float(convsv.steepest_direction(gradient, None, convsv.Conv("OIHW")).upper)

    def share(optimizer: Any) -> float:
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        optimizer.step()
        return float(((before - layer.weight.detach()) * gradient).sum()) / upper

    wanted = share(ConvMuon(layer, lr=1.0, scaling="operator"))
    optimizer = ConvMuon(layer, lr=1.0, scaling="operator")
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.equal(layer.weight.detach(), before)
    assert share(optimizer) == pytest.approx(wanted, abs=1e-3)


def test_a_state_of_another_geometry_is_refused() -> None:
    layer, other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2)
    optimizer, another = ConvMuon(layer), ConvMuon(other)
    layer.weight.grad, other.weight.grad = torch.ones_like(layer.weight), torch.ones_like(other.weight)
    optimizer.step()
    another.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state has matrices of shape .* is it of another layer\?"):
        another.step()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = network()
    optimizer = ConvMuon(model, lr=0.1)
    backward(model)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    model[0].weight.grad[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"gradient holds NaN or infinity, for a weight of shape \(4, 3, 3, 3\)"):
        optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert all(torch.isfinite(one).all() for one in model.parameters())
