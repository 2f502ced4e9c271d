"""Means over frequencies of functions of the Gram matrix, which need no decomposition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from convsv_core._geometry.plan import Plan
from convsv_core._spectrum.values import mean_over_frequencies
from convsv_core._symbol.folding import fold
from convsv_core._symbol.gram import differences_of, gram_coefficients, gram_evaluator
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import BLOCK_BYTES, symbol_evaluator
from convsv_core.backend import Array, BlockWork

__all__ = ["mean_over_grams", "squared_gram"]

MOST_OFFSETS = 128
"""Largest number of offsets for which every pair of offsets may have a product of its own.

A guess: it limits the number of products to about 8000.
"""


def squared_gram(operand: Operand, shift: float) -> Array:
    """Return the mean over frequencies of ``|G - shift I|_F**2``, with the Gram matrix G at the user's scale."""
    if not _pairs_are_cheaper(operand.plan):
        return mean_over_grams(operand, _squared_distances, shift)
    upper = operand.xp.astype(gram_coefficients(operand), operand.complex_dtype, copy=False)
    lower = operand.backend.adjoint(operand.xp.flip(upper[1:, ...], axis=0))
    coefficients, centre = _folded(operand, operand.xp.concat([lower, upper], axis=0))
    total = operand.xp.sum(_squared_distances(operand, coefficients[centre : centre + 1, ...], shift))
    for others in (coefficients[:centre, ...], coefficients[centre + 1 :, ...]):
        total = total + operand.xp.sum(_squared_distances(operand, others, 0.0))
    return total


def _squared_distances(operand: Operand, grams: Array, shift: float) -> Array:
    """Return ``|G - shift I|_F**2``, summed over groups, of Gram matrices given at the operand's own scale.

    Real and imaginary parts are squared by themselves, because a complex product that overflows is NaN.
    """
    xp, scale = operand.xp, operand.scale
    identity = operand.backend.asarray_like(shift * np.eye(grams.shape[-1]), operand.kernel)
    identity = xp.astype(identity, operand.real_dtype, copy=False)
    real, imaginary = xp.real(grams) * scale * scale - identity, xp.imag(grams) * scale * scale
    return xp.sum(real**2 + imaginary**2, axis=(-3, -2, -1))


def _pairs_are_cheaper(plan: Plan) -> bool:
    """Return whether a product for every pair of taps is less work than products at every frequency.

    It is always so on the infinite lattice, where there are no frequencies to visit.
    """
    offsets, side = plan.offset_count, min(plan.block)
    of_pairs, of_frequencies = offsets**2 * side, 8 * len(plan.frequencies) * (offsets + side)
    return not all(plan.periods) or (offsets <= MOST_OFFSETS and of_pairs <= of_frequencies)


def _folded(operand: Operand, coefficients: Array) -> tuple[Array, int]:
    """Return the coefficients after folding, one matrix a row, and the row of the difference 0."""
    xp, plan = operand.xp, operand.plan
    matrices = coefficients.shape[1:]
    differences = [*map(differences_of, plan.offsets)]
    coefficients = xp.reshape(coefficients, (*map(len, differences), *matrices))
    folded = fold(operand.backend, coefficients, differences, plan.periods)
    zeros = tuple(np.flatnonzero(places == 0)[0] for places in folded.places)
    centre = np.ravel_multi_index(zeros, tuple(len(places) for places in folded.places))
    return xp.reshape(folded.coefficients, (-1, *matrices)), int(centre)


def mean_over_grams(operand: Operand, function: Callable[[Operand, Array, Any], Array], parameter: float) -> Array:
    """Return the mean over frequencies of ``function(operand, grams, parameter)``, the grams at the operand's scale."""
    parts = operand.map_blocks(_of_grams, operand.plan.frequencies, function, parameter, budget=BLOCK_BYTES)
    return mean_over_frequencies(operand, parts)


def _of_grams(operand: Operand, function: Callable[[Operand, Array, Any], Array], parameter: float) -> BlockWork:
    """Return the work on a block of frequencies that `mean_over_grams` maps."""
    evaluate = gram_evaluator(operand, symbol_evaluator(operand))
    return BlockWork(lambda frequencies: function(operand, evaluate(frequencies), parameter), 2 * evaluate.row_bytes)
