"""`compare`: certified norms of the differences of two models, against the dense matrices, and what is not matched."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from convsv_conformance.dense import dense_matrix
from torch import nn

import convsv_core as convsv
from convsv_core import Conv
from convsv_core.layers import Layer, ModelError, dense_layer
from convsv_core.plugins import backends, get_backend
from convsv_core.reports import Unmatched, difference_reports, match_layers

BACKENDS = [row.name for row in backends() if row.available]
rng = np.random.default_rng(0)

GEOMETRIES = [
    Conv("OIHW", padding=1, padding_mode="zeros"),
    Conv("OIHW", stride=2, padding=1, padding_mode="zeros"),
    Conv("HWIO", dilation=2, padding=2, padding_mode="reflect"),
    Conv("IOHW", stride=2, padding=1, padding_mode="zeros", transposed=True, output_padding=1),
    Conv("OIHW", groups=2, padding="valid", padding_mode="zeros"),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def changed(model: nn.Module, size: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return other


def dense_norm(kernel, conv, extents):
    taps = tuple(kernel.shape[conv.layout.index(letter)] for letter in conv.spatial)
    matrix = dense_matrix(
        kernel,
        extents,
        conv.layout,
        stride=conv.strides,
        dilation=conv.dilations,
        groups=conv.groups,
        transposed=conv.transposed,
        pads=conv.pads(taps),
        padding_mode=conv.padding_mode,
        output_shape=None if conv.output_padding is None else (14, 12),
    )
    return np.linalg.norm(matrix, 2)


@pytest.mark.parametrize("conv", GEOMETRIES, ids=lambda conv: f"{conv.layout}-{conv.padding_mode}-{conv.strides}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_hold_for_the_dense_matrices(conv, backend):
    shape = tuple({"O": 4, "I": 2, "H": 3, "W": 3}[letter] for letter in conv.layout)
    first = rng.normal(size=shape)
    second = first + 0.1 * rng.normal(size=shape)
    layers = [Layer("layer", kernel, conv, (7, 6)) for kernel in (first, second)]
    matching = match_layers(layers[:1], layers[1:])
    assert matching.unmatched == []
    (row,) = difference_reports(matching.pairs, get_backend(backend), dtype="float32")
    difference, norm = (dense_norm(kernel, conv, (7, 6)) for kernel in (first - second, first))
    assert difference <= row.difference_upper
    assert norm <= row.norm_upper
    # The norm of a layer on 7 x 6 pixels with other than circular padding may lie far below the one for every size.
    assert row.share <= 1.05 * row.difference_upper / row.norm_upper
    assert row.share >= row.difference_upper / row.norm_upper * (1 - 1e-9)


def test_a_known_difference():
    model = network()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight.mul_(0.75)
        other[6].weight[0, 0] += 2
    found = convsv.compare(model, other, torch.zeros(1, 3, 8, 8), linear=True)
    assert [row.name for row in found] == ["6", "2", "0", "3"]
    dense, scaled, same, reflected = found
    assert dense.difference_upper == pytest.approx(2, rel=1e-6)
    norm = float(torch.linalg.matrix_norm(model[6].weight, 2))
    assert dense.share == pytest.approx(2 / norm, rel=1e-5)
    assert dense.linear
    assert 0.25 <= scaled.share <= 0.25 * (1 + 2e-3)
    assert (same.difference_upper, same.share) == (0, 0)
    assert reflected.norm_upper is not None  # from the extents that the example gives
    assert found.unmatched == ()


def test_models_and_files_of_any_format(tmp_path):
    model = network()
    other = changed(model, 1e-2).eval()
    torch.save(other.state_dict(), tmp_path / "other.pt")
    torch.onnx.export(other, (torch.zeros(1, 3, 8, 8),), tmp_path / "other.onnx", dynamo=False)
    np.savez(tmp_path / "other.npz", **{name: one.numpy() for name, one in other.state_dict().items()})
    live = {row.name: row for row in convsv.compare(model, other, torch.zeros(1, 3, 8, 8), linear=True)}
    assert all(1e-3 < row.share < 0.5 for row in live.values())
    for suffix in ("pt", "onnx", "npz"):
        found = convsv.compare(model, tmp_path / f"other.{suffix}", torch.zeros(1, 3, 8, 8), linear=True)
        assert found.unmatched == ()
        assert {row.name for row in found} == set(live)
        for row in found:
            assert row.share == pytest.approx(live[row.name].share, rel=1e-12)
            assert row.difference_upper == live[row.name].difference_upper
    back = convsv.compare(tmp_path / "other.npz", str(tmp_path / "other.onnx"), linear=True)
    assert [row.share for row in back] == [0, 0, 0, 0]


def test_axes_are_matched_by_layout():
    keys = {"conv": Conv("OIHW", padding=1, padding_mode="zeros"), "dense": None}
    kernel, matrix = rng.normal(size=(4, 2, 3, 3)), rng.normal(size=(5, 3))
    first = [Layer("conv", kernel, keys["conv"], None), dense_layer("fc", matrix, "OI")]
    second = [
        Layer("conv", kernel.transpose(2, 3, 1, 0), replace(keys["conv"], layout="HWIO"), None),
        dense_layer("fc", matrix.T, "IO"),
    ]
    matching = match_layers(first, second)
    assert [row.share for row in difference_reports(matching.pairs, get_backend("numpy"))] == [0, 0]


def test_what_is_not_matched_is_named_with_the_reason():
    def conv(name, shape=(4, 2, 3, 3), **geometry):
        return Layer(name, np.ones(shape), Conv("OIHW", padding=1, padding_mode="zeros", **geometry), None)

    first = [
        conv("same"),
        conv("shape"),
        conv("stride"),
        conv("mode"),
        conv("lost"),
        dense_layer("kind", np.ones((2, 2)), "OI"),
    ]
    second = [
        conv("same"),
        conv("shape", (4, 2, 5, 5)),
        conv("stride", stride=2),
        replace(conv("mode"), conv=Conv("OIHW", padding=1, padding_mode="reflect")),
        conv("new"),
        Layer("kind", None, None, None, "int8 without a scale"),
    ]
    matching = match_layers(first, second)
    assert [pair.name for pair in matching.pairs] == ["same"]
    assert {one.name: one.model for one in matching.unmatched} == {
        "shape": "both",
        "stride": "both",
        "mode": "both",
        "kind": "both",
        "lost": "a",
        "new": "b",
    }
    reasons = {one.name: one.reason for one in matching.unmatched}
    assert reasons["shape"] == "different shapes: 4x2x3x3 in the first model and 4x2x5x5 in the second one"
    assert reasons["stride"].startswith("different geometry: stride (1, 1) in the first model and stride (2, 2)")
    assert reasons["mode"].startswith("different geometry: padding")
    assert reasons["kind"] == "in the second model: int8 without a scale"
    assert reasons["lost"] == "only in the first model"


def test_names_that_several_layers_have_match_none():
    twins = [dense_layer(name, np.ones((2, 2)), "OI") for name in ("a.weight", "a.kernel")]
    matching = match_layers(twins, [dense_layer("a", np.ones((2, 2)), "OI")])
    assert matching.pairs == []
    assert len(matching.unmatched) == 3


def test_assumed_geometry_gives_way_to_what_is_known():
    stated = Conv("OIHW", stride=2, groups=2, padding=1, padding_mode="zeros")
    kernel = rng.normal(size=(4, 2, 3, 3))
    assumed = ("stride", "dilation", "groups", "padding", "transposed", "layout")
    file = Layer("a", kernel, Conv("OIHW", padding_mode="zeros"), (32, 32), "assumed stride 1", assumed=assumed)
    for layers in ([file], [Layer("a", kernel, stated, None)]), ([Layer("a", kernel, stated, None)], [file]):
        (pair,) = match_layers(*layers).pairs
        assert pair.layer.conv == stated
        assert pair.layer.note == ""
    (pair,) = match_layers([file], [file]).pairs
    assert (pair.layer.conv, pair.layer.note) == (file.conv, "assumed stride 1")


def test_zero_weights_and_padding_that_needs_extents():
    conv = Conv("OIHW", padding=1, padding_mode="reflect")
    zeros, ones = np.zeros((1, 1, 3, 3)), np.ones((1, 1, 3, 3))
    (row,) = difference_reports(
        match_layers([Layer("a", zeros, conv, None)], [Layer("a", ones, conv, None)]).pairs, get_backend("numpy")
    )
    assert row.share == math.inf
    assert (row.difference_upper, row.norm_upper) == (None, None)
    assert "needs the layer's extents" in row.note
    assert row.has_figures
    (row,) = difference_reports(
        match_layers([Layer("a", zeros, conv, (4, 4))], [Layer("a", zeros, conv, (4, 4))]).pairs, get_backend("numpy")
    )
    assert (row.share, row.difference_upper, row.norm_upper) == (0, 0, 0)


def test_rounding_to_the_computing_dtype_is_part_of_the_bound():
    """The difference 2^-40 of numbers near 1 is lost if the kernels are rounded to float32 first."""
    first = np.ones((1, 1, 1, 1))
    layers = [Layer("a", kernel, GEOMETRIES[0], None) for kernel in (first, first + 2.0**-40)]
    (row,) = difference_reports(match_layers(layers[:1], layers[1:]).pairs, get_backend("numpy"), dtype="float32")
    assert 2.0**-40 <= row.difference_upper <= 2.0**-40 * (1 + 1e-6)


def test_the_result_is_a_report(tmp_path):
    model = network()
    other = nn.Sequential(*copy.deepcopy(model)[:3], nn.Conv2d(4, 4, 5), nn.Conv2d(4, 2, 1))
    found = convsv.compare(model, other)
    assert isinstance(found, convsv.Report)
    text = " ".join(str(found).split())
    assert "2 convolutions compared, of which 2 have equal weights." in text
    assert "3 (different shapes: 4x4x3x3 in the first model and 4x4x5x5 in the second one)" in text
    assert "4 (only in the second model)" in text
    assert found.unmatched[1] == Unmatched("4", "b", "only in the second model")
    document = json.loads(found.to_json())
    assert (document["model"], document["other"], document["backend"]) == ("Sequential", "Sequential", "numpy")
    assert document["unmatched"][1] == {"name": "4", "model": "b", "reason": "only in the second model"}
    assert list(document["layers"][0])[:1] == ["name"]
    assert {"difference_upper", "norm_upper", "share", "other_name"} <= set(document["layers"][0])
    assert [row.name for row in found.ordered("depth")] == ["0", "2"]
    assert found[:1].unmatched == found.unmatched
    assert str(pickle.loads(pickle.dumps(found))) == str(found)


def test_errors(tmp_path):
    with pytest.raises(TypeError, match="wanted a model of a framework"):
        convsv.compare(network(), 3)
    with pytest.raises(ModelError, match=r"none\.onnx"):
        convsv.compare(network(), tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="backend='none'"):
        convsv.compare(network(), network(), backend="none")
