"""Steps of `ConvMuon`: their norms, and the parts that torch's own optimizers and schedulers do."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from convsv_adapters.torch import ConvMuon, _muon, conv_layers
from convsv_backends import _threads
from torch import nn

import convsv_core as convsv
from convsv_core.layers import lattice
from convsv_core.training import direction_rise

SLACK = 1e-5
"""Relative error of a step in float32: the difference of two weights of about the step's size. A guess."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 5, stride=2, padding=2, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1, bias=False),
        nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(384, 2),
    )


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, first + step)
        optimizer.step()


def norm(change: torch.Tensor, conv: convsv.Conv) -> float:
    return float(convsv.norm_bounds(change, lattice(conv)).upper)


def test_threads_change_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for least in (math.inf, 0.0):
        monkeypatch.setattr(_threads, "SHARED_OPERATIONS", least)
        model = nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4)), nn.Conv2d(6, 2, 8), nn.Flatten())
        model.load_state_dict(weights[0] if weights else model.state_dict())
        start = copy.deepcopy(model.state_dict())
        optimizer = ConvMuon(model, lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        weights += [start, copy.deepcopy(model.state_dict())]
    for name in weights[1]:
        torch.testing.assert_close(weights[3][name], weights[1][name], rtol=1e-4, atol=1e-5)


def test_an_error_of_a_thread_names_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "SHARED_OPERATIONS", 0.0)
    whole = _muon.steepest_together

    def fails_for_depthwise(kernels: Any, *arguments: Any, **options: Any) -> Any:
        if kernels[0].shape[1] == 1:
            raise ValueError("no direction")
        return whole(kernels, *arguments, **options)

    monkeypatch.setattr(_muon, "steepest_together", fails_for_depthwise)
    model = network()
    optimizer = ConvMuon(model)
    backward(model)
    with pytest.raises(ValueError, match="no direction") as caught:
        optimizer.step()
    assert any("(8, 1, 3, 3)" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("method", ["exact", "polar", "flat"])
@pytest.mark.parametrize("scaling", ["rms", "operator"])
def test_the_norm_of_a_step_is_the_rate_times_the_factor(method: Any, scaling: str) -> None:
    model = network()
    before = copy.deepcopy(model)
    lr = 0.25
    train(model, ConvMuon(model, lr=lr, method=method, scaling=scaling), 1)
    pairs = zip(conv_layers(before), conv_layers(model), strict=True)
    for old, new in pairs:
        module, strides = new.module, 1
        for stride in module.stride:
            strides *= stride
        elements = module.out_channels * (strides if module.transposed else 1)
        factor = (elements / (module.in_channels * (1 if module.transposed else strides))) ** 0.5
        wanted = lr * (factor if scaling == "rms" else 1.0)
        found = norm((new.weight - old.weight).detach(), new.conv)
        assert found <= wanted * (1 + 1e-3 + SLACK), new.name
        least = 1.0 if module.kernel_size == (1, 1) else 1 / (1 + direction_rise(method))
        assert found >= wanted * least * (1 - SLACK), new.name
    change = (model[-1].weight - before[-1].weight).detach()
    wanted = lr * ((2 / 384) ** 0.5 if scaling == "rms" else 1.0)
    assert float(torch.linalg.matrix_norm(change, 2)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("taps", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_step_changes_outputs_alike_for_all_widths_taps_and_strides(width: int, taps: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(width, 2 * width, taps, stride=stride, padding=taps // 2, padding_mode="circular", bias=False)
    before = layer.weight.detach().clone()
    layer(torch.randn(2, width, 8, 8)).square().mean().backward()
    ConvMuon(layer, lr=0.1).step()
    change = layer.weight.detach() - before
    conv = convsv.Conv("OIHW", stride=stride)
    largest = float(convsv.operator_norm(change, (8, 8), conv)) * (width * stride**2 / (2 * width)) ** 0.5
    assert 0.1 / 1.18 * 0.9 <= largest <= 0.1 * (1 + SLACK)


def test_a_linear_layer_takes_the_polar_factor() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    before = layer.weight.detach().clone()
    layer(torch.randn(16, 6)).square().mean().backward()
    u, _, vh = torch.linalg.svd(layer.weight.grad, full_matrices=False)
    ConvMuon(layer, lr=0.5, scaling="operator", weight_decay=0.1).step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.05) - 0.5 * (u @ vh), rtol=0, atol=1e-5)


def test_other_parameters_take_the_steps_of_adamw() -> None:
    model, other = network(), network()
    train(model, ConvMuon(model, lr=0.0, adamw_lr=1e-2, adamw_weight_decay=0.1), 3)
    rest = [one for name, one in other.named_parameters() if one.ndim == 1]
    train(other, torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), 1)
    other.zero_grad(set_to_none=True)
    assert len(rest) == 7
    fresh = network()
    train(fresh, ConvMuon(fresh, lr=0.0, adamw_lr=1e-2, adamw_weight_decay=0.1), 1)
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=0)


def test_a_checkpoint_goes_on_as_if_there_had_been_no_break() -> None:
    model = network()
    optimizer = ConvMuon(model, lr=0.05)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2, first=3)
    resumed = network()
    resumed.load_state_dict(saved[0])
    another = ConvMuon(resumed, lr=0.7)
    another.load_state_dict(saved[1])
    assert another.param_groups[0]["lr"] == 0.05
    train(resumed, another, 2, first=3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[name], rtol=0, atol=0)
    copied_model, copied = copy.deepcopy((resumed, another))
    train(copied_model, copied, 1, first=5)
    train(resumed, another, 1, first=5)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, copied_model.state_dict()[name], rtol=0, atol=0)


