"""Check each public function of singular values and vectors against the dense matrix."""

from __future__ import annotations

import math

import numpy as np

import convsv_core as convsv
from convsv_conformance.cases import Case
from convsv_conformance.target import Ledger, Target

__all__ = [
    "VALUE_FACTOR",
    "clip",
    "extremes",
    "frequencies",
    "methods",
    "scalars",
    "singular_vectors",
    "svd",
    "symbol",
    "values",
    "views",
]

VALUE_FACTOR = 20.0
"""Largest error of a singular value that the library promises, in units of eps * sigma_max."""

LEAST_RAISED = 0.02
"""Least singular value, relative to the norm, that a check raises; a guess.

Rounding changes the singular vectors of smaller values too much.
"""


def values(target: Target, case: Case, ledger: Ledger) -> None:
    """Check all singular values, and that they are in descending order."""
    kernel, truth = target.kernel(case)
    result = convsv.singular_values(kernel, case.input_shape, case.conv)
    got = target.fetch("singular_values", result, (case.count,))
    ledger.true("singular_values: not in descending order", bool(np.all(np.diff(got) <= 0)))
    ledger.close("singular_values", got, truth.singular_values, scale=truth.norm, factor=VALUE_FACTOR)


def methods(target: Target, case: Case, ledger: Ledger) -> None:
    """Check each ``method=`` within the error bound that its documentation states."""
    kernel, truth = target.kernel(case)
    for method in ("svd", "gram"):
        what = f"singular_values(method={method!r})"
        result = convsv.singular_values(kernel, case.input_shape, case.conv, method=method)
        got = target.fetch(what, result, (case.count,))
        expected = truth.singular_values
        # An eigenvalue of the Gram matrix has an error of eps * norm**2, so its root has that error over the value.
        # The root of an eigenvalue near 0 has an error of at most sqrt(eps) * norm, which also bounds the others.
        largest = math.sqrt(VALUE_FACTOR * target.eps) * truth.norm
        if method == "gram" and truth.norm > 0:
            error = VALUE_FACTOR * target.eps * truth.norm**2 / np.maximum(expected, largest)
            if not bool(np.all(np.abs(got - expected) <= error)):
                worst = int(np.argmax(np.abs(got - expected) / error))
                ledger.true(f"{what}: {got[worst]!r} at {worst}, wanted {expected[worst]!r}", False)
            ledger.close(f"{what}, the largest", got[0], expected[0], scale=truth.norm, factor=VALUE_FACTOR)
        else:
            ledger.close(what, got, expected, scale=truth.norm, factor=VALUE_FACTOR)


