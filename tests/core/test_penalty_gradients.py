"""Gradients of penalties against finite differences, at hard kernels, and under transformations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from penalty_cases import CALLS, CONV, EPS, HARD, random_kernel

from convsv_core import Conv, penalties
from convsv_core.plugins import get_backend

STEP = EPS ** (1 / 5)
"""Where the error of a central difference of order 4 is of the order of that of its rounding, ``STEP**4``."""

TRUNCATION = 100.0
"""Largest error of such a difference, in units of ``STEP**4``: the size of fifth derivatives here."""


def differences(call: Callable[[Any], Any], kernel: Any, direction: Any) -> float:
    """The derivative in a direction, by the central difference of order 4."""
    ahead = [float(call(kernel + count * STEP * direction)) for count in (1, 2)]
    behind = [float(call(kernel - count * STEP * direction)) for count in (1, 2)]
    return (8 * (ahead[0] - behind[0]) - (ahead[1] - behind[1])) / (12 * STEP)


def is_derivative(got: float, slope: float) -> bool:
    return abs(got - slope) <= TRUNCATION * STEP**4 * max(1.0, abs(slope))


HALF = [name if number % 2 else pytest.param(name, marks=pytest.mark.thorough) for number, name in enumerate(CALLS)]


@pytest.mark.parametrize("name", HALF)
def test_gradients_against_finite_differences_on_each_library(name: str) -> None:
    kernel, conv = 0.3 * random_kernel(4, 4, 3, seed=3) + np.eye(4)[:, :, None] * np.asarray([0, 1, 0]), Conv("OIW")
    rng = np.random.default_rng(4)
    directions = [direction / np.linalg.norm(direction) for direction in rng.standard_normal((3, *kernel.shape))]
    found = {}
    for library in ("torch", "jax"):
        pytest.importorskip(library)
        backend = get_backend(library)
        derivative = backend.grad(lambda array: CALLS[name](array, 9, conv))
        assert derivative is not None
        found[library] = backend.to_numpy(derivative(backend.asarray(kernel, dtype="float64")))
        for direction in directions:
            slope = differences(lambda array: CALLS[name](array, 9, conv), kernel, direction)
            assert is_derivative(float(np.sum(found[library] * direction)), slope)
    largest = max(np.abs(gradient).max() for gradient in found.values())
    assert np.abs(found["torch"] - found["jax"]).max() <= 1000 * EPS * largest


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gradients_are_finite_everywhere(hard: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    for scale in (1.0, 1 / 64):
        for name, call in CALLS.items():
            kernel = torch.tensor(scale * HARD[hard] / 4, dtype=getattr(torch, dtype), requires_grad=True)
            value = call(kernel, (4, 6), CONV)
            (gradient,) = torch.autograd.grad(value, kernel)
            assert bool(torch.isfinite(value)), name
            assert bool(torch.isfinite(gradient).all()), name


@pytest.mark.parametrize("power", [-120, -100, 60, 100])
def test_kernels_of_absurd_scale(power: int) -> None:
    """Finite wherever the true value is, in single precision."""
    torch = pytest.importorskip("torch")
    degrees = dict.fromkeys(CALLS, 2) | {"orthogonality": 4, "schatten-4": 4, "schatten-6": 6, "schatten-1.5": 1.5}
    degrees |= {"nuclear": 1, "log_condition_number": 0, "log_lipschitz": 0, "negative_log_abs_det": 0, "stable_rank": 0}
    kernel = torch.tensor(np.ldexp(HARD["random"], power), dtype=torch.float32, requires_grad=True)
    for name, call in CALLS.items():
        value = call(kernel, (4, 6), CONV)
        (gradient,) = torch.autograd.grad(value, kernel)
        if power * degrees[name] < 125:
            assert bool(torch.isfinite(value)), name
            assert bool(torch.isfinite(gradient).all()), name
        else:
            assert value.item() == math.inf, name


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gradients_by_the_bound(library: str) -> None:
    pytest.importorskip(library)
    backend = get_backend(library)
    kernel = backend.asarray(random_kernel(3, 4, 3, 3), dtype="float64")
    for call in (penalties.norm_hinge, penalties.spectrum_hinge):
        derivative = backend.grad(lambda bound, call=call: call(kernel, (4, 5), CONV, bound))
        assert derivative is not None
        slope = differences(
            lambda bound, call=call: call(kernel, (4, 5), CONV, float(bound)), np.asarray(0.5), np.asarray(1.0)
        )
        got = derivative(backend.asarray(np.asarray(0.5), dtype="float64"))
        assert is_derivative(float(got), slope)


# ---- tracing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_under_the_transformations_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    kernels = torch.stack([torch.tensor(HARD[hard][:, :, :1, :1]) for hard in ("zero", "repeated", "random")])

    def call(kernel: Any) -> Any:
        return CALLS[name](kernel, (4, 3), CONV)

    alone = torch.stack([call(kernel) for kernel in kernels])
    assert torch.allclose(torch.func.vmap(call)(kernels), alone, rtol=50 * EPS, atol=50 * EPS)
    gradients = torch.func.vmap(torch.func.grad(call))(kernels)
    expected = torch.stack([torch.func.grad(call)(kernel) for kernel in kernels])
    assert bool(torch.isfinite(gradients).all())
    assert torch.allclose(gradients[2], expected[2], rtol=1000 * EPS, atol=1000 * EPS)


def test_under_the_transformations_of_jax() -> None:
    jax = pytest.importorskip("jax")
    kernels = np.stack([HARD[hard][:, :, :2, :2] for hard in ("zero", "identity", "random")])

    def everything(kernel: Any, bound: Any) -> Any:
        layer = (kernel, (4, 3), CONV)
        traced = (penalties.norm_hinge(*layer, bound), penalties.spectrum_hinge(*layer, bound))
        return jax.numpy.stack([*(call(*layer) for call in CALLS.values()), *traced])

    mapped = jax.jit(jax.vmap(everything, in_axes=(0, None)))(kernels, 0.5)
    slopes = jax.jit(jax.vmap(jax.jacrev(everything), in_axes=(0, None)))(kernels, 0.5)
    assert bool(jax.numpy.isfinite(slopes).all())
    names = [*CALLS, "norm_hinge", "spectrum_hinge"]
    for kernel, row in zip(kernels, mapped, strict=True):
        alone = np.asarray([float(CALLS[name](kernel, (4, 3), CONV)) for name in names])
        assert np.abs(np.asarray(row) - alone).max() <= 100 * EPS * (1 + np.abs(alone).max())


def test_jax_without_a_transformation() -> None:
    jax = pytest.importorskip("jax")
    kernel = random_kernel(4, 4, 1, 3)
    for name, call in CALLS.items():
        got = call(jax.numpy.asarray(kernel), (2, 4), CONV)
        assert isinstance(got, jax.Array)
        assert float(got) == pytest.approx(float(call(kernel, (2, 4), CONV)), rel=500 * EPS), name
