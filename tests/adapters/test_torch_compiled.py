"""Tests of `torch.compile` with PyTorch's parametrization and penalty: the values, the derivatives, and the calls."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convsv_adapters.torch import _operators as operators
from convsv_adapters.torch import _shared_norms as shared
from convsv_adapters.torch import conv_layers, operator_norm, penalty
from torch import nn
from torch_models import recorded_norms

import convsv_core as convsv

COMPILER = shutil.which("g++") or shutil.which("clang++")
INDUCTOR = (pytest.mark.thorough, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"))
BACKENDS = ["aot_eager", pytest.param("inductor", marks=INDUCTOR)]
ROUNDING = 256
"""Factor of eps within which compiled sums agree with eager ones: a guess. They differ in the order of the terms."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()  # A test that compiles one function for many models would reach PyTorch's limit.


def compiled(function: Any, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    found, wanted = found.detach(), wanted.detach()
    assert found.dtype == wanted.dtype
    atol = ROUNDING * torch.finfo(wanted.dtype).eps * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    return recorded_norms(monkeypatch)


class Folded(nn.Module):
    """Network with each way in which a normalisation and a layer stand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.behind = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.alone = nn.BatchNorm2d(4)
        self.scaled = operator_norm(nn.Conv2d(4, 4, 3, padding=1), bound=0.5)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.turned, self.grouped = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.bare = nn.Conv2d(6, 4, 3, stride=2)
        self.twice = nn.Conv2d(4, 4, 1, bias=False)
        self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last, self.dense = nn.Linear(4, 5), nn.BatchNorm1d(5)
        for norm in self.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_var.uniform_(0.5, 2)
                if norm.affine:
                    nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        image = self.alone(torch.tanh(self.behind(self.first(batch))))
        image = torch.tanh(self.bare(torch.tanh(self.grouped(self.turned(self.plain(self.scaled(image)))))))
        output = self.twice(image)
        image = self.one(output) + self.other(output)
        return self.dense(self.last(image.mean((2, 3))))


def folded(dtype: torch.dtype = torch.float64) -> tuple[Folded, torch.Tensor]:
    return Folded().to(dtype), torch.randn(3, 3, 8, 8, dtype=dtype)


def log_lipschitz(model: nn.Module, batch: torch.Tensor, *, first: bool = False) -> Callable[[torch.Tensor], Any]:
    """Return the loss of a model with the penalty, which is computed before or after the forward pass."""
    layers = conv_layers(model, batch, linear=True, batch_norm="fold")

    def loss(batch: torch.Tensor) -> torch.Tensor:
        if first:
            return penalty(model, "log_lipschitz", layers=layers) + model(batch).square().mean()
        return model(batch).square().mean() + penalty(model, "log_lipschitz", layers=layers)

    return loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}


# ---- normalisations that are folded in ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "first", "dtype", "backend"),
    [
        (True, True, torch.float32, "aot_eager"),
        (True, False, torch.float64, "aot_eager"),
        (False, True, torch.float64, "aot_eager"),
        pytest.param(True, False, torch.float32, "inductor", marks=INDUCTOR),
        pytest.param(False, True, torch.float64, "inductor", marks=INDUCTOR),
    ],
)
def test_a_penalty_with_normalisations_is_the_same(
    training: bool, first: bool, dtype: torch.dtype, backend: str
) -> None:
    model, batch = folded(dtype)
    model.train(training)
    other = copy.deepcopy(model)
    eager, graph = log_lipschitz(model, batch, first=first), compiled(log_lipschitz(other, batch, first=first), backend)
    for _ in range(2):  # In training mode the second step has other running variances.
        for one in (model, other):
            one.zero_grad()
        wanted, found = eager(batch), graph(batch)
        assert_near(found, wanted)
        wanted.backward()
        found.backward()
        for name, gradient in gradients(model).items():
            same = gradients(other)[name]
            assert gradient is not None, name
            assert same is not None, name
            assert_near(same, gradient)
    for wanted, found in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_penalty_has_derivatives_by_what_needs_them() -> None:
    model, batch = folded()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("behind.weight", "last.weight"))
    layers = conv_layers(model, batch, linear=True, batch_norm="fold")
    found = []
    for function in (penalty, compiled(penalty)):
        model.zero_grad()
        function(model, "log_lipschitz", layers=layers).backward()
        found.append(gradients(model))
    wanted, same = found
    assert {name for name, one in same.items() if one is not None} == {"behind.weight", "last.weight"}
    for name in ("behind.weight", "last.weight"):
        assert_near(same[name], wanted[name])
    model.requires_grad_(True)  # The graph has no derivative by the others, so it is compiled anew.
    compiled(penalty)(model, "log_lipschitz", layers=layers).backward()
    assert all(gradients(model)[name] is not None for name in ("first.weight", "one.weight"))


# ---- one call for all layers of a shape --------------------------------------------------------------------


def alike(count: int = 3) -> nn.Sequential:
    return nn.Sequential(*(operator_norm(nn.Conv2d(4, 4, 3, padding=1), bound=0.25) for _ in range(count)))


def original(layer: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.parametrizations.weight.original
    return weight


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_layers_of_a_shape_are_computed_together(calls: list[tuple[int, bool]], backend: str) -> None:
    model, batch = alike(), torch.randn(2, 4, 6, 6)
    graph, optimizer = compiled(model, backend), torch.optim.SGD(model.parameters(), lr=0.1)
    graph(batch)
    for step in range(4):
        calls.clear()
        graph(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        graph(batch)
        graph(batch)
        # The parametrization itself has asked when it was registered, and is not asked any more.
        assert calls == [(3, True)] or (step == 0 and calls == [(6, True)])
    calls.clear()
    with torch.no_grad():
        assert_near(graph(batch), copy.deepcopy(model)(batch))


def test_layers_that_are_trained_by_a_compiled_model_are_those_of_an_eager_one() -> None:
    models, batch = [alike()], torch.randn(2, 4, 6, 6)
    models.append(copy.deepcopy(models[0]))
    for model, function in zip(models, (models[0], compiled(models[1])), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            function(batch).square().sum().backward()
            optimizer.step()
    for wanted, found in zip(*models, strict=True):
        assert_near(original(found), original(wanted))


def test_a_compiled_layer_never_has_the_norm_of_former_values() -> None:
    model, batch = alike(), torch.randn(2, 4, 6, 6)
    graph = compiled(model)
    graph(batch)
    changes: list[Callable[[torch.Tensor], object]] = [
        lambda weight: weight.data.mul_(3),
        lambda weight: weight.data.view(-1)[-1:].add_(1),
        lambda weight: setattr(weight, "data", torch.randn_like(weight)),
        lambda weight: weight.detach().numpy().__imul__(0.01),
    ]
    for change in changes:
        for layer in reversed(model):
            change(original(layer))
            with torch.no_grad():
                found = graph(batch)
                wanted = copy.deepcopy(model)(batch)
            assert_near(found, wanted)


def test_a_weight_that_changes_within_the_graph_has_its_own_norm() -> None:
    layer = alike(1)[0]
    weight, batch = original(layer), torch.randn(2, 4, 6, 6)

    def twice(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            once = layer(batch)
            weight.mul_(-2)
            return once + layer(batch)

    start = weight.detach().clone()
    wanted = twice(batch)
    with torch.no_grad():
        weight.copy_(start)
    assert_near(compiled(twice)(batch), wanted)
    assert torch.equal(weight, -2 * start)


@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (8, 1, 3, 3), (1, 6, 2, 3), (3, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_operators_are_what_the_compiler_takes_them_for(
    layout: torch.memory_format, shape: tuple[int, ...]
) -> None:
    """PyTorch checks schema, fake and derivative. The second call finds kept results, which a graph must not get."""
    weight = nn.Parameter(torch.randn(shape).to(memory_format=layout))
    conv = operators.conv_arguments(convsv.Conv("OIHW", padding=1, padding_mode="zeros"))
    number, call = torch.ops.convsv.number, repr(("layer_norm", conv, None, 0.1))
    for _ in range(2):
        torch.library.opcheck(number.default, ([weight], call, [True]))
        torch.library.opcheck(number.default, ([weight.detach()], call, [False]))
    value, (slope,) = number([weight], call, [True])
    kept = slope.detach().clone()
    with torch.no_grad():
        value.zero_()
        slope.zero_()
    again, (same,) = number([weight], call, [True])
    assert same.is_contiguous()
    assert float(again.detach()) > 0
    assert torch.equal(same, kept)
    torch.library.opcheck(torch.ops.convsv.times_slopes.default, (torch.ones(()), [kept], [weight.detach()]))


# ---- dynamic shapes, autocast, modes of gradients, and second derivatives ----------------------------------


def test_shapes_and_numbers_that_change_between_calls() -> None:
    model = alike(2)
    layers = conv_layers(model)

    def loss(batch: torch.Tensor, bound: float) -> torch.Tensor:
        return model(batch).square().mean() + penalty(model, "norm_hinge", layers=layers, bound=bound)

    for options in ({}, {"dynamic": True}):
        torch.compiler.reset()
        graph = compiled(loss, **options)
        for count, extents, bound in ((2, (6, 6), 0.1), (3, (6, 7), 0.1), (5, (9, 8), 0.05)):
            batch, found = torch.randn(count, 4, *extents), []
            for function in (loss, graph):
                model.zero_grad()
                value = function(batch, bound)
                value.backward()
                found.append([value, *(original(layer).grad.clone() for layer in model)])
            for wanted, same in zip(*found, strict=True):
                assert_near(same, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_under_autocast(backend: str) -> None:
    model, batch = alike(), torch.randn(2, 4, 6, 6)
    layers = conv_layers(model)

    def outputs(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return model(batch), model[0].weight, penalty(model, "norm_hinge", layers=layers, bound=0.1)

    graph = compiled(outputs, backend)
    with torch.autocast("cpu", torch.bfloat16):
        (image, weight, term), (same_image, same_weight, same_term) = outputs(batch), graph(batch)
    assert same_image.dtype == image.dtype == torch.bfloat16
    assert_near(same_weight, weight)  # The norm and the penalty keep the digits of float32.
    assert_near(same_term, term)
    torch.testing.assert_close(same_image, image, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)
    wanted, found = (torch.autograd.grad(one.sum(), original(model[0]))[0] for one in (weight, same_weight))
    assert_near(found, wanted)


def test_a_model_that_is_compiled_without_gradients(calls: list[tuple[int, bool]]) -> None:
    model, batch = alike(), torch.randn(2, 4, 6, 6)
    wanted = model(batch)
    wanted.square().sum().backward()
    gradient = original(model[0]).grad.clone()
    model.zero_grad()
    graph = compiled(model)
    for layer in model:
        shared._askers.pop(layer.parametrizations.weight[0])
    calls.clear()
    with torch.no_grad():
        found = graph(batch)
    assert calls
    assert not any(derivative for _, derivative in calls)
    assert not found.requires_grad
    assert_near(found, wanted)
    found = graph(batch)
    found.square().sum().backward()
    assert_near(original(model[0]).grad, gradient)
    with torch.inference_mode():
        assert_near(graph(batch), wanted)


def test_gradients_that_are_off_in_a_part_of_a_graph() -> None:
    model, batch = folded()
    layers = conv_layers(model, batch, linear=True, batch_norm="fold")

    def loss() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            watched = penalty(model, "log_lipschitz", layers=layers)
        return watched, penalty(model, "log_lipschitz", layers=layers[:1])

    watched, term = compiled(loss)()
    assert not watched.requires_grad
    assert_near(watched, loss()[0])
    term.backward()
    assert model.bare.weight.grad is None
    assert float(model.first.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", ["parametrization", "squared_norm", "log_lipschitz"])
@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_a_second_derivative_through_a_graph_is_refused(kind: str, backend: str) -> None:
    model, batch = folded()
    layers = conv_layers(model, batch, linear=True, batch_norm="fold")
    weight = original(model.scaled) if kind == "parametrization" else model.bare.weight

    def function() -> torch.Tensor:
        return model.scaled.weight.sum() if kind == "parametrization" else penalty(model, kind, layers=layers)

    def plain() -> torch.Tensor:
        """Return a term of which PyTorch has second derivatives, so that a missing one would not be noticed."""
        return weight.pow(3).sum()

    (wanted,) = torch.autograd.grad(function() + plain(), weight)
    (first,) = torch.autograd.grad(compiled(function, backend)() + plain(), weight, create_graph=True)
    assert_near(first, wanted)
    error, words = RuntimeError, "double backward"  # by PyTorch itself
    if backend == "eager":
        error, words = NotImplementedError, "first derivative alone"
    with pytest.raises(error, match=words):
        torch.autograd.grad(first.square().sum(), weight)


def test_a_compiled_model_can_be_exported_too() -> None:
    model = nn.Sequential(alike(), operator_norm(nn.Conv2d(4, 4, 3, padding=1), (6, 6), 0.3, circular=True)).eval()
    batch = torch.randn(2, 4, 6, 6)
    compiled(model)(batch)
    shapes = ({0: torch.export.Dim("count", min=1, max=16)},)
    exported = torch.export.export(model, (batch,), dynamic_shapes=shapes)
    assert not any("convsv" in str(node.target) for node in exported.graph.nodes)
    for count in (2, 3):
        batch = torch.randn(count, 4, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(batch), model(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bound", [torch.tensor(0.1), float("inf")], ids=str)
def test_options_of_a_compiled_penalty_are_finite_numbers(bound: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    graph = torch.compile(
        penalty, backend="aot_eager"
    )  # With `fullgraph` the error is PyTorch's, with these words in it.
    with pytest.raises((TypeError, ValueError), match=r"in torch.compile: wanted a (finite )?number"):
        graph(model, "norm_hinge", layers=conv_layers(model), bound=bound)
