"""The singular vectors that a projection follows, and the steps that bring an iterate within the bound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core import Conv
from convsv_core._projection import dykstra, restoration, subspace
from convsv_core._projection.excess import Samples
from convsv_core._projection.projection import _make_problem
from convsv_core._projection.restoration import restored, squared_change
from convsv_core._projection.subspace import excess_of_followed, first_columns, first_vectors, leading_vectors
from convsv_core._symbol.operand import make_operand
from convsv_core.plugins import get_backend

CONV = Conv("OIHW")


def random_kernel(*shape: int, dtype: Any = np.float64) -> np.ndarray:
    kernel = np.random.default_rng(sum(shape)).standard_normal(shape)
    return np.asarray(kernel / math.sqrt(math.prod(shape[1:])), dtype)


# ---- followed singular vectors ---------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(20, 20), (20, 30), (30, 20)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_excess_is_the_one_of_all_singular_values(library: str, shape: tuple[int, int], groups: int) -> None:
    backend = get_backend(library)
    kernel = random_kernel(shape[0] * groups, shape[1], 3, 3)
    operand = make_operand(backend.asarray(kernel), (5, 4), Conv("OIHW", groups=groups))
    samples, limit = Samples.at(operand), 0.5 * float(convsv.operator_norm(kernel, (5, 4), Conv("OIHW", groups=groups)))
    limit = limit / float(operand.scale)
    vectors = leading_vectors(operand, operand.kernel, samples.frequencies, 20)
    bound = backend.asarray(np.asarray(limit))
    found = excess_of_followed(operand, operand.kernel, bound, *samples, None, vectors)
    symbol = dykstra.symbol_polynomial(operand)
    matrices = backend.to_numpy(symbol(samples.frequencies))
    u, s, vh = np.linalg.svd(matrices, full_matrices=False)
    wanted = (u * np.maximum(s - limit, 0)[..., None, :]) @ vh
    np.testing.assert_allclose(backend.to_numpy(found.excess.matrices), wanted, atol=1e-11)
    np.testing.assert_allclose(backend.to_numpy(found.norms).max(), s.max(), rtol=1e-12)


def test_a_value_that_is_not_followed_leaves_a_lower_bound() -> None:
    """With one vector of many the trace is still the nuclear norm of the excess, so the dual's value is one."""
    kernel = random_kernel(20, 20, 3, 3)
    operand = make_operand(kernel, (5, 4), CONV)
    samples, limit = Samples.at(operand), np.asarray(0.3)
    found = excess_of_followed(
        operand, operand.kernel, limit, *samples, None, first_vectors(operand, len(samples.weights), 1)
    )
    values = np.linalg.svd(found.excess.matrices, compute_uv=False)
    np.testing.assert_allclose(found.excess.trace, values.sum((-2, -1)), atol=1e-12)
    assert found.excess.trace.max() > 0


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_followed_vectors_lead_to_as_near_a_kernel(monkeypatch: pytest.MonkeyPatch, share: float, dtype: Any) -> None:
    """At a small bound all singular values exceed it, more than are followed at first."""
    kernel, rtol = random_kernel(18, 16, 3, 3, dtype=dtype), 1e-2
    bound = share * float(convsv.operator_norm(kernel, (8, 8), CONV))
    first = convsv.project(kernel, (8, 8), CONV, bound, rtol=rtol)
    monkeypatch.setattr(dykstra, "first_columns", lambda _: 0)
    monkeypatch.setattr(restoration, "first_columns", lambda _: 0)
    monkeypatch.setattr(restoration, "ROUNDS", 1)
    second = convsv.project(kernel, (8, 8), CONV, bound, rtol=rtol)
    assert first.converged
    assert second.converged
    assert float(first.norm) <= bound
    assert float(first.distance) ** 2 == pytest.approx(float(second.distance) ** 2, rel=2 * rtol)
    assert first.iterations <= second.iterations


# ---- steps within the bound ------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [6, 16])
def test_a_kernel_above_the_bound_is_brought_within(channels: int) -> None:
    """The steps move a kernel that is a little above the bound less far than a rescaling does."""
    kernel = random_kernel(channels, channels, 3, 3)
    bound = 0.97 * float(convsv.operator_norm(kernel, (12, 12), CONV))
    problem = _make_problem(kernel, (12, 12), CONV, bound, "dykstra", 1e-2)
    operand = problem.operand
    rescaled = float(squared_change(operand, operand.kernel * 0.97))
    # A value for which half of the rescaling's squared distance is within the gap.
    found = restored(problem, operand, operand.kernel, 0.25 * rescaled, np.arange(len(problem.frequencies)))
    assert found.converged
    assert len(found.peaks)
    norm = float(convsv.operator_norm(found.kernel, (12, 12), CONV)) * float(operand.scale)
    inside = found.kernel * min(1.0, bound / norm)
    assert float(squared_change(operand, inside)) <= 0.51 * rescaled


def test_a_kernel_too_far_from_the_bound_is_given_up() -> None:
    kernel = random_kernel(6, 6, 3, 3)
    problem = _make_problem(kernel, (12, 12), CONV, 0.5, "dykstra", 1e-2)
    found = restored(problem, problem.operand, problem.operand.kernel, 1e-6, np.arange(len(problem.frequencies)))
    assert not found.converged


def test_a_kernel_of_full_support_is_clipped() -> None:
    """With a tap for each frequency, the nearest kernel is the clipped one, and one step finds it."""
    kernel = random_kernel(17, 16, 3, 4)
    bound = 0.5 * float(convsv.operator_norm(kernel, (3, 4), CONV))
    found = convsv.project(kernel, (3, 4), CONV, bound)
    assert found.iterations == 1
    assert found.converged
    np.testing.assert_allclose(found.kernel, convsv.clip(kernel, (3, 4), CONV, bound), atol=1e-12)


def test_a_state_of_a_far_kernel_does_not_move_a_near_one_farther() -> None:
    kernel = random_kernel(6, 5, 3, 3)
    bound = 0.2 * float(convsv.operator_norm(kernel, (8, 8), CONV))
    far = convsv.project(kernel, (8, 8), CONV, bound, steps=3)
    near = 1.01 * np.asarray(far.kernel)
    again = convsv.project(near, (8, 8), CONV, bound, steps=3, state=far.state)
    scaled = convsv.project(near, (8, 8), CONV, bound, method="rescale")
    assert float(again.distance) <= 1.01 * float(scaled.distance)


def test_more_vectors_are_followed_until_decompositions_are_as_cheap() -> None:
    operand = make_operand(random_kernel(32, 32, 3, 3), (8, 8), CONV)
    assert first_columns(operand) == 8
    assert subspace.more_columns(operand, 8) == 16
    assert subspace.more_columns(operand, 16) == 0
    assert first_columns(make_operand(random_kernel(32, 32, 1, 1), (8, 8), CONV)) == 0
