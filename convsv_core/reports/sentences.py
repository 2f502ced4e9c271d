"""Say in sentences what a person should know of a network first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from convsv_core.reports import texts

__all__ = ["how_many_differ", "of_bounds", "of_differences", "of_spectrum"]

NEAR_SINGULAR = 1e4
"""Condition number from which a layer counts as near singular. A guess: it loses more than half of float32's digits."""

CLOSE = 1.01
"""Factor between the norm and the reshaped norm that counts as none. A guess: one percent is of no consequence."""


def of_spectrum(rows: Sequence[Any]) -> list[str]:
    """Return where the norm is largest, where the reshaped norm misleads most, and what is near singular."""
    found = []
    measured = [row for row in rows if row.norm is not None]
    if measured:
        largest = max(measured, key=lambda row: row.norm)
        found.append(
            f"The largest norm is {texts.figure(largest.norm)}, of {largest.name}: its circular convolution stretches "
            "some input by this factor."
        )
    found += _misleading(rows)
    conditions = [row for row in rows if row.condition_number is not None]
    if conditions:
        worst = max(conditions, key=lambda row: row.condition_number)
        near = sum(row.condition_number >= NEAR_SINGULAR for row in conditions)
        condition = "infinite" if math.isinf(worst.condition_number) else texts.figure(worst.condition_number, 2)
        if near:
            layers = "1 layer is" if near == 1 else f"{near} layers are"
            found.append(
                f"{layers} near singular, with a condition number of {NEAR_SINGULAR:g} or more; the worst is "
                f"{worst.name}, with a smallest singular value of {texts.figure(worst.smallest_singular_value, 2)}."
            )
        else:
            found.append(f"No layer is near singular: the largest condition number is {condition}, of {worst.name}.")
    return found + _without(rows)


def of_bounds(rows: Sequence[Any]) -> list[str]:
    """Return where the certified norm is largest, where the reshaped norm misleads most, and which gaps are left."""
    found = []
    measured = [row for row in rows if row.upper is not None]
    if measured:
        largest = max(measured, key=lambda row: row.upper)
        found.append(
            f"The largest norm is that of {largest.name}: its supremum over all input sizes is proved to lie between "
            f"{texts.rounded_down(largest.lower)} and {texts.rounded_up(largest.upper)}."
        )
    found += _misleading(rows)
    wide = [row.name for row in measured if not row.converged]
    if measured:
        found.append(
            f"The bounds of {len(wide)} layers are further apart than requested, as those of {wide[0]}."
            if wide
            else "The bounds of every layer are as near to each other as requested."
        )
    return found + _without(rows)


def of_differences(rows: Sequence[Any]) -> list[str]:
    """Return how many layers differ, and where the difference is largest, relative to the layer and alone."""
    found = [how_many_differ(rows)]
    shares = [row for row in rows if row.share]
    if shares:
        largest = max(shares, key=lambda row: row.share)
        found.append(
            f"The largest relative difference is that of {largest.name}: its norm is at most "
            f"{texts.percent_up(largest.share)} of the layer's norm."
            if math.isfinite(largest.share)
            else f"The weights of {largest.name} are 0 in the first network and not in the second."
        )
    sizes = [row for row in rows if row.difference_upper]
    if sizes:
        largest = max(sizes, key=lambda row: row.difference_upper)
        found.append(
            f"The largest difference is that of {largest.name}: for an input of norm 1 the output of this layer "
            f"changes by at most {texts.rounded_up(largest.difference_upper)}."
        )
    return found + _without(rows)


def how_many_differ(rows: Sequence[Any]) -> str:
    """Return how many layers were compared, and how many of them have equal weights."""
    same = sum(row.difference_upper == 0 or row.share == 0 for row in rows)
    return f"{texts.layers(rows)} compared, of which {same} {'has' if same == 1 else 'have'} equal weights."


def _misleading(rows: Sequence[Any]) -> list[str]:
    """Return a sentence on the layer where the norm and the reshaped norm differ most."""
    compared = [row for row in rows if row.factor]
    if not compared:
        return []
    worst = max(compared, key=lambda row: abs(math.log(row.factor)))
    factor = worst.factor
    if max(factor, 1 / factor) < CLOSE:
        return ["The reshaped norm, which frameworks call spectral_norm, is within 1 % of the norm of every layer."]
    return [
        f"The reshaped norm, which frameworks call spectral_norm, misleads most at {worst.name}: it is "
        f"{texts.figure(worst.reshaped_norm)}, and the norm is {texts.figure(worst.norm)}, {factor:.2f} times as much."
    ]


def _without(rows: Sequence[Any]) -> list[str]:
    """Return a sentence on the layers without figures, if there are any."""
    count = sum(not row.has_figures for row in rows)
    if not count:
        return []
    layers = "1 layer has" if count == 1 else f"{count} layers have"
    return [f"{layers} no figures; the notes below the table say why."]
