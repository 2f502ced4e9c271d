"""Check values and gradients of penalties against the singular values of the dense matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convsv_conformance.cases import Case, Truth
from convsv_conformance.checks.derivatives import GRADIENT_FACTOR
from convsv_conformance.checks.spectrum import VALUE_FACTOR
from convsv_conformance.dense import Array
from convsv_conformance.target import Failure, Ledger, Target
from convsv_core import penalties

__all__ = ["Penalty", "gradients", "values"]

DIRECTIONS = 2
"""Number of random directions in which a gradient is compared with the dense reference's derivative; a guess."""

SHARE = 0.6
"""Bound of the hinges, relative to the norm; a guess that leaves values on both sides of the bound."""


@dataclass(frozen=True)
class Penalty:
    """One penalty of one convolution, with the answers that follow from the singular values of the dense matrix.

    Parameters
    ----------
    name : str
    function : callable
        The function from a kernel to the penalty.
    value : float
        The right value.
    sensitivity : float
        Change of the value, to first order, by an error of 1 in every singular value, relative to the largest.
    slopes : array, shape (count,)
        Derivatives of the value by the singular values.
    bend : float
        Change of the slopes by such an error, summed over the singular values.
    smooth : bool
        Whether the value is differentiable where singular values are equal.
    exact : bool
        Whether value and slopes follow the definition. They do not where singular values are too near to 0.
    """

    name: str
    function: Callable[[Any], Any]
    value: float
    sensitivity: float
    slopes: Array
    bend: float
    smooth: bool = True
    exact: bool = True


def values(target: Target, case: Case, ledger: Ledger) -> None:
    """Check every penalty within the error that its singular values may have; with NaN, a compiled one must be NaN."""
    kernel, truth = target.kernel(case)
    chosen = tuple(_penalties(case, truth, target.eps))
    run = target.compiled(lambda array: tuple(penalty.function(array) for penalty in chosen))
    for penalty, result in zip(chosen, run(kernel), strict=True):
        got = float(target.fetch(penalty.name, result, ()))
        if penalty.exact:
            ledger.close(penalty.name, got, penalty.value, scale=penalty.sensitivity, factor=VALUE_FACTOR)
        else:
            ledger.true(f"{penalty.name}: {got}, wanted a finite number", math.isfinite(got))
    if target.backend.jit(run) is not None:
        poisoned = case.values(target.dtype).copy()
        poisoned[(0,) * poisoned.ndim] = math.nan
        results = run(target.backend.asarray(poisoned, dtype=target.dtype, device=target.device))
        for penalty, result in zip(chosen, results, strict=True):
            ledger.true(f"{penalty.name}: a number for NaN in a kernel", math.isnan(float(target.exact(result))))


def gradients(target: Target, case: Case, ledger: Ledger) -> None:
    """Check gradients against the dense operator's derivatives; where there are none, gradients must be finite."""
    kernel, truth = target.kernel(case)
    chosen = tuple(_penalties(case, truth, target.eps))
    derivatives = [target.backend.grad(penalty.function) for penalty in chosen]
    run = target.compiled(lambda array: tuple(derivative(array) for derivative in derivatives if derivative))
    rng = np.random.default_rng(case.count)
    directions = [rng.standard_normal(truth.values.shape) for _ in range(DIRECTIONS)]
    lengths = [float(np.linalg.norm(case.matrix(direction), 2)) for direction in directions]
    separate = case.fill == "random"
    for penalty, result in zip(chosen, run(kernel), strict=True):
        what = f"gradient of {penalty.name}"
        gradient = target.fetch(what, result, tuple(kernel.shape), target.dtype)
        if not np.all(np.isfinite(gradient)):
            raise Failure(f"{what}: {np.count_nonzero(~np.isfinite(gradient))} entries are not finite")
        if not penalty.exact or not (separate or penalty.smooth):
            continue
        for direction, length in zip(directions, lengths, strict=True):
            slope = truth.derivative(penalty.slopes, direction)
            got = float(np.sum(gradient * direction))
            rounded = (float(np.sum(np.abs(gradient * direction))) + abs(slope)) * target.kernel_eps / target.eps
            scale = rounded + penalty.bend * length
            ledger.close(what, got, slope, scale=scale, factor=GRADIENT_FACTOR)


