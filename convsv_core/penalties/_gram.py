"""Means over frequencies of functions of the Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from convsv_core.backend import Array, BlockFunction
from convsv_core.evaluation import BLOCK_BYTES, symbol_evaluator
from convsv_core.gram import differences_of, gram_coefficients, gram_evaluator
from convsv_core.operand import Operand
from convsv_core.penalties._means import mean
from convsv_core.plan import Plan

MOST_OFFSETS = 128
"""Taps of a channel pair up to which every pair of taps may have a product of its own."""


def squared_gram(operand: Operand, shift: float) -> Array:
    """The mean over frequencies of ``|G - shift I|_F**2``, with G the Gram matrix at the user's scale."""
    if not _pairs_are_cheaper(operand.plan):
        return mean_over_grams(operand, _squared_distances, shift)
    upper = operand.xp.astype(gram_coefficients(operand), operand.complex_dtype, copy=False)
    lower = operand.backend.adjoint(operand.xp.flip(upper[1:, ...], axis=0))
    coefficients, centre = _fold(operand, operand.xp.concat([lower, upper], axis=0))
    total = operand.xp.sum(_squared_distances(operand, coefficients[centre : centre + 1, ...], shift))
    for others in (coefficients[:centre, ...], coefficients[centre + 1 :, ...]):
        total = total + operand.xp.sum(_squared_distances(operand, others, 0.0))
    return total


def _squared_distances(operand: Operand, grams: Array, shift: float) -> Array:
    """``|G - shift I|_F**2`` of Gram matrices, given at the operand's own scale, summed over groups.

    By parts, because a complex product that overflows is NaN, not infinite.
    """
    xp, scale = operand.xp, operand.scale
    identity = operand.backend.constant(shift * np.eye(grams.shape[-1]), operand.kernel)
    identity = xp.astype(identity, operand.real_dtype, copy=False)
    real, imaginary = xp.real(grams) * scale * scale - identity, xp.imag(grams) * scale * scale
    return xp.sum(real**2 + imaginary**2, axis=(-3, -2, -1))


def _pairs_are_cheaper(plan: Plan) -> bool:
    """Whether a product for every pair of taps is less work than products at every frequency.

    On the infinite lattice there are no frequencies to visit.
    """
    offsets = math.prod(len(axis.offsets) for axis in plan.axes)
    side = min(plan.block)
    of_pairs, of_frequencies = offsets**2 * side, 8 * len(plan.frequencies) * (offsets + side)
    return not all(plan.periods) or (offsets <= MOST_OFFSETS and of_pairs <= of_frequencies)


def _fold(operand: Operand, coefficients: Array) -> tuple[Array, int]:
    """Add coefficients whose phases are the same at every frequency of the grid; also the place of difference 0."""
    xp, plan = operand.xp, operand.plan
    matrices = coefficients.shape[1:]
    differences = [differences_of(axis.offsets) for axis in plan.axes]
    folded = xp.reshape(coefficients, (*map(len, differences), *matrices))
    centre = 0
    for index, (axis, along) in enumerate(zip(plan.axes, differences, strict=True)):
        places = np.asarray(along) % axis.period if axis.period else np.asarray(along)
        distinct = np.unique(places)
        if len(distinct) < len(places):
            table = operand.backend.constant((distinct[:, None] == places) + 0.0, folded)
            table, places = xp.astype(table, folded.dtype), distinct
            folded = xp.moveaxis(xp.tensordot(table, folded, axes=((1,), (index,))), 0, index)
        centre = centre * len(places) + int(np.flatnonzero(places == 0)[0])
    return xp.reshape(folded, (-1, *matrices)), centre


def mean_over_grams(operand: Operand, function: Callable[[Operand, Array, Any], Array], parameter: float) -> Array:
    """The mean over frequencies of ``function(operand, grams, parameter)``, with grams at the operand's own scale."""
    parts = operand.map_blocks(_of_grams, operand.plan.frequencies, function, parameter, budget=BLOCK_BYTES)
    return mean(operand, parts)


def _of_grams(
    operand: Operand, function: Callable[[Operand, Array, Any], Array], parameter: float
) -> tuple[BlockFunction, int]:
    evaluate = gram_evaluator(operand, symbol_evaluator(operand))
    return lambda frequencies: function(operand, evaluate(frequencies), parameter), 2 * evaluate.row_bytes
