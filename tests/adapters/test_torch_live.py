"""The step hook certifies the weights that the model has, and refuses those that it cannot set."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from convsv_adapters.torch import operator_norm, project_after_step
from torch import nn
from torch.nn.utils import parametrizations

import convsv_core as convsv


def true_norm(layer: nn.Module) -> float:
    """The norm of a layer with its own padding on images of 10 x 10, from the identity in double precision."""
    layer = copy.deepcopy(layer).eval().double()
    layer.bias = None
    images = torch.eye(100 * layer.in_channels, dtype=torch.float64).reshape(-1, layer.in_channels, 10, 10)
    with torch.no_grad():
        return float(torch.linalg.matrix_norm(layer(images).flatten(1), 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_a_parametrization_that_does_not_give_the_weight_back_is_named(wrap) -> None:
    model = nn.Sequential(wrap(nn.Conv2d(3, 8, 3, padding=1)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    projection = project_after_step(optimizer, model, 0.1)
    with pytest.raises(ValueError, match=r"layer '0' cannot be projected: its parametrization .* gives another weight"):
        train(model, optimizer)
    assert projection.norms == {}


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, operator_norm])
def test_a_parametrization_that_gives_the_weight_back_is_projected(wrap) -> None:
    model = nn.Sequential(wrap(nn.Conv2d(3, 8, 3, padding=1)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    projection = project_after_step(optimizer, model, 0.1)
    train(model, optimizer)
    assert true_norm(model[0]) <= projection.norms["0"] * (1 + 1e-6) <= 0.1 * (1 + 2e-6)


def test_a_layer_that_is_replaced_or_added_is_projected() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    projection = project_after_step(optimizer, model, 0.5)
    train(model, optimizer)
    model[0] = nn.Conv2d(3, 8, 3, padding=1)
    model.append(nn.Conv2d(8, 3, 3))
    nn.init.normal_(model[0].weight)
    optimizer.step()
    assert sorted(projection.norms) == ["0", "1"]
    for name, norm in projection.norms.items():
        assert true_norm(model[int(name)]) <= norm * (1 + 1e-6) <= 0.5 * (1 + 2e-6)


def test_a_model_without_convolutions_left_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    projection = project_after_step(torch.optim.SGD(model.parameters(), 0.1), model, 0.5)
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match="no convolution left"):
        projection.project()


def test_chosen_layers_stay_the_only_ones() -> None:
    from convsv_adapters.torch import conv_layers

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    projection = project_after_step(torch.optim.SGD(model.parameters(), 0.1), model, 0.5, layers=conv_layers(model)[:1])
    model[1] = nn.Conv2d(8, 8, 3)
    assert list(projection.project()) == ["0"]


def test_swapped_arguments_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(TypeError, match=r"model is a SGD: wanted a torch\.nn\.Module; are arguments swapped"):
        project_after_step(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)  # type: ignore[arg-type]


def test_a_projection_is_copied_and_pickled_with_its_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    projection = project_after_step(torch.optim.SGD(model.parameters(), 0.1), model, 0.5)
    for other, moved in (copy.deepcopy((model, projection)), pickle.loads(pickle.dumps((model, projection)))):
        nn.init.normal_(other[0].weight)
        norm = moved.project()["0"]
        assert true_norm(other[0]) <= norm * (1 + 1e-6) <= 0.5 * (1 + 2e-6)
    assert true_norm(model[0]) > 0.5  # which only its own projection sets


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_parametrization_on_the_meta_device_and_in_an_onnx_export(tmp_path) -> None:
    layer = operator_norm(nn.Conv2d(3, 4, 3, device="meta"))
    assert layer.weight.shape == (4, 3, 3, 3)
    assert layer(torch.zeros(1, 3, 8, 8, device="meta")).shape == (1, 4, 6, 6)
    model = operator_norm(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(RuntimeError, match="remove_parametrizations"):
        torch.onnx.export(model, (torch.zeros(1, 3, 8, 8),), tmp_path / "m.onnx", dynamo=False)


def test_the_norm_of_a_weight_that_requires_gradients_warns_of_nothing() -> None:
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convsv.operator_norm(weight, (8, 8), convsv.Conv("OIHW")).backward()
        convsv.norm_upper_bound(weight, convsv.Conv("OIHW")).backward()
    assert weight.grad is not None


def test_a_weight_that_cannot_be_read_costs_its_own_row_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, device="meta"))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    first, eighth, meta = convsv.analyze(model)
    assert first.note == "extents unknown: wanted an example_input"
    assert "Float8" in eighth.note
    assert "meta" in meta.note


class Scaled(nn.Conv2d):
    def _conv_forward(self, images, weight, bias):
        return super()._conv_forward(images, 3 * weight, bias)


class Dilated(nn.Conv2d):
    def forward(self, images):
        return nn.functional.conv2d(images, self.weight, dilation=2)


class Masked(nn.Conv2d):
    def forward(self, images):
        self.weight.data[0] = 0
        return super().forward(images)


class Failing(nn.Conv2d):
    def forward(self, images, style):
        return super().forward(images * style)


class Padded(nn.Conv2d):
    def forward(self, images):
        return torch.relu(super().forward(nn.functional.pad(images, (1, 1, 1, 1))))


@pytest.mark.parametrize("kind", [Scaled, Dilated, Masked, Failing])
def test_a_class_that_does_not_convolve_with_its_weight_has_no_figure(kind) -> None:
    layer = kind(3, 4, 3)
    before = layer.weight.detach().clone()
    (report,) = convsv.analyze(layer) if kind is Failing else convsv.analyze(nn.Sequential(layer))
    assert report.kernel_shape is None
    assert "forward pass of its own" in report.note
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("wrap", [lambda layer: layer, parametrizations.weight_norm], ids=["plain", "weight_norm"])
def test_a_class_that_does_more_than_convolve_with_its_weight_has_figures(wrap) -> None:
    (report,) = convsv.analyze(wrap(Padded(3, 4, 3)), torch.zeros(1, 3, 8, 8))
    assert report.operator_norm > 0
    assert "forward pass of its own" in report.note
