"""Tests of the norms that layers share in PyTorch: no weight ever gets the norm of another one, or of its past."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convsv_adapters.torch import OperatorNorm, conv_layers, operator_norm, penalty
from convsv_adapters.torch import _shared_norms as shared
from convsv_adapters.torch._operators import conv_arguments
from torch import nn
from torch.nn.utils import parametrize
from torch_models import recorded_norms

import convsv_core as convsv

BOUND = 0.25
"""Every random weight of the tests has a larger norm."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_model() -> nn.Sequential:
    return nn.Sequential(*(operator_norm(nn.Conv2d(4, 4, 3, padding=1), bound=BOUND) for _ in range(3)))


def original(layer: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.parametrizations.weight.original
    return weight


def alone(layer: nn.Module) -> torch.Tensor:
    """Return the scaled weight by the core's function for one kernel."""
    weight = original(layer)
    norm = convsv.norm_upper_bound(weight, convsv.Conv("OIHW", padding=1, padding_mode="zeros"))
    return weight / torch.clamp(norm / BOUND, min=1.0)


def assert_current(model: nn.Sequential) -> None:
    for layer in model:
        torch.testing.assert_close(layer.weight, alone(layer), rtol=1e-6, atol=1e-7)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    return recorded_norms(monkeypatch)


def counts_of(calls: list[tuple[int, bool]]) -> list[int]:
    """Return the number of kernels of each computation of norms."""
    return [count for count, _ in calls]


def fill(weight: torch.Tensor) -> None:
    weight.data.normal_()  # PyTorch counts no version for it.


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda weight: weight.detach().mul_(-3).add_(0.1),
    "data": fill,
    "numpy": lambda weight: weight.detach().numpy().__setitem__((0, 0, 0, 0), 7.0),
    "set_": lambda weight: weight.data.set_(torch.randn(4, 4, 3, 3)),
    "assignment": lambda weight: setattr(weight, "data", torch.randn(4, 4, 3, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_changed_weight_gets_its_own_norm(change: str, which: int) -> None:
    model = make_model()
    assert_current(model)
    with torch.no_grad():
        CHANGES[change](original(model[which]))
    assert_current(model)


def test_a_weight_that_changes_between_two_layers_gets_its_own_norm() -> None:
    """The first layer has the norms of the others computed, before these change."""
    model = make_model()
    assert_current(model)
    with torch.no_grad():
        fill(original(model[0]))
        fill(original(model[1]))
    _ = model[0].weight
    fill(original(model[1]))
    assert_current(model)


def test_training_computes_the_norms_of_a_shape_once_a_step(calls: list[tuple[int, bool]]) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(2, 4, 8, 8)
    calls.clear()
    for _ in range(3):
        loss = model(images).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_current(model)
    assert counts_of(calls).count(3) >= 3
    assert len(calls) <= 6


def test_the_layers_of_all_shapes_are_computed_by_one_call(calls: list[tuple[int, bool]]) -> None:
    model = nn.Sequential(
        operator_norm(nn.Conv2d(4, 4, 3, padding=1), bound=BOUND),
        operator_norm(nn.Conv2d(4, 8, 3, stride=2, padding=1), bound=BOUND, input_shape=(8, 8), circular=True),
        operator_norm(nn.Conv2d(8, 4, 1).double(), bound=BOUND, mode="normalise"),
        operator_norm(nn.Conv2d(4, 4, 3, padding=1), bound=BOUND),
    )
    with torch.no_grad():
        for layer in model:
            fill(original(layer))
    calls.clear()
    weights = [layer.weight for layer in model]
    assert counts_of(calls) == [4]
    norms = [layer.parametrizations.weight[0].norm(original(layer)) for layer in model]
    for layer, weight, norm, mode in zip(model, weights, norms, ("bound", "bound", "normalise", "bound"), strict=True):
        divisor = norm / BOUND if mode == "normalise" else torch.clamp(norm / BOUND, min=1.0)
        torch.testing.assert_close(weight, original(layer) / divisor, rtol=1e-6, atol=1e-7)


def test_a_weight_that_has_no_norm_spoils_no_other(calls: list[tuple[int, bool]]) -> None:
    model = make_model()
    with torch.no_grad():
        fill(original(model[0]))
        original(model[2]).fill_(torch.nan)
    torch.testing.assert_close(model[0].weight, alone(model[0]), rtol=1e-6, atol=1e-7)


def test_a_model_without_norms_costs_the_others_one_step(calls: list[tuple[int, bool]]) -> None:
    """Someone keeps a model whose training has diverged, and trains another one."""
    diverged, model = make_model(), make_model()
    with torch.no_grad():
        original(diverged[1]).fill_(torch.nan)
    calls.clear()
    for _ in range(3):
        with torch.no_grad():
            for layer in model:
                fill(original(layer))
        assert_current(model)
    assert counts_of(calls)[-2:] == [3, 3]
    with pytest.raises(ValueError, match="NaN"):
        _ = diverged[1].weight


def test_a_copy_that_is_not_called_costs_nothing(calls: list[tuple[int, bool]]) -> None:
    model, other = make_model(), make_model()
    calls.clear()
    for _ in range(4):
        with torch.no_grad():
            for layer in (*model, *other):
                fill(original(layer))
        for layer in model:
            _ = layer.weight
    assert counts_of(calls)[-1] == 3
    assert_current(other)


def test_copies_pickles_and_loaded_states_have_norms_of_their_own() -> None:
    model = make_model()
    assert_current(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in copied:
            fill(original(layer))
    assert_current(copied)
    assert_current(model)
    norm = pickle.loads(pickle.dumps(OperatorNorm(convsv.Conv("OIHW"), bound=BOUND)))
    assert torch.isfinite(norm(torch.randn(4, 4, 3, 3))).all()
    model.load_state_dict(copied.state_dict())
    assert_current(model)


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    before = len(shared._askers)
    model = make_model()
    assert len(shared._askers) == before + 3
    del model
    gc.collect()
    assert len(shared._askers) <= before


def test_a_bad_weight_is_reported_by_its_own_layer() -> None:
    model = make_model()
    assert_current(model)
    with torch.no_grad():
        for layer in model:
            fill(original(layer))
        original(model[2])[0, 0, 0, 0] = torch.nan
    torch.testing.assert_close(model[0].weight, alone(model[0]), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="NaN"):
        _ = model[2].weight


def test_threads_that_share_layers_get_the_norms_of_their_weights() -> None:
    norm = OperatorNorm(convsv.Conv("OIHW"), bound=BOUND)
    failures = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            weight = torch.randn(4, 4, 3, 3, generator=generator)
            wanted = weight * (BOUND / convsv.norm_upper_bound(weight, norm.conv))
            if not torch.allclose(norm(weight), wanted, rtol=1e-5, atol=1e-7):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("mode", ["bound", "normalise"])
@pytest.mark.parametrize("scale", [0.001, 1.0])
def test_derivatives_are_those_of_the_single_norm(mode: Any, scale: float) -> None:
    """Also for a layer whose norm was computed beside another, or without a derivative."""
    model = nn.Sequential(*(operator_norm(nn.Conv2d(2, 2, 3), bound=BOUND, mode=mode) for _ in range(2)))
    model.double()
    with torch.no_grad():
        for layer in model:
            original(layer).normal_().mul_(scale)
            _ = layer.weight
    for layer in model:
        norm, weight = layer.parametrizations.weight[0], original(layer)
        gradient = torch.randn_like(weight)
        (found,) = torch.autograd.grad(layer.weight, weight, gradient)
        divisor = norm.divisor(convsv.norm_upper_bound(weight, norm.conv))
        (wanted,) = torch.autograd.grad(weight / divisor, weight, gradient)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda w: norm(w).square(), weight)


def test_functions_of_torch_func_take_the_single_norm() -> None:
    layer = operator_norm(nn.Conv2d(4, 4, 3).double(), bound=BOUND)
    norm = layer.parametrizations.weight[0]
    weight = original(layer).detach()
    found = torch.func.grad(lambda w: norm(w).square().sum())(weight)
    leaf = weight.clone().requires_grad_()
    norm(leaf).square().sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-12)


def test_cached_weights_are_computed_once(calls: list[tuple[int, bool]]) -> None:
    model = make_model()
    with torch.no_grad():
        for layer in model:
            fill(original(layer))
    calls.clear()
    with parametrize.cached():
        assert_current(model)
        fill(original(model[0]))
        assert model[0].weight is model[0].weight  # PyTorch's own cache holds until the context ends.
    assert_current(model)
    assert sum(counts_of(calls)) == 4


# ---- the penalty -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [("norm_hinge", {"bound": 0.1}), ("squared_norm", {}), ("log_lipschitz", {})]
)
@pytest.mark.parametrize("with_extents", [False, True])
def test_a_penalty_of_layers_together_is_that_of_each(kind: str, options: dict[str, Any], with_extents: bool) -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)), nn.Conv2d(4, 6, 3)).double()
    batch = torch.zeros(1, 4, 9, 9, dtype=torch.float64) if with_extents else None
    layers = conv_layers(model, batch)
    found = penalty(model, kind, layers=layers, **options)
    gradients = torch.autograd.grad(found, list(model[0].parameters())[:1], create_graph=True)
    single = sum(penalty(model, kind, layers=[layer], **options) for layer in layers)
    assert float(found.detach()) == pytest.approx(float(torch.as_tensor(single).detach()), rel=1e-12)
    weight = model[0].weight
    wanted = torch.autograd.grad(penalty(model, kind, layers=layers[:1], **options), weight, create_graph=True)
    torch.testing.assert_close(gradients[0], wanted[0], rtol=1e-10, atol=1e-12)
    second = [torch.autograd.grad(one[0].square().sum(), weight)[0] for one in (gradients, wanted)]
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-10)


