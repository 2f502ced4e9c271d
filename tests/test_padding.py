"""The padding rule: which operators stand for a layer, and bounds whose rounding keeps them bounds."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from convsv_core import Conv, norm_bounds, operator_norm
from convsv_core._geometry.padding import check_repeats_no_pixel, repeats_pixels
from convsv_core.layers import Operator, UnknownExtents, circular_geometry, lattice, layer_operators

SHAPE = (2, 2, 3, 3)
REFLECT = Conv("OIHW", padding_mode="reflect")


@pytest.mark.parametrize(
    ("conv", "repeats"),
    [
        (Conv("OIHW", padding=9, padding_mode="zeros"), False),
        (Conv("OIHW"), False),
        (Conv("OIHW", padding=((0, 2), (2, 0))), False),
        (Conv("OIHW", padding=2), True),
        (Conv("OIHW", padding=(1, 2)), True),
        (Conv("OIHW", padding=2, dilation=2), False),
        (REFLECT, True),
        (Conv("OIHW", padding="valid", padding_mode="reflect"), False),
        (Conv("OIHW", padding=(0, 1), padding_mode="replicate"), True),
    ],
)
def test_padding_that_repeats_pixels_needs_extents(conv: Conv, repeats: bool) -> None:
    assert repeats_pixels(SHAPE, conv) == repeats
    if not repeats:
        check_repeats_no_pixel(SHAPE, conv)
        assert layer_operators(SHAPE, conv) == (Operator(lattice(conv), None, 1.0),)
        return
    with pytest.raises(NotImplementedError, match="repeats pixels"):
        check_repeats_no_pixel(SHAPE, conv)
    with pytest.raises(UnknownExtents, match=r"repeats pixels.*layer's extents"):
        layer_operators(SHAPE, conv)
    (operator,) = layer_operators(SHAPE, conv, [(8, 8), (3, 5), (8, 7)])
    assert operator.padding_norm > 1


def test_the_largest_padding_norm_of_several_extents_counts() -> None:
    (operator,) = layer_operators((1, 1, 5, 5), REFLECT, [(8, 8), (3, 3), (9, 9)])
    assert operator == Operator(lattice(REFLECT), None, 3.0)


def test_a_circular_operator_for_each_of_the_extents() -> None:
    conv = Conv("OIHW", stride=2, padding=1, padding_mode="zeros")
    operators = layer_operators(SHAPE, conv, [(7, 8), (8, 8), (16, 16)], circular=True)
    assert [operator.input_shape for operator in operators] == [(8, 8), (16, 16)]
    assert {operator.conv for operator in operators} == {Conv("OIHW", stride=2)}
    assert {operator.padding_norm for operator in operators} == {1.0}
    with pytest.raises(UnknownExtents, match="circular=True"):
        layer_operators(SHAPE, conv, circular=True)
    transposed = Conv("IOHW", stride=2, transposed=True)
    assert circular_geometry(transposed, (7, 9)) == ((7, 9), transposed)


def test_impossible_padding_is_no_question_of_extents() -> None:
    with pytest.raises(ValueError, match="reflect padding of 2") as raised:
        layer_operators((1, 1, 5, 5), REFLECT, [(2, 2)])
    assert not isinstance(raised.value, UnknownExtents)


@pytest.mark.parametrize("conv", [REFLECT, Conv("OIHW", padding=2), Conv("OIHW", padding=1, padding_mode="replicate")])
def test_the_operator_bounds_the_norm_of_the_layer(conv: Conv) -> None:
    for seed in range(5):
        kernel = np.random.default_rng(seed).standard_normal(SHAPE)
        (operator,) = layer_operators(SHAPE, conv, [(7, 6)])
        upper = operator.layer_upper(float(norm_bounds(kernel, operator.conv).upper))
        assert operator_norm(kernel, (7, 6), conv) <= upper


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 6, 9, 12])
def test_rounding_never_takes_a_bound_below_the_truth(copies: int) -> None:
    """To nearest, about half of these products and quotients go the wrong way."""
    root = math.sqrt(copies)
    norm = root if Fraction(root) ** 2 >= copies else math.nextafter(root, math.inf)
    operator = Operator(Conv("OIW"), None, norm)
    wrong = 0
    for value in np.random.default_rng(copies).uniform(0, 2, 200).tolist():
        upper, limit = operator.layer_upper(value), operator.limit(value)
        assert Fraction(upper) >= Fraction(value) * Fraction(norm) > Fraction(math.nextafter(upper, 0))
        assert Fraction(upper) ** 2 >= Fraction(value) ** 2 * copies
        assert operator.layer_upper(limit) <= value < operator.layer_upper(math.nextafter(limit, math.inf))
        wrong += Fraction(value * norm) < Fraction(value) * Fraction(norm)
    assert (wrong == 0) == (math.log2(norm).is_integer())


@pytest.mark.parametrize("value", [0.0, 5e-324, math.inf, math.nan, 1.7e308])
def test_the_ends_of_the_range(value: float) -> None:
    operator = Operator(Conv("OIW"), None, 3.0)
    results: list[Any] = [operator.layer_upper(value), operator.limit(value)]
    if math.isnan(value):
        assert all(map(math.isnan, results))
        return
    assert results[0] >= value >= results[1]
    assert operator.layer_upper(results[1]) <= value
