"""`norm_bounds` never lies: on layers of every geometry, against a search of its own kind."""

from __future__ import annotations

import numpy as np
import pytest
from convsv_conformance.random_layers import random_layer, refined_supremum, symbol_norm

import convsv_core as convsv
from convsv_core.plugins import get_backend

LAYERS_PER_SEED = 40


def check_layer(kernel: np.ndarray, conv: convsv.Conv, rtol: float) -> float:
    """Assert that the bounds hold; returns the gap between them."""
    bounds = convsv.norm_bounds(kernel, conv, rtol=rtol)
    lower, upper = float(bounds.lower), float(bounds.upper)
    # Both sides of the truth: it is at least what any search finds, and `lower` is attained where it says.
    eps = float(np.finfo(kernel.dtype).eps)
    noise = 1 + 64 * np.finfo(float).eps * max(kernel.shape)
    found = refined_supremum(lambda angles: symbol_norm(kernel, conv, angles), conv.ndim, np.asarray(bounds.frequency))
    attained = symbol_norm(kernel, conv, np.asarray(bounds.frequency)[None, :])[0]
    assert lower <= attained * noise
    assert attained <= lower * (1 + 8 * eps) * noise
    assert found <= upper * noise
    assert bounds.converged == (upper <= (1 + rtol) * lower)
    if lower == 0:
        assert upper <= np.finfo(kernel.dtype).tiny or found > 0
        return 0.0
    return upper / lower - 1


@pytest.mark.parametrize("seed", range(10))
def test_random_layers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(LAYERS_PER_SEED):
        kernel, conv = random_layer(rng)
        rtol = 1e-2 if conv.ndim == 3 else 1e-3
        gap = check_layer(kernel, conv, rtol)
        assert gap <= rtol or conv.ndim == 3, (kernel.shape, conv)


@pytest.mark.parametrize("seed", range(5))
def test_random_grids(seed: int) -> None:
    """On one circular grid the truth is the largest of finitely many norms."""
    rng = np.random.default_rng(100 + seed)
    for _ in range(LAYERS_PER_SEED):
        kernel, conv = random_layer(rng)
        shape = tuple(
            int(n) * s for n, s in zip(rng.integers(1, 14 - 3 * conv.ndim, conv.ndim), conv.strides, strict=True)
        )
        shape = tuple(n // s for n, s in zip(shape, conv.strides, strict=True)) if conv.transposed else shape
        bounds = convsv.norm_bounds(kernel, conv, input_shape=shape)
        truth = float(convsv.singular_values(kernel.astype(np.result_type(kernel, float)), shape, conv)[0])
        noise = 64 * np.finfo(float).eps * truth
        assert bounds.lower <= truth + noise
        assert truth <= bounds.upper + noise
        assert bounds.converged


def test_local_optima_do_not_stop_the_search() -> None:
    """Two blocks whose suprema stand at different frequencies, one barely higher; others stop at the lower."""
    rng = np.random.default_rng(3)
    for _ in range(60):
        peaks = rng.uniform(0, 2 * np.pi, (2, 2))
        kernel = np.zeros((2, 2, 3, 3), complex)
        for block, (height, peak) in enumerate(zip((1.0, 1.2), peaks, strict=True)):
            waves = [np.exp(-1j * np.arange(3) * angle) / 3 for angle in peak]
            kernel[block, block] = height * np.multiply.outer(*waves)
        bounds = convsv.norm_bounds(kernel, convsv.Conv("OIHW"))
        assert bounds.lower <= 1.2 * (1 + 1e-14) <= bounds.upper * (1 + 2e-14)


@pytest.mark.parametrize(
    ("name", "kernel", "norm"),
    [
        ("identity", np.eye(8)[:, :, None, None] * np.pad(np.ones((1, 1)), 1), 1.0),
        ("one tap of nine", np.eye(4)[:, :, None, None] * (np.arange(9) == 5).reshape(3, 3), 1.0),
        ("ones", np.ones((4, 4, 3, 3)), 36.0),
        ("1x1", np.diag([3.0, 2.0])[:, :, None, None], 3.0),
        ("orthogonal", np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0][:, :, None, None], 1.0),
        ("zero", np.zeros((3, 2, 3, 3)), 0.0),
    ],
)
def test_flat_and_peaked_symbols_converge_to_the_last_digits(name: str, kernel: np.ndarray, norm: float) -> None:
    bounds = convsv.norm_bounds(kernel, convsv.Conv("OIHW"), rtol=1e-8)
    assert bounds.converged
    assert bounds.evaluations <= 100
    assert float(bounds.lower) <= norm <= float(bounds.upper)


