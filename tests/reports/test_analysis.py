"""From layers to figures, on every backend, against the dense matrix."""

from __future__ import annotations

import importlib.resources
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from convsv_conformance.dense import dense_matrix

from convsv_core.conv import Conv
from convsv_core.layers import Layer
from convsv_core.plugins import backends, get_backend
from convsv_core.reports import layer_reports, read_model
from convsv_core.reports.analysis import CURVE_POINTS, describe

BACKENDS = [row.name for row in backends() if row.available]
DIGITS = Path(str(importlib.resources.files("convsv_adapters") / "data" / "digits.onnx"))
EPS = float(np.finfo(np.float32).eps)
rng = np.random.default_rng(0)


def report_of(layer, backend="numpy", **options):
    (report,) = layer_reports([layer], get_backend(backend), **options)
    return report


def layer(shape, conv, extents=(6, 4), dtype=np.float64, note=""):
    return Layer("layer", rng.normal(size=shape).astype(dtype), conv, extents, note)


def dense_values(report, kernel):
    matrix = dense_matrix(
        kernel,
        report.input_shape,
        report.layout,
        stride=report.stride,
        dilation=report.dilation,
        groups=report.groups,
        transposed=report.transposed,
    )
    return np.linalg.svd(matrix, compute_uv=False)


CASES = [
    layer((3, 2, 3, 3), Conv("OIHW", padding=1, padding_mode="zeros")),
    layer((4, 1, 3, 2), Conv("OIHW", stride=(2, 1), groups=2, padding="valid")),
    layer((2, 3, 2, 2), Conv("IOHW", stride=2, transposed=True, padding=0)),
    layer((3, 3, 2, 2), Conv("HWIO", dilation=2, padding_mode="reflect")),
    layer((2, 2, 5), Conv("OIW"), extents=(3,)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.conv.layout)
def test_figures_against_the_dense_matrix(case, backend):
    report = report_of(case, backend, dtype="float32")
    values = dense_values(report, case.kernel.astype(np.float32))
    tolerance = 20 * EPS * values[0]
    assert report.operator_norm == pytest.approx(values[0], abs=tolerance)
    assert report.smallest_singular_value == pytest.approx(values[-1], abs=tolerance)
    relative = tolerance * (1 / values[0] + 1 / values[-1])
    assert report.condition_number == pytest.approx(values[0] / values[-1], rel=relative)
    assert report.stable_rank == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-5)
    np.testing.assert_allclose(report.curve, values, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("stored", "asked", "precision"), [("float64", None, 1e-14), ("float64", "float32", 1e-6)])
def test_dtype(stored, asked, precision):
    case = layer((3, 2, 3, 3), Conv("OIHW"), dtype=stored)
    values = dense_values(describe(case), case.kernel)
    error = abs(report_of(case, dtype=asked).operator_norm - values[0]) / values[0]
    assert error < precision
    assert asked is None or error > 1e-12


def test_a_library_without_float64_computes_in_float32(monkeypatch):
    monkeypatch.setattr(get_backend("numpy"), "dtypes", lambda device=None: ("float32",))
    report = report_of(layer((3, 2, 3, 3), Conv("OIHW"), dtype="float64"))
    assert report.curve.dtype == np.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(backend):
    case = layer((3, 2, 3, 3), Conv("OIHW"), dtype=np.float16)
    values = dense_values(describe(case), case.kernel)
    assert report_of(case, backend).operator_norm == pytest.approx(values[0], rel=20 * EPS)


def test_reshaped_norm_is_what_pytorch_calls_spectral_norm():
    import torch

    for transposed in (False, True):
        module = (torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d)(6, 4, 3, groups=2)
        kernel = module.weight.detach().numpy().copy()
        conv = Conv("IOHW" if transposed else "OIHW", groups=2, transposed=transposed)
        report = report_of(Layer("layer", kernel, conv, (8, 8)))
        normed = torch.nn.utils.parametrizations.spectral_norm(module, n_power_iterations=200)
        normed.train()
        sigma = float(np.linalg.norm(kernel) / torch.linalg.norm(normed.weight.detach()))
        assert report.reshaped_norm == pytest.approx(sigma, rel=1e-4)
        assert report.factor == pytest.approx(report.operator_norm / sigma, rel=1e-4)