def frequencies(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the singular values of each frequency's matrix, in the place of that frequency."""
    kernel, truth = target.kernel(case)
    count = case.groups * min(case.block)
    result = convsv.frequency_singular_values(kernel, case.input_shape, case.conv)
    got = target.fetch("frequency_singular_values", result, (*case.grid, count))
    expected = np.linalg.svd(truth.symbol, compute_uv=False).reshape(*case.grid, count)
    expected = np.sort(expected, axis=-1)[..., ::-1]
    ledger.close("frequency_singular_values", got, expected, scale=truth.norm, factor=VALUE_FACTOR)


def symbol(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the matrices themselves, against the Fourier transform of the dense matrix."""
    kernel, truth = target.kernel(case)
    result = convsv.symbol(kernel, case.input_shape, case.conv)
    got = target.fetch("symbol", result, truth.symbol.shape, target.complex_answer)
    ledger.close("symbol", got, truth.symbol, scale=truth.norm, factor=VALUE_FACTOR)


def svd(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the decomposition of each frequency: its factors are orthonormal, and their product is the symbol."""
    kernel, truth = target.kernel(case)
    rows, columns = case.block
    side = min(rows, columns)
    outer = (*case.grid, case.groups)
    u, s, vh = convsv.svd(kernel, case.input_shape, case.conv)
    left = target.fetch("svd: U", u, (*outer, rows, side), target.complex_answer)
    middle = target.fetch("svd: S", s, (*outer, side))
    right = target.fetch("svd: Vh", vh, (*outer, side, columns), target.complex_answer)
    ledger.true("svd: S is not in descending order", bool(np.all(np.diff(middle, axis=-1) <= 0)))
    factor = VALUE_FACTOR * side
    product = (left * middle[..., None, :]) @ right
    ledger.close("svd: U S Vh", product, truth.symbol, scale=truth.norm, factor=factor)
    unit = np.broadcast_to(np.eye(side), (*outer, side, side))
    ledger.close("svd: U* U", np.conj(left).swapaxes(-1, -2) @ left, unit, scale=1.0, factor=factor)
    ledger.close("svd: Vh Vh*", right @ np.conj(right).swapaxes(-1, -2), unit, scale=1.0, factor=factor)


def singular_vectors(target: Target, case: Case, ledger: Ledger) -> None:
    """Check singular vectors as images: orthonormal, and the layer maps each to sigma times its partner."""
    kernel, truth = target.kernel(case)
    decomposition = convsv.svd(kernel, case.input_shape, case.conv)
    count, vectors_dtype = case.count, target.complex_answer if target.is_complex else target.answer
    chosen = sorted({0, 1, 2, count // 2, count - 2, count - 1} & set(range(count)))
    lefts, rights = [], []
    for index in chosen:
        u, s, v = decomposition.singular_vectors(index)
        what = f"singular_vectors({index})"
        left = target.fetch(f"{what}: u", u, (case.channels[0], *case.output_shape), vectors_dtype).reshape(-1)
        right = target.fetch(f"{what}: v", v, (case.channels[1], *case.input_shape), vectors_dtype).reshape(-1)
        value = float(target.fetch(f"{what}: s", s, ()))
        expected = truth.singular_values[index]
        bound = {"scale": truth.norm, "factor": VALUE_FACTOR * min(case.block)}
        ledger.close(f"{what}: s", value, expected, scale=truth.norm, factor=VALUE_FACTOR)
        ledger.close(f"{what}: A v = s u", truth.matrix @ right, value * left, **bound)
        ledger.close(f"{what}: A* u = s v", truth.matrix.conj().T @ left, value * right, **bound)
        lefts.append(left)
        rights.append(right)
    for what, side in (("u", lefts), ("v", rights)):
        stacked = np.stack(side)
        ledger.close(
            f"singular_vectors: products of {what}",
            stacked.conj() @ stacked.T,
            np.eye(len(chosen)),
            scale=1.0,
            factor=VALUE_FACTOR * min(case.block),
        )


def scalars(target: Target, case: Case, ledger: Ledger) -> None:
    """Check the norms, the ranks and the determinant that follow from the singular values."""
    kernel, truth = target.kernel(case)
    arguments = (kernel, case.input_shape, case.conv)
    sigma = truth.singular_values
    norm, smallest = truth.norm, float(sigma[-1])
    frobenius = math.sqrt(float(np.sum(sigma**2)))

    got = target.fetch("operator_norm", convsv.operator_norm(*arguments), ())
    ledger.close("operator_norm", got, norm, scale=norm, factor=VALUE_FACTOR)
    got = target.fetch("frobenius_norm", convsv.frobenius_norm(*arguments), ())
    ledger.close("frobenius_norm", got, frobenius, scale=frobenius, factor=VALUE_FACTOR)
    got = target.fetch("stable_rank", convsv.stable_rank(*arguments), ())
    rank = (frobenius / norm) ** 2 if norm else 0.0
    ledger.close(
        "stable_rank", got, rank, scale=rank, factor=4 * VALUE_FACTOR
    )  # two squares, each of which doubles the error

    # A value below `blur` cannot be told from zero. Quotient and logarithm amplify the error of a small value.
    blur = VALUE_FACTOR * target.eps * norm
    got = target.fetch("condition_number", convsv.condition_number(*arguments), ())
    if smallest > 2 * blur:
        condition = norm / smallest
        ledger.close("condition_number", got, condition, scale=condition**2, factor=4 * VALUE_FACTOR)
    else:
        ledger.true(
            f"condition_number: {got} for values from {norm} to {smallest}",
            bool(got >= (1 / (4 * VALUE_FACTOR * target.eps) if norm else math.inf)),
        )

    if truth.matrix.shape[0] == truth.matrix.shape[1]:
        got = target.fetch("log_abs_det", convsv.log_abs_det(*arguments), ())
        if smallest > 2 * blur:
            logs = np.log(sigma)
            scale = float(np.sum(norm / sigma) + np.sum(np.abs(logs)))
            ledger.close("log_abs_det", got, float(np.sum(logs)), scale=scale, factor=2 * VALUE_FACTOR)
        else:
            vanishing = sigma <= 2 * blur
            most = float(np.sum(np.log(np.maximum(sigma, 4 * blur)))) if norm else -math.inf
            ledger.true(f"log_abs_det: {got} with {vanishing.sum()} values near 0", bool(got <= most))


def views(target: Target, case: Case, ledger: Ledger) -> None:
    """Check a kernel that is a view of an array with its axes in another order."""
    drawn = case.values(target.dtype)
    base = target.array(np.ascontiguousarray(drawn.transpose()))
    xp = target.backend.namespace(base)
    kernel = xp.permute_dims(base, tuple(reversed(range(drawn.ndim))))
    truth = case.truth(target.exact(kernel))
    result = convsv.singular_values(kernel, case.input_shape, case.conv)
    got = target.fetch("singular_values of a view", result, (case.count,))
    ledger.close("singular_values of a view", got, truth.singular_values, scale=truth.norm, factor=VALUE_FACTOR)
    result = convsv.clip(kernel, case.input_shape, case.conv, truth.norm / 2)
    got = target.fetch("clip of a view", result, drawn.shape, target.dtype)
    ledger.close("clip of a view", got, truth.clipped(truth.norm / 2), scale=truth.norm, factor=VALUE_FACTOR)


def clip(target: Target, case: Case, ledger: Ledger) -> None:
    """Check one clip-and-cut step at shares of the norm, and that a kernel within the bound does not change."""
    kernel, truth = target.kernel(case)
    dtype = target.dtype if target.kernel_eps == target.eps else target.answer
    shape = tuple(kernel.shape)
    for share in (0.5, 0.9):
        bound = share * truth.norm
        got = target.fetch("clip", convsv.clip(kernel, case.input_shape, case.conv, bound), shape, dtype)
        expected = truth.clipped(bound)
        ledger.close(f"clip to {share} of the norm", got, expected, scale=truth.norm, factor=VALUE_FACTOR)
    got = target.fetch("clip", convsv.clip(kernel, case.input_shape, case.conv, 2 * truth.norm + 1), shape, dtype)
    ledger.true("clip: changed a kernel that is within the bound", bool(np.all(got == truth.values)))
    smallest = float(truth.singular_values[-1])
    if smallest < LEAST_RAISED * truth.norm or not truth.norm:
        return  # a value of zero has no singular vectors to raise it by, and rounding spoils those of a value near it
    for bound, lower in ((0.8 * truth.norm, 0.5 * truth.norm), (math.inf, 2 * smallest), (0.5 * truth.norm,) * 2):
        result = convsv.clip(kernel, case.input_shape, case.conv, bound, lower=lower)
        got = target.fetch("clip: lower", result, shape, dtype)
        expected = truth.clipped(bound, lower)
        # The vectors of small values have errors of eps * norm / value, and are multiplied by ``lower - value``.
        scale = truth.norm * (1 + lower / smallest)
        ledger.close(f"clip to {lower}...{bound}", got, expected, scale=scale, factor=VALUE_FACTOR)


def extremes(target: Target, case: Case, ledger: Ledger) -> None:
    """Check that kernels whose squares would overflow or vanish get accurate answers."""
    if target.kernel_eps != target.eps:  # a kernel of 16 bits has the range of its own dtype
        powers = {"float16": (-8, 10), "bfloat16": (-100, 100)}[target.dtype]
    else:
        powers = {"float32": (-100, 100), "float64": (-900, 900)}[target.answer]
    for power in powers:
        kernel = target.array(np.ldexp(1.0, power) * case.values(target.dtype))
        # The reference would overflow too, so the results are compared at the scale of 1.
        truth = case.truth(target.exact(kernel) * np.ldexp(1.0, -power))
        for what, result, expected in (
            ("singular_values", convsv.singular_values(kernel, case.input_shape, case.conv), truth.singular_values),
            ("operator_norm", convsv.operator_norm(kernel, case.input_shape, case.conv), np.asarray(truth.norm)),
        ):
            got = target.fetch(what, result, expected.shape) * np.ldexp(1.0, -power)
            ledger.close(f"{what} of 2**{power} times it", got, expected, scale=truth.norm, factor=VALUE_FACTOR)
