"""Check directions of steepest descent: within the ball by the dense matrix, and near the optimum of a dense solver."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

import convsv_core as convsv
from convsv_conformance.cases import Case, Truth
from convsv_conformance.checks.projection import SLACK
from convsv_conformance.dense import Array
from convsv_conformance.target import Ledger, Target

__all__ = ["METHODS", "Optimum", "compiled", "of_every_size", "of_nothing", "of_one_size", "optimum"]

METHODS: tuple[Literal["exact", "polar", "flat"], ...] = ("exact", "polar", "flat")
"""The methods of `convsv_core.steepest_direction`."""

RTOL = 1e-2
"""Relative gap that is asked for; the library's default."""

REFERENCE_RTOL = 3e-3
"""Relative gap of the reference's own bounds; a guess, a third of `RTOL`."""

COMPILED_ITERATIONS = 40
"""A number of iterations that proves a share of 0.9 on the cases here, by trial."""

COMPILED_SHARE = 0.9
"""The share of the upper bound that the compiled iterations must reach. See `COMPILED_ITERATIONS`."""

REFERENCE_WEIGHT = 4.0
"""Weight of the gradient in the reference's iteration. A guess; it changes the number of iterations alone."""


REFERENCE_RANK = 1e-9
"""Singular values of the taps' matrices below this share of the largest are 0, as where taps share a place. A guess."""


class Optimum(NamedTuple):
    """Hold bounds of the largest inner product of a gradient with a kernel of norm at most 1."""

    lower: float
    upper: float


def of_one_size(target: Target, case: Case, ledger: Ledger) -> None:
    """Check each method's norm, inner product and bounds, and a second search that starts from the first one."""
    gradient, truth = target.kernel(case)
    reference = optimum(truth)
    state = None
    for method in METHODS:
        found = convsv.steepest_direction(gradient, case.input_shape, case.conv, method=method, rtol=RTOL)
        _consistent(target, truth, method, found, reference, ledger)
        ledger.true(f"{method}: a state", (found.state is not None) == (found.iterations > 0))
        if method == "exact":
            state = found.state
            ledger.true(f"exact: {found.alignment} of {found.upper}", found.converged is True)
    if state is not None:
        again = convsv.steepest_direction(
            gradient, case.input_shape, case.conv, rtol=RTOL, max_iterations=3, state=state
        )
        _consistent(target, truth, "exact, from a state", again, reference, ledger)
        share = float(again.alignment) / float(again.upper)
        ledger.true(f"exact, from a state: {share} after {again.iterations}", share >= 1 - 2 * RTOL)
    once = convsv.steepest_direction(gradient, case.input_shape, case.conv, max_iterations=1)
    _consistent(target, truth, "exact, one iteration", once, reference, ledger)
    flat = convsv.steepest_direction(gradient, case.input_shape, case.conv, method="flat")
    _not_behind(target, "exact, one iteration", once, flat, ledger)


def of_every_size(target: Target, case: Case, ledger: Ledger) -> None:
    """Check that a direction without an input shape is within the ball for several sizes and for zero padding."""
    gradient, truth = target.kernel(case)
    found = convsv.steepest_direction(gradient, None, case.conv, rtol=RTOL)
    values = target.fetch("direction", found.direction, truth.values.shape, _dtype(target))
    step = (1,) * len(case.taps) if case.transposed else case.stride
    larger = tuple(n + s for n, s in zip(case.input_shape, step, strict=True))
    for extents in (case.input_shape, step, larger):
        sized = dataclasses.replace(case, input_shape=extents)
        for mode in ("circular", "zeros"):
            dense = float(np.linalg.norm(sized.matrix(values, mode), 2))
            ledger.not_above(f"the norm of {extents}, {mode}", dense, 1 + SLACK[target.answer])
    alignment, upper = (float(target.fetch(what, one, ())) for what, one in zip(*_named(found), strict=True))
    ledger.not_above("alignment", alignment, _inner(truth.values, values))
    ledger.not_above("alignment beside upper", alignment, upper)
    ledger.true(f"{alignment} of {upper}", alignment >= (1 - 2 * RTOL) * upper)


def of_nothing(target: Target, case: Case, ledger: Ledger) -> None:
    """Check that the gradient zero has the direction zero."""
    _, truth = target.kernel(case)
    zeros = target.array(0 * truth.values)
    for shape in (case.input_shape, None):
        for method in METHODS:
            found = convsv.steepest_direction(zeros, shape, case.conv, method=method)
            got = target.fetch(f"{method} of zero", found.direction, truth.values.shape, _dtype(target))
            ledger.true(f"{method} of zero: not zero", not got.any())
            ledger.true(f"{method} of zero: bounds", float(found.alignment) == 0 and float(found.upper) == 0)