PADDED = [
    Conv("OIHW", padding_mode="zeros"),
    Conv("OIHW", padding="valid", padding_mode="zeros"),
    Conv("OIHW", stride=2, padding=1, padding_mode="zeros"),
    Conv("OIHW", padding=2, padding_mode="reflect"),
    Conv("OIHW", padding=2, padding_mode="replicate"),
    Conv("OIHW", padding=2),
    Conv("OIHW"),
]


@pytest.mark.parametrize("conv", PADDED, ids=lambda conv: f"{conv.padding_mode}, {conv.padding}, {conv.stride}")
@pytest.mark.parametrize("kernel", [np.ones((2, 2, 3, 3)), rng.normal(size=(2, 2, 3, 3))], ids=["ones", "random"])
def test_bounds_for_the_declared_padding_hold_for_the_dense_matrix(conv, kernel):
    case = Layer("layer", kernel, conv, (7, 6))
    upper, both = report_of(case, bounds="upper"), report_of(case, bounds="both")
    matrix = dense_matrix(
        kernel,
        (7, 6),
        "OIHW",
        stride=conv.strides,
        dilation=(1, 1),
        pads=conv.pads((3, 3)),
        padding_mode=conv.padding_mode,
    )
    norm = np.linalg.norm(matrix, 2)
    assert upper.norm_lower is None
    assert norm <= min(upper.norm_upper, both.norm_upper)
    assert norm * (1 - 1e-2) <= both.norm_lower <= norm
    bare = report_of(case)
    assert (bare.norm_lower, bare.norm_upper) == (None, None)
    assert bare.operator_norm == upper.operator_norm == both.operator_norm


def test_bounds_without_extents_and_of_what_has_none():
    zeros, reflect = Conv("OIHW", padding_mode="zeros"), Conv("OIHW", padding_mode="reflect")
    kernel = np.ones((1, 1, 3, 3))
    report = report_of(Layer("layer", kernel, zeros, None, "no extents"), bounds="upper")
    assert (report.operator_norm, report.note) == (None, "no extents")
    assert 9 <= report.norm_upper <= 9 * 1.01
    report = report_of(Layer("layer", kernel, reflect, None, "no extents"), bounds="upper")
    assert report.norm_upper is None
    assert report.note.startswith("no extents; padding='same' with padding_mode='reflect' repeats pixels")
    assert report.note.endswith("a bound for the layer's own padding needs the layer's extents")
    strided = Conv("OIHW", stride=2)
    report = report_of(Layer("layer", kernel, strided, None), bounds="upper")
    assert report.norm_upper is None
    assert report.note == "a bound for the layer's own padding needs the layer's extents"
    report = report_of(Layer("layer", kernel, Conv("OIHW"), None), bounds="upper")
    assert 9 <= report.norm_upper <= 9 * 1.01
    report = report_of(Layer("layer", np.ones((1, 1, 5, 5)), reflect, (2, 2)), bounds="upper")
    assert report.operator_norm == pytest.approx(25)
    assert report.norm_upper is None
    assert "reflect padding of 2" in report.note
    report = report_of(Layer("layer", np.full((1, 1, 3, 3), np.nan), zeros, (8, 8)), bounds="upper")
    assert report.note.count("NaN") == 1


