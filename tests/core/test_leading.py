"""The leading singular vectors of many matrices, and that what they do not hold is found out."""

from __future__ import annotations

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core._projection import excess, leading
from convsv_core._projection.leading import PAIRS, expected_share, leading_pairs
from convsv_core.plugins import get_backend

SIDE, COUNT = 24, 40
EPS = float(np.finfo(np.float32).eps)


def unitary(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    shape = (COUNT, 2, rows, columns)
    q: np.ndarray = np.linalg.qr(rng.standard_normal(shape) + 1j * rng.standard_normal(shape))[0]
    return q


def with_values(values: np.ndarray, rows: int = SIDE, columns: int = SIDE) -> np.ndarray:
    """Matrices of two groups with the given singular values, in random bases."""
    rng = np.random.default_rng(0)
    left, right = unitary(rng, rows, len(values)), unitary(rng, columns, len(values))
    return np.asarray((left * values) @ right.conj().swapaxes(-1, -2))


def excess_of(matrices: np.ndarray, limit: float) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrices, full_matrices=False)
    return np.asarray((u * np.maximum(s - limit, 0)[..., None, :]) @ vh)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, SIDE + 6), (SIDE + 6, SIDE)], ids=str)
@pytest.mark.parametrize("above", [[], [2.0], [1.0001], [2.0, 1.95], [2.0, 2.0, 2.0]], ids=str)
def test_what_is_above_the_limit_is_found(library: str, shape: tuple[int, int], above: list[float]) -> None:
    backend = get_backend(library)
    values = np.asarray(above + [0.5] * (SIDE - len(above)))
    matrices = with_values(values, *shape)
    array, limit = backend.asarray(matrices), backend.asarray(np.asarray(1.0))
    assert leading_pairs(backend, array, limit).sure.all()
    found, traces = (backend.to_numpy(x) for x in excess._excess_leading(backend, array, limit))
    np.testing.assert_allclose(found, excess_of(matrices, 1.0), atol=16 * EPS * values.max(), rtol=0)
    np.testing.assert_allclose(traces, 2 * sum(x - 1 for x in above), atol=16 * EPS * values.max(), rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        np.repeat([2.0, 0.5], [PAIRS + 1, SIDE - PAIRS - 1]),
        np.linspace(0.1, 2.0, SIDE),
        np.r_[100.0, 1.1, np.full(SIDE - 2, 0.99)],  # the second is lost beside the first in single precision
    ],
    ids=["more than columns", "half", "far apart"],
)
def test_what_is_not_found_is_decomposed(values: np.ndarray) -> None:
    backend, matrices, limit = get_backend("numpy"), with_values(values), np.asarray(1.0)
    assert expected_share(backend, matrices, limit) == 0
    assert not leading_pairs(backend, matrices, limit).sure.all()
    found, _ = excess._excess_leading(backend, matrices, limit)
    np.testing.assert_allclose(found, excess_of(matrices, 1.0), atol=16 * EPS * values.max(), rtol=0)


def test_a_start_that_does_not_hold_the_leading_vector_is_found_out() -> None:
    """A matrix whose leading vector is orthogonal to every starting column, but for rounding, which is no help."""
    backend = get_backend("numpy")
    start = leading._start(SIDE)
    basis = np.linalg.qr(np.c_[start, np.random.default_rng(1).standard_normal((SIDE, SIDE - PAIRS))])[0]
    values = np.full(SIDE, 0.5)
    values[-1] = 1.0 + 1e-6  # not raised above the rest by the power
    values[:PAIRS] = 0.999
    matrix = ((basis * values) @ basis.T).astype(complex)[None, None]
    limit = np.asarray(1.0 - 1e-4)
    squares, _, sure = leading_pairs(backend, matrix, limit)
    assert squares.max() < 1.0, "the starting columns hold it after all"
    assert not sure.any()
    found, _ = excess._excess_leading(backend, matrix, limit)
    np.testing.assert_allclose(found, excess_of(matrix, float(limit)), atol=16 * EPS, rtol=0)


def test_zero_matrices_and_huge_ones() -> None:
    backend = get_backend("numpy")
    matrices = with_values(np.r_[2.0, np.full(SIDE - 1, 0.1)])
    matrices[0], matrices[1, 1] = 0, 0
    with np.errstate(all="raise", under="ignore"):
        found, _ = excess._excess_leading(backend, matrices, np.asarray(1.0))
    np.testing.assert_allclose(found, excess_of(matrices, 1.0), atol=16 * EPS, rtol=0)


def test_clip_takes_this_way_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    conv, extents = convsv.Conv("HWIO"), (12, 12)
    norms = convsv.frequency_singular_values(kernel, extents, conv)[..., 0]
    counts: list[int] = []
    found = excess.leading_pairs

    def counting(*arguments: object) -> object:
        counts.append(len(arguments[1]))  # type: ignore[arg-type]
        return found(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(excess, "leading_pairs", counting)
    for quantile, wanted in ((0.5, True), (0.999, False)):
        counts.clear()
        bound = float(np.quantile(norms, quantile))
        clipped = convsv.clip(kernel, extents, conv, bound)
        assert bool(counts) is wanted
        exact = convsv.clip(kernel.astype(np.float64), extents, conv, bound)
        np.testing.assert_allclose(clipped, exact, atol=16 * EPS * norms.max(), rtol=0)
    counts.clear()
    convsv.clip(kernel, extents, conv, 0.5 * float(norms.min()))
    assert not counts, "most of the pairs are above the bound"