def compiled(target: Target, case: Case, ledger: Ledger) -> None:
    """Check a fixed number of iterations as one function under the library's compiler, and a gradient of NaN."""
    gradient, truth = target.kernel(case)

    def everything(array: Any) -> tuple[Any, ...]:
        search = functools.partial(convsv.steepest_direction, array, case.input_shape, case.conv)
        first = search(max_iterations=COMPILED_ITERATIONS)
        following = search(max_iterations=1, state=first.state)
        return first, following, search(method="polar"), search(method="flat")

    run: Callable[..., Any] | None = target.backend.jit(everything)
    assert run is not None  # only libraries that have a compiler are asked
    names = ("exact", "exact, from a state", "polar", "flat")
    reference = optimum(truth)
    for name, found in zip(names, run(gradient), strict=True):
        _consistent(target, truth, f"{name}, compiled", found, reference, ledger)
        if name.startswith("exact"):
            share = float(found.alignment) / float(found.upper)
            ledger.true(f"{name}, compiled: {share} of the upper bound", share >= COMPILED_SHARE)
    for name, found in zip(names, run(gradient * math.nan), strict=True):
        undefined = np.isnan(target.exact(found.direction)).all() and math.isnan(float(found.alignment))
        ledger.true(f"{name}, compiled: a number for NaN", bool(undefined))


def _dtype(target: Target) -> str:
    return target.dtype if target.kernel_eps == target.eps else target.answer


def _named(found: convsv.SteepestDirection) -> tuple[tuple[str, str], tuple[Any, Any]]:
    return ("alignment", "upper"), (found.alignment, found.upper)


def _inner(one: Array, other: Array) -> float:
    return float(np.real(np.vdot(one, other)))


def _not_behind(
    target: Target, what: str, found: convsv.SteepestDirection, flat: convsv.SteepestDirection, ledger: Ledger
) -> None:
    """Check that "exact", which also tries the flattened polar factor, is not behind it after few iterations."""
    alignment, least = (float(target.fetch(f"{what}: alignment", one.alignment, ())) for one in (found, flat))
    ledger.not_above(
        f"{what}: the alignment of the flattened polar factor", least, alignment * (1 + SLACK[target.answer])
    )


def _consistent(
    target: Target, truth: Truth, what: str, found: convsv.SteepestDirection, reference: Optimum, ledger: Ledger
) -> None:
    """Check the norm by the dense matrix, and both bounds by the inner product and the reference's bounds."""
    values = target.fetch(f"{what}: direction", found.direction, truth.values.shape, _dtype(target))
    alignment, upper = (
        float(target.fetch(f"{what}: {name}", one, ())) for name, one in zip(*_named(found), strict=True)
    )
    dense = float(np.linalg.norm(truth.case.matrix(values), 2))
    ledger.not_above(f"{what}: the norm", dense, 1 + SLACK[target.answer])
    exact = _inner(truth.values, values)
    ledger.not_above(f"{what}: the alignment beside the inner product", alignment, exact)
    size = float(np.sum(np.abs(truth.values) * np.abs(values)))
    terms = truth.values.size
    ledger.close(f"{what}: alignment", alignment, exact, scale=size, factor=4 + 2 * min(terms, 8 * math.sqrt(terms)))
    ledger.not_above(
        f"{what}: the alignment beside the optimum", alignment, reference.upper * (1 + SLACK[target.answer])
    )
    ledger.not_above(f"{what}: the optimum beside its upper bound", reference.lower, upper)


# ---- the reference -----------------------------------------------------------------------------------


@functools.cache
def optimum(truth: Truth) -> Optimum:
    """Return bounds of the optimum, from the dense matrix alone.

    The iteration is Douglas and Rachford's, on the dense matrix. A kernel divided by its norm bounds the optimum
    from below. A matrix whose inner products with the taps' matrices are the gradient bounds it from above by its
    nuclear norm. Among kernels whose taps act at one place, only kernels with equal parts count.

    Raises
    ------
    RuntimeError
        If 5000 iterations do not reach the gap `REFERENCE_RTOL`.
    """
    basis = np.eye(truth.values.size).reshape(-1, *truth.values.shape)
    columns = np.stack([truth.case.matrix(one).reshape(-1) for one in basis], axis=1)
    inverse = np.linalg.pinv(columns, rcond=REFERENCE_RANK)
    pull = inverse.T @ truth.values.reshape(-1)  # its inner product with the matrix of a kernel is the gradient's
    shape = truth.matrix.shape
    size = np.linalg.norm(pull)
    if not size:
        return Optimum(0.0, 0.0)
    weight = REFERENCE_WEIGHT * size / math.sqrt(min(shape))
    point = pull / weight
    lower, upper = 0.0, math.inf
    for index in range(5000):
        u, s, vh = np.linalg.svd(point.reshape(shape), full_matrices=False)
        excess = ((u * np.maximum(s - 1, 0)) @ vh).reshape(-1)
        inside = point - excess
        taps = inverse @ (inside - excess)
        matrix = columns @ taps + pull / weight
        point = point + 1.5 * (matrix - inside)
        if index % 10 == 9:
            norm = np.linalg.norm(matrix.reshape(shape), 2)
            lower = max(lower, float(np.real(np.vdot(pull, matrix))) / float(norm))
            dual = weight * excess + pull - columns @ (inverse @ (weight * excess))
            upper = min(upper, float(np.linalg.svd(dual.reshape(shape), compute_uv=False).sum()))
            if upper - lower <= REFERENCE_RTOL * upper:
                return Optimum(lower, upper)
    raise RuntimeError(f"the reference found the optimum to be between {lower} and {upper} only")
