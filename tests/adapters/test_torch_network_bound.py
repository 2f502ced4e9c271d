"""Tests of the PyTorch adapter: a bound for a whole network, shared out over its layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convsv_adapters.torch import StepProjection, project_after_step
from torch import nn
from torch.nn import functional as F

import convsv_core as convsv


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class ResNet(nn.Module):
    """A residual network with a normalisation behind each convolution, and one that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.BatchNorm2d(2)
        self.stem, self.first, self.second = (
            nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1, **options), nn.BatchNorm2d(4))
            for inputs, options in ((2, {"padding_mode": "reflect"}), (4, {"bias": False}), (4, {"bias": False}))
        )
        self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(self.start(x)))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.head(F.max_pool2d(x, 2).mean(dim=(2, 3)))


LAYERS = {"start", "stem.0", "first.0", "second.0", "head.0", "head.3"}


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 2, 6, 6)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(2 * images()), torch.randint(3, (16,))).backward()
        optimizer.step()


@pytest.mark.parametrize(("share", "limit"), [("equal", 1.0), ("norms", 1.0), ("norms", 30.0)])
def test_the_network_is_certified_within_the_bound_after_every_epoch(share: str, limit: float) -> None:
    model = ResNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    projection = project_after_step(
        optimizer, model, network_bound=limit, share=share, example_input=images(1), headroom=0.0
    )
    assert projection.bounds.keys() == LAYERS
    equal = len({round(bound, 9) for bound in projection.bounds.values()}) == 1
    assert equal == (share == "equal")
    for _ in range(3):
        train(model, optimizer, 4)
        norms = projection.project()
        assert all(norms[name] <= bound for name, bound in projection.bounds.items())
        model.eval()
        found = convsv.lipschitz(model, images(1))
        model.train()
        assert found.lower is not None
        assert found.lower <= found.upper <= limit
        for image in images(4).double():
            exact = copy.deepcopy(model).double().eval()
            matrix = torch.autograd.functional.jacobian(lambda x, exact=exact: exact(x[None])[0], image)
            assert float(torch.linalg.matrix_norm(matrix.flatten(1), 2)) <= found.upper


def test_the_whole_bound_is_given_out() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    bounds = StepProjection(model, network_bound=8.0, example_input=images(1)).bounds
    assert list(bounds.values()) == pytest.approx([2.0] * 3, rel=2e-4)
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Sum(nn.Conv2d(2, 2, 3, padding=1)))
    bounds = StepProjection(model, network_bound=6.0, example_input=images(1)).bounds  # b (1 + b) = 6
    assert list(bounds.values()) == pytest.approx([2.0] * 2, rel=2e-4)


class Sum(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class UsedTwice(nn.Module):
    """A convolution whose output is used with its normalisation and without it, and a normalisation used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y + self.norm(x)


def test_a_layer_with_and_without_its_normalisation_counts_for_each() -> None:
    model = UsedTwice()
    with torch.no_grad():
        model.conv.weight.mul_(10)
    projection = StepProjection(model, network_bound=6.0, example_input=images(1))
    assert list(projection.bounds.values()) == pytest.approx([2.0, 2.0], rel=2e-4)  # each of three terms
    norms = projection.project()
    assert norms["conv"] <= 2
    assert norms["norm"] <= 2
    assert convsv.lipschitz(model.eval(), images(1)).upper <= 6


def test_a_copy_keeps_its_bounds_and_replaced_modules_get_them() -> None:
    model = ResNet()
    projection = StepProjection(model, network_bound=1.0, example_input=images(1))
    for other in (copy.deepcopy(projection), pickle.loads(pickle.dumps(projection))):
        assert other.bounds == projection.bounds
        other.project()
        assert convsv.lipschitz(other._model.eval(), images(1)).upper <= 1
    model.first[0] = nn.Conv2d(4, 4, 5, padding=2)
    projection.project()
    assert convsv.lipschitz(model.eval(), images(1)).upper <= 1


@pytest.mark.parametrize(
    ("model", "limit", "message"),
    [
        (lambda: Sum(nn.Conv2d(2, 2, 3, padding=1)), 0.5, "would be 1 even if every bounded layer were zero"),
        (lambda: Sum(nn.Conv2d(2, 2, 3, padding=1)), 1.0, "bounds below"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.PReLU()), 1.0, "'1'.* depends on parameters"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.LayerNorm(4)), 1.0, "depends on parameters|no bound"),
        (lambda: Gated(), 1.0, "no bound"),
        (lambda: Functional(), 1.0, "holds weights of no bounded layer"),
        (lambda: Scaled(), 1.0, "depends on parameters"),
    ],
)
def test_networks_that_cannot_be_bounded_are_refused(
    model: Callable[[], nn.Module], limit: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StepProjection(model(), network_bound=limit, example_input=images(1))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kernel = nn.Conv2d(2, 2, 3), nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.conv(x), self.kernel)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.conv(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.conv.weight.sum()


def test_wrong_options() -> None:
    model, batch = ResNet(), images(1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "bound=None and network_bound=None"),
        ({"bound": 1.0, "network_bound": 1.0}, "wanted a number for one of them"),
        ({"network_bound": 0.0, "example_input": batch}, "network_bound=0.0"),
        ({"network_bound": 1.0}, "needs an example_input"),
        ({"network_bound": 1.0, "circular": True, "example_input": batch}, "circular=True"),
        ({"network_bound": 1.0, "layers": [], "example_input": batch}, "with layers"),
        ({"network_bound": 1.0, "share": "half", "example_input": batch}, "share='half'"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            StepProjection(model, **options)
    assert all(module.training for module in model.modules())
