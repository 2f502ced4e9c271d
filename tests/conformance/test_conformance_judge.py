"""The dense reference is tested too: its values, derivatives, symbols and clipped kernels."""

from __future__ import annotations

import numpy as np
import pytest
from convsv_conformance.dense import accurate_singular_values
from convsv_conformance.symbols import symbol_at
from convsv_conformance.table import TABLE, by_name


def test_singular_values_of_the_judge_are_those_of_known_matrices() -> None:
    rng = np.random.default_rng(0)
    exact = np.concatenate([np.repeat([2.0, 1.0, 2.0**-20], 20), np.zeros(4)])
    # Householder reflections with dyadic entries are exactly orthogonal, so the product has exactly these values
    signs = [rng.choice([-1.0, 1.0], 64) for _ in range(4)]
    left, right, *_ = (np.eye(64) - np.outer(sign, sign) / 32 for sign in signs)
    got = accurate_singular_values(left @ np.diag(exact) @ right)
    assert np.abs(got - exact).max() <= np.finfo(np.float64).eps * 2


@pytest.mark.parametrize("name", ["2d", "stride", "kernel-larger-than-input", "transposed-groups"])
def test_derivative_of_the_judge_is_the_limit_of_differences(name: str) -> None:
    case = by_name(name)[0]
    truth = case.truth(case.values("float64"))
    rng = np.random.default_rng(1)
    step = np.finfo(np.float64).eps ** (1 / 3)
    for weights in (np.ones(1), np.linspace(2, 1, case.count)):
        direction = rng.standard_normal(truth.values.shape)
        ahead, behind = (
            weights @ case.truth(truth.values + sign * step * direction).singular_values[: len(weights)]
            for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        assert abs(truth.derivative(weights, direction) - slope) <= 100 * step**2 * weights.sum()


@pytest.mark.parametrize("name", ["rectangular", "stride", "groups", "transposed-stride", "dilated-onto-itself"])
def test_clip_of_the_judge_is_the_least_squares_projection(name: str) -> None:
    """No kernel of the shape is nearer to the clipped operator: the nearest one is solved for, entry by entry."""
    case = by_name(name)[0]
    truth = case.truth(case.values("float64"))
    bound = truth.norm / 2
    u, s, vh = np.linalg.svd(truth.matrix, full_matrices=False)
    change = (u * (np.minimum(s, bound) - s)) @ vh
    basis = np.eye(truth.values.size).reshape(-1, *truth.values.shape)
    columns = np.stack([case.matrix(one).reshape(-1) for one in basis], axis=1)
    least = np.linalg.lstsq(columns, change.reshape(-1), rcond=None)[0]  # of minimal norm, so shared equally
    expected = truth.values + least.reshape(truth.values.shape)
    assert np.abs(truth.clipped(bound) - expected).max() <= 100 * np.finfo(np.float64).eps * truth.norm


def test_symbol_at_any_frequency_is_that_of_the_matrix_on_the_grid() -> None:
    for case in TABLE:
        truth = case.truth(case.values("complex128"))
        angles = np.indices(case.grid).reshape(len(case.grid), -1).T * (2 * np.pi / np.asarray(case.grid))
        got = symbol_at(case, truth.values, angles).reshape(truth.symbol.shape)
        assert np.abs(got - truth.symbol).max() <= 100 * np.finfo(np.float64).eps * truth.norm, case.name


def test_symbol_of_the_judge_has_the_values_of_its_matrix() -> None:
    for case in TABLE:
        truth = case.truth(case.values("float64"))
        values = np.sort(np.linalg.svd(truth.symbol, compute_uv=False).reshape(-1))[::-1]
        assert np.abs(values - truth.singular_values).max() <= 20 * np.finfo(np.float64).eps * truth.norm, case.name