# ---- compiled graphs ---------------------------------------------------------------------------------------


def compiled_norm(weight: torch.Tensor, derivative: bool) -> Any:
    """Return what the operator of a compiled graph returns for a weight of `make_model`."""
    conv = conv_arguments(convsv.Conv("OIHW", padding=1, padding_mode="zeros"))
    return torch.ops.convsv.number([weight], repr(("layer_norm", conv, None, 0.1)), [derivative])


@pytest.mark.parametrize("derivative", [False, True])
def test_a_graph_that_hands_on_copies_has_their_norms(calls: list[tuple[int, bool]], derivative: bool) -> None:
    """The C++ compiler hands on copies of a convolution's weight, in the layout that it prefers."""
    model = make_model()
    with torch.no_grad():
        for layer in model:
            original(layer).mul_(1.5 + derivative)  # No other model has these weights.
    calls.clear()
    for layer in model:
        weight = original(layer)
        norm, slopes = compiled_norm(weight.detach().clone(memory_format=torch.channels_last), derivative)
        wanted = convsv.norm_upper_bound(weight, convsv.Conv("OIHW", padding=1, padding_mode="zeros"))
        torch.testing.assert_close(norm, wanted.detach(), rtol=1e-6, atol=0)
        assert len(slopes) == derivative
        for slope in slopes:
            (gradient,) = torch.autograd.grad(wanted, weight)
            torch.testing.assert_close(slope, gradient, rtol=0, atol=1e-5)
    assert counts_of(calls)[0] >= 3
    assert sum(counts_of(calls)[1:]) == 0
    changed = original(model[0]).detach() * 3
    assert float(compiled_norm(changed, False)[0]) == pytest.approx(3 * float(compiled_norm(changed / 3, False)[0]))


def test_a_copy_of_a_frozen_weight_has_a_derivative() -> None:
    model = make_model()
    frozen = original(model[0]).requires_grad_(False)
    norm, (slope,) = compiled_norm(frozen.clone(), True)
    torch.testing.assert_close(torch.sum(slope * frozen), norm, rtol=1e-5, atol=0)  # The norm is homogeneous.
