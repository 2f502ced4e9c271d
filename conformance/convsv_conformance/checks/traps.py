"""Check cases that other programs get wrong, and that the case tells the usual mistake from the right number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import convsv_core as convsv
from convsv_conformance.cases import Case, Truth, make_case
from convsv_conformance.checks.spectrum import VALUE_FACTOR
from convsv_conformance.dense import Array
from convsv_conformance.table import by_name
from convsv_conformance.target import Ledger, Target

__all__ = ["CLIPPED", "TRAPS", "ZERO", "Trap", "clip_leaves_more", "norms", "zero_kernel"]


@dataclass(frozen=True)
class Trap:
    """A case, and the norm that a known mistake gives for it.

    Parameters
    ----------
    case : Case
    mistake : str
        A mistake that other programs make.
    mistaken : callable
        The norm by that mistake, computed from the truth. It must differ from the right norm by more than a tenth,
        or the case would not tell the two apart.
    """

    case: Case
    mistake: str
    mistaken: Callable[[Truth], float]

    @property
    def name(self) -> str:
        """Return the name of the case."""
        return self.case.name


def _norm_of_block(case: Case, values: Array) -> float:
    return float(np.linalg.norm(case.matrix(values), 2))


def _product_over_groups(truth: Truth) -> float:
    case = truth.case
    norms = np.linalg.norm(truth.symbol, 2, axis=(-2, -1)).reshape(-1, case.groups).max(axis=0)
    return float(np.prod(norms))


def _cropped(truth: Truth) -> float:
    case = truth.case
    cropped = truth.values[..., : case.input_shape[0], : case.input_shape[1]]
    return _norm_of_block(case, cropped)


def _sampled_at_kernel_size(truth: Truth) -> float:
    case = truth.case
    small = make_case(case.name, case.channels, case.taps, case.taps)
    return _norm_of_block(small, truth.values)


def _reshaped(truth: Truth) -> float:
    return float(np.linalg.norm(truth.values.reshape(truth.values.shape[0], -1), 2))


def _taps_strided(truth: Truth) -> float:
    """Return the norm with every second tap only: taps are subsampled instead of split into residue classes."""
    case = truth.case
    kept = np.zeros_like(truth.values)
    kept[..., :: case.stride[0], :: case.stride[1]] = truth.values[..., :: case.stride[0], :: case.stride[1]]
    return _norm_of_block(case, kept)


TRAPS = (
    Trap(
        make_case("trap-groups", (8, 8), (3, 3), (4, 4), groups=4), "norms of groups multiplied", _product_over_groups
    ),
    Trap(make_case("trap-larger", (3, 3), (7, 7), (3, 4)), "taps beyond the input cropped", _cropped),
    Trap(
        make_case("trap-samples", (2, 2), (3, 3), (7, 7)), "sampled at as many points as taps", _sampled_at_kernel_size
    ),
    Trap(make_case("trap-1d", (3, 3), (5,), (9,)), "the kernel reshaped to a matrix", _reshaped),
    Trap(make_case("trap-stride-3-4", (3, 3), (3, 4), (6, 8), stride=2), "taps subsampled", _taps_strided),
    Trap(make_case("trap-stride-5-2", (3, 3), (5, 2), (6, 8), stride=2), "taps subsampled", _taps_strided),
)

ZERO = by_name("zero")[0]
"""The case of the zero kernel."""

CLIPPED = make_case("trap-clip", (3, 3), (3, 3), (6, 6))
"""A case in which one clip-and-cut step leaves a norm well above the bound."""


def norms(target: Target, trap: Trap, ledger: Ledger) -> None:
    """Check the norm of a case that a known mistake gets wrong."""
    case = trap.case
    kernel, truth = target.kernel(case)
    wrong = trap.mistaken(truth)
    ledger.true(f"{trap.mistake}: the case does not tell", abs(wrong - truth.norm) > truth.norm / 10)
    got = target.fetch("operator_norm", convsv.operator_norm(kernel, case.input_shape, case.conv), ())
    ledger.close("operator_norm", got, truth.norm, scale=truth.norm, factor=VALUE_FACTOR)


def zero_kernel(target: Target, case: Case, ledger: Ledger) -> None:
    """Check every number of the zero operator, for which other programs divide zero by zero."""
    kernel, _ = target.kernel(case)
    arguments = (kernel, case.input_shape, case.conv)
    for function, expected in (
        (convsv.operator_norm, 0.0),
        (convsv.frobenius_norm, 0.0),
        (convsv.stable_rank, 0.0),
        (convsv.condition_number, math.inf),
        (convsv.log_abs_det, -math.inf),
    ):
        got = target.fetch(function.__name__, function(*arguments), ())
        ledger.true(f"{function.__name__} of the zero kernel: {got}", float(got) == expected)
    clipped = target.exact(convsv.clip(*arguments, 1.0))
    ledger.true("clip of the zero kernel is not zero", not clipped.any())


def clip_leaves_more(target: Target, case: Case, ledger: Ledger) -> None:
    """Check that one clip-and-cut step leaves the right norm, well above the bound as the documentation says."""
    kernel, truth = target.kernel(case)
    bound = truth.norm / 2
    clipped = convsv.clip(kernel, case.input_shape, case.conv, bound)
    left = case.truth(truth.clipped(bound)).norm
    ledger.true(f"the case is too easy: {left / bound} of the bound is left", left > 1.1 * bound)
    got = target.fetch("operator_norm", convsv.operator_norm(clipped, case.input_shape, case.conv), ())
    ledger.close("norm after one clip-and-cut", got, left, scale=truth.norm, factor=2 * VALUE_FACTOR)
