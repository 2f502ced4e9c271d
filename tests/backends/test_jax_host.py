"""JAX on a CPU calls NumPy code: from compiled programs by a callback, and for eager calls directly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import convsv_core as convsv
from convsv_core import Conv, penalties
from convsv_core.backend import ArraySpec
from convsv_core.plugins import get_backend

jax = pytest.importorskip("jax")
jnp = jax.numpy

CALLBACK = "python_cpu_callback"

CASES = {
    "plain": (Conv("OIHW"), (4, 3, 3, 3), (6, 5), False),
    "complex": (Conv("OIHW"), (3, 4, 3, 3), (6, 5), True),
    "stride and groups": (Conv("HWIO", stride=2, groups=2), (3, 3, 2, 4), (6, 8), False),
    "transposed": (Conv("IOHW", stride=2, transposed=True), (3, 4, 3, 3), (4, 4), True),
    "taps beyond the input": (Conv("OIW"), (4, 3, 7), (4,), False),
    "zeros": (Conv("OIHW", padding_mode="zeros"), (12, 12, 3, 3), (6, 6), False),
    "one channel": (Conv("OIW"), (1, 1, 3), (8,), False),
}


@pytest.fixture
def without_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Any]:
    """Return a function that calls another one while all work stays in XLA's programs, as on an accelerator."""

    def call(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("CONVSV_JAX_HOST", "0")
            return jax.block_until_ready(function())

    return call


def kernel_of(name: str, dtype: str = "float32") -> np.ndarray[Any, Any]:
    _, shape, _, is_complex = CASES[name]
    rng = np.random.default_rng(7)
    kernel = rng.normal(size=shape)
    if is_complex:
        return (kernel + 1j * rng.normal(size=shape)).astype("complex64" if dtype == "float32" else "complex128")
    return kernel.astype(dtype)


@pytest.mark.parametrize("name", CASES)
def test_a_norm_and_its_gradient_are_those_of_the_program(name: str, without_host: Any) -> None:
    conv, _, extents, _ = CASES[name]
    kernel = jnp.asarray(kernel_of(name))

    def call() -> Any:
        return jax.jit(jax.value_and_grad(lambda kernel: convsv.operator_norm(kernel, extents, conv)))(kernel)

    value, gradient = call()
    wanted, wanted_gradient = without_host(call)
    np.testing.assert_allclose(value, wanted, rtol=3e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=3e-4)


@pytest.mark.parametrize("name", ["plain", "stride and groups", "zeros"])
def test_a_gradient_is_the_difference_quotient(name: str) -> None:
    conv, _, extents, _ = CASES[name]
    kernel = kernel_of(name, "float64")
    direction, step = np.random.default_rng(8).normal(size=kernel.shape), 1e-5

    def norm(kernel: Any) -> Any:
        return convsv.operator_norm(kernel, extents, conv)

    _, slope = jax.jit(lambda kernel: jax.jvp(norm, (kernel,), (jnp.asarray(direction),)))(jnp.asarray(kernel))
    quotient = (norm(kernel + step * direction) - norm(kernel - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, quotient, rtol=1e-5)


def test_a_second_derivative_is_that_of_the_program(without_host: Any) -> None:
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3)))

    def call() -> Any:
        return jax.jit(jax.hessian(lambda kernel: convsv.operator_norm(kernel, (4,), Conv("OIW"))))(kernel)

    found = call()
    assert float(abs(found).max()) > 0.01
    np.testing.assert_allclose(found, without_host(call), atol=1e-8)


def test_the_zero_kernel_has_a_zero_gradient_and_its_bound_is_zero() -> None:
    bound = jax.jit(jax.value_and_grad(lambda kernel: convsv.norm_upper_bound(kernel, Conv("OIW"))))
    value, gradient = bound(jnp.zeros((2, 3, 3)))
    assert float(value) == 0
    assert not np.any(gradient)


