"""Projection: the tests that the conformance suite does not ask of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from convsv_conformance.checks import projection as check
from convsv_conformance.random_layers import random_layer
from convsv_conformance.table import by_name
from convsv_conformance.target import Failure, Ledger, Target

import convsv_core as convsv
from convsv_core import Conv
from convsv_core._projection import certificate, excess, projection, working_set
from convsv_core.plugins import get_backend

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
CONV = Conv("OIHW")
METHODS = check.METHODS


def random_kernel(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


# ---- feasible -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [100, pytest.param(500, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("method", METHODS)
def test_random_layers_are_within_the_bound(
    method: str, layers: int, record_property: Callable[[str, object], None]
) -> None:
    """In 32 bits, of each method a share of the layers, by another certificate than the projection's own."""
    rng = np.random.default_rng(METHODS.index(method))
    worst = 0.0
    for number in range(layers):
        kernel, conv = random_layer(rng)
        kernel = kernel.astype("complex64" if np.iscomplexobj(kernel) else "float32")
        strides = (1,) * conv.ndim if conv.transposed else conv.strides
        extents = tuple(int(n) * s for n, s in zip(rng.integers(1, 7, conv.ndim), strides, strict=True))
        share = float(rng.choice([rng.uniform(0.05, 1.2), 1.0, 1 - 1e-7, 1e-3]))
        bound = share * float(convsv.operator_norm(kernel, extents, conv))
        found = convsv.project(kernel, extents, conv, bound, method=method, max_iterations=5)
        upper = float(convsv.norm_bounds(found.kernel, conv, input_shape=extents, rtol=1e-6).upper)
        dense = float(convsv.operator_norm(found.kernel.astype("complex128"), extents, conv))
        assert found.kernel.dtype == kernel.dtype
        assert float(found.norm) <= bound * (1 + 1e-6), number
        assert dense <= float(found.norm) * (1 + 50 * EPS["float64"]), number
        if bound:
            worst = max(worst, upper / bound)
    record_property("largest certified norm over the bound", worst)
    assert worst <= 1 + 1e-6


def test_every_input_size_is_within_the_bound() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        kernel, conv = random_layer(rng)
        kernel = kernel.astype("complex64" if np.iscomplexobj(kernel) else "float32")
        bound = rng.uniform(0.3, 0.9) * float(convsv.norm_bounds(kernel, conv).upper)
        found = convsv.project(kernel, None, conv, bound, max_iterations=5)
        assert float(found.norm) <= bound * (1 + 1e-6)
        assert float(convsv.norm_bounds(found.kernel, conv, rtol=1e-4).lower) <= float(found.norm)
        again = convsv.project(found.kernel, None, conv, bound, max_iterations=5)
        assert np.array_equal(again.kernel, found.kernel)


# ---- memory and warm starts -----------------------------------------------------------------------------


def test_a_small_working_set_is_feasible_and_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = random_kernel(4, 4, 3, 3)
    bound = 0.5 * float(convsv.operator_norm(kernel, (12, 12), CONV))
    whole = convsv.project(kernel, (12, 12), CONV, bound)
    monkeypatch.setattr(working_set, "DUAL_BYTES", 3 * 4 * 4 * 16 * 8)
    found = convsv.project(kernel, (12, 12), CONV, bound, max_iterations=200)
    assert found.state is not None
    assert float(found.norm) <= bound
    distances = float(found.distance), float(whole.distance)
    assert found.converged is (distances[0] <= distances[1] * (1 + 1e-4)) or not found.converged


def test_a_state_saves_iterations() -> None:
    kernel = random_kernel(6, 5, 3, 3)
    arguments = ((8, 8), CONV, 0.5 * float(convsv.operator_norm(kernel, (8, 8), CONV)))
    first = convsv.project(kernel, *arguments)
    second = convsv.project(kernel, *arguments, state=first.state)
    assert second.converged
    assert second.iterations < first.iterations
    # Both are within the gap of the nearest; two points of a convex set that are, are within twice its root.
    apart = np.linalg.norm(second.kernel - first.kernel) * 8
    assert apart <= 2 * math.sqrt(1e-4) * float(first.distance)
    after_a_step = convsv.project(kernel + 1e-3 * random_kernel(6, 5, 3, 3, seed=1), *arguments, state=first.state)
    assert after_a_step.converged
    assert after_a_step.iterations < first.iterations


