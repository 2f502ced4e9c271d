"""Tests of PyTorch modules as graphs of maps: each operator computes what PyTorch computes; wrong calls are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from convsv_adapters.torch import operator_norm
from convsv_adapters.torch._graph import model_graph
from network_graphs import RandomNetwork, difference, torch_jacobian_norm, unsupported
from torch import nn

import convsv_core as convsv
from convsv_core._network.attained import NUDGE
from convsv_core.networks import Elementwise, Pad, Scale

TOLERANCE = 1e-10
"""Largest difference from PyTorch in double precision, in units of the largest element of the output."""


class Function(nn.Module):
    """A module whose forward pass is a function of itself and an input."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.inner = inner
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return a random input without elements at which a function has a kink or is not defined."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(shape or (1, 4, 8, 8), generator=random, dtype=torch.float64) + 0.1


def check(model: nn.Module, x: torch.Tensor) -> Any:
    """Check that the graph of a model computes what the model computes, and return the graph."""
    model = model.double().eval()
    graph = model_graph(model, x)
    assert unsupported(graph) == []
    with torch.no_grad():
        assert difference(graph, [x.numpy()], model(x).numpy()) < TOLERANCE
    return graph


# ---- operators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers",
    [
        # Convolutions of every geometry.
        [nn.Conv2d(4, 6, 3, 2, (2, 1), 2, 2), nn.Conv2d(6, 6, 3, groups=6, padding="same")],
        [nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")],
        [nn.Conv2d(4, 4, (3, 2), padding=(2, 1), padding_mode="replicate", bias=False), nn.ZeroPad2d((-1, 2, 1, 0))],
        [nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False), nn.ConvTranspose2d(6, 4, 3, 3, 1, 2, groups=2, dilation=2)],
        # Pooling and resizing.
        [nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d((3, 4)), nn.AdaptiveAvgPool2d((1, 2))],
        [nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.AdaptiveAvgPool2d(1)],
        [nn.AvgPool2d((3, 2), (2, 1), (1, 0), divisor_override=5), nn.MaxPool2d(3, 2, 1, 1, ceil_mode=True)],
        [nn.Upsample(size=(5, 13), mode="bilinear", align_corners=True), nn.AdaptiveMaxPool2d(1)],
        [
            nn.Upsample(scale_factor=1.7, mode="bicubic"),
            nn.MaxPool2d(3, 1, 1, 2),
        ],
        [nn.Upsample(scale_factor=1.7, mode="nearest"), nn.Upsample(scale_factor=(1.3, 0.6), mode="nearest-exact")],
        [nn.Upsample(scale_factor=(1.3, 0.6), mode="bilinear"), nn.PixelShuffle(2), nn.PixelUnshuffle(2)],
        # Normalisation.
        [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm((8, 8)), nn.RMSNorm(8)],
        [nn.ChannelShuffle(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 5), nn.Softmax(-1), nn.LogSoftmax(1)],
        # Functions of one number.
        [nn.Hardswish(), nn.SiLU(), nn.Mish(), nn.GELU(), nn.GELU("tanh"), nn.ELU(0.7), nn.SELU(), nn.CELU(0.6)],
        [nn.PReLU(4), nn.LeakyReLU(0.2), nn.Hardtanh(-0.3, 0.4), nn.ReLU6(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh()],
        [nn.LogSigmoid(), nn.Softplus(2.0), nn.Softsign(), nn.Threshold(-0.2, -0.2), nn.ReLU(), nn.RReLU(), nn.GLU(1)],
    ],
    ids=lambda layers: "-".join(type(layer).__name__ for layer in layers),
)
def test_modules_are_described_exactly(layers: list[nn.Module]) -> None:
    torch.manual_seed(0)
    check(nn.Sequential(*copy.deepcopy(layers)), image() - 0.55)


