"""Norms of several kernels at once, their derivatives, and the frequencies that a coarse grid excludes."""

from __future__ import annotations

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core._geometry.plan import make_plan
from convsv_core._norm.cover import covered_grid, grid_cover
from convsv_core._norm.largest import largest_on_grid
from convsv_core._norm.search import Largest, largest_of_each, moments_of, parts_of
from convsv_core._symbol import singular_pairs
from convsv_core._symbol.operand import make_operand
from convsv_core._symbol.rows import grid_rows
from convsv_core.training import norms_together

GEOMETRIES = {
    "plain": ((6, 4, 3, 3), (8, 10), convsv.Conv("OIHW")),
    "fine grid": ((4, 4, 3, 3), (32, 30), convsv.Conv("OIHW")),
    "one channel": ((1, 1, 3, 3), (8, 8), convsv.Conv("OIHW")),
    "HWIO": ((3, 5, 4, 6), (9, 7), convsv.Conv("HWIO")),
    "strided": ((8, 3, 3, 3), (48, 48), convsv.Conv("OIHW", stride=2)),
    "dilated": ((4, 4, 3, 3), (12, 12), convsv.Conv("OIHW", dilation=2)),
    "grouped": ((8, 2, 3, 3), (8, 8), convsv.Conv("OIHW", groups=4)),
    "transposed": ((4, 6, 4, 4), (6, 6), convsv.Conv("IOHW", stride=2, transposed=True)),
    "1-D": ((5, 3, 7), (90,), convsv.Conv("OIW", dilation=3)),
    "3-D": ((3, 2, 2, 3, 3), (4, 5, 6), convsv.Conv("OIDHW")),
    "one tap": ((5, 4, 1, 1), (6, 6), convsv.Conv("OIHW")),
    "more pairs of taps than frequencies": ((6, 6, 5, 5), (4, 4), convsv.Conv("OIHW")),
    "long": ((2, 2, 11, 11), (24, 24), convsv.Conv("OIHW")),
}

DTYPES = ("float16", "float32", "float64", "complex64", "complex128")


def random_kernels(shape: tuple[int, ...], dtype: str, scales: list[float]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(shape))
    kernels = []
    for scale in scales:
        kernel = rng.standard_normal(shape) * scale
        if dtype.startswith("complex"):
            kernel = kernel * np.exp(2j * np.pi * rng.uniform(size=shape))
        kernels.append(kernel.astype(dtype))
    return kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_norms_together_are_those_of_the_single_kernels(name: str, dtype: str) -> None:
    shape, extents, conv = GEOMETRIES[name]
    kernels = random_kernels(shape, dtype, [1.0, 0.0, 3.0, 0.01])
    for input_shape in (extents, None):
        found = norms_together(kernels, input_shape, conv)
        for kernel, norm in zip(kernels, found.values, strict=True):
            if input_shape is None:
                wanted = convsv.norm_upper_bound(kernel, conv)
            else:
                wanted = convsv.operator_norm(kernel, input_shape, conv)
            assert found.values.dtype == wanted.dtype
            np.testing.assert_allclose(norm, wanted, rtol=8 * np.finfo(wanted.dtype).eps)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_slopes_are_the_derivatives_of_the_norms(name: str, dtype: str) -> None:
    shape, extents, conv = GEOMETRIES[name]
    kernels = random_kernels(shape, dtype, [1.0, 2.0])
    changes = random_kernels(shape[::-1], dtype, [1e-6, 1e-6])
    changes = [change.reshape(shape) for change in changes]
    for input_shape in (extents, None):
        found = norms_together(kernels, input_shape, conv)
        assert found.slopes is not None
        after, before = (
            norms_together([k + sign * c for k, c in zip(kernels, changes, strict=True)], input_shape, conv).values
            for sign in (1, -1)
        )
        for slope, change, difference in zip(found.slopes, changes, after - before, strict=True):
            assert slope.shape == shape
            assert float(np.real(np.sum(slope * change))) == pytest.approx(difference / 2, rel=1e-4, abs=1e-11)


