"""Check the public functions under a library's transformations: gradients, compilation, and maps over a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

import convsv_core as convsv
from convsv_conformance.cases import Case, Truth
from convsv_conformance.checks.spectrum import VALUE_FACTOR
from convsv_conformance.dense import Array
from convsv_conformance.target import Failure, Ledger, Target

__all__ = [
    "GRADIENT_FACTOR",
    "batched",
    "compiled",
    "compiled_values",
    "gradients",
    "gradients_not_compiled",
    "gradients_where_values_meet",
]

DIRECTIONS = 4
"""Number of random directions in which a gradient is compared with the dense reference's derivative; a guess."""

GRADIENT_FACTOR = 200.0
"""Largest error of a directional derivative, in units of eps times its scale.

The gradient of a singular value is ``Re(u* dA v)``. The error of the vectors is eps divided by the distance to the
nearest other value, relative to the largest value. In the cases here this amplifies eps by about ten. The number is a
guess that leaves room for that.
"""

Scalar = Callable[[Any], Any]


def gradients(target: Target, case: Case, ledger: Ledger) -> None:
    """Check gradients of the norm and of a weighted sum of all values against the dense operator's derivatives."""
    kernel, truth = target.kernel(case)
    weights = np.linspace(2.0, 1.0, case.count)
    weighted = _weighted_sum(target, case, weights)
    got = _gradient(target, "singular_values", weighted, kernel)
    _agrees(target, ledger, "gradient of a sum of singular values", truth, got, weights)
    got = _gradient(target, "operator_norm", _norm(case), kernel)
    _agrees(target, ledger, "gradient of operator_norm", truth, got, np.ones(1))


def gradients_where_values_meet(target: Target, case: Case, ledger: Ledger) -> None:
    """Check gradients where singular values are equal: they must be finite, and be subgradients.

    The operator norm and the sum of all values are convex, so ``f(K + E) >= f(K) + <g, E>`` for every E. The sum
    is differentiable wherever the operator has full rank, even where values are equal.
    """
    kernel, truth = target.kernel(case)
    total = np.ones(case.count)
    rng = np.random.default_rng(case.count)
    for what, function, of_values in (
        ("singular_values", _weighted_sum(target, case, total), np.sum),
        ("operator_norm", _norm(case), np.max),
    ):
        gradient = _gradient(target, what, function, kernel)
        here = float(of_values(truth.singular_values))
        slope = float(np.sum(gradient * truth.values))
        scale = max(float(np.sum(np.abs(gradient * truth.values))), here)
        # Both functions are homogeneous, so the derivative along the kernel itself is the value.
        rounded = scale * target.kernel_eps / target.eps  # a gradient has the kernel's own dtype
        ledger.close(f"gradient of {what} along the kernel", slope, here, scale=rounded, factor=GRADIENT_FACTOR)
        for _ in range(DIRECTIONS):
            direction = rng.standard_normal(truth.values.shape) * max(float(np.max(np.abs(truth.values))), 1.0)
            there = float(of_values(case.truth(truth.values + direction).singular_values))
            least = here + float(np.sum(gradient * direction))
            room = GRADIENT_FACTOR * target.kernel_eps * (there + here)
            ledger.true(f"gradient of {what}: {there} < {least}, so it is no subgradient", there >= least - room)
        if what == "singular_values" and truth.singular_values[-1] > truth.norm / 2:
            _agrees(target, ledger, f"gradient of {what}", truth, gradient, total)


def compiled_values(target: Target, case: Case, ledger: Ledger) -> None:
    """Check all singular values, compiled as one function."""
    kernel, truth = target.kernel(case)
    run = _transform(target, "jit", lambda array: convsv.singular_values(array, case.input_shape, case.conv))
    got = target.fetch("singular_values under jit", run(kernel), (case.count,))
    ledger.close("singular_values under jit", got, truth.singular_values, scale=truth.norm, factor=VALUE_FACTOR)


