"""Kernels of one geometry, each rescaled to the bound, and the bound of a change that certificates rest on."""

from __future__ import annotations

import math

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core._norm import search
from convsv_core._norm.tap_bounds import frobenius_bound
from convsv_core._projection.rescale import rescale_together
from convsv_core._symbol import moments
from convsv_core._symbol.gram import gram_polynomial
from convsv_core._symbol.moments import moment_bounds
from convsv_core._symbol.operand import make_operand
from convsv_core._symbol.polynomial import symbol_polynomial
from convsv_core.plugins import get_backend

GEOMETRIES = {
    "plain": ((6, 4, 3, 3), (8, 10), convsv.Conv("OIHW")),
    "one channel": ((1, 1, 3, 3), (8, 8), convsv.Conv("OIHW")),
    "HWIO": ((3, 5, 4, 6), (9, 7), convsv.Conv("HWIO")),
    "strided": ((8, 3, 3, 3), (8, 8), convsv.Conv("OIHW", stride=2)),
    "dilated": ((4, 4, 3, 3), (12, 12), convsv.Conv("OIHW", dilation=2)),
    "grouped": ((8, 2, 3, 3), (8, 8), convsv.Conv("OIHW", groups=4)),
    "transposed": ((4, 6, 4, 4), (6, 6), convsv.Conv("IOHW", stride=2, transposed=True)),
    "1-D": ((5, 3, 7), (16,), convsv.Conv("OIW", dilation=3)),
    "3-D": ((3, 2, 2, 3, 3), (4, 5, 6), convsv.Conv("OIDHW")),
    "one tap": ((5, 4, 1, 1), (6, 6), convsv.Conv("OIHW")),
    "more pairs of taps than frequencies": ((6, 6, 5, 5), (4, 4), convsv.Conv("OIHW")),
}


def make_kernels(
    shape: tuple[int, ...], dtype: str, bound: float, norms: np.ndarray, norm_of: object
) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(shape))
    kernels = []
    for norm in norms:
        kernel = rng.standard_normal(shape)
        if np.dtype(dtype).kind == "c":
            kernel = kernel * np.exp(2j * np.pi * rng.uniform(size=shape))
        kernels.append((kernel * (norm * bound / norm_of(kernel))).astype(dtype))  # type: ignore[operator]
    return kernels


CASES = [
    (name, library, dtype)
    for name in GEOMETRIES
    for library in ("numpy", "torch")
    for dtype in ("float32", "float64", "complex64")
] + [("strided", "jax", "float32")]  # JAX compiles each shape: one stands for all


@pytest.mark.parametrize(("name", "library", "dtype"), CASES)
def test_each_kernel_is_brought_within_the_bound(name: str, library: str, dtype: str) -> None:
    shape, extents, conv = GEOMETRIES[name]
    backend = get_backend(library)
    wide = "complex128" if dtype == "complex64" else "float64"
    eps = float(np.finfo(dtype).eps)

    def norm_of(kernel: np.ndarray) -> float:
        return float(convsv.operator_norm(kernel, extents, conv))

    def supremum_of(kernel: np.ndarray) -> float:
        return float(convsv.norm_bounds(kernel, conv, rtol=1e-6).upper)

    for input_shape, measure, loss in ((extents, norm_of, 2e-3), (None, supremum_of, 0.02)):
        kernels = make_kernels(shape, dtype, 0.7, np.asarray([0.5, 1.01, 3.0, 0.9]), measure)
        arrays = [backend.asarray(kernel) for kernel in kernels]
        results = rescale_together(arrays, input_shape, conv, 0.7)
        for kernel, array, (found, upper) in zip(kernels, arrays, results, strict=True):
            after = measure(backend.to_numpy(found).astype(wide))
            assert after <= upper * (1 + 2e-6)  # the gap of the measure
            assert upper <= 0.7
            assert str(found.dtype).rpartition(".")[2] == dtype
            if measure(kernel.astype(wide)) < 0.7:
                assert found is array
            else:
                assert after >= 0.7 * (1 - loss)
                share = after / measure(kernel.astype(wide))
                assert np.abs(backend.to_numpy(found) - share * kernel).max() <= 8 * eps * np.abs(kernel).max() + 1e-5
        again = rescale_together([found for found, _ in results], input_shape, conv, 0.7)
        assert all(one is other for (one, _), (other, _) in zip(again, results, strict=True))


