"""The nearest kernel of `project` against a convex solver, which shares no code with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from convsv_conformance.cases import Case, make_case
from convsv_conformance.checks import projection as check
from convsv_conformance.table import by_name

import convsv_core as convsv

SMALL = (
    *by_name(
        "1d", "1d-even", "1d-one-channel", "1d-flax-layout", "1d-stride", "1d-dilation", "1d-transposed",
        "1d-kernel-larger-than-input", "1d-depthwise-dilated", "one-pixel-wide", "two-pixels", "stride-of-the-input",
        "3d-stride", "3d-transposed",
    ),
    make_case("small-2d", (2, 2), (2, 2), (3, 3)),
    make_case("small-groups", (4, 2), (2, 2), (2, 3), groups=2),
    make_case("small-stride", (3, 1), (3, 3), (4, 4), stride=2),
    make_case("small-transposed", (1, 3), (3, 3), (2, 2), stride=2, transposed=True),
    make_case("small-wrapped", (2, 1), (5,), (4,)),
)  # fmt: skip
PROBLEMS = [(case, share, "float64") for case in SMALL for share in (0.4, 0.8)]
PROBLEMS += [(case, 0.6, "complex128") for case in by_name("1d-even", "1d-stride", "one-pixel-wide")]

NEAREST_RTOL = 1e-4
"""Largest relative difference of the distance from the solver's."""

SOLVER_RTOL = 1e-7
"""Relative error of the solver's own distance, a hundred times the tolerance that it is given."""


def solved(case: Case, values: Any, bound: float) -> float:
    """Least Frobenius distance to an operator of norm at most `bound`, by an interior-point method."""
    cp = pytest.importorskip("cvxpy")
    basis = np.eye(values.size).reshape(-1, *values.shape)
    columns = np.stack([case.matrix(one).reshape(-1) for one in basis], axis=1)
    matrix = case.matrix(values)
    taps = cp.Variable(values.size, complex=np.iscomplexobj(values))
    operator = cp.reshape(columns @ taps, matrix.shape, order="C")
    # The squared distance is a quadratic form of the taps.
    eigenvalues, vectors = np.linalg.eigh(columns.T @ columns)
    root = np.sqrt(np.maximum(eigenvalues, 0))[:, None] * vectors.T
    objective = cp.sum_squares(root @ (taps - values.reshape(-1)))
    problem = cp.Problem(cp.Minimize(objective), [cp.sigma_max(operator) <= bound])
    tolerance = 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the solver warns of inaccuracy, which the next lines check
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance)
    found = (columns @ taps.value).reshape(matrix.shape)
    assert np.linalg.norm(found, 2) <= bound * (1 + SOLVER_RTOL)
    return float(np.linalg.norm(found - matrix))


@pytest.mark.parametrize(("case", "share", "dtype"), PROBLEMS, ids=lambda value: getattr(value, "name", str(value)))
def test_dykstra_is_as_near_as_a_convex_solver(
    case: Case, share: float, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    values = case.values(dtype)
    truth = case.truth(values)
    bound = share * truth.norm
    least = solved(case, values, bound)
    found = convsv.project(values, case.input_shape, case.conv, bound)
    assert found.converged
    assert -SOLVER_RTOL <= float(found.distance) / least - 1 <= NEAREST_RTOL
    alternating = convsv.project(values, case.input_shape, case.conv, bound, method="alternating")
    clipped = convsv.clip(values, case.input_shape, case.conv, bound)
    excess_of_clip = case.truth(clipped).norm / bound - 1
    record_property("dykstra, distance above the least", float(found.distance) / least - 1)
    record_property("alternating, distance above the least", float(alternating.distance) / least - 1)
    record_property("one clip, norm above the bound", excess_of_clip)
    assert float(alternating.distance) >= least * (1 - SOLVER_RTOL)


def test_enough_problems_are_solved() -> None:
    assert len(PROBLEMS) >= 30


@pytest.mark.parametrize("name", ["1d-even", "1d-stride", "one-pixel-wide"])
def test_the_distance_of_the_reference_is_that_of_the_solver(name: str) -> None:
    (case,) = by_name(name)
    truth = case.truth(case.values("float64"))
    bound = check.SHARE * truth.norm
    least = solved(case, truth.values, bound)
    reference = check.least_distance(truth, bound)
    assert least * (1 - check.REFERENCE_RTOL) <= reference <= least * (1 + SOLVER_RTOL)
