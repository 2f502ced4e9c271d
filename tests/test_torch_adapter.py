"""The PyTorch adapter: what it finds in a model, and what holds after a training step."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from convsv_adapters import _torch_targets
from convsv_adapters._commands import convsv as command_line
from convsv_adapters.torch import (
    OperatorNorm,
    StepProjection,
    analyze,
    conv_layers,
    operator_norm,
    penalty,
    project_after_step,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import convsv_core as convsv

SLACK = 1 + 1e-6
"""What `convsv_core.project` lets a certified norm exceed the bound by."""

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def network() -> nn.Sequential:
    """Norms above 1, and one of each kind of geometry that the hook treats apart."""
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
    """Upper bound of the norm of the layer with its own padding, where the core has one, else of its symbol."""
    weight = layer.weight.detach()
    extents = None if layer.conv.padding_mode == "zeros" else layer.input_shape
    return float(convsv.norm_bounds(weight, layer.conv, input_shape=extents).upper)


# ---- finding layers ----------------------------------------------------------------------------------------


def test_each_kind_of_convolution_is_found_with_its_geometry() -> None:
    layers = conv_layers(network(), images())
    assert [layer.name for layer in layers] == ["0", "3.0", "4", "6"]
    assert [layer.input_shape for layer in layers] == [(12, 12), (12, 12), (6, 6), (6, 6)]
    convs = [layer.conv for layer in layers]
    assert convs[0] == convsv.Conv("OIHW", padding=1, padding_mode="zeros")
    assert convs[1] == convsv.Conv("OIHW", stride=2, groups=2, padding=1, padding_mode="zeros")
    assert convs[2] == convsv.Conv("OIHW", dilation=2, padding="same", padding_mode="reflect")
    assert convs[3] == convsv.Conv("IOHW", stride=2, padding=1, padding_mode="zeros", transposed=True)
    assert [layer.note for layer in layers] == [""] * 4


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "valid"},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 2, "padding_mode": "replicate", "stride": 2},
        {"padding": 1, "padding_mode": "reflect", "groups": 2},
    ],
    ids=lambda options: options.get("padding_mode", options["padding"]),
)
def test_the_geometry_is_that_of_the_module(ndim: int, options: dict[str, Any]) -> None:
    """The norm that the core finds is that of the module as a matrix."""
    module = [nn.Conv1d, nn.Conv2d, nn.Conv3d][ndim - 1](2, 2, 3, bias=False, **options).double()
    extents = (6, 5, 4)[:ndim]
    (layer,) = conv_layers(module, torch.zeros(1, 2, *extents, dtype=torch.float64))
    assert layer.input_shape == extents
    assert_norm_is_that_of_the_module(layer, module, 2, extents)


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("extra", [0, 1])
def test_output_padding_is_part_of_the_geometry(ndim: int, extra: int) -> None:
    kind = [nn.ConvTranspose1d, nn.ConvTranspose2d][ndim - 1]
    taps = 4 - extra
    module = kind(2, 3, taps, stride=2, padding=1, output_padding=extra, bias=False).double()
    extents = (5, 4)[:ndim]
    (layer,) = conv_layers(module, torch.zeros(1, 2, *extents, dtype=torch.float64))
    assert layer.conv.padding == ((1, 1 - extra),) * ndim
    assert_norm_is_that_of_the_module(layer, module, 2, extents)


def test_an_output_size_asked_for_in_the_call_counts() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x, output_size=(10,))

    (layer,) = conv_layers(Up(), torch.zeros(1, 2, 5))
    assert layer.conv.padding == ((1, 0),)


def assert_norm_is_that_of_the_module(layer: Any, module: nn.Module, channels: int, extents: tuple[int, ...]) -> None:
    columns = torch.eye(channels * int(np.prod(extents)), dtype=torch.float64)
    matrix = module(columns.reshape(-1, channels, *extents)).reshape(len(columns), -1)
    truth = float(torch.linalg.matrix_norm(matrix.detach(), ord=2))
    found = float(convsv.operator_norm(layer.weight.detach(), extents, layer.conv))
    # The iteration for padded operators stops at 1e-6 or so; a wrong geometry is off by percents.
    assert found == pytest.approx(truth, rel=1e-4)


def test_a_forward_pass_leaves_no_trace() -> None:
    model = network()
    model[5].eval()
    model.register_buffer("calls", torch.zeros(()))

    def count(module: nn.Module, _: Any) -> None:
        module.calls += 1
        torch.rand(3)

    hook = model.register_forward_pre_hook(count)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    versions = [buffer._version for buffer in model[1].buffers()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    before = torch.get_rng_state(), random.getstate()
    conv_layers(model, torch.ones(1, 3, 12, 12))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [buffer._version for buffer in model[1].buffers()] == versions
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    hook.remove()


def test_a_failing_forward_pass_leaves_no_trace_either() -> None:
    model = network()
    with pytest.raises(RuntimeError):
        conv_layers(model, torch.zeros(1, 5, 12, 12))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_shared_unreached_and_resized_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 2, 3, padding=1)
            self.again = self.first
            self.unused = nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor, *, shrink: int) -> torch.Tensor:
            return self.again(self.first(input=x)[..., ::shrink, ::shrink])

    layers = conv_layers(Net(), {"x": torch.zeros(1, 2, 8, 8), "shrink": 2})
    assert [(layer.name, layer.input_shapes) for layer in layers] == [("first", ((8, 8), (4, 4))), ("unused", ())]
    assert layers[1].input_shape is None
    assert layers[1].note == "not reached by the forward pass"


def test_lazy_layers_are_initialised_by_the_pass() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConvTranspose2d(2, 3))
    with pytest.raises(ValueError, match=r"'0'.*LazyConv2d.*example_input"):
        conv_layers(model)
    layers = conv_layers(model, torch.zeros(1, 3, 8, 8))
    assert [tuple(layer.weight.shape) for layer in layers] == [(4, 3, 3, 3), (4, 2, 3, 3)]
    assert [layer.input_shape for layer in layers] == [(8, 8), (6, 6)]


def test_wrappers_are_looked_into() -> None:
    model = network()
    names = [layer.name for layer in conv_layers(model)]
    assert [layer.name for layer in conv_layers(nn.DataParallel(model))] == names
    assert [layer.name for layer in conv_layers(torch.compile(model))] == names


def test_what_is_not_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"collections\.OrderedDict.*torch\.nn\.Module"):
        conv_layers(network().state_dict())


def test_the_report_is_that_of_the_command_line(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    arguments = ["spectrum", str(tmp_path / "weights.pth"), "--input-shape", "9,9", "--json", str(tmp_path / "out")]
    run = CliRunner().invoke(command_line, arguments)
    assert run.exit_code == 0, run.output
    wanted = json.loads((tmp_path / "out").read_text())["layers"]
    reports = analyze(model, torch.zeros(1, 3, 9, 9))
    assert reports[0].operator_norm is not None
    for report, row in zip(reports, wanted, strict=True):
        assert report.operator_norm == row["operator_norm"]
        assert report.condition_number == row["condition_number"]
        assert report.reshaped_norm == row["reshaped_norm"]
        assert list(report.input_shape or ()) == row["input_shape"]


def test_a_report_without_extents_says_so() -> None:
    (report,) = convsv.analyze(nn.Conv2d(2, 2, 3))
    assert report.operator_norm is None
    assert "example_input" in report.note


def test_analyze_refuses_other_objects() -> None:
    with pytest.raises(TypeError, match=r"builtins\.dict"):
        convsv.analyze({})


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
    """No buffers, the same in training and evaluation, after any number of passes, and in a copy."""
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


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_a_compiled_model_is_the_same() -> None:
    model = nn.Sequential(operator_norm(nn.Conv2d(3, 4, 3), bound=0.3), nn.ReLU())
    compiled = torch.compile(model)
    batch = images(2)
    wanted, found = model(batch), compiled(batch)
    assert torch.allclose(found, wanted, rtol=0, atol=16 * torch.finfo(torch.float32).eps)
    found.square().sum().backward()
    gradient = model[0].parametrizations.weight.original.grad
    assert float(gradient.abs().max()) > 0


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


# ---- projection after steps --------------------------------------------------------------------------------


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
    # the bound is used: no layer is far below it, but for padding's own share in the one that reflects
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

    monkeypatch.setattr(_torch_targets, "rescale_together", fail)
    monkeypatch.setattr(_torch_targets, "project", fail)
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
    rescale = _torch_targets.rescale_together
    monkeypatch.setattr(
        _torch_targets, "rescale_together", lambda *args, **options: calls.append(1) or rescale(*args, **options)
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
    with pytest.raises(ValueError, match=r"circular=True.*'0'"):
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
    with pytest.warns(UserWarning, match="subclass"):
        project_after_step(torch.optim.SGD(layer.parameters()), layer, 1.0)
