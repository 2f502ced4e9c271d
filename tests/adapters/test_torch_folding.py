"""Tests of the PyTorch adapter: linear layers, and batch normalisations in evaluation mode, within a bound."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convsv_adapters.torch import StepOptions, StepProjection, _scales, conv_layers, penalty, project_after_step
from torch import nn
from torch.nn import functional as F
from torch_models import SLACK

import convsv_core as convsv


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block with batch normalisations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))


def network() -> nn.Sequential:
    """Return a small residual network with every kind of normalisation that the hook distinguishes."""
    return nn.Sequential(
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Block(4),
        nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )


PAIRS = {
    "0": ("0",),
    "1": ("1", "2"),
    "4.first": ("4.first", "4.norms.0"),
    "4.second": ("4.second", "4.norms.1"),
    "5": ("5", "6"),
    "7": ("7", "8"),
    "11": ("11", "12"),
    "14": ("14",),
}
"""The modules of each map of `network`, by the name of the first."""

SHAPES = {"0": (2, 4, 4), "1": (2, 4, 4), "7": (6, 8, 8), "11": (64,), "14": (8,)}
"""The shapes of the inputs of these maps. Other maps take four channels."""


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 2, 4, 4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(3 * images()), torch.randint(3, (8,))).backward()
        optimizer.step()


def dense_norm(function: Callable[[torch.Tensor], torch.Tensor], point: torch.Tensor) -> float:
    """Return the norm of the Jacobian of a map of one example."""
    matrix = torch.autograd.functional.jacobian(lambda x: function(x[None])[0], point)
    return float(torch.linalg.matrix_norm(matrix.reshape(-1, point.numel()), 2))


def dense_norms(model: nn.Module) -> dict[str, float]:
    """Return the norm of each map of `network` in evaluation mode, from its dense matrix."""
    exact = copy.deepcopy(model).double().eval()
    return {
        name: dense_norm(
            nn.Sequential(*map(exact.get_submodule, parts)),
            torch.zeros(SHAPES.get(name, (4, 4, 4)), dtype=torch.float64),
        )
        for name, parts in PAIRS.items()
    }


def test_the_kernel_is_that_of_the_layer_and_its_normalisation() -> None:
    model = network()
    model(images())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    norms, layers = dense_norms(model), conv_layers(model, images(1), linear=True, batch_norm="fold")
    assert [layer.name for layer in layers] == list(PAIRS)
    for layer in layers:
        assert tuple(layer.kernel.shape) == layer.kernel_shape
        norm = float(convsv.operator_norm(layer.kernel.detach().double(), layer.input_shape, layer.conv))
        assert norm == pytest.approx(norms[layer.name], rel=1e-5)


def test_without_the_options_no_other_layer_is_listed() -> None:
    model = network()
    assert [layer.name for layer in conv_layers(model, images(1))] == ["1", "4.first", "4.second", "5", "7"]
    found = [layer.name for layer in conv_layers(model, linear=True)]
    assert found == ["1", "4.first", "4.second", "5", "7", "11", "14"]


# ---- the bound -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rescale", pytest.param("dykstra", marks=pytest.mark.thorough)])
def test_every_map_is_within_the_bound_in_evaluation_mode(method: str) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    projection = project_after_step(
        optimizer, model, 1.0, linear=True, batch_norm="fold", method=method, example_input=images(1)
    )
    kernels = {name: model.get_submodule(name).weight.detach().clone() for name in ("1", "14")}
    for steps in (1, 6):
        train(model, optimizer, steps)
        for name, norm in dense_norms(model).items():
            assert norm <= projection.norms[name] * (1 + 1e-12) <= 1.0, name
        assert max(projection.norms.values()) >= 0.98
    model(5 * images())  # The running variances move, and the bounds may not hold any more.
    projection.project()
    assert all(norm <= projection.norms[name] * (1 + 1e-12) <= 1.0 for name, norm in dense_norms(model).items())
    # Only the layer without a normalisation was made smaller itself.
    changes = {
        name: float(model.get_submodule(name).weight.detach().norm() / kernel.norm())
        for name, kernel in kernels.items()
    }
    assert changes["1"] > changes["14"]


def test_the_network_is_within_the_product_at_random_and_at_adversarial_inputs() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    projection = project_after_step(optimizer, model, 1.0, linear=True, batch_norm="fold", example_input=images(1))
    train(model, optimizer, 10)
    exact, norms = copy.deepcopy(model).double().eval(), projection.norms
    branch = norms.pop("4.first") * norms.pop("4.second")
    bound = math.prod(norms.values()) * (1 + branch)
    assert bound <= 2.0
    for image in images(3).double():
        point = image.clone().requires_grad_()
        for _ in range(10):  # Walk towards larger Jacobians.
            assert dense_norm(exact, point) <= bound
            direction = torch.randn_like(image)
            value = torch.autograd.functional.jvp(lambda x: exact(x[None])[0], point, direction, create_graph=True)[1]
            (gradient,) = torch.autograd.grad(value.square().sum(), point)
            point = (point + 0.3 * F.normalize(gradient.flatten(), dim=0).view_as(point)).detach().requires_grad_()


def test_a_network_can_come_near_the_product() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), Block(4), nn.Flatten(), nn.Linear(64, 64))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
    nn.init.eye_(model[4].weight)
    norms = StepProjection(model, 1.0, linear=True, batch_norm="fold", example_input=torch.zeros(1, 4, 4, 4)).project()
    bound = norms["0"] * (1 + norms["2.first"] * norms["2.second"]) * norms["4"]
    point = torch.ones(4, 4, 4, dtype=torch.float64) + 10  # Where every activation is positive
    assert 0.97 * bound <= dense_norm(copy.deepcopy(model).double().eval(), point) <= bound


def test_maps_that_hardly_move_are_not_tested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    options: dict[str, Any] = {"linear": True, "batch_norm": "fold", "headroom": 0.1, "example_input": images(1)}
    projection = StepProjection(model, 0.5, **options)
    first = projection.project()
    calls: list[int] = []
    right = _scales.rescaling_factors
    monkeypatch.setattr(_scales, "rescaling_factors", lambda *a, **o: calls.append(1) or right(*a, **o))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_var.mul_(0.999)
                module.weight.mul_(1.001)
        for layer in projection.layers:
            layer.module.weight.add_(1e-4 * torch.randn_like(layer.module.weight))
    second = projection.project()
    assert not calls
    for name, norm in dense_norms(model).items():
        assert norm <= second[name] * (1 + 1e-12) <= 0.5
        assert second[name] >= first[name]
    changes: list[tuple[Callable[[], Any], str, int]] = [
        (lambda: model[2].running_var.mul_(0.5), "1", 0),  # every channel alike: the old certificate says how much
        (lambda: model[2].running_var[0].mul_(0.3), "1", 1),
        (lambda: model[7].weight.mul_(1.2), "7", 1),
        (lambda: model[7].weight.mul_(1e6), "7", 1),
        (lambda: model[0].weight[1].zero_(), "0", 0),
    ]
    for change, name, count in changes:
        calls.clear()
        with torch.no_grad():
            change()
        norms = projection.project()
        assert len(calls) == count
        assert dense_norms(model)[name] <= norms[name] * (1 + 1e-12) <= 0.5
    with torch.no_grad():
        model[0].weight[1] = 100.0  # from a scale of zero, which no quotient bounds
    assert dense_norms(model)["0"] > 1
    assert dense_norms(model)["0"] > 0.5 >= projection.project()["0"] >= dense_norms(model)["0"]


def test_a_weight_that_normalisations_share_is_small_enough_for_each() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)) for _ in range(2)))
    model[1][1].weight = model[0][1].weight
    with torch.no_grad():
        model[0][0].weight.mul_(5)
        model[1][0].weight.mul_(50)
    projection = StepProjection(model, 1.0, batch_norm="fold", example_input=torch.zeros(1, 3, 8, 8))
    norms = projection.project()
    assert norms["1.0"] == pytest.approx(0.99, abs=2e-3)
    assert norms["0.0"] < 0.3
    exact = copy.deepcopy(model).double().eval()
    for index in range(2):
        assert dense_norm(exact[index], torch.zeros(3, 8, 8, dtype=torch.float64)) <= norms[f"{index}.0"]
    assert projection.project() == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_16_bits(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[1].running_var.uniform_(0.5, 2)
    projection = StepProjection(
        model, 1.0, batch_norm="fold", headroom=0.0, example_input=torch.zeros(1, 4, 6, 6).to(dtype)
    )
    norms = projection.project()
    assert model[1].weight.dtype == dtype
    exact = copy.deepcopy(model).double().eval()
    norm = dense_norm(exact, torch.zeros(4, 12, 12, dtype=torch.float64))
    assert 0.8 <= norm <= norms["0"] <= 1.0
    before = model[1].weight.clone()
    projection.project()
    assert torch.equal(model[1].weight, before)


def test_the_bound_of_the_circular_operator_at_several_extents() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(3))
    layers = conv_layers(model, torch.zeros(1, 3, 6, 6), batch_norm="fold")
    layers = [layers[0].__class__(**{**vars(layers[0]), "input_shapes": ((6, 6), (5, 7))})]
    projection = StepProjection(model, 0.1, circular=True, headroom=0.0, layers=layers)
    norms = projection.project()
    exact = copy.deepcopy(model).double().eval()
    found = [dense_norm(exact, torch.zeros(3, *extents, dtype=torch.float64)) for extents in ((6, 6), (5, 7))]
    assert max(found) <= norms["0"] <= 0.1
    assert max(found) >= 0.0995


# ---- copies, replacements, errors ------------------------------------------------------------------------


def test_copies_and_replaced_modules_are_followed() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projection = project_after_step(optimizer, model, 1.0, linear=True, batch_norm="fold", example_input=images(1))
    train(model, optimizer, 1)
    for copied in (copy.deepcopy(projection), pickle.loads(pickle.dumps(projection))):
        twin = copied._model
        other = torch.optim.SGD(twin.parameters(), lr=0.5)
        copied.attach(other)
        train(twin, other, 2)
        assert max(dense_norms(twin).values()) <= 1.0
    twin = copy.deepcopy(model)
    projection.attach(torch.optim.SGD(twin.parameters(), lr=0.5), twin)
    with torch.no_grad():
        twin[2].weight.mul_(10)
    projection.project()
    assert max(dense_norms(twin).values()) <= 1.0
    twin[1], twin[2] = nn.Conv2d(2, 4, 5, padding=2), nn.BatchNorm2d(4)
    twin[0].weight.data.mul_(3)
    projection.project()
    assert max(dense_norms(twin).values()) <= 1.0
    twin.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"'15' is new.*new projection"):
        projection.project()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "2", nn.BatchNorm2d(4, affine=False)), "behind the layer '1' has no weight"),
        (lambda m: setattr(m, "0", nn.BatchNorm2d(2, affine=False)), "behind the layer '0' has no weight"),
        (lambda m: setattr(m, "2", nn.BatchNorm2d(4, track_running_stats=False)), "'2' keeps no running statistics"),
        (lambda m: m.extra.append(nn.BatchNorm2d(4)), "'extra.0' was not reached"),
        (lambda m: m.register_forward_hook(_normalises), "tensors that are not those of one"),
    ],
)
def test_normalisations_that_cannot_be_bounded_are_named(change: Callable[[Any], None], message: str) -> None:
    model = network()
    unused = nn.Module()
    unused.extra = nn.ModuleList()
    model.register_module("extra", unused.extra)
    model.forward = lambda x: nn.Sequential(*[one for name, one in model.named_children() if name != "extra"])(x)
    change(model)
    with pytest.raises(ValueError, match=message):
        StepProjection(model, 1.0, linear=True, batch_norm="fold", example_input=images(2))


def _normalises(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(output, torch.zeros(3), torch.ones(3))


def test_options_can_be_copied() -> None:
    options = StepOptions(1.0, linear=True, batch_norm="fold", example_input=images(1))
    for other in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert (other.bound, other.linear, other.batch_norm) == (1.0, True, "fold")
        projection = StepProjection(network(), **{name: getattr(other, name) for name in vars(options) if name != "_"})
        assert max(projection.project().values()) <= 1


def test_wrong_options() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"batch_norm='fold' needs an example_input.*'0'"):
        StepProjection(model, 1.0, batch_norm="fold")
    with pytest.raises(ValueError, match="batch_norm='bare'"):
        StepProjection(model, 1.0, batch_norm="bare", example_input=images(1))
    with pytest.raises(ValueError, match="layers are given beside linear"):
        StepProjection(model, 1.0, linear=True, layers=conv_layers(model))
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        StepProjection(nn.ReLU(), 1.0, linear=True)
    with pytest.warns(UserWarning, match="'0' is .*forward pass"):
        StepProjection(nn.Sequential(nn.Conv2d(2, 3, 3), Doubled(3)), 1.0, batch_norm="fold", example_input=images(1))


class Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_model_in_training_mode_is_left_as_it_was() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    conv_layers(model, images(1), linear=True, batch_norm="fold")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


# ---- the penalty ------------------------------------------------------------------------------------------


def test_the_log_of_the_product_is_certified_and_differentiable() -> None:
    model = network()
    model(images())
    layers = conv_layers(model, images(1), linear=True, batch_norm="fold")
    value = penalty(model, "log_lipschitz", layers=layers)
    assert float(value.detach()) == float(penalty(model, "log_lipschitz", example_input=images(1)).detach())
    least = sum(math.log(norm) for norm in dense_norms(model).values())
    # Reflect padding counts with its own norm, and a finite image may have far smaller norms than every size has.
    assert least <= float(value.detach()) <= least + 3
    value.backward()
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            assert float(parameter.grad.norm()) > 0, name
    # The product is homogeneous in the weights of each map.
    scale = float((model[14].weight.grad * model[14].weight.detach()).sum())
    assert scale == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ValueError, match="needs an example_input"):
        penalty(model, "log_lipschitz")


def test_bounds_hold_for_every_size_of_image() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    norms = StepProjection(model, 1.0, batch_norm="fold", example_input=images(1)).project()
    exact = copy.deepcopy(model).double().eval()
    for extent in (3, 8, 13):
        assert dense_norm(exact, torch.zeros(2, extent, extent, dtype=torch.float64)) <= norms["0"] <= SLACK