def _penalties(case: Case, truth: Truth, eps: float) -> list[Penalty]:
    sigma, norm = truth.singular_values, truth.norm
    frequencies = math.prod(case.grid)
    bound = SHARE * norm
    first = np.zeros(case.count)
    first[0] = 1.0

    def of(function: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
        return lambda kernel: function(kernel, case.input_shape, case.conv, *arguments)

    excess = np.maximum(sigma - bound, 0.0)
    found = [
        Penalty(
            "norm_hinge",
            of(penalties.norm_hinge, bound),
            excess[0] ** 2,
            2 * excess[0] * norm,
            2 * excess[0] * first,
            2 * norm,
            smooth=False,
        ),
        Penalty("norm_hinge below the bound", of(penalties.norm_hinge, 2 * norm + 1), 0.0, 0.0, 0 * first, 0.0),
        Penalty(
            "spectrum_hinge",
            of(penalties.spectrum_hinge, bound),
            float(np.sum(excess**2)) / frequencies,
            float(np.sum(2 * excess * norm)) / frequencies,
            2 * excess / frequencies,
            2 * norm * case.count / frequencies,
        ),
        Penalty("spectrum_hinge below the bound", of(penalties.spectrum_hinge, 2 * norm + 1), 0.0, 0.0, 0 * first, 0.0),
        Penalty(
            "squared_norm", of(penalties.squared_norm), norm**2, 2 * norm**2, 2 * norm * first, 2 * norm, smooth=False
        ),
        _orthogonality(case, truth, of(penalties.orthogonality), eps),
        *(_schatten(case, truth, of(penalties.schatten, p), p) for p in (1, 1.5, 2, 3, 4, 6, 8)),
    ]
    frobenius = float(np.sum(sigma**2))
    rank = frobenius / norm**2 / frequencies if norm else 0.0
    ranked = 2 * sigma / norm**2 - 2 * frobenius / norm**3 * first if norm else 0 * first
    found.append(
        Penalty(
            "stable_rank",
            of(penalties.stable_rank),
            rank,
            2 * rank,
            ranked / frequencies,
            (2 * case.count / norm + 10 * frobenius / norm**3) / frequencies if norm else 0.0,
            smooth=False,
        )
    )
    return [*found, _log_lipschitz(case, truth, of(penalties.log_lipschitz)), *_logarithms(case, truth, of, eps)]


def _orthogonality(case: Case, truth: Truth, function: Callable[[Any], Any], eps: float) -> Penalty:
    sigma, frequencies = truth.singular_values, math.prod(case.grid)
    defect = sigma**2 - 1
    value = float(np.sum(defect**2)) / frequencies
    # The error of the Gram matrix is eps times the larger of the squared norm and 1, in each of its directions.
    rounding = max(truth.norm**2, 1.0)
    values_each = case.count / frequencies
    sensitivity = 2 * math.sqrt(value * values_each) * rounding + 2 * VALUE_FACTOR * eps * values_each * rounding**2
    slopes = 4 * sigma * defect / frequencies
    bend = values_each * 4 * (3 * truth.norm**2 + 1) * max(truth.norm, 1.0)
    return Penalty("orthogonality", function, value, sensitivity, slopes, bend)


def _schatten(case: Case, truth: Truth, function: Callable[[Any], Any], p: float) -> Penalty:
    sigma, norm, frequencies = truth.singular_values, truth.norm, math.prod(case.grid)
    power = sigma ** (p - 1)
    # Even powers are computed from the Gram matrix, whose error is eps * norm**2.
    moved = p * power * norm if p % 2 else p / 2 * sigma ** (p - 2) * norm**2
    curvature = max(1.0, p - 1) * p * norm ** (p - 1) * (1 if p >= 2 else _steepness(truth))
    return Penalty(
        f"schatten({p})",
        function,
        float(np.sum(sigma**p)) / frequencies,
        float(np.sum(moved)) / frequencies,
        p * power / frequencies,
        curvature * case.count / frequencies,
        smooth=p > 1,
    )


def _steepness(truth: Truth) -> float:
    return truth.norm / float(truth.singular_values[-1]) if truth.singular_values[-1] > 0 else 1.0


def _log_lipschitz(case: Case, truth: Truth, function: Callable[[Any], Any]) -> Penalty:
    first = np.zeros(case.count)
    first[0] = 1.0
    norm = truth.norm or 1.0
    value = math.log(norm)
    return Penalty(
        "log_lipschitz",
        function,
        value,
        1.0 + abs(value),
        first / norm,
        1 / norm,
        smooth=False,
        exact=truth.norm > 0,
    )


def _logarithms(case: Case, truth: Truth, of: Callable[..., Callable[[Any], Any]], eps: float) -> list[Penalty]:
    """Return the two penalties that grow without limit, up to the floor, as a singular value vanishes."""
    sigma, norm, frequencies = truth.singular_values, truth.norm, math.prod(case.grid)
    smallest, nothing = float(sigma[-1]), np.zeros(case.count)
    exact = smallest > 4 * VALUE_FACTOR * eps * norm
    safe = sigma if exact else np.ones(case.count)
    slopes = nothing.copy()
    slopes[0] = 1 / safe[0]
    slopes[-1] -= 1 / safe[-1]
    condition = math.log(safe[0] / safe[-1])
    found = [
        Penalty(
            "log_condition_number",
            of(penalties.log_condition_number),
            condition,
            norm / safe[-1] + condition + 1,
            slopes,
            2 * norm / safe[-1] ** 2,
            smooth=False,
            exact=exact,
        )
    ]
    if truth.matrix.shape[0] == truth.matrix.shape[1]:
        found.append(
            Penalty(
                "negative_log_abs_det",
                of(penalties.negative_log_abs_det),
                -float(np.sum(np.log(safe))) / frequencies,
                float(np.sum(norm / safe + np.abs(np.log(safe)))) / frequencies,
                -1 / safe / frequencies,
                float(np.sum(norm / safe**2)) / frequencies,
                exact=exact,
            )
        )
    return found