def test_a_maximum_between_grid_points_is_found() -> None:
    angle = 2 * np.pi * 0.123456
    kernel = np.exp(-1j * angle * np.arange(5))[None, None, :]
    bounds = convsv.norm_bounds(kernel, convsv.Conv("OIW"), rtol=1e-8)
    assert bounds.converged
    assert float(bounds.lower) <= 5.0 <= float(bounds.upper)
    assert bounds.frequency[0] == pytest.approx(angle, abs=1e-3)


def test_the_singular_pair_attains_the_lower_bound() -> None:
    rng = np.random.default_rng(0)
    for conv in (convsv.Conv("OIHW", stride=2), convsv.Conv("OIHW", groups=2), convsv.Conv("IOHW", transposed=True)):
        kernel = rng.normal(size=(4, 3, 3, 3))
        shape = (8, 8)
        bounds = convsv.norm_bounds(kernel, conv, input_shape=shape)
        symbol = convsv.symbol(kernel, shape, conv)
        place = tuple(round(a * n / (2 * np.pi)) for a, n in zip(bounds.frequency, symbol.shape, strict=False))
        pair = np.einsum("gr,grc,gc->", bounds.left.conj(), symbol[place], bounds.right)
        assert abs(pair - bounds.lower) <= 100 * np.finfo(float).eps * bounds.lower


def test_a_spent_budget_returns_the_certificate_reached() -> None:
    kernel = np.random.default_rng(0).normal(size=(8, 8, 3, 3, 3))
    conv = convsv.Conv("OIDHW")
    short = convsv.norm_bounds(kernel, conv, rtol=1e-6, max_evaluations=1000)
    assert not short.converged
    assert short.evaluations <= 1000
    better = convsv.norm_bounds(kernel, conv, rtol=1e-2)
    assert short.lower <= better.upper
    assert better.lower <= short.upper


@pytest.mark.parametrize("rtol", [0, -1.0, float("nan"), "small", True])
def test_rtol_must_be_positive(rtol: object) -> None:
    with pytest.raises(ValueError, match="rtol"):
        convsv.norm_bounds(np.ones((1, 1, 3)), convsv.Conv("OIW"), rtol=rtol)  # type: ignore[arg-type]


def test_repeating_paddings_are_refused_without_extents() -> None:
    with pytest.raises(NotImplementedError, match="reflect"):
        convsv.norm_bounds(np.ones((1, 1, 3)), convsv.Conv("OIW", padding_mode="reflect"))


@pytest.mark.parametrize("seed", range(3))
def test_cells_decided_by_cholesky(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices are tested against a limit before their norm is computed; here all of them are."""
    monkeypatch.setattr("convsv_core._norm.torus.TESTED_SIDE", 1)
    rng = np.random.default_rng(200 + seed)
    for _ in range(LAYERS_PER_SEED):
        kernel, conv = random_layer(rng)
        rtol = 1e-2 if conv.ndim == 3 else 1e-3
        gap = check_layer(kernel, conv, rtol)
        assert gap <= rtol or conv.ndim == 3, (kernel.shape, conv)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_cholesky_and_eigenvalues_agree_on_wide_layers(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get_backend(library)
    values = np.random.default_rng(0).normal(size=(64, 80, 3, 3))
    kernel, conv = backend.asarray(values), convsv.Conv("OIHW")
    tested = convsv.norm_bounds(kernel, conv)
    monkeypatch.setattr("convsv_core._norm.torus.TESTED_SIDE", 1000)
    computed = convsv.norm_bounds(kernel, conv)
    assert tested.converged
    assert computed.converged
    assert float(tested.lower) <= float(computed.upper)
    assert float(computed.lower) <= float(tested.upper)
