"""Test the images of a layer against singular vectors of the dense operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from convsv_conformance.dense import dense_matrix

from convsv_core import Conv, frequency_singular_values
from convsv_core.layers import Layer
from convsv_core.plugins import get_backend
from convsv_core.reports import LayerReport, layer_reports
from convsv_core.reports.images import PATCH, PIXELS, by_frequency

CASES = [
    ((3, 2, 3, 3), Conv("OIHW"), (8, 6)),
    ((4, 1, 3, 2), Conv("OIHW", stride=(2, 1), groups=4), (8, 5)),
    ((4, 2, 3, 3), Conv("OIHW", stride=2, groups=2, dilation=3), (8, 8)),
    ((2, 3, 2, 2), Conv("IOHW", stride=2, transposed=True), (3, 4)),
    ((2, 1, 3, 3), Conv("IOHW", groups=2, transposed=True), (5, 4)),
    ((3, 3, 2, 2), Conv("HWIO", dilation=2), (4, 6)),
    ((2, 2, 5), Conv("OIW"), (3,)),
    ((2, 2, 2, 2, 3), Conv("DHWIO", stride=(1, 2, 1)), (2, 4, 3)),
]


def report_of(kernel: Any, conv: Conv, extents: tuple[int, ...], **options: Any) -> LayerReport:
    layer = Layer("layer", kernel, conv, extents)
    (report,) = layer_reports([layer], get_backend("numpy"), **{"images": True} | options)
    return report


def whole(images: Any, channels: tuple[int, ...], count: int) -> Any:
    """Return images of all channels, with 0 in the channels of other groups, as a vector."""
    full = np.zeros((count, *images.shape[1:]))
    full[list(channels)] = images
    return full.reshape(-1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize(("shape", "conv", "extents"), CASES, ids=lambda part: str(part)[:24])
def test_the_layer_maps_the_input_image_to_the_output_image(
    shape: tuple[int, ...], conv: Conv, extents: tuple[int, ...], dtype: Any
) -> None:
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=shape).astype(dtype)
    if dtype is np.complex128:
        kernel = kernel + 1j * rng.normal(size=shape)
    report = report_of(kernel, conv, extents)
    top = report.top_vectors
    assert top is not None
    taps = [shape[conv.layout.index(letter)] for letter in conv.spatial]
    sizes = zip(taps, conv.dilations, conv.strides, strict=True)
    # The images are those of taps that begin at their output, so all padding is behind the image.
    pads = tuple((0, max(0, d * (k - 1) + 1 - s)) for k, d, s in sizes)
    geometry = {"stride": conv.strides, "dilation": conv.dilations, "groups": conv.groups}
    matrix = dense_matrix(kernel, extents, conv.layout, **geometry, pads=pads, transposed=conv.transposed)
    ends = [shape[conv.layout.index(letter)] for letter in "IO"]
    ends[1 if conv.transposed else 0] *= conv.groups
    right = whole(top.inputs, top.input_channels, ends[0])
    left = whole(top.outputs, top.output_channels, ends[1])
    eps = float(np.finfo(np.float32 if dtype is np.float32 else np.float64).eps)
    assert top.value == pytest.approx(report.operator_norm, rel=64 * eps)
    assert np.linalg.norm(right) > 0
    if dtype is not np.complex128:  # The real part of a singular vector of a real operator is a singular vector.
        np.testing.assert_allclose(matrix @ right, top.value * left, rtol=0, atol=64 * eps * top.value)
        assert np.linalg.norm(matrix @ right) == pytest.approx(report.operator_norm * np.linalg.norm(right), rel=1e-4)


@pytest.mark.parametrize(("shape", "conv", "extents"), CASES, ids=lambda part: str(part)[:24])
def test_the_figures_are_those_of_a_report_without_images(
    shape: tuple[int, ...], conv: Conv, extents: tuple[int, ...]
) -> None:
    kernel = np.random.default_rng(2).normal(size=shape)
    one, two = report_of(kernel, conv, extents), report_of(kernel, conv, extents, images=False)
    assert two.by_frequency is two.top_vectors is None
    np.testing.assert_array_equal(one.curve, two.curve)
    assert (one.operator_norm, one.stable_rank, one.quantiles) == (two.operator_norm, two.stable_rank, two.quantiles)
    expected = np.fft.fftshift(frequency_singular_values(kernel, extents, conv)[..., 0])
    np.testing.assert_allclose(one.by_frequency, expected, rtol=1e-6)
    assert one.top_vectors is not None
    angles = np.asarray(one.top_vectors.frequency)
    assert np.all((-np.pi < angles) & (angles <= np.pi))


def test_large_images_keep_their_peak_and_their_middle() -> None:
    values = np.random.default_rng(3).random((200, 3))
    image = by_frequency(values)
    assert image.shape == (PIXELS, 3)
    assert image.max() == np.float32(values.max())
    lone = np.zeros((150, 70))
    lone[0, 0] = 1.0
    (place,) = np.argwhere(by_frequency(lone))
    assert list(place) == [PIXELS // 2] * 2


def test_vectors_of_large_layers_are_cut_to_a_corner_and_few_channels() -> None:
    kernel = np.random.default_rng(4).normal(size=(7, 9, 3, 3))
    top = report_of(kernel, Conv("OIHW"), (40, 30)).top_vectors
    assert top is not None
    assert top.inputs.shape == top.outputs.shape == (4, PATCH, PATCH)
    assert len(set(top.input_channels)) == len(set(top.output_channels)) == 4


def test_a_layer_of_zeros_has_images() -> None:
    report = report_of(np.zeros((2, 2, 3, 3)), Conv("OIHW"), (4, 4))
    assert report.operator_norm == 0
    assert report.top_vectors is not None
    assert report.top_vectors.value == 0
    assert np.isfinite(report.top_vectors.inputs).all()
