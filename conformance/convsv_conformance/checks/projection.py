"""Check projections onto the operator-norm ball: the dense matrix must be within the bound, and the nearest such."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

import convsv_core as convsv
from convsv_conformance.cases import Case, Truth
from convsv_conformance.checks.spectrum import VALUE_FACTOR
from convsv_conformance.dense import Array
from convsv_conformance.target import UNITS_IN_LAST_PLACE, Ledger, Target

__all__ = [
    "METHODS",
    "compiled",
    "least_distance",
    "nearest",
    "of_every_size",
    "of_nothing",
    "of_one_size",
    "steps",
    "without_decompositions",
]

METHODS: tuple[Literal["dykstra", "alternating", "rescale", "newton-schulz"], ...] = (
    "dykstra",
    "alternating",
    "rescale",
    "newton-schulz",
)
"""The methods of `convsv_core.project`."""

SHARE = 0.6
"""The bound, relative to the norm; a guess that leaves values on both sides of the bound."""

SLACK = {"float32": 1e-6, "float64": 8 * UNITS_IN_LAST_PLACE["float64"]}
"""Relative excess of a result's norm over the bound that is allowed, by dtype of the answer: the library's promise."""

RTOL = 1e-4
"""Relative gap that is asked for; the library's default."""

OTHERS_RTOL = 1e-2
"""Relative gap at which other methods than "dykstra" may stop; a guess.

They converge slowly, and the last rescaling makes their results feasible.
"""

REFERENCE_RTOL = 1e-5
"""Relative gap of the reference's own projection; a guess, a tenth of `RTOL`."""

PRODUCTS_ERROR = 1e-5
"""Error of a pass without a decomposition, relative to a matrix's Frobenius norm, as the library states it."""

STEPS = 150
"""A number of iterations that reaches the gap `RTOL` on the cases here, by trial."""


def of_one_size(target: Target, case: Case, ledger: Ledger) -> None:
    """Check each method on a kernel above the bound, on one within the bound, and on the method's own result."""
    kernel, truth = target.kernel(case)
    bound = SHARE * truth.norm
    distances = {}
    for method in METHODS:
        rtol = RTOL if method == "dykstra" else OTHERS_RTOL
        found = convsv.project(kernel, case.input_shape, case.conv, bound, method=method, rtol=rtol)
        distances[method] = _consistent(target, truth, method, found, bound, ledger)
        again = convsv.project(found.kernel, case.input_shape, case.conv, bound, method=method, rtol=rtol)
        _unchanged(target, f"{method}, twice", again, target.exact(found.kernel), ledger)
        ledger.true(f"{method}: converged={found.converged}", found.converged is True)
        ledger.true(f"{method}: a state", (found.state is not None) == (method == "dykstra" and found.iterations > 0))
        wide = convsv.project(kernel, case.input_shape, case.conv, 1.5 * truth.norm + 1, method=method)
        _unchanged(target, f"{method} of a kernel within the bound", wide, truth.values, ledger)
    # No other method may come nearer than "dykstra", whose result is the nearest up to its gap.
    room = 1 / math.sqrt(1 - RTOL)
    least = min(distances.values())
    ledger.true(f"the nearest kernel is not: {distances}", distances["dykstra"] <= least * room + _blur(target, truth))