FUNCTIONS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "parts": lambda m, x: torch.cat([*x.chunk(2, 1)[::-1], x.split([1, 3], 1)[1], x.unbind(1)[2][:, None]], 1),
    "views": lambda m, x: (
        x.narrow(2, 1, 3).unflatten(1, (2, 2)).movedim(1, 2).transpose(0, 1).squeeze(1)[..., 1:, None]
    ),
    "matrices": lambda m, x: (
        m.weight @ (x.reshape(4, 64).T @ m.weight).T + torch.addmm(m.weight[0], m.weight, m.weight)[:, :1]
    ),
    "indices": lambda m, x: x[:, [0, 2]].index_select(2, torch.tensor([1, 1, 5])).flip(3).roll((1, 2), (2, 3)),
    "copies": lambda m, x: x.repeat(2, 1, 1, 3).repeat_interleave(2, 2) + x.mean().expand(1, 1, 1, 24),
    "reductions": lambda m, x: (
        x.sum((0, 2)) + x.amax((2, 3)).T + x.max(2)[0][0, 0] + x.logsumexp(1)[0, :4] + x.norm(dim=1)[0, 0]
    ),
    "arithmetic": lambda m, x: (2 - x / 2 + 3 * x - torch.rsub(x, 1, alpha=2)) * m.weight[:, :1, None] + x * x - 1 / x,
    "powers": lambda m, x: x**2 + x.pow(3) + x.sqrt() + x.rsqrt() + x.exp() + x.log() + torch.erf(x) + x.abs() + x**-1,
    "extrema": lambda m, x: (
        torch.maximum(x, 1 - x) + torch.minimum(x, m.weight[0, 0]) + x.clamp(0.2, 0.6) + x.clamp_min(0.3)
    ),
    "padding": lambda m, x: F.pad(x, (1, 2, 0, 1), value=0.5) + F.pad(x, (2, 1, 1, 0), mode="circular"),
    "stack": lambda m, x: torch.stack([x, x.square()], 1).cumsum(3) + torch.zeros(2, 1, 1, 1).double(),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, 2 * x, 1 - x, attn_mask=m.weight.repeat(2, 2)),
    "in place": lambda m, x: x.clone().add_(1).mul_(x).relu_(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_described_exactly(name: str) -> None:
    torch.manual_seed(0)
    check(Function(FUNCTIONS[name]), image())


@pytest.mark.parametrize("ndim", [1, 3])
def test_other_numbers_of_axes_and_no_batch(ndim: int) -> None:
    kinds = {1: (nn.Conv1d, nn.ConvTranspose1d, nn.AvgPool1d, nn.MaxPool1d, "linear")}
    kinds[3] = (nn.Conv3d, nn.ConvTranspose3d, nn.AvgPool3d, nn.MaxPool3d, "trilinear")
    conv, transposed, average, largest, mode = kinds[ndim]
    layers = (conv(2, 4, 3, padding=1), average(2), transposed(4, 2, 2, 2), largest(2))
    check(nn.Sequential(*layers), image(2, *(8,) * ndim))
    check(nn.Sequential(*layers, nn.Upsample(scale_factor=2, mode=mode)), image(1, 2, *(8,) * ndim))


def test_batch_normalisation_is_a_scale_of_the_stored_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False))
    for module in model[1:]:
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    nn.init.normal_(model[1].weight)
    graph = check(model, image())
    (first,) = (node for node in graph if node.name == "1")
    assert isinstance(first.kind, Scale)
    wanted = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    np.testing.assert_allclose(first.kind.scale.ravel(), wanted.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "parametrize",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        operator_norm,
    ],
)
def test_weights_that_the_forward_pass_computes_are_computed_once(parametrize: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(parametrize(nn.Conv2d(4, 5, 3, padding=1)), nn.ReLU())
    model(image().float())  # The old form of spectral normalisation has its first vectors from here.
    graph = model_graph(model.eval(), image().float())
    with torch.no_grad():
        # The graph's weights are computed in double precision, where the rounding error bound of a norm is smaller.
        tolerance = 1e-5 if parametrize is operator_norm else 1e-6
        assert difference(graph, [image()], model(image().float())) < tolerance
    assert len(graph) == 3


def test_nodes_have_the_names_of_modules_and_of_pytorch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.pad(x + self.first(x).sigmoid(), (1, 1, 0, 0), mode="circular")

    graph = model_graph(Net().eval(), image().float())
    assert [node.name for node in graph] == ["x", "first", "sigmoid", "add", "pad"]
    assert graph.find("first") == "first"
    assert isinstance(graph["pad"].kind, Pad)
    assert graph["pad"].kind.mode == "circular"
    assert isinstance(graph["sigmoid"].kind, Elementwise)
    assert graph["sigmoid"].op == "aten.sigmoid.default"


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.BatchNorm2d(4)),
            r"module '0' normalises by the mean .* batch.*training mode: wanted model\.eval",
        ),
        (nn.Sequential(nn.Dropout(0.5)), r"draws random numbers.*training mode: wanted model\.eval"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), r"changes 'parametrizations.*training mode"),
        (Function(lambda m, x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)).eval(), "no fixed map$"),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), "no fixed map$"),
        (Function(lambda m, x: x + torch.rand(1)).eval(), "random numbers"),
        (Function(lambda m, x: x if x.sum() > 0 else -x).eval(), "control flow"),
        (Function(lambda m, x: x[:, : int(x.sum())]).eval(), "shapes that depend on values"),
        (Function(lambda m, x: x[x > 0]).eval(), "shape that depends on values"),
        (Function(lambda m, x: torch.zeros(3)).eval(), "nothing that depends on its input"),
        (nn.Conv2d(3, 4, 3).eval(), "expected input.* to have 3 channels, but got 4"),
    ],
)
def test_what_is_no_fixed_map_is_refused(model: nn.Module, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = copy.deepcopy(model.state_dict())
    mode = model.training
    with pytest.raises(ValueError, match=message):
        convsv.lipschitz(model, image().float())
    assert model.training is mode
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert capfd.readouterr().out == ""


def test_a_model_needs_an_input_of_floating_point_numbers() -> None:
    with pytest.raises(ValueError, match="example_input=None"):
        convsv.lipschitz(nn.ReLU().eval())
    with pytest.raises(ValueError, match=r"torch.int64: wanted floating-point"):
        convsv.lipschitz(nn.ReLU().eval(), torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("model", "op"),
    [
        (Function(lambda m, x: m.inner(x[0, 0])[0], nn.LSTM(8, 4)), "aten.lstm.input"),
        (Function(lambda m, x: torch.fft.fft(x).real), "aten.fft_fft.default"),
        (
            Function(lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
            "aten.scaled_dot_product_attention.default",
        ),
        (Function(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1].double()), "<built-in function getitem>"),
        (Function(lambda m, x: torch.round(x)), "aten.round.default"),
        (nn.Threshold(0.1, 0.0), "aten.threshold.default"),
        (Function(lambda m, x: torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: 1 - a, (x,))), "aten.gt.Scalar"),
    ],
)
def test_what_has_no_rule_is_named_with_the_bound_up_to_it(model: nn.Module, op: str) -> None:
    doubled = Function(lambda m, x: m.inner(2 * x), model).eval()
    found = convsv.lipschitz(doubled, image().float(), lower=False)
    assert found.upper == np.inf
    assert found.missing[0].op == op
    if op not in ("<built-in function getitem>", "aten.gt.Scalar"):
        assert found.missing[0].log10_before == pytest.approx(np.log10(2), abs=1e-9)


