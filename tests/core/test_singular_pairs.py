"""Tests of singular vectors of largest singular values, against the SVD."""

from __future__ import annotations

import numpy as np
import pytest

from convsv_core._geometry.plan import HostArray
from convsv_core._symbol import singular_pairs
from convsv_core._symbol.singular_pairs import largest_pairs

DTYPES = ["float32", "float64", "complex64", "complex128"]


def random_blocks(shape: tuple[int, ...], dtype: str) -> HostArray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape) * dtype.startswith("complex")).astype(
        dtype, casting="unsafe"
    )


def assert_pairs(blocks: HostArray, squares: HostArray | None) -> None:
    found, wanted = largest_pairs(blocks, squares), np.linalg.svd(blocks, compute_uv=False).max(axis=(1, 2))
    margin = 64 * float(np.finfo(blocks.dtype).eps)
    assert found.left.dtype == found.right.dtype == blocks.dtype
    np.testing.assert_allclose(found.values, wanted, rtol=margin)
    for one, group, value, left, right in zip(blocks, found.groups, found.values, found.left, found.right, strict=True):
        assert np.linalg.norm(left) == pytest.approx(1.0, abs=margin)
        assert np.linalg.norm(right) == pytest.approx(1.0, abs=margin)
        np.testing.assert_allclose(one[group] @ right, value * left, atol=margin * value)
        np.testing.assert_allclose(one[group].conj().T @ left, value * right, atol=margin * value)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("sides", [(5, 5), (3, 7), (7, 3), (1, 4), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_several_matrices_of_several_blocks(dtype: str, sides: tuple[int, int], known: bool) -> None:
    blocks = random_blocks((4, 3, *sides), dtype)
    blocks[1] *= 1000
    blocks[2] = 0
    squares = np.linalg.svd(blocks, compute_uv=False).max(axis=(1, 2)).astype(float) ** 2
    assert_pairs(blocks, squares if known else None)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_equal_values(dtype: str) -> None:
    blocks = np.stack([np.stack([np.eye(4), np.diag([1, 0.5, 1, 0])]), np.stack([np.zeros((4, 4)), np.eye(4)])])
    assert_pairs(blocks.astype(dtype), np.ones(2))


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.001, 2.0, np.nan])
def test_a_square_that_is_wrong_costs_time_alone(factor: float) -> None:
    blocks = random_blocks((2, 2, 6, 5), "complex128")
    squares = np.linalg.svd(blocks, compute_uv=False).max(axis=(1, 2)) ** 2
    assert_pairs(blocks, factor * squares)


def test_a_known_square_spares_the_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks((1, 1, 64, 64), "complex128")
    square = np.linalg.svd(blocks, compute_uv=False).max(axis=(1, 2)) ** 2
    monkeypatch.delattr(singular_pairs, "_decomposed")
    assert_pairs(blocks, square)
