"""Layers of many taps on images of fixed extents: their exact norms through transforms, in little memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from padded_cases import Case, cases

import convsv_core as convsv
from convsv_core import Conv
from convsv_core._geometry.padding import tap_reads
from convsv_core._norm import padded_transform
from convsv_core._norm.padded import make_padded_operator, padded_operator_norm, padded_rounding
from convsv_core._norm.padded_transform import TransformedOperator
from convsv_core.plugins import backends
from convsv_core.training import frobenius_bound

EPS = float(np.finfo(np.float64).eps)
UNITS = 256
"""Tolerance of values, in units of eps times the norm: as for tables of pixels, and for a few levels of transforms."""

CASES = {
    **cases(),
    "output-padding": Case(
        (3, 2, 3), (5,), Conv("IOW", stride=3, padding=1, padding_mode="zeros", transposed=True, output_padding=2)
    ),
    "cropped": Case(
        (3, 2, 2), (5,), Conv("IOW", stride=3, padding=1, padding_mode="zeros", transposed=True, output_padding=0)
    ),
}


@pytest.fixture
def by_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply every layer by transforms, whatever it costs."""
    monkeypatch.setattr(padded_transform, "transforms_are_cheaper", lambda operand, reads: True)
    monkeypatch.setattr("convsv_core._norm.padded.transforms_are_cheaper", lambda operand, reads: True)


@pytest.mark.parametrize("complex_values", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_transformed_operator_is_that_of_the_pixels(case: Case, complex_values: bool) -> None:
    kernel = case.kernel(complex_values=complex_values)
    pixels = make_padded_operator(kernel, case.input_shape, case.conv)
    reads = tap_reads(tuple(axis.taps for axis in pixels.operand.plan.axes), case.input_shape, case.conv)
    transformed = padded_transform.make_transformed_operator(pixels.operand, reads, case.conv.padding_mode)
    assert (transformed.input_shape, transformed.output_shape) == (pixels.input_shape, pixels.output_shape)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, *pixels.input_shape)), rng.standard_normal((2, *pixels.output_shape))
    scale = float(np.abs(kernel).sum() / float(pixels.operand.scale))
    np.testing.assert_allclose(transformed.apply(x), pixels.apply(x), rtol=0, atol=UNITS * EPS * scale)
    np.testing.assert_allclose(transformed.adjoint(y), pixels.adjoint(y), rtol=0, atol=UNITS * EPS * scale)


@pytest.mark.usefixtures("by_transforms")
@pytest.mark.parametrize(
    "name", ["same-zeros", "strided-reflect", "transposed-zeros", "3d-circular", "dilated-replicate"]
)
def test_norms_and_bounds(name: str) -> None:
    case = CASES[name]
    kernel = case.kernel()
    norm = case.norm(kernel)
    assert isinstance(make_padded_operator(kernel, case.input_shape, case.conv), TransformedOperator)
    value = float(padded_operator_norm(kernel, case.input_shape, case.conv))
    assert abs(value - norm) <= UNITS * EPS * norm
    rounding = padded_rounding(kernel, case.input_shape, case.conv, norm)
    assert 0 < rounding < 1e-11 * norm
    bounds = convsv.norm_bounds(kernel, case.conv, input_shape=case.input_shape)
    assert norm * (1 - 1e-10) <= bounds.lower <= norm <= bounds.upper


@pytest.mark.usefixtures("by_transforms")
@pytest.mark.parametrize("backend", [row.name for row in backends() if row.available and row.name != "dask"])
def test_every_library(backend: str) -> None:
    from convsv_core.plugins import get_backend

    case = CASES["strided-zeros"]
    library = get_backend(backend)
    kernel = library.asarray(case.kernel(), dtype="float32")
    value = float(library.to_numpy(padded_operator_norm(kernel, case.input_shape, case.conv)))
    assert value == pytest.approx(case.norm(case.kernel().astype(np.float32)), rel=1e-6)


@pytest.mark.usefixtures("by_transforms")
def test_the_gradient_is_that_of_the_dense_norm() -> None:
    case = CASES["dilated-reflect"]
    kernel = torch.tensor(case.kernel(), requires_grad=True)
    padded_operator_norm(kernel, case.input_shape, case.conv).backward()
    assert kernel.grad is not None
    step = 1e-6
    direction = np.random.default_rng(1).standard_normal(case.kernel_shape)
    above, below = (case.norm(case.kernel() + sign * step * direction) for sign in (1, -1))
    slope = float((kernel.grad.numpy() * direction).sum())
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("extent", [32, 20_000])
def test_twenty_thousand_taps_take_little_memory(extent: int) -> None:
    """A table of 20,000 outputs and taps takes 3 GB."""
    rng = np.random.default_rng(0)
    kernel = (rng.standard_normal((1, 1, 20_000)) * np.exp(-np.arange(20_000) / 4000)).astype(np.float32)
    conv = Conv("OIW", padding_mode="zeros")
    convsv.norm_bounds(kernel[..., :200], conv, input_shape=(100,))  # imports what is imported late
    tracemalloc.start()
    bounds = convsv.norm_bounds(kernel, conv, input_shape=(extent,))
    crude = frobenius_bound(kernel, conv)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < bounds.lower <= bounds.upper <= crude
    assert peak < 150 * 2**20


@pytest.mark.parametrize("shape", [(1, 1, 600), (3, 2, 700), (2, 2, 30, 31)], ids=str)
@pytest.mark.parametrize("complex_taps", [False, True], ids=["real", "complex"])
def test_the_crude_bound_by_transforms_is_that_of_the_pairs(
    monkeypatch: pytest.MonkeyPatch, shape: Any, complex_taps: bool
) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if complex_taps else 0)
    conv = Conv("OIW" if len(shape) == 3 else "OIHW")
    transformed = frobenius_bound(kernel, conv)
    monkeypatch.setattr("convsv_core._norm.tap_bounds.MOST_PAIRED", 10**6)
    assert transformed == pytest.approx(frobenius_bound(kernel, conv), rel=1e-12)


def test_the_places_that_taps_read_are_found_without_a_table() -> None:
    for conv in (
        Conv("OIW", stride=s, dilation=d, padding=p, padding_mode="replicate")
        for s in (1, 2, 5)
        for d in (1, 3)
        for p in (0, 2)
    ):
        for taps in (1, 2, 4):
            (axis,) = tap_reads((taps,), (23,), conv)
            np.testing.assert_array_equal(axis.reached(), np.unique(axis.places()))
