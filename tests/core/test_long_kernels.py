"""Kernels of many taps: certified bounds and norms by transforms, without a table that grows with the pairs of taps."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core import Conv
from convsv_core._symbol import gram
from convsv_core._symbol.gram import differences_of, gram_coefficients
from convsv_core._symbol.operand import make_operand
from convsv_core._symbol.transform import fast_length, is_long, transform_roundings

EPS = float(np.finfo(np.float64).eps)
MEBI = 1 << 20


def kernel_of(*shape: int, complex_taps: bool = False) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(len(shape) + shape[-1])
    kernel = rng.standard_normal(shape)
    return kernel + 1j * rng.standard_normal(shape) if complex_taps else kernel


def supremum(kernel: np.ndarray[Any, Any], points: int) -> float:
    """The largest norm of a 1-D kernel's symbol on a fine grid: a lower bound of the supremum."""
    if 1 in kernel.shape[:2]:
        return float(np.sqrt((np.abs(np.fft.fft(kernel, points)) ** 2).sum(axis=(0, 1)).max()))
    symbols = np.moveaxis(np.fft.fft(kernel, points), -1, 0)
    return float(np.linalg.norm(symbols, 2, axis=(1, 2)).max())


@pytest.mark.parametrize("shape", [(1, 1, 1000), (3, 1, 257), (1, 2, 128), (5, 4, 110)], ids=str)
@pytest.mark.parametrize("complex_taps", [False, True], ids=["real", "complex"])
def test_bounds_hold_and_close(shape: Any, complex_taps: bool) -> None:
    kernel = kernel_of(*shape, complex_taps=complex_taps)
    points = 32 * shape[-1]
    attained = supremum(kernel, points)
    most = attained / math.cos(math.pi * (shape[-1] - 1) / 2 / points)  # the Bernstein-Szego inequality
    for rtol in (1e-2, 1e-3, 1e-5):
        bounds = convsv.norm_bounds(kernel, Conv("OIW"), rtol=rtol)
        assert bounds.converged
        assert attained <= float(bounds.upper) <= (1 + rtol) * float(bounds.lower)
        assert float(bounds.lower) <= most


@pytest.mark.parametrize("conv", [Conv("OIW"), Conv("OIW", stride=2), Conv("OIW", groups=2), Conv("OIW", dilation=3)])
@pytest.mark.parametrize("extent", [60, 252])
def test_norm_on_a_grid_is_the_largest_singular_value(conv: Conv, extent: int) -> None:
    """At 60 elements the kernel wraps round."""
    kernel = kernel_of(2, 1, 240)
    norm = float(convsv.singular_values(kernel, (extent,), conv)[0])
    assert float(convsv.operator_norm(kernel, (extent,), conv)) == pytest.approx(norm, rel=1e4 * EPS)
    bounds = convsv.norm_bounds(kernel, conv, input_shape=(extent,))
    assert bounds.converged
    assert float(bounds.lower) <= norm * (1 + 1e4 * EPS)
    assert norm <= float(bounds.upper) * (1 + 4 * EPS)


def test_two_axes_with_diamond_cells() -> None:
    kernel = kernel_of(2, 1, 12, 11)
    fine = (np.abs(np.fft.fft2(kernel, (512, 512))) ** 2).sum(axis=(0, 1))
    bounds = convsv.norm_bounds(kernel, Conv("OIHW"), rtol=1e-2)
    assert bounds.converged
    assert float(np.sqrt(fine.max())) <= float(bounds.upper)
    assert float(bounds.lower) <= float(np.sqrt(fine.max())) * 1.01


def test_a_flat_symbol_is_certified() -> None:
    kernel = np.zeros((1, 1, 3000))
    kernel[0, 0, 1234] = 2.5
    bounds = convsv.norm_bounds(kernel, Conv("OIW"), rtol=1e-6)
    assert bounds.converged
    assert float(bounds.lower) <= 2.5 <= float(bounds.upper)


@pytest.mark.parametrize("complex_taps", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", [(3, 2, 120), (2, 3, 120), (2, 2, 11, 12)], ids=str)
def test_transformed_coefficients_are_the_sums_over_pairs(
    monkeypatch: pytest.MonkeyPatch, shape: Any, complex_taps: bool
) -> None:
    conv = Conv("OIW" if len(shape) == 3 else "OIHW")
    operand = make_operand(kernel_of(*shape, complex_taps=complex_taps), None, conv, lattice=True)
    assert is_long(operand)
    transformed = gram_coefficients(operand)
    rounding = float(transform_roundings(operand).max())
    monkeypatch.setattr(gram, "is_long", lambda operand: False)
    summed = gram_coefficients(operand)
    assert transformed.shape == summed.shape
    assert np.linalg.norm(transformed - summed, axis=(-2, -1)).sum() <= rounding
    assert rounding < 1e-6 * np.abs(summed).max()


@pytest.mark.parametrize("shape", [(1, 1, 20_000), (512, 1, 1024)], ids=str)
def test_memory_and_evaluations_stay_small(shape: Any) -> None:
    """All pairs of 20,000 taps take 3 GB. One cover of about 7e5 points decides a gap of 1e-3."""
    kernel = kernel_of(*shape).astype(np.float32)
    convsv.norm_bounds(kernel_of(1, 1, 128), Conv("OIW"))  # imports what is imported late
    tracemalloc.start()
    bounds = convsv.norm_bounds(kernel, Conv("OIW"))
    values = convsv.operator_norm(kernel, (256,), Conv("OIW"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bounds.converged
    assert float(values) <= float(bounds.upper)
    assert bounds.evaluations <= 1 << 20
    assert peak <= 150 * MEBI


def test_differences_of_equally_spaced_offsets() -> None:
    for offsets in [(0,), (0, 1), (3, 5, 7), (-4, -1, 2, 5), (0, 1, 3)]:
        assert differences_of(offsets) == tuple(sorted({a - b for a in offsets for b in offsets}))


def test_fast_lengths_are_the_least_products_of_small_primes() -> None:
    smooth = sorted(2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6))
    for least in range(1, 1000):
        assert fast_length(least) == next(n for n in smooth if n >= least)
        assert fast_length(least, even=True) == next(n for n in smooth if n >= least and n % 2 == 0)