def test_a_kernel_that_was_above_is_left_with_headroom() -> None:
    shape, extents, conv = GEOMETRIES["plain"]

    def norm_of(kernel: np.ndarray) -> float:
        return float(convsv.operator_norm(kernel, extents, conv))

    kernels = make_kernels(shape, "float64", 1.0, np.asarray([0.5, 0.98, 1.001]), norm_of)
    results = rescale_together(kernels, extents, conv, 1.0, headroom=0.05)
    assert [found is kernel for (found, _), kernel in zip(results, kernels, strict=True)] == [True, True, False]
    assert [upper for _, upper in results] == pytest.approx([0.95, 0.98, 0.95], rel=1e-6)
    assert norm_of(results[2][0]) == pytest.approx(0.95, rel=1e-6)


def make_flat_kernels(norms: list[float]) -> list[np.ndarray]:
    """Kernels whose singular values are nearly alike at every frequency, so that moments tell little of the largest."""
    rng = np.random.default_rng(5)
    kernels = []
    for norm in norms:
        kernel = 0.01 * rng.standard_normal((8, 8, 3, 3))
        kernel[:, :, 1, 1] += np.linalg.qr(rng.standard_normal((8, 8)))[0]
        kernels.append(norm * kernel / float(convsv.operator_norm(kernel, (8, 8), convsv.Conv("OIHW"))))
    return kernels


@pytest.mark.parametrize("padding", [{"padding_mode": "reflect"}, {"padding_mode": "circular", "padding": 2}])
def test_padding_that_repeats_pixels_has_no_certificate_for_every_size(padding: dict[str, object]) -> None:
    kernel = np.full((1, 1, 3, 3), 0.1)
    conv = convsv.Conv("OIHW", **padding)
    with pytest.raises(NotImplementedError, match="repeats pixels"):
        rescale_together([kernel], None, conv, 1.0)
    with pytest.raises(ValueError, match="rtol=-1"):
        rescale_together([kernel], None, convsv.Conv("OIHW"), 1.0, rtol=-1)


def test_kernels_of_which_no_frequency_can_be_left_out() -> None:
    conv = convsv.Conv("OIHW")
    kernels = make_flat_kernels([0.5, 0.9999, 1.001, 1.3])
    results = rescale_together(kernels, (8, 8), conv, 1.0)
    for kernel, (found, upper) in zip(kernels, results, strict=True):
        norm = float(convsv.operator_norm(kernel, (8, 8), conv))
        assert (found is kernel) == (norm < 1)
        assert float(convsv.operator_norm(found, (8, 8), conv)) == pytest.approx(min(norm, 1.0), rel=1e-9)
        assert float(convsv.operator_norm(found, (8, 8), conv)) <= upper <= 1


@pytest.mark.parametrize("exponent", [18, 24, 30, 36, 42])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_eigenvalues_of_small_matrices_keep_their_digits_beside_a_large_neighbour(dtype: str, exponent: int) -> None:
    """The closed form for matrices of side 2 takes fourth powers of norms, which vanish first."""
    rng, extents, conv = np.random.default_rng(1), (6, 6), convsv.Conv("OIHW")
    kernel = rng.standard_normal((2, 3, 2, 2)) + (1j * rng.standard_normal((2, 3, 2, 2)) if dtype[0] == "c" else 0)
    kernel = kernel.astype(dtype)
    norm = float(convsv.operator_norm(kernel, extents, conv))
    large = kernel * np.asarray(2.0**exponent, dtype)
    (found, upper), _ = rescale_together([kernel, large], extents, conv, 0.9 * norm)
    assert 0.9 * norm * (1 - 1e-3) < float(convsv.operator_norm(found.astype("complex128"), extents, conv)) <= upper


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_large_neighbour_takes_nothing_from_a_small_kernel(library: str) -> None:
    shape, extents, conv = GEOMETRIES["plain"]
    backend = get_backend(library)

    def norm_of(kernel: np.ndarray) -> float:
        return float(convsv.operator_norm(kernel, extents, conv))

    kernels = make_kernels(shape, "float32", 1.0, np.asarray([3e3, 1.1, 0.99]), norm_of)
    arrays = [backend.asarray(kernel) for kernel in kernels]
    results = rescale_together(arrays, extents, conv, 1.0)
    assert results[2][0] is arrays[2]
    for found, upper in results[:2]:
        assert 1 - 1e-3 <= norm_of(backend.to_numpy(found).astype("float64")) <= upper <= 1