def test_a_state_of_another_layer_is_refused() -> None:
    kernel = random_kernel(4, 4, 3, 3)
    bound = 0.5 * float(convsv.operator_norm(kernel, (8, 8), CONV))
    state = convsv.project(kernel, (8, 8), CONV, bound).state
    with pytest.raises(ValueError, match=r"state.*another layer"):
        convsv.project(kernel[:2], (8, 8), CONV, bound / 2, state=state)
    with pytest.raises(ValueError, match=r"state.*another input shape"):
        convsv.project(kernel, (3, 3), CONV, bound / 2, state=state)
    assert state is not None
    few = convsv.ProjectionState(state.frequencies[:1], state.dual[:1])
    with pytest.raises(ValueError, match=r"state.*with steps, wanted all"):
        convsv.project(kernel, (8, 8), CONV, bound, steps=2, state=few)


# ---- other libraries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("library", ["torch", pytest.param("jax", marks=pytest.mark.thorough)])
def test_libraries_agree(library: str, method: Any) -> None:
    pytest.importorskip(library)
    backend = get_backend(library)
    kernel = random_kernel(3, 4, 3, 3)
    bound = 0.6 * float(convsv.operator_norm(kernel, (5, 6), CONV))
    expected = convsv.project(kernel, (5, 6), CONV, bound, method=method, rtol=1e-3)
    found = convsv.project(
        backend.asarray(kernel, dtype="float64", device="cpu"), (5, 6), CONV, bound, method=method, rtol=1e-3
    )
    # The same iterations: they contract nothing away, so that each may add its rounding.
    allowed = 100 * max(expected.iterations, 1) * EPS["float64"] * np.abs(kernel).max()
    assert found.iterations == expected.iterations
    assert np.abs(backend.to_numpy(found.kernel) - expected.kernel).max() <= allowed


def test_a_state_is_a_pytree_of_jax() -> None:
    jax = pytest.importorskip("jax")
    kernel = jax.numpy.asarray(random_kernel(3, 2, 3))
    conv = Conv("OIW")
    bound = 0.6 * float(convsv.operator_norm(kernel, (8,), conv))

    @jax.jit
    def step(kernel: Any, state: Any) -> Any:
        return convsv.project(kernel, (8,), conv, bound, steps=5, state=state)

    first = step(kernel, None)
    second = step(kernel, jax.tree.map(lambda leaf: leaf * 1, first.state))
    assert float(second.norm) <= bound * (1 + 8 * EPS["float64"])
    assert float(second.distance) <= float(first.distance) * (1 + 1e-3)
    with pytest.raises(ValueError, match="steps=None: under tracing"):
        jax.jit(lambda kernel: convsv.project(kernel, (8,), conv, bound).kernel)(kernel)


@pytest.mark.parametrize("method", METHODS)
def test_constant_to_differentiation_in_jax(method: Any) -> None:
    jax = pytest.importorskip("jax")
    conv = Conv("OIW")
    kernel = jax.numpy.asarray(random_kernel(3, 2, 3))

    def function(kernel: Any) -> Any:
        return (kernel * convsv.project(kernel, (8,), conv, 0.5, method=method, steps=2).kernel).sum()

    value = convsv.project(kernel, (8,), conv, 0.5, method=method, steps=2).kernel
    gradient = jax.jit(jax.grad(function))(kernel)
    assert np.abs(np.asarray(gradient - value)).max() <= 100 * EPS["float64"]


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_constant_to_differentiation_in_torch(method: Any, steps: int | None, factor: float) -> None:
    torch = pytest.importorskip("torch")
    kernel = torch.asarray(factor * random_kernel(3, 2, 3)).requires_grad_()
    found = convsv.project(kernel, (8,), Conv("OIW"), 0.5, method=method, steps=steps)
    assert not found.kernel.requires_grad
    (kernel * found.kernel).sum().backward()
    assert torch.equal(kernel.grad, found.kernel)