@pytest.mark.parametrize("entry", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_gives_nan(entry: float) -> None:
    kernel = jnp.ones((4, 3, 3, 3), jnp.float32).at[0, 0, 0, 0].set(entry)
    conv = Conv("OIHW")

    @jax.jit
    def results(kernel: Any) -> Any:
        projected = convsv.project(kernel, None, conv, 1.0, steps=2)
        return (
            convsv.operator_norm(kernel, (6, 6), conv),
            convsv.norm_upper_bound(kernel, conv),
            convsv.singular_values(kernel, (6, 6), conv),
            convsv.clip(kernel, (6, 6), conv, 1.0),
            (projected.kernel, projected.norm, projected.distance),
            penalties.norm_hinge(kernel, (6, 6), conv, 1.0),
        )

    assert all(np.isnan(one).all() for one in jax.tree.leaves(results(kernel)))


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "values": lambda kernel: convsv.singular_values(kernel, (6, 6), Conv("OIHW")),
    "strided values": lambda kernel: convsv.singular_values(kernel, (6, 6), Conv("OIHW", stride=3)),
    "clip": lambda kernel: convsv.clip(kernel, (6, 6), Conv("OIHW"), 1.0),
    "clip between": lambda kernel: convsv.clip(kernel, (6, 6), Conv("OIHW"), 1.5, lower=0.5),
    "upper bound": lambda kernel: convsv.norm_upper_bound(kernel, Conv("OIHW")),
    "rescale": lambda kernel: convsv.project(kernel, None, Conv("OIHW"), 1.0, method="rescale", steps=1).kernel,
    "alternating": lambda kernel: (
        convsv.project(kernel, (6, 6), Conv("OIHW"), 1.0, method="alternating", steps=3).kernel
    ),
    "newton-schulz": lambda kernel: (
        convsv.project(kernel, (6, 6), Conv("OIHW"), 1.0, method="newton-schulz", steps=3).kernel
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_results_are_those_of_the_program(name: str, without_host: Any) -> None:
    kernel = jnp.asarray(kernel_of("plain"))

    def call() -> Any:
        return jax.jit(lambda kernel: FUNCTIONS[name](kernel))(kernel)

    text = jax.jit(lambda kernel: FUNCTIONS[name](kernel)).lower(kernel).as_text()
    assert CALLBACK in text
    assert "lapack" not in text
    found, wanted = call(), without_host(call)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_dykstra_on_the_host_goes_on_from_its_state_and_is_as_near() -> None:
    kernel, conv = kernel_of("plain"), Conv("OIHW")
    step = jax.jit(lambda kernel, state: convsv.project(kernel, (6, 5), conv, 1.0, steps=30, state=state))
    first = jax.jit(lambda kernel: convsv.project(kernel, (6, 5), conv, 1.0, steps=3))(kernel)
    second = step(kernel, first.state)
    third = step(kernel, second.state)
    nearest = convsv.project(kernel, (6, 5), conv, 1.0)
    assert third.state.dual.shape == first.state.dual.shape
    assert max(float(one.norm) for one in (first, second, third)) <= 1 + 1e-6
    assert float(third.distance) <= float(first.distance)
    np.testing.assert_allclose(third.distance, nearest.distance, rtol=1e-3)


def test_a_batch_calls_the_host_once_and_unmapped_arguments_stay_whole() -> None:
    backend = get_backend("jax")
    shapes = []

    def on_host(first: Any, second: Any) -> tuple[Any, ...]:
        shapes.append((type(first), first.shape, type(second), second.shape))
        return (first.sum() + second.sum(),)

    def call(first: Any, second: Any) -> Any:
        return backend.call_host(
            on_host,
            (first, second),
            (ArraySpec((), "float64"),),
            lambda first, second: (first.sum() + second.sum(),),
        )[0]

    first, second = jnp.ones((3, 2)), jnp.ones(5)
    found = jax.jit(jax.vmap(call, in_axes=(1, None)))(first, second)
    np.testing.assert_array_equal(found, [8, 8])
    # A callback with JAX arrays could wait for the threads that wait for the callback.
    assert shapes == [(np.ndarray, (3,), np.ndarray, (5,))] * 2


def test_mapped_norms_are_those_of_each_kernel() -> None:
    kernels = np.stack([kernel_of("plain"), 2 * kernel_of("plain")], axis=1)
    norm = jax.jit(jax.vmap(lambda kernel: convsv.operator_norm(kernel, (6, 5), Conv("OIHW")), in_axes=1))
    gradient = jax.jit(
        jax.grad(
            lambda kernels: jax.vmap(lambda one: convsv.operator_norm(one, (6, 5), Conv("OIHW")), in_axes=1)(
                kernels
            ).sum()
        )
    )
    single = convsv.operator_norm(kernels[:, 0], (6, 5), Conv("OIHW"))
    np.testing.assert_allclose(norm(kernels), [single, 2 * single], rtol=1e-6)
    np.testing.assert_allclose((gradient(kernels) * kernels).sum(), 3 * single, rtol=1e-5)


def test_a_callback_has_one_blas_thread() -> None:
    limits = []

    def on_host(array: Any) -> tuple[Any, ...]:
        limits.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return (array,)

    backend = get_backend("jax")
    spec = (ArraySpec((2,), "float64"),)
    jax.block_until_ready(
        jax.jit(lambda array: backend.call_host(on_host, (array,), spec, lambda a: (a,)))(jnp.ones(2))
    )
    assert limits
    assert set(limits) == {1}


def test_many_programs_at_once_end() -> None:
    """Programs that are dispatched without waiting, from several threads, with large arrays and LAPACK beside them."""
    conv = Conv("OIHW")
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(48, 64, 3, 3)).astype(np.float32))

    @jax.jit
    def step(kernel: Any) -> Any:
        parts = [convsv.operator_norm(kernel * (1 + index), (4, 4), conv) for index in range(4)]
        return kernel / sum(parts), jnp.linalg.eigvalsh(kernel[:, :48, 0, 0] @ kernel[:, :48, 0, 0].T)

    found: list[Any] = []

    def run() -> None:
        current, results = kernel, []
        for _ in range(4):
            current, values = step(current)
            results.append(values)
        found.append(jax.block_until_ready((current, results))[0])

    threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 3
    np.testing.assert_array_equal(found[0], found[1])