@pytest.mark.parametrize("guess", ["too large", "too small", "elsewhere", "none"])
def test_a_wrong_guess_of_the_norm_costs_no_certificate(guess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the bounds from above enter the result: estimates say what is looked at first."""

    def planted(gram: object) -> moments.MomentBounds | None:
        found = moment_bounds(gram)  # type: ignore[arg-type]
        assert found is not None
        uppers, estimates = found
        if guess == "elsewhere":  # valid, and worst where the norm is least
            return moments.MomentBounds(4 * uppers.max() - uppers, estimates)
        if guess == "none":
            return None
        return moments.MomentBounds(uppers, estimates * (1e6 if guess == "too large" else 0.0))

    shape, extents, conv = GEOMETRIES["plain"]
    kernels = make_kernels(
        shape,
        "float64",
        1.0,
        np.asarray([0.9, 1.1, 2.0]),
        lambda kernel: float(convsv.operator_norm(kernel, extents, conv)),
    )
    wanted = rescale_together(kernels, extents, conv, 1.0)
    monkeypatch.setattr(search, "moment_bounds", planted)
    for kernel, (found, upper), (other, _) in zip(
        kernels, rescale_together(kernels, extents, conv, 1.0), wanted, strict=True
    ):
        norm = float(convsv.operator_norm(found, extents, conv))
        assert norm <= upper <= 1
        assert norm == pytest.approx(min(1.0, float(convsv.operator_norm(kernel, extents, conv))), rel=1e-9)
        np.testing.assert_allclose(found, other, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_moments_bound_the_norms_of_the_symbol(name: str, dtype: str) -> None:
    shape, extents, conv = GEOMETRIES[name]
    kernel = make_kernels(shape, dtype, 1.5, np.ones(1), lambda kernel: float(np.abs(kernel).max()))[0]
    operand = make_operand(kernel, extents, conv)
    gram = gram_polynomial(operand)
    found = moment_bounds(gram)
    assert found is not None
    uppers, estimates = found
    symbol = symbol_polynomial(make_operand(kernel.astype("complex128"), extents, conv))
    turns = symbol.phases(operand.plan.frequencies)
    norms = np.linalg.norm(symbol.matrices(turns), ord=2, axis=(-2, -1)) ** 2
    slack = float(gram.roundings().max())
    assert (norms <= uppers + slack).all()
    assert (estimates <= norms + 4 * slack).all()
    assert (uppers <= norms.max() * math.sqrt(min(operand.plan.block)) + 100 * slack).all()
    if min(operand.plan.block) == 1:
        np.testing.assert_allclose(uppers, norms, atol=4 * slack + 1e-3 * norms.max())


def test_moments_are_left_out_where_their_tables_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, extents, conv = GEOMETRIES["plain"]
    monkeypatch.setattr(moments, "MOMENT_ENTRIES", 100)
    assert moment_bounds(gram_polynomial(make_operand(np.ones(shape), extents, conv))) is None


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_norm_of_a_change_is_bounded_by_products_of_its_taps(name: str) -> None:
    shape, _, conv = GEOMETRIES[name]
    rng = np.random.default_rng(1)
    alike = np.ones(shape)
    single = np.zeros(shape)
    single[tuple(0 for _ in shape)] = 2.0
    for kernel in (
        rng.standard_normal(shape),
        rng.standard_normal(shape) + 1j * rng.standard_normal(shape),
        alike,
        single,
    ):
        supremum = float(convsv.norm_bounds(kernel, conv, rtol=1e-6).lower)
        bound = frobenius_bound(kernel, conv)
        assert supremum <= bound * (1 + 16 * np.finfo(float).eps)
        assert np.linalg.norm(kernel) <= bound * (1 + 16 * np.finfo(float).eps)
        taps = [shape[conv.layout.index(letter)] for letter in conv.spatial]
        order = [conv.layout.index(letter) for letter in ("O", "I", *conv.spatial)]
        norms = np.linalg.norm(kernel.transpose(order).reshape(-1, int(np.prod(taps))), axis=0)
        assert bound <= norms.sum() * (1 + 16 * np.finfo(float).eps)
    assert frobenius_bound(single, conv) == 2.0
