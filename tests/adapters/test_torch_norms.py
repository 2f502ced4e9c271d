"""Tests of the PyTorch adapter: the parametrization by the operator norm, and the penalty."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from convsv_adapters.torch import OperatorNorm, conv_layers, operator_norm, penalty
from torch import nn
from torch.nn.utils import parametrize
from torch_models import DEVICES, images

import convsv_core as convsv


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ---- the parametrization -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["bound", "normalise"])
@pytest.mark.parametrize("input_shape", [None, (8, 8)])
def test_a_parametrised_layer_has_the_norm(mode: Any, input_shape: Any, device: str) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, device=device)
    with torch.no_grad():
        layer.weight.mul_(5)
    operator_norm(layer, input_shape, 0.5, mode)
    (found,) = conv_layers(layer)
    if input_shape is None:
        bounds = convsv.norm_bounds(layer.weight.detach(), found.conv)
        assert bounds.upper <= 0.5 * (1 + 1e-3)  # the gap between the two bounds
        assert bounds.lower >= 0.5 / 1.1 * (1 - 1e-3)
    else:
        norm = convsv.operator_norm(layer.weight.detach(), (8, 8), found.conv)
        assert float(norm) == pytest.approx(0.5, rel=100 * torch.finfo(torch.float32).eps)


def test_a_parametrised_layer_within_the_bound_is_left_alone() -> None:
    layer = nn.Conv2d(4, 4, 3)
    weight = layer.weight.detach().clone()
    operator_norm(layer, bound=100.0)
    assert torch.equal(layer.weight, weight)


def test_the_norm_depends_on_the_weight_alone() -> None:
    """There are no buffers. Mode, number of passes and copying do not change the weight."""
    layer = operator_norm(nn.Conv2d(4, 4, 3, padding=1), bound=0.1)
    assert list(layer.buffers()) == []
    weight = layer.weight.detach().clone()
    layer.eval()
    assert torch.equal(layer.weight, weight)
    layer.train()
    for _ in range(2):
        layer(torch.randn(1, 4, 8, 8))
    assert torch.equal(layer.weight, weight)
    assert torch.equal(copy.deepcopy(layer).weight, weight)


def test_a_state_dict_goes_round() -> None:
    layer = operator_norm(nn.Conv2d(4, 4, 3), bound=0.1)
    other = operator_norm(nn.Conv2d(4, 4, 3), bound=0.1)
    assert not torch.equal(layer.weight, other.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, other.weight)
    assert set(layer.state_dict()) == {"bias", "parametrizations.weight.original"}


def test_the_gradient_is_that_of_the_scaled_weight() -> None:
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    norm = OperatorNorm(convsv.Conv("OIHW"), (6, 6), 0.5, "normalise")
    assert torch.autograd.gradcheck(norm, kernel)
    zero = torch.zeros(3, 2, 3, 3, requires_grad=True)
    norm(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()
    assert torch.equal(norm(zero), zero)


def test_an_assignment_is_scaled() -> None:
    layer = operator_norm(nn.Conv2d(2, 2, 1), (4, 4), 1.0, "normalise")
    layer.weight = 3 * torch.eye(2)[:, :, None, None]
    assert torch.allclose(layer.weight, torch.eye(2)[:, :, None, None])
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)


COMPILER = shutil.which("g++") or shutil.which("clang++")
INDUCTOR = (pytest.mark.thorough, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_a_compiled_model_is_the_same(backend: str) -> None:
    model = nn.Sequential(operator_norm(nn.Conv2d(3, 4, 3), bound=0.3), nn.ReLU())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    batch = images(2)
    wanted, found = model(batch), compiled(batch)
    assert torch.allclose(found, wanted, rtol=0, atol=16 * torch.finfo(torch.float32).eps)
    found.square().sum().backward()
    gradient = model[0].parametrizations.weight.original.grad
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("with_extents", [False, True])
@pytest.mark.parametrize("kind", ["norm_hinge", "squared_norm"])
def test_a_compiled_penalty_is_the_same(kind: str, with_extents: bool) -> None:
    batch = images(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2, padding=1))
    layers = conv_layers(model, batch if with_extents else None)
    options = {"bound": 0.1} if kind == "norm_hinge" else {}

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().sum() + penalty(model, kind, layers=layers, **options)

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        function(batch).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for wanted, found in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_exported_model_has_operators_of_pytorch_alone() -> None:
    model = nn.Sequential(operator_norm(nn.Conv2d(3, 4, 3), bound=0.3), nn.ReLU()).eval()
    batch = images(2)
    exported = torch.export.export(model, (batch,))
    assert not any("convsv" in str(node.target) for node in exported.graph.nodes)
    assert torch.allclose(exported.module()(batch), model(batch), atol=1e-6)


def test_a_second_derivative_is_that_of_the_norm() -> None:
    conv = convsv.Conv("OIHW")
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda kernel: convsv.operator_norm(kernel, (5, 4), conv), kernel)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_the_norm_its_digits(device: str) -> None:
    layer = operator_norm(nn.Conv2d(8, 8, 3, padding=1, device=device), (8, 8), 0.25, "normalise", circular=True)
    weight = layer.weight.detach()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(layer.weight, weight)
        output = layer(torch.randn(1, 8, 8, 8, device=device))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_parametrised_weight_keeps_its_dtype(dtype: torch.dtype) -> None:
    layer = operator_norm(nn.Conv2d(4, 4, 3, dtype=dtype), bound=0.25)
    assert layer.weight.dtype == dtype
    norm = convsv.norm_bounds(layer.weight.detach(), convsv.Conv("OIHW", padding_mode="zeros")).lower
    assert norm <= 0.25 * (1 + 4 * torch.finfo(dtype).eps)


def test_impossible_parametrizations_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        operator_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mode='spectral'"):
        operator_norm(nn.Conv2d(1, 1, 1), mode="spectral")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bound=0"):
        operator_norm(nn.Conv2d(1, 1, 1), bound=0)
    with pytest.raises(ValueError, match="circular=True"):
        operator_norm(nn.Conv2d(1, 1, 1), circular=True)
    with pytest.raises(NotImplementedError, match="reflect"):
        operator_norm(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))


# ---- the penalty -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("norm_hinge", {"bound": 0.1}),
        ("spectrum_hinge", {"bound": 0.1}),
        ("squared_norm", {}),
        ("orthogonality", {}),
        ("schatten", {"p": 4}),
        ("log_condition_number", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_penalty_is_the_sum_over_the_layers(kind: str, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, stride=2, padding=1))
    layers = conv_layers(model, torch.zeros(1, 2, 9, 9))
    found = penalty(model, kind, layers=layers, **options)
    wanted = [
        getattr(convsv.penalties, kind)(layer.weight, extents, convsv.Conv("OIHW", layer.conv.stride), **options)
        for layer, extents in zip(layers, [(9, 9), (8, 8)], strict=True)
    ]
    assert torch.equal(found, sum(wanted))
    found.backward()
    assert all(torch.isfinite(layer.weight.grad).all() for layer in layers)


@pytest.mark.parametrize(
    ("kind", "options"), [("norm_hinge", {"bound": 0.1}), ("squared_norm", {}), ("orthogonality", {})]
)
def test_a_penalty_for_every_size_needs_no_extents(kind: str, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    every = penalty(model, kind, **options).detach()
    one = penalty(model, kind, example_input=torch.zeros(1, 2, 16, 16), **options).detach()
    assert float(every) >= float(one) * (1 - 1e-5)  # taps that do not wrap: the same but for rounding, or a bound
    assert float(every) <= float(one) * 1.5


def test_impossible_penalties_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    with pytest.raises(ValueError, match="kind='norm'"):
        penalty(model, "norm")
    with pytest.raises(ValueError, match=r"'0'.*example_input"):
        penalty(model, "schatten", p=4)
    with pytest.raises(ValueError, match="no convolution"):
        penalty(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="bound"):
        penalty(model, "norm_hinge")