def test_schedulers_accumulation_and_closures() -> None:
    model, twice = network(), network()
    optimizer = ConvMuon(model, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 1.5e-4]
    other = ConvMuon(twice, lr=0.1)

    def closure() -> torch.Tensor:
        other.zero_grad()
        for _ in range(2):
            backward(twice)
        return torch.zeros(())

    twice.eval()
    model_eval = network().eval()
    single = ConvMuon(model_eval, lr=0.1)
    backward(model_eval)
    single.step()
    assert float(other.step(closure)) == 0.0
    # The direction does not depend on the size of the gradient.
    for one, two in zip(conv_layers(model_eval), conv_layers(twice), strict=True):
        torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-4)


def test_a_scaler_skips_a_step_with_an_infinite_gradient() -> None:
    model = network()
    optimizer = ConvMuon(model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model.state_dict())
    loss = model(torch.ones(2, 3, 8, 8)).square().mean()
    scaler.scale(loss).backward()
    model[0].weight.grad[0, 0, 0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(model[0].weight.detach(), before["0.weight"], rtol=0, atol=0)
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(2, 3, 8, 8)).square().mean()).backward()
    scaler.step(optimizer)
    assert not torch.equal(model[0].weight.detach(), before["0.weight"])


def test_groups_have_options_of_their_own() -> None:
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5, "method": "flat"},
        {"params": model[4].parameters(), "algorithm": "adamw", "adamw_lr": 0.1},
        {"params": model[6].parameters(), "method": "polar", "weight_decay": 0.1},
    ]
    optimizer = ConvMuon(model, params=groups)
    found = [(one["algorithm"], one["lr"], one["method"], len(one["params"])) for one in optimizer.param_groups]
    assert found == [
        ("steepest", 0.5, "flat", 1),
        ("adamw", 3e-4, "flat", 1),
        ("adamw", 0.1, "exact", 2),
        ("steepest", 0.02, "polar", 1),
    ]
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match="algorithm='steepest' with a parameter"):
        optimizer.add_param_group({"params": [model[1].weight], "algorithm": "steepest"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)).to(dtype)
    optimizer = ConvMuon(model, lr=0.1)
    before = model[0].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3, 6, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()
    assert model[0].weight.dtype == dtype
    assert torch.isfinite(model[0].weight).all()
    assert not torch.equal(before, model[0].weight)


def test_training_reduces_the_loss_of_a_strided_network() -> None:
    torch.manual_seed(0)
    model = network()
    images = torch.randn(16, 3, 8, 8)
    labels = torch.arange(16) % 2
    optimizer = ConvMuon(model, lr=0.1)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"method": "newton"}, "method='newton'"),
        ({"scaling": "width"}, "scaling='width': wanted one of rms, operator"),
        ({"iterations": 0}, "iterations=0"),
        ({"adamw_betas": (0.9, 1.0)}, "adamw_betas=1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvMuon(network(), **options)


def test_what_is_no_model_or_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"wanted a torch\.nn\.Module"):
        ConvMuon(network().parameters())  # type: ignore[arg-type]
    model = network()
    optimizer = ConvMuon(model)
    backward(model)
    model[0].weight.grad.fill_(float("nan"))
    with pytest.raises(ValueError, match="gradient holds NaN"):
        optimizer.step()