# ---- errors and steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bound": -1.0}, ValueError, "bound=-1.0"),
        ({"bound": math.nan}, ValueError, "bound=nan"),
        ({"bound": [1.0]}, TypeError, r"bound=\[1.0\]"),
        ({"bound": np.ones(2)}, ValueError, r"bound has shape \(2,\)"),
        ({"method": "admm"}, ValueError, "method='admm'.*dykstra"),
        ({"rtol": 0}, ValueError, "rtol=0"),
        ({"rtol": -1e-4}, ValueError, "rtol=-0.0001"),
        ({"rtol": math.nan}, ValueError, "rtol=nan"),
        ({"max_iterations": 0}, ValueError, "max_iterations"),
        ({"max_iterations": 1.5}, TypeError, "max_iterations"),
        ({"steps": 0}, ValueError, "steps"),
        ({"conv": Conv("OIHW", padding_mode="zeros")}, NotImplementedError, "'zeros'.*input_shape=None"),
        ({"conv": Conv("OIHW", padding="valid")}, NotImplementedError, "'valid'.*input_shape=None"),
        (
            {"conv": Conv("OIHW", padding_mode="reflect"), "input_shape": None},
            NotImplementedError,
            "padding_mode='reflect'",
        ),
    ],
)
def test_bad_calls(options: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"input_shape": (4, 4), "conv": CONV, "bound": 1.0, **options}
    with pytest.raises(error, match=message):
        convsv.project(random_kernel(2, 2, 3, 3), **call)


def test_a_bound_of_another_library() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="kernel is an array of numpy, bound one of torch"):
        convsv.project(random_kernel(2, 2, 3, 3), (4, 4), CONV, torch.asarray(1.0))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 3)])
def test_the_excess_by_products_is_as_accurate_as_stated(shape: tuple[int, int]) -> None:
    """Of matrices of all ranks and spreads, beside that of the SVD."""
    rng = np.random.default_rng(0)
    backend = get_backend("numpy")
    for spread in (0, 2, 6, 12):
        side = min(shape)
        u, _, vh = np.linalg.svd(rng.normal(size=(200, *shape)), full_matrices=False)
        s = 10.0 ** (-spread * rng.random((200, side)))
        matrices = ((u * s[:, None, :]) @ vh).astype("complex128")
        for limit in (0.9, 0.1, 1e-3):
            bound = np.asarray(limit)
            exact, exact_trace = excess._excess_svd(backend, matrices[:, None], bound)
            found, trace = excess.excess_by_products(backend, matrices[:, None], bound)
            error = np.linalg.norm(found - exact, axis=(-2, -1))
            assert np.max(error / np.linalg.norm(matrices[:, None], axis=(-2, -1))) <= check.PRODUCTS_ERROR
            assert trace.shape == exact_trace.shape


# ---- the suite's checks are tested too ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p: p._replace(kernel=p.kernel * 1.001), "the norm"),
        (lambda p: p._replace(norm=p.norm * 0.999), "beside its certificate"),
        (lambda p: p._replace(norm=p.norm * 1.001), "the certificate"),
        (lambda p: p._replace(distance=p.distance * 1.001), "distance"),
        (lambda p: p._replace(kernel=p.kernel * 0.99, norm=p.norm * 0.99), "distance"),
        (lambda p: p._replace(kernel=p.kernel.copy().swapaxes(-1, -2)), "distance|norm|shape"),
        (lambda p: p._replace(kernel=p.kernel.astype("float32")), "dtype"),
        (lambda p: p._replace(converged=False), "converged"),
        (lambda p: p._replace(distance=float(p.distance)), "not an array"),
    ],
)
def test_a_wrong_projection_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: Any, message: str) -> None:
    right = convsv.project
    target, case = Target(get_backend("numpy"), "cpu", "float64"), by_name("rectangular")[0]
    check.of_one_size(target, case, Ledger(target.eps))
    monkeypatch.setattr(convsv, "project", lambda *arguments, **options: wrong(right(*arguments, **options)))
    with pytest.raises(Failure, match=message):
        check.of_one_size(target, case, Ledger(target.eps))