def compiled(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the answers of several functions compiled as one, and that a kernel with NaN gives NaN."""
    kernel, truth = target.kernel(case)

    def everything(array: Any) -> tuple[Any, ...]:
        arguments = (array, case.input_shape, case.conv)
        return (
            convsv.singular_values(*arguments),
            convsv.operator_norm(*arguments),
            convsv.frobenius_norm(*arguments),
            convsv.stable_rank(*arguments),
            convsv.clip(*arguments, truth.norm / 2),
        )

    run = _transform(target, "jit", everything)
    values, norm, frobenius, rank, clipped = run(kernel)
    dtype = target.dtype if target.kernel_eps == target.eps else target.answer
    size = math.sqrt(float(np.sum(truth.singular_values**2)))
    for what, result, expected, scale in (
        ("singular_values", values, truth.singular_values, truth.norm),
        ("operator_norm", norm, np.asarray(truth.norm), truth.norm),
        ("frobenius_norm", frobenius, np.asarray(size), size),
    ):
        got = target.fetch(f"{what} under jit", result, expected.shape)
        ledger.close(f"{what} under jit", got, expected, scale=scale, factor=VALUE_FACTOR)
    got = target.fetch("stable_rank under jit", rank, ())
    expected_rank = (size / truth.norm) ** 2 if truth.norm else 0.0
    ledger.close("stable_rank under jit", got, expected_rank, scale=expected_rank, factor=4 * VALUE_FACTOR)
    got = target.fetch("clip under jit", clipped, tuple(kernel.shape), dtype)
    ledger.close("clip under jit", got, truth.clipped(truth.norm / 2), scale=truth.norm, factor=VALUE_FACTOR)

    for bad in (math.nan, math.inf):
        poisoned = case.values(target.dtype).copy()
        poisoned[(-1,) * poisoned.ndim] = bad
        for result in run(target.backend.asarray(poisoned, dtype=target.dtype, device=target.device)):
            finite = np.isfinite(target.exact(result))
            ledger.true(f"{bad} in a kernel gave a finite number under jit", not finite.any())


def gradients_not_compiled(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the gradient without the compiler; the other checks compile gradients where the library can."""
    kernel, truth = target.kernel(case)
    result = _transform(target, "grad", _norm(case))(kernel)
    got = target.fetch("gradient, not compiled", result, tuple(kernel.shape), target.dtype)
    _agrees(target, ledger, "gradient of operator_norm, not compiled", truth, got, np.ones(1))


def batched(target: Target, case: Case, ledger: Ledger) -> None:
    """Check kernels that are stacked on a leading axis: each must get the answer that it gets alone."""
    drawn = case.values(target.dtype)
    kernels = target.array(np.stack([drawn, drawn[..., ::-1] / 2, np.zeros_like(drawn)]))
    truths = [case.truth(values) for values in target.exact(kernels)]
    scale = truths[0].norm
    for what, function, expected in (
        (
            "singular_values",
            lambda k: convsv.singular_values(k, case.input_shape, case.conv),
            [truth.singular_values for truth in truths],
        ),
        ("operator_norm", _norm(case), [truth.norm for truth in truths]),
    ):
        result = target.compiled(_transform(target, "vmap", function))(kernels)
        got = target.fetch(f"{what} under vmap", result, np.shape(expected))
        ledger.close(f"{what} under vmap", got, np.asarray(expected), scale=scale, factor=VALUE_FACTOR)
    drawn = drawn.copy()
    drawn[(0,) * drawn.ndim] = math.nan
    poisoned = np.stack([case.values(target.dtype), drawn])
    array = target.backend.asarray(poisoned, dtype=target.dtype, device=target.device)
    got = target.exact(target.compiled(_transform(target, "vmap", _norm(case)))(array))
    ledger.close("operator_norm beside a kernel with NaN", got[0], truths[0].norm, scale=scale, factor=VALUE_FACTOR)
    ledger.true("NaN in a kernel gave a number under vmap", bool(np.isnan(got[1])))


def _norm(case: Case) -> Scalar:
    return lambda kernel: convsv.operator_norm(kernel, case.input_shape, case.conv)


def _weighted_sum(target: Target, case: Case, weights: Array) -> Scalar:
    factors = target.array(weights, target.answer)

    def function(kernel: Any) -> Any:
        weighted = convsv.singular_values(kernel, case.input_shape, case.conv) * factors
        return target.backend.namespace(weighted).sum(weighted)

    return function


def _transform(target: Target, trait: str, function: Callable[..., Any]) -> Callable[..., Any]:
    transformed: Callable[..., Any] | None = getattr(target.backend, trait)(function)
    if transformed is None:
        raise Failure(f"{target.backend.name} has no {trait}")
    return transformed


def _gradient(target: Target, what: str, function: Scalar, kernel: Any) -> Array:
    """Return the gradient of `function`, after a check that it is finite and of the kernel's kind."""
    result = target.compiled(_transform(target, "grad", function))(kernel)
    gradient = target.fetch(f"gradient of {what}", result, tuple(kernel.shape), target.dtype)
    if not np.all(np.isfinite(gradient)):
        raise Failure(f"gradient of {what}: {np.count_nonzero(~np.isfinite(gradient))} entries are not finite")
    return gradient


def _agrees(target: Target, ledger: Ledger, what: str, truth: Truth, gradient: Array, weights: Array) -> None:
    """Compare derivatives in random directions with those of the dense matrix's largest values, weighted."""
    rng = np.random.default_rng(gradient.size)
    for _ in range(DIRECTIONS):
        direction = rng.standard_normal(gradient.shape)
        slope = truth.derivative(weights, direction)
        scale = float(np.sum(np.abs(gradient * direction))) + abs(slope)
        scale *= target.kernel_eps / target.eps
        ledger.close(what, float(np.sum(gradient * direction)), slope, scale=scale, factor=GRADIENT_FACTOR)
