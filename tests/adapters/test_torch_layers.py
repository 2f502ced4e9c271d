"""Tests of the PyTorch adapter: the layers that it finds in a model, and their report."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from convsv_adapters.cli.group import convsv as command_line
from convsv_adapters.torch import analyze, conv_layers, operator_norm
from torch import nn
from torch_models import images, network

import convsv_core as convsv


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
    """The norm that the core finds is the norm of the module's matrix."""
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
    # The iteration for padded operators stops at about 1e-6. A wrong geometry changes the norm by per cents.
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
    with pytest.raises(TypeError, match=r"'m\.onnx'.*convsv spectrum reports on a file"):
        convsv.analyze("m.onnx")


def test_facts_are_fields_and_layers_compare_by_them() -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, image: Any, weight: Any, bias: Any) -> Any:
            return super()._conv_forward(image, weight / weight.std(), bias)

    with pytest.warns(FutureWarning, match="weight_norm"):
        normed = torch.nn.utils.weight_norm(nn.Conv2d(2, 2, 3))
    model = nn.ModuleList([nn.Conv2d(2, 4, 3), Standardised(2, 2, 3), normed, nn.ConvTranspose2d(4, 2, 3, groups=2)])
    layers = conv_layers(model)
    assert [layer.unknown_forward for layer in layers] == [False, True, False, False]
    assert [layer.computed_in_forward for layer in layers] == [False, False, True, False]
    assert all(layer.reached for layer in layers)
    assert [layer.kernel_shape for layer in layers] == [tuple(layer.weight.shape) for layer in layers]
    assert layers == conv_layers(model)
    assert layers[3] != dataclasses.replace(layers[3], module=copy.deepcopy(model[3]))
    moved = copy.deepcopy(layers[0])
    assert moved.weight is moved.module.weight is not layers[0].weight


def test_the_shape_of_a_parametrised_weight_is_known_without_computing_it() -> None:
    layer = operator_norm(nn.ConvTranspose2d(4, 6, 3, groups=2), bound=0.1)
    (found,) = conv_layers(layer)
    assert found.kernel_shape == tuple(layer.weight.shape) == (4, 3, 3, 3)