def test_a_projection_that_is_not_the_nearest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = convsv.project
    target, case = Target(get_backend("numpy"), "cpu", "float64"), by_name("1d-stride")[0]

    def another(*arguments: Any, **options: Any) -> Any:
        return right(*arguments, **{**options, "method": "alternating"})

    check.nearest(target, case, Ledger(target.eps))
    monkeypatch.setattr(convsv, "project", another)
    with pytest.raises(Failure, match=r"dykstra: .* is above"):
        check.nearest(target, case, Ledger(target.eps))


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("extents", [(5, 9), (16, 16), (23, 14), (31, 40), (64, 33), (1, 50)])
def test_no_frequency_above_the_bound_is_left_out(extents: tuple[int, int], real: bool) -> None:
    """The tests of all frequencies, and the search by coarser grids, find what a visit of every frequency finds."""
    conv = convsv.Conv("OIHW")
    rng = np.random.default_rng(sum(extents))
    for smooth in (0.0, 0.5, 2.0):
        kernel = rng.standard_normal((3, 2, 3, 3)) * np.exp(-smooth * np.add.outer([1, 0, 1], [1, 0, 1]))
        if not real:
            kernel = kernel * np.exp(1j * rng.uniform(size=kernel.shape))
        values = convsv.frequency_singular_values(kernel, extents, conv)[..., 0]
        for share in (0.3, 0.8, 0.97, 1.2):
            limit = share * float(values.max())
            problem = projection._make_problem(kernel, extents, conv, limit, "rescale", 1e-4)
            limit = float(problem.bound)
            visited = values[tuple(problem.frequencies.T)] / float(problem.operand.scale)
            rounding = 100 * np.finfo(float).eps
            for find in (certificate.frequencies_above, certificate._search_above):
                above, upper, *_ = find(problem, problem.operand.kernel, limit)
                assert set(np.flatnonzero(visited > limit * (1 + rounding))) <= set(above)
                assert set(above) <= set(np.flatnonzero(visited > limit * (1 - rounding)))
                assert upper >= visited.max() * (1 - rounding)
                assert upper <= max(limit, float(visited.max()) * (1 + rounding))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", ["dykstra", "rescale"])
def test_a_kernel_a_rounding_above_the_bound_is_hardly_moved(method: str, dtype: str) -> None:
    """What the product with a number next to 1 is rounded by is of the size of what is to be gained."""
    eps = float(np.finfo(dtype).eps)
    rng = np.random.default_rng(3)
    conv = convsv.Conv("OIHW")
    for seed in range(12):
        kernel = rng.standard_normal((4, 4, 3, 3)).astype(dtype)
        norm = float(convsv.operator_norm(kernel.astype("float64"), (8, 8), conv))
        for above in (1e-6, 4e-6, 1e-3 * (seed + 1)):
            found = convsv.project(kernel, (8, 8), conv, norm / (1 + above), method=method, max_iterations=20)
            size = float(convsv.frobenius_norm(kernel, (8, 8), conv))
            assert 0 < float(found.distance) <= (1.01 * above + 64 * eps) * size
            assert float(found.norm) <= norm / (1 + above)


def test_a_bound_of_the_least_numbers_leaves_a_kernel_within_it() -> None:
    kernel = np.random.default_rng(0).standard_normal((2, 2, 3)).astype("float32")
    tiny = float(np.finfo("float32").smallest_subnormal)
    for bound in (0.0, 4 * tiny, 1000 * tiny):
        found = convsv.project(kernel, (8,), convsv.Conv("OIW"), bound, method="rescale")
        assert np.all(np.isfinite(found.kernel))
        assert float(convsv.operator_norm(found.kernel.astype("float64"), (8,), convsv.Conv("OIW"))) <= bound