def test_a_stride_that_does_not_divide_takes_the_next_multiple():
    report = report_of(layer((2, 2, 3, 3), Conv("OIHW", stride=(2, 3)), extents=(7, 9), note="own note"))
    assert report.input_shape == (8, 9)
    assert report.note == "extents 7x9 taken as 8x9, a multiple of the stride; own note"
    assert report.operator_norm is not None
    transposed = report_of(layer((2, 2, 3, 3), Conv("IOHW", stride=2, transposed=True), extents=(7, 9)))
    assert (transposed.input_shape, transposed.note) == ((7, 9), "")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Layer("bad", None, Conv("OIHW"), (8, 8), "no weights"), "no weights"),
        (Layer("bad", np.ones((2, 2, 3, 3)), None, (8, 8), "no geometry"), "no geometry"),
        (Layer("bad", np.ones((2, 2, 3, 3)), Conv("OIHW"), None, "no extents"), "no extents"),
        (Layer("bad", np.ones((3, 2, 3, 3)), Conv("OIHW", groups=2), (8, 8)), "groups=2 does not divide"),
        (Layer("bad", np.full((2, 2, 3, 3), np.nan), Conv("OIHW"), (8, 8)), "NaN or infinity"),
        (Layer("bad", np.ones((2, 2, 3, 3), int), Conv("OIHW"), (8, 8)), "dtype int64"),
        (Layer("bad", np.ones((2, 2, 3, 3)), Conv("OIHW"), (8,)), "input_shape"),
    ],
)
def test_a_layer_that_cannot_be_handled_says_why_and_the_others_run(bad, reason):
    good = layer((2, 2, 3, 3), Conv("OIHW"))
    first, second = layer_reports([bad, good], get_backend("numpy"))
    assert reason in first.note
    assert "\n" not in first.note
    assert first.operator_norm is first.condition_number is first.reshaped_norm is first.curve is None
    assert second.operator_norm is not None


def test_singular_layers():
    zero = report_of(Layer("zero", np.zeros((2, 2, 3, 3)), Conv("OIHW"), (4, 4)))
    assert (zero.operator_norm, zero.smallest_singular_value, zero.stable_rank) == (0, 0, 0)
    assert zero.condition_number == math.inf
    assert zero.factor is None
    assert zero.note == "singular to the precision of float64"
    rounding = report_of(Layer("blur", np.full((1, 1, 2, 2), 0.25), Conv("OIHW"), (6, 6)))
    assert rounding.condition_number > 1e15
    assert rounding.note == "singular to the precision of float64"


def test_the_curve_of_a_large_layer_keeps_both_ends():
    case = layer((4, 4, 3, 3), Conv("OIHW"), extents=(32, 32))
    report = report_of(case)
    assert report.curve.shape == (CURVE_POINTS,)
    assert (report.curve[0], report.curve[-1]) == (report.operator_norm, report.smallest_singular_value)
    assert np.all(np.diff(report.curve) <= 0)


# ---- the network that ships -------------------------------------------------------------------------------


def test_extents_of_the_shipped_network_are_those_of_onnxruntime():
    layers = read_model(DIGITS)
    model = onnx.load(DIGITS)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    outputs = {value.name for value in model.graph.output}
    names = [node.input[0] for node in convolutions]
    inner = [name for name in names if name != model.graph.input[0].name and name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(inner))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = {session.get_inputs()[0].name: np.ones((1, 1, 8, 8), np.float32)}
    wanted = list(dict.fromkeys(inner))
    seen = dict(zip(wanted, session.run(wanted, feed), strict=True)) | feed
    assert [layer.input_shape for layer in layers] == [seen[name].shape[2:] for name in names]


@pytest.mark.parametrize("name", ["stem", "block1.depthwise", "down", "block2.grouped"])
def test_the_shipped_network_against_the_dense_matrix(name):
    (case,) = [layer for layer in read_model(DIGITS) if layer.name == name]
    report = report_of(case)
    values = dense_values(report, case.kernel)
    assert report.operator_norm == pytest.approx(values[0], abs=20 * EPS * values[0])
    assert report.smallest_singular_value == pytest.approx(values[-1], abs=20 * EPS * values[0])
