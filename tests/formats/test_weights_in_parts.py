"""Tests of tensors that are not the layer's weight: a rule that is known, or the reason and no figure."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from convsv_adapters.parameters import put_together
from convsv_adapters.torch import operator_norm
from projected_files import run
from torch import nn
from torch.nn.utils import parametrizations, prune
from wrapped_networks import BarSpectral, dense_norm

from convsv_core.layers import Geometry, ReadOptions
from convsv_core.reports import read_model


def rows(path):
    result = run("spectrum", path, "--input-shape", "5,5", "--json", "-")
    return {row["name"]: row for row in json.loads(result.stdout)["layers"]}


def refused(path, name):
    """Return whether `convsv project` names the layer and writes nothing."""
    output = path.with_name("out")
    result = run("project", path, "--bound", 0.1, "-o", output, "--method", "rescale")
    return result.exit_code == 1 and name in result.stderr and not output.exists()


def saved(path, state):
    torch.save(state, path)
    return path


def arrays(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def test_a_mask_counts_for_the_norm_and_project_refuses_the_layer(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).reshape(2, 2, 1, 1)
    prune.custom_from_mask(model[0], "weight", torch.tensor([[1.0, 1.0], [1.0, 0.0]]).reshape(2, 2, 1, 1))
    path = saved(tmp_path / "m.pt", model.state_dict())
    assert rows(path)["0.weight"]["operator_norm"] == pytest.approx((1 + 5**0.5) / 2, rel=1e-6)
    assert refused(path, "0.weight")


def old_spectral_norm(channels, transposed):
    """Return a trained layer of as many inputs as outputs, of unequal strengths along the axis of its rows."""
    torch.manual_seed(0)
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(channels, channels, 3, padding=1)
    layer = nn.utils.spectral_norm(layer)
    with torch.no_grad():
        layer.weight_orig.mul_(torch.linspace(0.2, 3, channels).view(1, channels, 1, 1))
    for _ in range(50):
        layer(torch.randn(1, channels, 8, 8))
    layer.eval()(torch.randn(1, channels, 8, 8))
    return layer


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [4, 8, 9])
def test_spectral_normalisation_of_square_layers_divides_by_the_right_axis(tmp_path, channels, transposed):
    layer = old_spectral_norm(channels, transposed)
    path = saved(tmp_path / "m.pt", layer.state_dict())
    truth = dense_norm(layer.weight.detach().double().numpy(), transposed)
    assert rows(path)["weight"]["operator_norm"] == pytest.approx(truth, rel=1e-5)
    assert refused(path, "weight")


def test_an_axis_that_nothing_tells_gives_the_reason(tmp_path):
    layer = nn.utils.spectral_norm(nn.ConvTranspose2d(8, 8, 3))  # never trained: u and v are random
    path = saved(tmp_path / "m.pt", layer.state_dict())
    assert rows(path)["weight"]["operator_norm"] is None
    assert "which axis" in rows(path)["weight"]["note"]
    assert refused(path, "weight")


def test_spectral_normalisation_of_pytorch_0_4_is_the_weight_of_the_last_pass(tmp_path):
    layer = old_spectral_norm(4, transposed=True)
    state = {name: tensor for name, tensor in layer.state_dict().items() if name != "weight_v"}
    path = saved(tmp_path / "m.pt", state)
    assert "without its vector v" in rows(path)["weight"]["note"]
    state["weight"] = layer.weight.detach()
    path = saved(tmp_path / "m.pt", state)
    truth = dense_norm(layer.weight.detach().double().numpy(), transposed=True)
    assert rows(path)["weight"]["operator_norm"] == pytest.approx(truth, rel=1e-5)
    state["weight"] = torch.randn_like(state["weight"])
    path = saved(tmp_path / "m.pt", state)
    assert "no multiple" in rows(path)["weight"]["note"]


def test_a_wrapper_that_iterates_at_each_pass(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(BarSpectral(nn.Conv2d(3, 5, 3)), BarSpectral(nn.ConvTranspose2d(5, 4, 3)))
    path = saved(tmp_path / "m.pt", model.state_dict())
    for index, layer in enumerate(model):
        truth = dense_norm(layer.weight.numpy(), index == 1)
        assert rows(path)[f"{index}.weight"]["operator_norm"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["old", "new"])
def test_weight_normalisation_along_any_axis_or_none(normalise, dim, transposed):
    torch.manual_seed(0)
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = normalise(layer, dim=dim)
    with torch.no_grad():
        (layer.weight_g if hasattr(layer, "weight_g") else layer.parametrizations.weight.original0).mul_(1.7)
        layer(torch.ones(1, 3, 8, 8))
    found = put_together(arrays(layer))["weight"]
    np.testing.assert_allclose(found, layer.weight.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_spectral_normalisation_as_a_parametrization_along_any_axis(dim):
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Conv1d(3, 4, 5), dim=dim).eval()
    found = put_together(arrays(layer))["weight"]
    np.testing.assert_allclose(found, layer.weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_mask_on_a_part_of_a_normalised_weight():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Conv2d(3, 5, 2))
    prune.random_unstructured(layer, "weight_v", 0.5)
    layer(torch.ones(1, 3, 8, 8))
    layer(torch.ones(1, 3, 8, 8))
    v = layer.weight_v_orig * layer.weight_v_mask
    wanted = v * (layer.weight_g / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    found = put_together(arrays(layer))["weight"]
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def tripled(layer):
    return nn.utils.parametrize.register_parametrization(layer, "weight", Tripled())


@pytest.mark.parametrize(
    "wrap", [operator_norm, parametrizations.orthogonal, tripled], ids=["operator_norm", "orthogonal", "unknown"]
)
def test_a_parametrization_that_is_not_known_has_the_reason(tmp_path, wrap):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), wrap(nn.Conv2d(4, 4, 3)))
    path = saved(tmp_path / "m.pt", model.state_dict())
    found = rows(path)
    assert found["0.weight"]["operator_norm"] is not None
    assert found["1.weight"]["operator_norm"] is None
    assert "parametrization" in found["1.weight"]["note"]
    assert refused(path, "1.weight")


@pytest.mark.parametrize(
    "companion",
    ["weight_scale", "gain", "mask", "scale", "u0", "weight_u", "weight_fake_quant.scale", "weight_zero_point"],
)
def test_an_unknown_companion_has_the_reason(tmp_path, companion):
    state = {"c.weight": torch.ones(4, 4, 3, 3), "c.bias": torch.ones(4), f"c.{companion}": torch.ones(4)}
    path = saved(tmp_path / "m.pt", state)
    (layer,) = read_model(path)
    assert (layer.kernel, f"c.{companion}" in layer.note) == (None, True)
    assert refused(path, "c.weight")


@pytest.mark.parametrize(
    "companion",
    [
        "scale_weight",
        "affine.weight",
        "conv_offset.weight",
        "attention.fc.weight",
        "lr_mul",
        "w_quant.s",
        "resample_filter",
    ],
)
def test_whatever_else_stands_in_the_layer_has_the_reason(tmp_path, companion):
    state = {"c.weight": torch.ones(4, 4, 3, 3), "c.bias": torch.ones(4), f"c.{companion}": torch.ones(1)}
    path = saved(tmp_path / "m.pt", state)
    (layer,) = read_model(path)
    assert (layer.kernel, f"c.{companion}" in layer.note) == (None, True)
    assert refused(path, "c.weight")


def test_layers_behind_a_convolution_in_its_class_change_nothing(tmp_path):
    state = {"c.weight": torch.ones(4, 4, 3, 3), "c.norm.weight": torch.ones(4), "c.act.weight": torch.ones(4)}
    (layer,) = read_model(saved(tmp_path / "m.pt", state))
    assert layer.kernel is not None


def test_the_user_can_say_that_a_companion_changes_nothing(tmp_path):
    path = saved(tmp_path / "m.pt", {"c.weight": torch.ones(4, 4, 3, 3), "c.grid": torch.ones(2)})
    (layer,) = read_model(path, ReadOptions(layers={"c.weight": Geometry(stride=1)}))
    assert layer.kernel is not None


@pytest.mark.parametrize(
    "wrapper", ["params/WeightNorm_0/Conv_1/kernel/scale", "batch_stats/SpectralNorm_0/Conv_1/kernel/u"]
)
def test_a_wrapper_of_linen_has_the_reason(tmp_path, wrapper):
    arrays = {f"params/Conv_{i}/kernel": np.ones((3, 3, 4, 4), np.float32) for i in range(3)}
    np.savez(tmp_path / "m.npz", **arrays, **{wrapper: np.ones(4, np.float32)})
    layers = read_model(tmp_path / "m.npz", ReadOptions(layout="HWIO"))
    assert [layer.kernel is None for layer in layers] == [False, True, False]


def test_numbers_at_frequencies_are_no_taps(tmp_path):
    kernel = torch.ones(4, 4, 3, 3, dtype=torch.complex64)
    state = {"a.weight": kernel, "b.weight": kernel, "b.bias": torch.ones(4, 1, 1), "spectral.weight": kernel}
    layers = read_model(saved(tmp_path / "m.pt", state))
    assert [layer.kernel is None for layer in layers] == [False, True, True]


def test_a_bias_of_a_layer_on_points_is_none_of_a_convolution(tmp_path):
    state = {"conv.kernel": torch.ones(27, 4, 8), "conv.bias": torch.ones(1, 8)}
    (layer,) = read_model(saved(tmp_path / "m.pt", state))
    assert (layer.kernel, "1x8" in layer.note) == (None, True)


def test_scales_of_channels_are_not_listed(tmp_path):
    state = {
        "conv.weight": torch.ones(4, 4, 3, 3),
        "norm.weight": torch.ones(1, 4, 1, 1),
        "act.slope": torch.ones(1, 4, 1, 1),
    }
    (layer,) = read_model(saved(tmp_path / "m.pt", state))
    assert layer.name == "conv.weight"


@pytest.mark.parametrize("added", ["lora_A.default.weight", "ia3_l.default"])
def test_an_adaptation_has_the_reason(tmp_path, added):
    state = {"c.original.weight": torch.ones(4, 4, 3, 3), f"c.{added}": torch.ones(2, 4, 3, 3)}
    layers = read_model(saved(tmp_path / "m.pt", state))
    assert "adaptation" in layers[0].note


def test_a_low_rank_adaptation_has_the_reason(tmp_path):
    state = {"c.base_layer.weight": torch.ones(4, 4, 3, 3), "c.lora_A.default.weight": torch.ones(2, 4, 3, 3)}
    layers = read_model(saved(tmp_path / "m.pt", state))
    assert "low-rank" in layers[0].note


@pytest.mark.parametrize(
    "part", ["weight_orig", "weight_bar", "weight_v", "weight_g", "parametrizations.weight.original1"]
)
def test_a_part_alone_has_the_reason(tmp_path, part):
    (layer,) = read_model(saved(tmp_path / "m.pt", {f"c.{part}": torch.ones(4, 4, 3, 3)}))
    assert layer.kernel is None