def nearest(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the distance of "dykstra" against that of a projection which uses the dense matrix alone."""
    kernel, truth = target.kernel(case)
    bound = SHARE * truth.norm
    least = least_distance(truth, bound)
    for method in ("dykstra", "alternating"):
        found = convsv.project(kernel, case.input_shape, case.conv, bound, method=method, rtol=RTOL)
        distance = float(target.exact(found.distance))
        blur = _blur(target, truth)
        ledger.true(f"{method}: the distance {distance} is below the least, {least}", distance >= least - blur)
        most = least / math.sqrt((1 - RTOL) * (1 - REFERENCE_RTOL)) + blur
        ledger.true(f"{method}: {distance} is above {most}", distance <= most or method != "dykstra")


def of_nothing(target: Target, case: Case, ledger: Ledger) -> None:
    """Check a bound of zero, and the zero kernel."""
    kernel, truth = target.kernel(case)
    zeros = target.array(0 * truth.values)
    for shape in (case.input_shape, None):
        for method in METHODS:
            found = convsv.project(kernel, shape, case.conv, 0.0, method=method)
            got = target.fetch(f"{method} to 0", found.kernel, truth.values.shape, _kernel_dtype(target))
            ledger.true(f"{method} to 0: not zero", not got.any() and float(found.norm) == 0)
            for bound in (0.0, 1.0):
                again = convsv.project(zeros, shape, case.conv, bound, method=method)
                _unchanged(target, f"{method} of the zero kernel", again, 0 * truth.values, ledger)


def of_every_size(target: Target, case: Case, ledger: Ledger) -> None:
    """Check that a projection without an input shape bounds circular and zero-padded layers of several sizes."""
    kernel, truth = target.kernel(case)
    bound = SHARE * float(target.exact(convsv.norm_bounds(kernel, case.conv).upper))
    for method in ("dykstra", "rescale"):
        found = convsv.project(kernel, None, case.conv, bound, method=method)
        _of_sizes(target, truth, method, found, bound, ledger)
        again = convsv.project(found.kernel, None, case.conv, bound, method=method)
        _unchanged(target, f"{method}, twice", again, target.exact(found.kernel), ledger)


def steps(target: Target, case: Case, ledger: Ledger) -> None:
    """Check a fixed number of iterations, without a compiler."""
    _fixed(target, case, ledger, lambda function: function)


def compiled(target: Target, case: Case, ledger: Ledger) -> None:
    """Check a fixed number of iterations, states included, as one function under the library's compiler."""

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        run = target.backend.jit(function)
        assert run is not None  # only libraries that have it are asked
        return run

    _fixed(target, case, ledger, jit)


def without_decompositions(target: Target, case: Case, ledger: Ledger) -> None:
    """Check that one pass of "newton-schulz" agrees with one of "alternating", within the stated error."""
    kernel, truth = target.kernel(case)
    bound = SHARE * truth.norm
    one, other = (
        case.matrix(target.exact(convsv.project(kernel, case.input_shape, case.conv, bound, method=m, steps=1).kernel))
        for m in ("newton-schulz", "alternating")
    )
    # The error of a pass moves the kernel, and through the norm also the rescaling.
    share = PRODUCTS_ERROR * _frobenius(truth.matrix)
    largest = PRODUCTS_ERROR * float(np.max(np.linalg.norm(truth.symbol, axis=(-2, -1))))
    allowed = share + largest * _frobenius(other) / bound + 2 * _blur(target, truth)
    ledger.true(
        f"newton-schulz: {_frobenius(one - other)} from alternating, allowed {allowed}",
        _frobenius(one - other) <= allowed,
    )


# ---- checks of any projection --------------------------------------------------------------------


def _kernel_dtype(target: Target) -> str:
    return target.dtype if target.kernel_eps == target.eps else target.answer


def _frobenius(array: Array) -> float:
    return float(np.linalg.norm(array))


def _blur(target: Target, truth: Truth) -> float:
    """Return how much rounding of the kernel may add to a distance."""
    return VALUE_FACTOR * target.eps * _frobenius(truth.matrix)


def _consistent(
    target: Target, truth: Truth, what: str, found: convsv.Projection, bound: float, ledger: Ledger
) -> float:
    """Return the distance, after a check of distance, norm and bound by the dense matrix."""
    values = target.fetch(f"{what}: kernel", found.kernel, truth.values.shape, _kernel_dtype(target))
    norm = float(target.fetch(f"{what}: norm", found.norm, ()))
    distance = float(target.fetch(f"{what}: distance", found.distance, ()))
    matrix = truth.case.matrix(values)
    ledger.not_above(f"{what}: the norm", float(np.linalg.norm(matrix, 2)), bound * (1 + SLACK[target.answer]))
    ledger.not_above(f"{what}: the norm beside its certificate", float(np.linalg.norm(matrix, 2)), norm)
    ledger.not_above(f"{what}: the certificate", norm, bound * (1 + SLACK[target.answer]))
    expected, scale = _frobenius(matrix - truth.matrix), _frobenius(truth.matrix)
    ledger.close(f"{what}: distance", distance, expected, scale=scale, factor=VALUE_FACTOR)
    return distance


def _unchanged(target: Target, what: str, found: convsv.Projection, expected: Array, ledger: Ledger) -> None:
    got = target.fetch(f"{what}: kernel", found.kernel, expected.shape, _kernel_dtype(target))
    ledger.true(f"{what}: changed", bool(np.all(got == expected)))
    distance = float(target.fetch(f"{what}: distance", found.distance, ()))
    ledger.true(f"{what}: distance={distance}, iterations={found.iterations}", distance == 0 and found.iterations == 0)
    ledger.true(f"{what}: converged={found.converged}", found.converged is True)


def _of_sizes(target: Target, truth: Truth, what: str, found: convsv.Projection, bound: float, ledger: Ledger) -> None:
    case = truth.case
    values = target.fetch(f"{what}: kernel", found.kernel, truth.values.shape, _kernel_dtype(target))
    norm = float(target.fetch(f"{what}: norm", found.norm, ()))
    ledger.not_above(f"{what}: the certificate", norm, bound * (1 + SLACK[target.answer]))
    step = (1,) * len(case.taps) if case.transposed else case.stride
    larger = tuple(n + s for n, s in zip(case.input_shape, step, strict=True))
    for extents in (case.input_shape, step, larger):
        sized = dataclasses.replace(case, input_shape=extents)
        for mode in ("circular", "zeros"):
            dense = float(np.linalg.norm(sized.matrix(values, mode), 2))
            ledger.not_above(f"{what}: the norm of {extents}, {mode}, beside its certificate", dense, norm)
    distance = float(target.fetch(f"{what}: distance", found.distance, ()))
    expected, scale = _frobenius(values - truth.values), _frobenius(truth.values)
    ledger.close(f"{what}: distance", distance, expected, scale=scale, factor=VALUE_FACTOR)


def _fixed(
    target: Target, case: Case, ledger: Ledger, transform: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    kernel, truth = target.kernel(case)
    bound = SHARE * truth.norm
    of_every_size = SHARE * float(target.exact(convsv.norm_bounds(kernel, case.conv).upper))

    def everything(array: Any) -> tuple[Any, ...]:
        fixed = tuple(
            convsv.project(array, case.input_shape, case.conv, bound, method=method, steps=count)
            for method, count in zip(METHODS, (STEPS, 5, 1, 5), strict=True)
        )
        following = convsv.project(array, case.input_shape, case.conv, bound, steps=1, state=fixed[0].state)
        wide = convsv.project(array, case.input_shape, case.conv, 1.5 * truth.norm + 1, steps=2)
        every_size = convsv.project(array, None, case.conv, of_every_size, steps=2)
        again = convsv.project(fixed[0].kernel, case.input_shape, case.conv, bound, steps=2)
        return fixed, following, wide, every_size, again

    fixed, following, wide, every_size, again = transform(everything)(kernel)
    distances = {}
    for method, found in zip(METHODS, fixed, strict=True):
        distances[method] = _consistent(target, truth, f"{method}, steps", found, bound, ledger)
    ledger.true("dykstra, steps: not converged", bool(fixed[0].converged))
    room, blur = 1 / math.sqrt(1 - RTOL), _blur(target, truth)
    least = min(distances.values())
    ledger.true(f"the nearest kernel is not: {distances}", distances["dykstra"] <= least * room + blur)
    # A step that starts from the state of earlier iterations must be as near as those iterations were.
    after = _consistent(target, truth, "dykstra, from a state", following, bound, ledger)
    ledger.true(f"dykstra, from a state: {after} for {distances}", after <= distances["dykstra"] * room + blur)
    same = bool(np.all(target.exact(again.kernel) == target.exact(fixed[0].kernel)))
    ledger.true("steps, twice: changed", same)
    got = target.fetch("steps: kernel", wide.kernel, truth.values.shape, _kernel_dtype(target))
    ledger.true("steps of a kernel within the bound: changed", bool(np.all(got == truth.values)))
    ledger.true("steps of a kernel within the bound: distance", float(wide.distance) == 0 and bool(wide.converged))
    _of_sizes(target, truth, "steps, every size", every_size, of_every_size, ledger)


# ---- the reference -----------------------------------------------------------------------------------


@functools.cache
def least_distance(truth: Truth, bound: float) -> float:
    """Return a lower bound of the Frobenius distance to operators of the case whose norm is at most `bound`.

    The iteration is Dykstra's algorithm on the dense matrix, as proximal gradient steps of the dual with Nesterov's
    momentum. The dual's value is a lower bound at every iteration. The result is within `REFERENCE_RTOL` of the
    distance of a feasible operator.

    Raises
    ------
    RuntimeError
        If 5000 iterations do not reach that gap.
    """
    basis = np.eye(truth.values.size).reshape(-1, *truth.values.shape)
    taps = np.stack([truth.case.matrix(one).reshape(-1) for one in basis], axis=1)
    orthonormal = np.linalg.svd(taps, full_matrices=False)
    span = orthonormal[0][:, orthonormal[1] > orthonormal[1].max() * 1e-9]
    matrix, shape = truth.matrix.reshape(-1), truth.matrix.shape
    dual = ahead = np.zeros_like(matrix)
    momentum, best, least = 1.0, math.inf, 0.0
    for _ in range(5000):
        inside = matrix - span @ (span.T @ ahead)
        u, s, vh = np.linalg.svd((ahead + inside).reshape(shape), full_matrices=False)
        excess = np.maximum(s - bound, 0)
        new = ((u * excess) @ vh).reshape(-1)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        turned = np.real(np.vdot(ahead - new, new - dual)) > 0
        ahead = new if turned else new + (momentum - 1) / following * (new - dual)
        momentum = 1.0 if turned else following
        dual = new
        change = span @ (span.T @ dual)
        least = max(least, float(np.real(np.vdot(change, 2 * matrix - change)) - 2 * bound * excess.sum()))
        reached = matrix - change
        reached = reached * min(1.0, bound / np.linalg.norm(reached.reshape(shape), 2))
        best = min(best, float(np.linalg.norm(reached - matrix) ** 2))
        if best - least <= REFERENCE_RTOL * best:
            return math.sqrt(least)
    raise RuntimeError(f"the reference found the squared distance to be between {least} and {best} only")
