"""The padding rule: the operators that stand for a layer, the norm of the padding, and rounding that keeps bounds."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from convsv_core import Conv, norm_bounds, operator_norm
from convsv_core._geometry.padding import check_repeats_no_pixel, padding_norm, repeats_pixels
from convsv_core._norm.padded import make_padded_operator, padded_operator_norm
from convsv_core.layers import Operator, UnknownExtents, circular_geometry, lattice, layer_operators

EPS = np.finfo(np.float64).eps
UNITS = 64
"""Tolerance of values, in units of eps times the norm; LAPACK's own error on these matrices is about 10."""

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


# ---- the norm of the padding ----------------------------------------------------------------------------


def close(value: Any, truth: float) -> bool:
    return abs(float(value) - truth) <= UNITS * EPS * truth


def symbol_supremum(kernel: Any) -> float:
    """Largest norm of the symbol on a fine grid, of a dense kernel of stride 1."""
    axes = tuple(range(2, kernel.ndim))
    symbol = np.fft.fftn(kernel, s=[96] * len(axes), axes=axes)
    return float(np.linalg.norm(np.moveaxis(symbol, (0, 1), (-2, -1)), 2, axis=(-2, -1)).max())


def test_reflect_after_normalisation() -> None:
    """A kernel whose symbol is at most 1 has a larger norm under reflect padding, and the bound covers it."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 3, 3))
    conv = Conv("OIHW", padding_mode="reflect")
    kernel = kernel / symbol_supremum(kernel)
    value = padded_operator_norm(kernel, (8, 8), conv)
    assert 1 < value <= padding_norm(kernel.shape, (8, 8), conv)


def test_replicate_reaches_three_times_the_symbol() -> None:
    kernel = np.random.default_rng(0).standard_normal((2, 2, 1, 1))
    conv = Conv("OIHW", padding=1, padding_mode="replicate")
    assert padding_norm(kernel.shape, (1, 1), conv) == 3
    assert close(padded_operator_norm(kernel, (1, 1), conv), 3 * symbol_supremum(kernel))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("pads", [(0, 0), (1, 1), (2, 1), (3, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("extent", [4, 5, 8])
def test_padding_norm_bounds(mode: str, pads: tuple[int, int], extent: int) -> None:
    rng = np.random.default_rng(extent)
    for taps in (1, 3, 4):
        conv = Conv("OIW", padding=(pads,), padding_mode=mode)
        kernel = rng.standard_normal((2, 2, taps))
        bound = (
            symbol_supremum(kernel)
            / math.cos(math.pi * (taps - 1) / 2 / 96)
            * padding_norm(kernel.shape, (extent,), conv)
        )
        assert padded_operator_norm(kernel, (extent,), conv) <= bound * (1 + UNITS * EPS)
        delta = np.ones((1, 1, 1))  # of the padding map alone, which it attains
        assert close(padded_operator_norm(delta, (extent,), conv), padding_norm((1, 1, 1), (extent,), conv))


@pytest.mark.parametrize(
    ("kernel_shape", "input_shape", "conv", "squared"),
    [
        ((1, 1, 3, 3), (8, 8), Conv("OIHW", padding_mode="zeros"), 1),
        ((1, 1, 3, 3), (8, 8), Conv("OIHW", padding="valid", padding_mode="reflect"), 1),
        ((1, 1, 3, 3), (8, 8), Conv("OIHW"), 1),
        ((1, 1, 9, 3), (4, 8), Conv("OIHW"), 1),
        ((1, 1, 4, 4), (8, 8), Conv("OIHW", padding=2), 4),
        ((1, 1, 4, 3), (8, 8), Conv("OIHW", padding=(2, 1)), 2),
        ((1, 1, 3, 3), (8, 8), Conv("OIHW", padding=1, padding_mode="replicate"), 4),
        ((1, 1, 5, 3), (8, 8), Conv("OIHW", padding=(2, 1), padding_mode="replicate"), 6),
        ((1, 1, 3, 3), (8, 8), Conv("OIHW", padding=1, padding_mode="reflect"), 4),
        ((1, 1, 3, 3), (3, 3), Conv("OIHW", padding=2, padding_mode="reflect"), 9),
        ((1, 1, 2), (8,), Conv("OIW", padding=1, stride=2, padding_mode="replicate"), 2),
        ((1, 1, 1), (8,), Conv("OIW", padding=1, stride=2, padding_mode="replicate"), 1),  # the copies go unread
        ((1, 1, 4), (4,), Conv("IOW", padding=1, stride=2, padding_mode="replicate", transposed=True), 2),
    ],
)
def test_padding_norm(kernel_shape: Any, input_shape: Any, conv: Conv, squared: int) -> None:
    value = padding_norm(kernel_shape, input_shape, conv)
    assert value == pytest.approx(math.sqrt(squared), rel=EPS)
    assert Fraction(value) ** 2 >= squared > Fraction(math.nextafter(value, 0)) ** 2


@pytest.mark.parametrize(
    ("kernel_shape", "input_shape", "conv", "message"),
    [
        ((1, 1, 3), (2,), Conv("OIW", padding=2, padding_mode="reflect"), "reflect padding of 2 on axis W"),
        ((1, 1, 3), (2,), Conv("OIW", padding=3), "circular padding of 3 on axis W"),
        ((1, 1, 3), (2,), Conv("OIW", padding="valid"), "3 taps of dilation 1 span 3 elements on axis W"),
        ((1, 1, 3, 3), (5, 4), Conv("OIHW", dilation=2, padding="valid"), "span 5 elements on axis W"),
        ((1, 1, 3), (4,), Conv("IOW", padding="valid", transposed=True), "takes 4 elements to 2 on axis W"),
        ((1, 1, 3), (4, 4), Conv("OIW"), "input_shape"),
        ((1, 3), (4,), Conv("OIW"), "layout"),
        ((3, 1, 3), (4,), Conv("OIW", groups=2), "groups=2"),
    ],
)
def test_wrong_calls(kernel_shape: Any, input_shape: Any, conv: Conv, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        padded_operator_norm(np.ones(kernel_shape), input_shape, conv)
    with pytest.raises(ValueError, match=message):
        padding_norm(kernel_shape, input_shape, conv)


# ---- padding as PyTorch pads -----------------------------------------------------------------------------


def channels_first(operator_shape: tuple[int, int, int], images: Any) -> Any:
    """From (..., groups, pixels, channels) to PyTorch's order, flattened."""
    assert images.shape[-3:] == operator_shape
    return np.moveaxis(images, -1, -2).reshape(*images.shape[:-3], -1)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("pads", [(1, 1), (2, 2), (1, 3), (0, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2], ids=str)
def test_operator_is_torch(mode: str, pads: Any, stride: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    kernel, image = rng.standard_normal((4, 3, 3, 2)), rng.standard_normal((2, 6, 5, 7))
    conv = Conv("OIHW", stride=stride, groups=2, padding=(pads, pads), padding_mode=mode)
    operator = make_padded_operator(kernel, (5, 7), conv)
    rows = np.moveaxis(image.reshape(2, 2, 3, 35), -1, -2)
    ours = channels_first(operator.output_shape, operator.apply(rows)) * float(operator.operand.scale)
    wide = torch.nn.functional.pad(torch.from_numpy(image), (*pads, *pads), "constant" if mode == "zeros" else mode)
    theirs = torch.nn.functional.conv2d(wide, torch.from_numpy(kernel), stride=stride, groups=2)
    assert np.abs(ours - theirs.numpy().reshape(2, -1)).max() <= UNITS * EPS * np.abs(ours).max()


@pytest.mark.parametrize(("taps", "padding", "output_padding"), [(3, 1, 1), (4, 1, 0), (2, 0, 0), (5, 2, 1)])
def test_transposed_operator_is_torch(taps: int, padding: int, output_padding: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    kernel, image = rng.standard_normal((4, 3, taps, taps)), rng.standard_normal((4, 3, 5))
    conv = Conv("IOHW", stride=2, groups=2, padding=padding, padding_mode="zeros", transposed=True)
    operator = make_padded_operator(kernel, (3, 5), conv)
    ours = channels_first(operator.output_shape, operator.apply(np.moveaxis(image.reshape(2, 2, 15), -1, -2)))
    theirs = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(image)[None],
        torch.from_numpy(kernel),
        stride=2,
        padding=padding,
        output_padding=output_padding,
        groups=2,
    )
    ours = ours * float(operator.operand.scale)
    assert theirs.shape[-2:] == (6, 10)
    assert np.abs(ours - theirs.numpy().reshape(-1)).max() <= UNITS * EPS * np.abs(ours).max()
