"""Norms of wide kernels, whose Gram matrices are tested once against a level that estimates raise."""

from __future__ import annotations

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core import Conv
from convsv_core._norm import sweep
from convsv_core._symbol.operand import make_operand
from convsv_core._symbol.rows import grid_rows
from convsv_core.plugins import get_backend

CIRCULAR = Conv("OIHW")
SIDE, EXTENT = sweep.SWEPT_SIDE, 10  # A grid of 10 x 10 has 52 frequencies to visit.


def gaussian(seed: int, channels: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(channels, channels, 3, 3)).astype(np.float32)


def orthogonal(channels: int = SIDE) -> np.ndarray:
    """Return a kernel all of whose singular values are 1."""
    kernel = np.zeros((channels, channels, 3, 3))
    kernel[:, :, 1, 1], _ = np.linalg.qr(np.random.default_rng(0).normal(size=(channels, channels)))
    return kernel


def norm_by_fft(kernel: np.ndarray, extent: int) -> float:
    symbol = np.fft.fft2(kernel.astype(float), (extent, extent), axes=(2, 3))
    return float(np.linalg.norm(symbol.transpose(2, 3, 0, 1), 2, axis=(-2, -1)).max())


def assert_exact(kernel: np.ndarray, expected: float, extent: int = EXTENT) -> None:
    eps = float(np.finfo(kernel.dtype).eps)
    assert float(convsv.operator_norm(kernel, (extent, extent), CIRCULAR)) == pytest.approx(expected, rel=4 * eps)
    bounds = convsv.norm_bounds(kernel, CIRCULAR, input_shape=(extent, extent))
    assert bounds.lower <= expected <= bounds.upper
    assert float(bounds.upper) == pytest.approx(expected, rel=32 * eps + 1e-11)


@pytest.mark.parametrize("seed", [0, 1])
def test_wide_norms_are_exact(seed: int) -> None:
    kernel = gaussian(seed)
    assert_exact(kernel, norm_by_fft(kernel, EXTENT))


def test_tall_and_complex_kernels_are_swept() -> None:
    real, imaginary = gaussian(2, 2 * SIDE)[:, :SIDE], gaussian(3, 2 * SIDE)[:, :SIDE]
    kernel = real + 1j * imaginary
    assert kernel.dtype == np.complex64
    symbol = np.fft.fft2(kernel.astype(complex), (6, 6), axes=(2, 3)).transpose(2, 3, 0, 1)
    expected = np.linalg.norm(symbol, 2, axis=(-2, -1)).max()
    found = convsv.operator_norm(kernel, (6, 6), CIRCULAR)
    assert float(found) == pytest.approx(float(expected), rel=4 * float(np.finfo(np.float32).eps))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_norms_everywhere(dtype: type) -> None:
    assert_exact(orthogonal().astype(dtype), norm_by_fft(orthogonal().astype(dtype), EXTENT))


def test_a_kernel_of_zeros() -> None:
    assert float(convsv.operator_norm(np.zeros((SIDE, SIDE, 3, 3), np.float32), (EXTENT, EXTENT), CIRCULAR)) == 0


@pytest.mark.parametrize("factor", [1.5, 1 + 1e-5, 0.5, 0.0, -1.0, float("nan")])
def test_wrong_estimates_cost_time_alone(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, right = gaussian(0), sweep.estimate_largest
    estimates = []

    def wrong(matrix: np.ndarray) -> float:
        estimates.append(factor * right(matrix))
        return estimates[-1]

    monkeypatch.setattr(sweep, "estimate_largest", wrong)
    assert_exact(kernel, norm_by_fft(kernel, EXTENT))
    assert estimates


def test_flat_spectra_on_a_fine_grid() -> None:
    kernel = gaussian(4)
    assert_exact(kernel, norm_by_fft(kernel, 28), extent=28)


def test_estimates_are_rayleigh_quotients() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(SIDE, SIDE)) + 1j * rng.normal(size=(SIDE, SIDE))
    matrix = root @ root.conj().T
    largest = np.linalg.eigvalsh(matrix)[-1]
    eps = float(np.finfo(np.float64).eps)
    assert 0.999 * largest <= sweep.estimate_largest(matrix) <= largest * (1 + SIDE * eps)
    assert sweep.estimate_largest(np.zeros((SIDE, SIDE))) == 0
    assert np.isnan(sweep.estimate_largest(np.full((SIDE, SIDE), np.nan)))


def test_a_sweep_proves_what_it_says() -> None:
    rows = grid_rows(make_operand(gaussian(5), (EXTENT, EXTENT), CIRCULAR))
    places = np.arange(len(rows.operand.plan.frequencies))
    assert sweep.is_sweepable(rows, len(places))
    exact = np.linalg.eigvalsh(get_backend("numpy").to_numpy(rows.matrices(rows.table(places))).astype(complex))
    largest = exact[:, 0, -1]
    found = sweep.sweep(rows, places, np.full(len(places), np.inf), 0.0)
    assert np.all(largest <= found.uppers)
    estimated = np.isfinite(found.estimates)
    assert estimated.any()
    assert not estimated.all()
    assert found.estimates.max() == pytest.approx(largest.max(), rel=1e-3)
    assert np.argmax(found.estimates) == np.argmax(largest)