def test_a_custom_operator_is_named() -> None:
    @torch.library.custom_op("convsv_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    found = convsv.lipschitz(Function(lambda m, x: twice(x)).eval(), image().float())
    assert [missing.op for missing in found.missing] == ["convsv_test.twice.default"]


# ---- figures -----------------------------------------------------------------------------------------------


def check_sound(seed: int) -> None:
    model = RandomNetwork(seed)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x).numpy()
    assert difference(model_graph(model, x), [x.numpy()], wanted) < TOLERANCE
    found = convsv.lipschitz(model, x, search=1)
    assert not found.missing
    assert found.log10_upper <= found.log10_product + 1e-9
    attained = [torch_jacobian_norm(model, scale * torch.randn_like(x)) for scale in (0.1, 1.0, 3.0)]
    assert found.lower is not None
    assert max(attained) <= found.upper
    assert found.lower <= min(found.upper, torch_jacobian_norm(model, x) * (1 + 100 * NUDGE))  # at an input beside x


@pytest.mark.parametrize("seed", range(5))
def test_no_jacobian_is_above_the_bound(seed: int) -> None:
    check_sound(seed)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(5, 55))
def test_no_jacobian_of_many_networks_is_above_the_bound(seed: int) -> None:
    check_sound(seed)


def residual_network(config: dict[str, Any]) -> nn.Module:
    """Return a ResNet of transformers with random weights and random statistics."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**config))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def test_a_resnet_of_transformers() -> None:
    model = residual_network(
        {"embedding_size": 4, "hidden_sizes": [4, 4, 6, 6], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    )
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"wanted model\.eval"):
        convsv.lipschitz(model, x)
    found = convsv.lipschitz(model.eval(), x)
    assert found.lower is not None
    assert not found.missing
    # The other three have a convolution in their shortcut.
    assert [block.shortcut_upper == 1 for block in found.blocks].count(True) == 5
    assert len(found.blocks) == 8
    assert found.lower <= found.upper
    assert found.log10_upper < found.log10_product


@pytest.mark.thorough
def test_the_resnet_18_of_transformers() -> None:
    model = residual_network(
        {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert difference(model_graph(model, x), [x.numpy()], model(x).logits.numpy()) < 1e-5
    found = convsv.lipschitz(model, x, lower=False)
    assert not found.missing
    assert found.log10_upper < found.log10_product - 2


def test_several_inputs_outputs_and_other_arguments() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, *, twice: bool = False, mask: object = None) -> Any:
            return {"sum": x + y, "both": (2 * x if twice else x, torch.ones(3))}

    x, y = image(1, 3, seed=1), image(1, 3, seed=2)
    graph = model_graph(Net().eval(), (x, y))
    assert [node.name for node in graph.inputs] == ["x", "y"]
    assert len(graph.outputs) == 2
    found = convsv.lipschitz(torch.compile(Net().eval()), {"x": x, "y": y, "twice": True, "mask": None})
    assert np.sqrt(5) <= found.upper <= np.sqrt(8) * (1 + 1e-9)
    assert found.lower == pytest.approx(np.linalg.norm([[1, 1], [2, 0]], 2), rel=1e-3)
    assert convsv.lipschitz(nn.DataParallel(Net().eval()), (x, y), output="add").upper == pytest.approx(2.0)