def test_other_programs_have_no_callback() -> None:
    from jax import export

    def norm(kernel: Any) -> Any:
        return convsv.operator_norm(kernel, (6, 5), Conv("OIHW"))

    shape = jax.ShapeDtypeStruct((4, 3, 3, 3), jnp.float32)
    assert CALLBACK in jax.jit(norm).lower(shape).as_text()
    exported = export.export(jax.jit(norm))(shape)
    assert CALLBACK not in exported.mlir_module()
    kernel = kernel_of("plain")
    np.testing.assert_allclose(exported.call(kernel), norm(kernel), rtol=1e-6)
    accelerated = export.export(jax.jit(norm), platforms=["cuda"])(shape)
    assert CALLBACK not in accelerated.mlir_module()


EAGER: dict[str, Callable[..., Any]] = {
    "operator_norm": lambda kernel: convsv.operator_norm(kernel, (6, 6), Conv("OIHW")),
    "norm_bounds": lambda kernel: convsv.norm_bounds(kernel, Conv("OIHW")),
    "project": lambda kernel: convsv.project(kernel, (6, 6), Conv("OIHW"), 1.0),
    "clip": lambda kernel: convsv.clip(kernel, (6, 6), Conv("OIHW"), 1.0),
    "values": lambda kernel: convsv.singular_values(kernel, (6, 6), Conv("OIHW")),
    "orthogonal": lambda kernel: convsv.nearest_orthogonal(kernel, (6, 6), Conv("OIHW")),
    "hinge": lambda kernel: penalties.spectrum_hinge(kernel, (6, 6), Conv("OIHW"), 1.0),
}


@pytest.mark.parametrize("name", EAGER)
def test_eager_results_are_those_of_numpy(name: str) -> None:
    kernel = kernel_of("plain")
    device = jax.devices("cpu")[0]
    found = EAGER[name](jax.device_put(kernel, device))
    wanted = EAGER[name](kernel)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(one, jax.Array) == isinstance(other, np.ndarray | np.generic)
        np.testing.assert_array_equal(one, other)
        if isinstance(one, jax.Array):
            assert one.devices() == {device}


def test_eager_calls_keep_the_types_of_their_arguments() -> None:
    kernel = jnp.asarray(kernel_of("plain"))
    clipped = convsv.clip(kernel.astype(jnp.bfloat16), (6, 6), Conv("OIHW"), jnp.asarray(1.0, jnp.float32))
    assert clipped.dtype == jnp.float32
    with pytest.raises(TypeError, match="kernel is an array of jax"):
        convsv.clip(kernel, (6, 6), Conv("OIHW"), np.asarray(1.0))
    with pytest.raises(ValueError, match="NaN or infinity"):
        convsv.operator_norm(kernel * jnp.nan, (6, 6), Conv("OIHW"))


def test_a_rescaling_returns_a_kernel_within_the_bound_itself() -> None:
    from convsv_core.training import rescale_together

    kernels = [jnp.full((1, 1, 3, 3), 0.5), jnp.full((1, 1, 3, 3), 0.01)]
    (first, norm), (second, _) = rescale_together(kernels, (8, 8), Conv("OIHW"), 1.0)
    assert isinstance(first, jax.Array)
    assert 0.999 < norm <= 1.0
    assert second is kernels[1]