def test_the_derivative_at_a_zero_kernel_is_0_beside_others() -> None:
    kernels = random_kernels((4, 4, 3, 3), "float32", [0.0, 1.0])
    found = norms_together(kernels, (8, 8), convsv.Conv("OIHW"))
    assert found.slopes is not None
    assert not found.slopes[0].any()
    assert np.isfinite(found.slopes[1]).all()


def test_a_huge_kernel_takes_no_digits_from_a_tiny_one() -> None:
    kernels = random_kernels((4, 4, 3, 3), "float32", [1e30, 1.0, 1e-25])
    found = norms_together(kernels, (8, 8), convsv.Conv("OIHW"))
    wanted = [convsv.operator_norm(kernel, (8, 8), convsv.Conv("OIHW")) for kernel in kernels]
    np.testing.assert_array_equal(found.values, wanted)


def test_values_alone_are_the_same() -> None:
    kernels = random_kernels((4, 4, 3, 3), "float32", [1.0, 2.0])
    both = norms_together(kernels, (8, 8), convsv.Conv("OIHW"))
    values = norms_together(kernels, (8, 8), convsv.Conv("OIHW"), derivatives=False)
    assert values.slopes is None
    np.testing.assert_array_equal(values.values, both.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["identity", "tied groups", "tie within a matrix"])
