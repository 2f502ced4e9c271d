"""Tests of the PyTorch adapter: the projection after an optimizer step."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convsv_adapters.torch import StepProjection, _targets, conv_layers, operator_norm, project_after_step
from torch import nn
from torch.nn.utils import parametrizations
from torch_models import DEVICES, SLACK, certified, images, network, train

import convsv_core as convsv


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [pytest.param("dykstra", marks=pytest.mark.thorough), "rescale"])
def test_after_training_every_layer_is_within_the_bound(method: str, device: str) -> None:
    model, batch = network().to(device), images().to(device)
    layers = conv_layers(model, batch)
    assert all(certified(layer) > 1 for layer in layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    projection = project_after_step(optimizer, model, 1.0, method=method, example_input=batch)
    assert projection.norms == {}
    train(model, optimizer, 3, batch)
    for layer in layers:
        assert certified(layer) <= 1.0 * SLACK, layer.name
        assert projection.norms[layer.name] <= 1.0 * SLACK
    # No layer is far below the bound; the norm of reflect padding is part of the certificate of the layer that has it.
    assert all(norm >= 0.9 for norm in projection.norms.values())


def test_the_circular_operator_is_bounded_where_it_is_asked_for() -> None:
    model, batch = network(), images()
    layers = conv_layers(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    project_after_step(optimizer, model, 1.0, circular=True, headroom=0.0, layers=layers)
    train(model, optimizer, 1)
    for layer in layers:
        conv = convsv.Conv(
            layer.conv.layout,
            layer.conv.stride,
            layer.conv.dilation,
            layer.conv.groups,
            transposed=layer.conv.transposed,
        )
        norm = convsv.operator_norm(layer.weight.detach(), layer.input_shape, conv)
        assert float(norm) == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize("method", ["rescale", "dykstra"])
def test_headroom_spares_the_next_certificates(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = network(), images()
    projection = StepProjection(model, 0.5, method=method, headroom=0.1, example_input=batch)
    projection.project()
    assert all(norm <= 0.45 * SLACK for norm in projection.norms.values())

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("there is a certificate that holds")

    monkeypatch.setattr(_targets, "rescale_together", fail)
    monkeypatch.setattr(_targets, "project", fail)
    with torch.no_grad():
        for layer in projection.layers:
            layer.module.weight.mul_(1 + 1e-3)
    before = copy.deepcopy(model.state_dict())
    projection.project()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for layer in projection.layers:
        found = convsv.norm_bounds(layer.weight.detach().double(), dataclasses.replace(layer.conv, padding="valid"))
        assert float(found.lower) <= projection.norms[layer.name] <= 0.5
    with torch.no_grad():
        for layer in projection.layers:
            layer.module.weight.mul_(1.2)
    with pytest.raises(AssertionError, match="there is a certificate"):
        projection.project()


def test_every_counts_steps_and_remove_ends_it() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    projection = project_after_step(optimizer, model[0], 1.0, every=3, method="rescale")
    train(model, optimizer, 2)
    assert projection.norms == {}
    train(model, optimizer, 1)
    assert projection.norms[""] <= 1.0 * SLACK
    projection.remove()
    projection.remove()
    with torch.no_grad():
        model[0].weight.mul_(10)
    train(model, optimizer, 3)
    assert float(convsv.norm_bounds(model[0].weight.detach(), conv_layers(model[0])[0].conv).lower) > 5


def test_kernels_within_the_bound_stay_bit_for_bit() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    versions = [parameter._version for parameter in model.parameters()]
    projection = project_after_step(
        torch.optim.SGD(model.parameters(), lr=0.1), model, 1000.0, example_input=torch.zeros(1, 3, 12, 12)
    )
    norms = projection.project()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert max(norms.values()) > 1


def test_layers_that_hardly_move_within_the_bound_are_not_certified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ConvTranspose2d(3, 2, 3))
    projection = project_after_step(torch.optim.SGD(model.parameters()), model, 5.0, headroom=0.5)
    first = projection.project()
    calls = []
    rescale = _targets.rescale_together
    monkeypatch.setattr(
        _targets, "rescale_together", lambda *args, **options: calls.append(1) or rescale(*args, **options)
    )
    with torch.no_grad():
        for layer in model:
            layer.weight.add_(0.01 * torch.randn_like(layer.weight))
    second = projection.project()
    assert not calls
    for layer in conv_layers(model):
        assert second[layer.name] > first[layer.name]
        assert float(convsv.norm_bounds(layer.weight.detach(), layer.conv).lower) <= second[layer.name] <= 5.0
    with torch.no_grad():
        model[1].weight.mul_(20)
    projection.project()
    assert len(calls) == 1
    assert all(certified(layer) <= 5.0 * SLACK for layer in conv_layers(model))


def test_copies_lose_the_hook_and_attach_brings_it_back() -> None:
    model = network()
    model[4] = nn.Conv2d(8, 6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    projection = project_after_step(optimizer, model, 1.0, method="rescale")
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), lr=0.0)
    other.load_state_dict(optimizer.state_dict())
    assert not copy.deepcopy(optimizer)._optimizer_step_post_hooks
    train(twin, other, 1)
    assert projection.steps == 0
    assert projection.attach(other, twin) is projection
    train(twin, other, 1)
    assert all(certified(layer) <= 1.0 * SLACK for layer in conv_layers(twin))
    train(model, optimizer, 1)
    assert projection.steps == 1
    assert all(certified(layer) > 1.0 for layer in conv_layers(model))
    with pytest.raises(ValueError, match="name '0'"):
        projection.attach(other, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Linear"):
        projection.attach(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stored_weights_of_16_bits_are_within_the_bound(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(6, 8, 3).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    project_after_step(optimizer, layer, 1.0, headroom=0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert layer.weight.dtype == dtype
    (found,) = conv_layers(layer)
    assert certified(found) <= 1.0 * SLACK
    assert certified(found) >= 1.0 - 4 * torch.finfo(dtype).eps
    stored = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, stored)


def test_a_gradient_scalers_skipped_step_is_none() -> None:
    layer = nn.Conv2d(2, 2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    projection = project_after_step(optimizer, layer, 0.1, method="rescale")
    scaler = torch.amp.GradScaler("cpu")
    for infinite in (True, False):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(torch.randn(1, 2, 5, 5)).float().sum() * (float("inf") if infinite else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert projection.steps == (0 if infinite else 1)
    assert certified(conv_layers(layer)[0]) <= 0.1 * SLACK


def test_a_weight_that_modules_share_is_within_the_bound_for_each() -> None:
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    with torch.no_grad():
        first.weight.mul_(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    projection = project_after_step(optimizer, model, 1.0)
    train(model, optimizer, 1, torch.randn(1, 4, 9, 9))
    assert all(certified(layer) <= 1.0 * SLACK for layer in conv_layers(model))
    assert set(projection.norms) == {"0", "1"}


@pytest.mark.parametrize(
    "parametrise", [parametrizations.weight_norm, lambda layer: operator_norm(layer, bound=50.0)], ids=["weight", "own"]
)
def test_parametrised_weights_are_assigned(parametrise: Callable[[nn.Module], nn.Module]) -> None:
    layer = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        layer.weight.mul_(5)
    model = nn.Sequential(parametrise(layer))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    project_after_step(optimizer, model, 1.0)
    train(model, optimizer, 2, torch.randn(1, 4, 9, 9))
    assert certified(conv_layers(model)[0]) <= 1.0 * SLACK * (1 + 8 * torch.finfo(torch.float32).eps)


def test_channels_last_stays() -> None:
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    strides = layer.weight.stride()
    project_after_step(torch.optim.SGD(layer.parameters()), layer, 0.1, method="rescale").project()
    assert layer.weight.stride() == strides
    assert certified(conv_layers(layer)[0]) <= 0.1 * SLACK


def test_diverged_training_names_the_layer() -> None:
    model = network()
    with torch.no_grad():
        model[3][0].weight[0, 0, 0, 0] = float("nan")
    projection = project_after_step(
        torch.optim.SGD(model.parameters()), model, 1.0, method="rescale", example_input=torch.zeros(1, 3, 12, 12)
    )
    with pytest.raises(ValueError, match="NaN") as raised:
        projection.project()
    assert "3.0" in raised.value.__notes__[0]


def test_impossible_projections_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"'0'.*repeats pixels.*example_input"):
        project_after_step(optimizer, model, 1.0)
    project_after_step(optimizer, model, 1.0, input_shapes={"0": (8, 8)}).remove()
    with pytest.raises(ValueError, match="'conv1'"):
        project_after_step(optimizer, model, 1.0, input_shapes={"conv1": (8, 8)})
    with pytest.raises(ValueError, match=r"'0'.*circular=True"):
        project_after_step(optimizer, nn.Sequential(nn.Conv2d(2, 2, 3)), 1.0, circular=True)
    with pytest.raises(ValueError, match="bound=-1"):
        project_after_step(optimizer, model, -1)
    with pytest.raises(ValueError, match="every=0"):
        project_after_step(optimizer, model, 1.0, every=0)
    for headroom in (-0.1, 1.0, True):
        with pytest.raises(ValueError, match="headroom"):
            project_after_step(optimizer, model, 1.0, headroom=headroom)
    with pytest.raises(ValueError, match="no convolution"):
        project_after_step(optimizer, nn.Linear(2, 2), 1.0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = torch.nn.utils.weight_norm(nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match="computed by a hook"):
        project_after_step(torch.optim.SGD(old.parameters()), old, 1.0)


def test_a_subclass_that_does_something_else_is_warned_of() -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, image: Any, weight: Any, bias: Any) -> Any:
            return super()._conv_forward(image, weight / weight.std(), bias)

    layer = Standardised(2, 2, 3)
    model = nn.Sequential(layer, nn.Conv2d(2, 2, 3))
    with pytest.warns(UserWarning, match=r"'0' is a subclass .* leaves the layer out"):
        projection = project_after_step(torch.optim.SGD(model.parameters()), model, 1.0)
    assert set(projection.project()) == {"1"}  # the norm of the stored kernel is not that of the layer


def test_a_subclass_that_convolves_with_its_weight_is_certified(recwarn: pytest.WarningsRecorder) -> None:
    class Activated(nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image).relu()

    layer = Activated(2, 2, 3, padding=1)
    norms = project_after_step(torch.optim.SGD(layer.parameters()), layer, 0.1).project()
    assert not recwarn.list
    (norm,) = norms.values()
    truth = convsv.operator_norm(layer.weight.detach(), (8, 8), convsv.Conv("OIHW", padding_mode="zeros"))
    assert truth <= norm <= 0.1 * (1 + 1e-6)


def test_each_option_is_in_the_signature_and_no_other_is_taken() -> None:
    options = set(inspect.signature(project_after_step).parameters)
    assert options >= {"optimizer", "model", "bound", "every", "method", "headroom", "circular", "example_input"}
    assert options >= {"input_shapes", "layers", "process_group", "rtol", "max_iterations"}
    model = nn.Conv2d(2, 2, 3)
    with pytest.raises(TypeError, match="tolerance"):
        StepProjection(model, 1.0, tolerance=0.1)
    with pytest.raises(ValueError, match="method='clip'"):
        StepProjection(model, 1.0, method="clip")
    with pytest.raises(ValueError, match="bound=inf"):  # of which a rescaling would certify a norm of 0
        StepProjection(model, float("inf"))
