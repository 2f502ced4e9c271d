"""Write figures as text. Tables in a terminal, in a notebook and in a page have these texts."""

from __future__ import annotations

import decimal
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

__all__ = [
    "Text",
    "count",
    "extents",
    "figure",
    "kernel",
    "layers",
    "logarithm_up",
    "percent_up",
    "power_up",
    "rounded_down",
    "rounded_up",
    "times",
    "with_digits",
    "yes_or_no",
]

Text: TypeAlias = Callable[[Any], str]
"""A function that writes a value, which may be None, as text."""

POWER_ROUNDING = 1e-14
"""Relative amount by which a power of ten is raised for rounding. A guess: 45 eps of float64, where libraries of
mathematics err by one or two.
"""

DIGITS = 4
"""The number of significant digits of a figure. A guess: enough to compare layers."""


def figure(value: float | None, digits: int = DIGITS) -> str:
    """Return a figure with this number of significant digits, or "-" for None.

    Examples
    --------
    >>> figure(123.456), figure(1.5e-7), figure(float("inf")), figure(float("nan")), figure(None)
    ('123.5', '1.5e-7', 'inf', 'nan', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(float(value))
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def with_digits(digits: int, text: Callable[..., str] = figure) -> Text:
    """Return a function that writes values with this number of significant digits; it can be pickled."""
    return functools.partial(text, digits=digits)


def rounded_down(value: float | None, digits: int = DIGITS) -> str:
    """Return the digits of a lower bound, rounded so that they are a lower bound too."""
    return _rounded(value, decimal.ROUND_FLOOR, digits)


def rounded_up(value: float | None, digits: int = DIGITS) -> str:
    """Return the digits of an upper bound, rounded so that they are an upper bound too.

    Examples
    --------
    >>> rounded_up(1.00001), rounded_down(1.00001)
    ('1.001', '1')
    """
    return _rounded(value, decimal.ROUND_CEILING, digits)


def count(value: int | None) -> str:
    """Return a number of things, or "-" for None."""
    return "-" if value is None else str(value)


def times(value: float | None) -> str:
    """Return a ratio, as "2.47x"."""
    return "-" if value is None else f"{value:.2f}x"


def yes_or_no(value: bool | None) -> str:
    """Return "yes", "no", or "-" for None."""
    return {True: "yes", False: "no", None: "-"}[value]


def extents(value: Sequence[int] | None) -> str:
    """Return extents as "32x32"."""
    return "-" if value is None else "x".join(map(str, value))


def percent_up(value: float | None) -> str:
    """Return an upper bound of a share in percent.

    Examples
    --------
    >>> percent_up(0.01234501), percent_up(None)
    ('1.235%', '-')
    """
    return "-" if value is None else f"{rounded_up(100 * value)}%"


LOGARITHM_PLACES = 4
"""The number of decimal places of a decimal logarithm: as many as `Lipschitz` prints."""

LARGEST_POWER = 6
"""The decimal logarithm from which a number is written as a power of ten (a guess: more digits are hard to count)."""


def logarithm_up(value: float | None) -> str:
    """Return the decimal logarithm of an upper bound, rounded up; "none" for no bound.

    Examples
    --------
    >>> logarithm_up(1.23456), logarithm_up(float("inf")), logarithm_up(float("-inf")), logarithm_up(None)
    ('1.2346', 'none', '-inf', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "none" if value > 0 else "-inf"
    step = decimal.Decimal(1).scaleb(-LOGARITHM_PLACES)
    rounded = decimal.Decimal(value).quantize(step, decimal.ROUND_CEILING)
    return f"{rounded if rounded else abs(rounded):.{LOGARITHM_PLACES}f}"


def power_up(log10: float | None) -> str:
    """Return the upper bound with this decimal logarithm, rounded up; "none" for no bound.

    Examples
    --------
    >>> power_up(2.0), power_up(-0.3), power_up(123.45678), power_up(float("-inf")), power_up(float("inf"))
    ('100.1', '0.5012', '10^123.4568', '0', 'none')
    """
    if log10 is None:
        return "-"
    if log10 in (-math.inf, 0.0):
        return "0" if log10 else "1"
    if abs(log10) >= LARGEST_POWER:
        return f"10^{logarithm_up(log10)}" if log10 < math.inf else "none"
    return rounded_up(10.0**log10 * (1 + POWER_ROUNDING))


def layers(rows: Sequence[Any]) -> str:
    """Return how many layers there are: "3 convolutions", or "3 layers" if some are dense."""
    noun = "layer" if any(row.linear for row in rows) else "convolution"
    return f"{len(rows)} {noun}{'' if len(rows) == 1 else 's'}"


def kernel(row: Any) -> str:
    """Return the shape of a row's kernel, with the stride, the dilation, the groups and T where it has them."""
    if row.linear and row.kernel_shape is not None:
        return f"{extents(row.kernel_shape[:2])} dense"
    parts = [extents(row.kernel_shape)]
    if row.transposed:
        parts.append("T")
    for letter, values in (("s", row.stride), ("d", row.dilation)):
        if values and max(values) > 1:
            parts.append(letter + (str(values[0]) if len(set(values)) == 1 else ",".join(map(str, values))))
    if row.groups and row.groups > 1:
        parts.append(f"g{row.groups}")
    return " ".join(parts)


def _rounded(value: float | None, rounding: str, digits: int) -> str:
    """Return `digits` digits of a bound, rounded to the side on which it stays a bound."""
    if value is None:
        return "-"
    context = decimal.Context(prec=digits, rounding=rounding)
    return figure(float(context.create_decimal_from_float(value)), digits)
