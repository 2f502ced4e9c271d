"""Directions of steepest descent: against a convex solver, on random gradients, in three libraries, and in training."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from convsv_conformance.cases import Case, make_case
from convsv_conformance.checks import direction as check
from convsv_conformance.random_layers import random_layer
from convsv_conformance.table import by_name

import convsv_core as convsv
from convsv_core import Conv
from convsv_core._projection.candidates import FLAT_SIDE
from convsv_core.training import direction_rise, steepest_together

SMALL = (
    *by_name("1d-one-channel", "1d-stride", "1d-transposed", "two-pixels", "3d-transposed"),
    make_case("small-2d", (2, 2), (2, 2), (3, 3)),
    make_case("small-groups", (4, 2), (2, 2), (2, 3), groups=2),
    make_case("small-depthwise", (2, 2), (2,), (4,), groups=2),
    make_case("small-wrapped", (2, 1), (5,), (4,)),
)
PROBLEMS = [(case, "float64") for case in SMALL]
PROBLEMS += [(case, "complex128") for case in by_name("one-pixel-wide")]

RTOL = 1e-3
SOLVER_RTOL = 1e-6
"""Relative error of the solver's optimum, a thousand times the tolerance that it is given."""

EPS32 = float(np.finfo(np.float32).eps)


def solved(case: Case, values: Any) -> float:
    """Return the optimum by an interior-point method, for kernels whose taps at one place are equal."""
    cp = pytest.importorskip("cvxpy")
    basis = np.eye(values.size).reshape(-1, *values.shape)
    columns = np.stack([case.matrix(one).reshape(-1) for one in basis], axis=1)
    pull = np.linalg.pinv(columns, rcond=1e-9).T @ values.reshape(-1)
    taps = cp.Variable(values.size, complex=np.iscomplexobj(values))
    operator = cp.reshape(columns @ taps, case.matrix(values).shape, order="C")
    products = (columns.T @ pull).conj() @ taps
    objective = cp.real(products) if np.iscomplexobj(values) else products
    problem = cp.Problem(cp.Maximize(objective), [cp.sigma_max(operator) <= 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the solver warns of inaccuracy, which its own duality gap bounds
        # The solver's chordal decomposition fails on block-diagonal problems.
        options = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9, "chordal_decomposition_enable": False}
        return float(problem.solve(solver=cp.CLARABEL, **options))


@pytest.mark.parametrize(("case", "dtype"), PROBLEMS, ids=lambda value: getattr(value, "name", str(value)))
def test_the_optimum_is_between_the_bounds(case: Case, dtype: str) -> None:
    values = case.values(dtype)
    best = solved(case, values)
    found = convsv.steepest_direction(values, case.input_shape, case.conv, rtol=RTOL, max_iterations=3000)
    assert found.converged
    assert (1 - RTOL) * found.upper <= found.alignment <= best * (1 + SOLVER_RTOL)
    assert best * (1 - SOLVER_RTOL) <= found.upper
    reference = check.optimum(case.truth(values))
    assert reference.lower <= best * (1 + SOLVER_RTOL)
    assert best * (1 - SOLVER_RTOL) <= reference.upper
    for method in ("polar", "flat"):
        other = convsv.steepest_direction(values, case.input_shape, case.conv, method=method)
        assert other.alignment <= best * (1 + SOLVER_RTOL)
        assert best * (1 - SOLVER_RTOL) <= other.upper


def test_a_kernel_of_one_tap_has_its_polar_factor() -> None:
    gradient = np.random.default_rng(0).standard_normal((5, 3, 1, 1))
    u, s, vh = np.linalg.svd(gradient[..., 0, 0], full_matrices=False)
    for shape in ((8, 8), None):
        for method in check.METHODS:
            found = convsv.steepest_direction(gradient, shape, Conv("OIHW"), method=method)
            assert found.iterations == 0
            assert found.converged
            np.testing.assert_allclose(found.direction[..., 0, 0], u @ vh, atol=1e-12)
            assert float(found.alignment) == pytest.approx(s.sum(), rel=1e-12)


def test_a_kernel_that_fills_its_stride_is_one_matrix() -> None:
    gradient = np.random.default_rng(0).standard_normal((5, 3, 4, 4))
    found = convsv.steepest_direction(gradient, None, Conv("OIHW", stride=4, padding="valid"))
    u, _, vh = np.linalg.svd(gradient.reshape(5, -1), full_matrices=False)
    assert found.iterations == 0
    np.testing.assert_allclose(found.direction, (u @ vh).reshape(gradient.shape), atol=1e-12)


def test_groups_have_norms_of_their_own() -> None:
    gradient = (
        np.random.default_rng(0).standard_normal((4, 2, 3, 3)) * np.array([1, 1, 1e-3, 1e-3])[:, None, None, None]
    )
    conv = Conv("OIHW", groups=2)
    found = convsv.steepest_direction(gradient, (6, 6), conv)
    for part in (slice(0, 2), slice(2, 4)):
        alone = convsv.steepest_direction(gradient[part], (6, 6), Conv("OIHW"))
        assert float(convsv.operator_norm(found.direction[part], (6, 6), Conv("OIHW"))) == pytest.approx(1, abs=1e-9)
        assert float(np.vdot(gradient[part], found.direction[part])) >= 0.98 * float(alone.upper)


@pytest.mark.thorough
def test_libraries_agree() -> None:
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    gradient = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    geometry = Conv("IOHW", transposed=True, stride=2)
    for method in check.METHODS:
        plain, *others = (
            convsv.steepest_direction(make(gradient), (8, 8), geometry, method=method, rtol=1e-9, max_iterations=20)
            for make in (np.asarray, torch.tensor, jnp.asarray)
        )
        for other in others:
            np.testing.assert_allclose(np.asarray(other.direction), plain.direction, atol=200 * EPS32)
            assert float(other.alignment) == pytest.approx(float(plain.alignment), rel=200 * EPS32)


def test_a_state_saves_iterations() -> None:
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((8, 8, 3, 3))
    near = gradient + 0.01 * rng.standard_normal(gradient.shape)
    first = convsv.steepest_direction(gradient, (8, 8), Conv("OIHW"))
    three = convsv.steepest_direction(near, (8, 8), Conv("OIHW"), max_iterations=3, state=first.state)
    assert three.alignment >= 0.98 * three.upper
    scaled = convsv.steepest_direction(1e6 * near, (8, 8), Conv("OIHW"), max_iterations=3, state=first.state)
    np.testing.assert_allclose(scaled.direction, three.direction, atol=1e-9)
    with pytest.raises(ValueError, match="another layer"):
        convsv.steepest_direction(near, (6, 6), Conv("OIHW"), state=first.state)


@pytest.mark.parametrize("method", check.METHODS)
@pytest.mark.parametrize(
    "conv",
    [Conv("OIHW"), Conv("OIHW", stride=2), Conv("OIHW", groups=2), Conv("IOHW", transposed=True), Conv("OIW")],
    ids=["plain", "stride", "groups", "transposed", "1d"],
)
def test_several_kernels_together_are_within_the_ball(method: Any, conv: Conv) -> None:
    rng = np.random.default_rng(0)
    shape = (4, 4, 3, 3)[: len(conv.layout)]
    gradients = [scale * rng.standard_normal(shape).astype(np.float32) for scale in (1.0, 1e-5, 0.0)]
    states = None
    for _ in range(3):
        found = steepest_together(gradients, None, conv, method=method, iterations=2, matrices=states)
        states = None if found[0].matrices is None else [one.matrices for one in found]
    for gradient, one in zip(gradients, found, strict=True):
        assert one.direction.dtype == gradient.dtype
        norm = float(convsv.norm_bounds(one.direction, conv).upper)
        assert norm <= 1 + 1e-6
        assert (norm >= 1 / (1 + direction_rise(method)) - 1e-3) == bool(gradient.any())
        alone = steepest_together([gradient], None, conv, method=method)
        assert alone[0].direction.shape == one.direction.shape
    if method == "exact":
        exact = convsv.steepest_direction(gradients[0], None, conv)
        assert float(np.vdot(gradients[0], found[0].direction)) >= 0.7 * float(exact.upper)


def test_few_iterations_are_not_behind_the_flattened_polar_factor() -> None:
    rng = np.random.default_rng(0)
    # All taps alike: the flattened polar factor is nearly the maximiser.
    gradient = rng.standard_normal((FLAT_SIDE, FLAT_SIDE, 1, 1)) + 0.1 * rng.standard_normal(
        (FLAT_SIDE, FLAT_SIDE, 3, 3)
    )
    other = rng.standard_normal(gradient.shape)
    first = convsv.steepest_direction(other, (4, 4), Conv("OIHW"), max_iterations=10)
    flat = convsv.steepest_direction(gradient, (4, 4), Conv("OIHW"), method="flat")
    once = convsv.steepest_direction(gradient, (4, 4), Conv("OIHW"), max_iterations=1, state=first.state)
    assert once.alignment >= flat.alignment * (1 - 8 * np.finfo(float).eps)
    assert not np.allclose(once.state.matrices, first.state.matrices)
    (flat_step,) = steepest_together([gradient], None, Conv("OIHW"), method="flat")
    (begun,) = steepest_together([other], None, Conv("OIHW"), iterations=10)
    (step,) = steepest_together([gradient], None, Conv("OIHW"), matrices=[begun.matrices])
    assert np.vdot(gradient, step.direction) >= np.vdot(gradient, flat_step.direction) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "newton"}, "method='newton': wanted one of exact, polar, flat"),
        ({"rtol": 0.0}, "rtol=0.0"),
        ({"max_iterations": 0}, "max_iterations=0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convsv.steepest_direction(np.ones((2, 2, 3, 3)), (4, 4), Conv("OIHW"), **arguments)


def test_nan_and_padding_are_refused() -> None:
    with pytest.raises(ValueError, match="gradient holds NaN"):
        convsv.steepest_direction(np.full((2, 2, 3, 3), np.nan), (4, 4), Conv("OIHW"))
    with pytest.raises(NotImplementedError, match="input_shape=None"):
        convsv.steepest_direction(np.ones((2, 2, 3, 3)), (4, 4), Conv("OIHW", padding=1, padding_mode="zeros"))


def as_case(values: Any, conv: Conv, input_shape: tuple[int, ...]) -> Case:
    wide, narrow = (values.shape[conv.layout.index(letter)] for letter in ("IO" if conv.transposed else "OI"))
    channels = (narrow * conv.groups, wide) if conv.transposed else (wide, narrow * conv.groups)
    taps = tuple(values.shape[conv.layout.index(letter)] for letter in conv.spatial)
    geometry = {"stride": conv.strides, "dilation": conv.dilations, "groups": conv.groups}
    return make_case("random", channels, taps, input_shape, transposed=conv.transposed, **geometry)


@pytest.mark.thorough
def test_bounds_hold_on_random_gradients_of_all_geometries() -> None:
    rng = np.random.default_rng(0)
    slack = 1 + 1e-6
    proved, compared = 0, 0
    for index in range(500):
        values, conv = random_layer(rng)
        extents = tuple(int(n) for n in rng.integers(2, 5, conv.ndim))
        shape = extents if conv.transposed else tuple(n * s for n, s in zip(extents, conv.strides, strict=True))
        results = [
            convsv.steepest_direction(values, shape, conv, method=method, max_iterations=100)
            for method in check.METHODS
        ]
        least = min(float(one.upper) for one in results)
        for found in results:
            assert float(convsv.operator_norm(found.direction, shape, conv)) <= slack, index
            assert float(found.alignment) <= least * slack, index
        proved += bool(results[0].converged)
        if values.size <= 12 and values.any() and max(as_case(values, conv, shape).matrix(values).shape) <= 16:
            size = float(np.max(np.abs(values))) or 1.0
            best = size * solved(as_case(values, conv, shape), values / size)
            assert max(float(one.alignment) for one in results) <= best * (1 + SOLVER_RTOL), index
            assert best * (1 - SOLVER_RTOL) <= least * slack, index
            compared += 1
    assert compared >= 20
    assert proved >= 450