def test_slopes_of_ties_attain_the_norm(kernels: str, dtype: str) -> None:
    """A subgradient D of a norm has ``Re sum(D * K)`` equal to the norm of K, because norms are homogeneous."""
    kernel, groups = np.zeros((4, 4, 3, 3)), 1
    kernel[np.arange(4), np.arange(4), 1, 1] = 1.0
    if kernels == "tied groups":
        kernel, groups = np.tile(np.random.default_rng(0).standard_normal((2, 2, 3, 3)), (2, 1, 1, 1)), 2
    elif kernels == "tie within a matrix":
        kernel[2, 2, 1, 1] = kernel[3, 3, 1, 1] = 0.5
    kernel = kernel.astype(dtype)
    conv = convsv.Conv("OIHW", groups=groups)
    for input_shape in ((8, 8), None):
        found = norms_together([kernel, 2 * kernel], input_shape, conv)
        assert found.slopes is not None
        for one, norm, slope in zip([kernel, 2 * kernel], found.values, found.slopes, strict=True):
            assert float(np.real(np.sum(slope * one))) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_slopes_are_the_same_from_all_eigenvectors(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = random_kernels((6, 5, 3, 3), dtype, [1.0, 0.0, 3.0])
    found = norms_together(kernels, (8, 8), convsv.Conv("OIHW"))
    monkeypatch.setattr(singular_pairs, "RESIDUAL_EPS", -1)  # No vector is good enough.
    wanted = norms_together(kernels, (8, 8), convsv.Conv("OIHW"))
    assert found.slopes is not None
    assert wanted.slopes is not None
    for one, other in zip(found.slopes, wanted.slopes, strict=True):
        np.testing.assert_allclose(one, other, atol=256 * np.finfo(dtype).eps)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_is_refused(bad: float) -> None:
    kernels = random_kernels((2, 2, 3, 3), "float32", [1.0, 1.0])
    kernels[1][0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        norms_together(kernels, (8, 8), convsv.Conv("OIHW"))


# ---- the cover of a fine grid ------------------------------------------------------------------------------


def flat_kernels(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return kernels whose norms are hardest to tell apart: steep between frequencies, constant, random."""
    steep = np.zeros(shape)
    steep[0, 0, 0, 0] = steep[0, 0, 2, 2] = 1.0  # |cos(theta_1 + theta_2)|, whose slope is the largest possible
    peak = np.ones(shape)
    constant = np.zeros(shape)
    constant[:, :, 1, 1] = np.eye(*shape[:2])
    return [steep, peak, constant, *random_kernels(shape, "float64", [1.0] * 6)]


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.5])
def test_a_cover_hides_no_larger_norm(shift: float) -> None:
    """The peak of a kernel is moved between the coarse frequencies by a modulation of its taps."""
    shape, extents, conv = (3, 3, 3, 3), (32, 32), convsv.Conv("OIHW")
    places = np.arange(3)
    turns = 2 * np.pi * (2 * shift) / 32 * (places[:, None] + places[None, :])
    for kernel in flat_kernels(shape):
        operand = make_operand(kernel * np.exp(1j * turns), extents, conv)
        assert grid_cover(operand.plan) is not None
        found = largest_on_grid(operand)
        symbols = np.fft.fft2(np.asarray(operand.kernel), extents).transpose(2, 3, 0, 1)
        wanted = float(np.linalg.norm(symbols, 2, axis=(-2, -1)).max() ** 2)
        assert found.value == pytest.approx(wanted, rel=1e-12)
        assert found.upper >= wanted * (1 - 1e-12)


def test_a_cover_for_every_size_keeps_its_factor() -> None:
    """The largest norm over all frequencies is at most the factor times the largest norm that the search finds."""
    shape, conv = (3, 3, 3, 3), convsv.Conv("OIHW", padding_mode="zeros", padding=1)
    grid, cover = covered_grid(shape, conv, 0.01, False)
    assert cover is not None
    places = np.arange(3)
    for kernel in flat_kernels(shape):
        for shift in (0.0, 0.25, 0.5):
            turns = 2 * np.pi * shift / grid.input_shape[0] * 2 * (places[:, None] + places[None, :])
            turned = kernel * np.exp(1j * turns)
            found = _search(turned, grid.input_shape, grid.conv, cover)
            supremum = convsv.norm_bounds(turned, conv, rtol=1e-6)
            assert grid.factor * np.sqrt(found.upper) * float(_scale(turned)) >= float(supremum.lower) * (1 - 1e-12)
            assert np.sqrt(found.value) * float(_scale(turned)) <= float(supremum.upper)


def test_a_share_that_is_too_large_would_hide_a_norm() -> None:
    """The tests above can fail: with a coarse test above the level, the best norm found is too small."""
    shape, conv = (1, 1, 3, 3), convsv.Conv("OIHW")
    places = np.arange(3)
    turned = np.ones(shape) * np.exp(1j * 2 * np.pi / 32 * (places[:, None] + places[None, :]))
    plan = make_plan(shape, False, (32, 32), conv)
    cover = grid_cover(plan)
    assert cover is not None
    wanted = largest_on_grid(make_operand(turned, (32, 32), conv))
    # Without moments the search begins anywhere, and the peak lies between coarse frequencies.
    held = _search(turned, (32, 32), conv, cover, moments=False)
    assert held.value == pytest.approx(wanted.value, rel=1e-12)
    hidden = _search(turned, (32, 32), conv, cover._replace(share=1.001), moments=False)
    assert hidden.value < wanted.value * (1 - 1e-3)


def _search(
    kernel: np.ndarray, extents: tuple[int, ...], conv: convsv.Conv, cover: object, *, moments: bool = True
) -> Largest:
    rows = grid_rows(make_operand(kernel, extents, conv))
    bounds = moments_of(rows, 1) if moments else [None]
    (found,) = largest_of_each(parts_of(rows, 1), bounds, [0.0], cover=cover)  # type: ignore[arg-type]
    return found


def _scale(kernel: np.ndarray) -> np.ndarray:
    return np.asarray(make_operand(kernel, (32, 32), convsv.Conv("OIHW")).scale)


def test_a_level_is_kept_by_each_kernel() -> None:
    """Kernels below their level need no eigenvalue, and others are found as if they were alone."""
    conv = convsv.Conv("OIHW", groups=3)
    kernels = random_kernels((4, 4, 3, 3), "float64", [1.0, 0.2, 3.0])
    operand = make_operand(np.concatenate(kernels), (16, 16), conv)
    rows = grid_rows(operand)
    alone = [
        float(convsv.operator_norm(kernel, (16, 16), convsv.Conv("OIHW"))) / float(operand.scale) for kernel in kernels
    ]
    level = (0.5 * (alone[0] + alone[1])) ** 2
    found = largest_of_each(parts_of(rows, 3), moments_of(rows, 3), [level] * 3, cover=grid_cover(operand.plan))
    assert found[1] == Largest(0.0, level, None)
    for index in (0, 2):
        assert np.sqrt(found[index].value) == pytest.approx(alone[index], rel=1e-12)
