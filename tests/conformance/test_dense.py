"""The dense reference against the convolutions of PyTorch and JAX, which share no code with it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from convsv_conformance.dense import dense_matrix, same_pads

LETTERS = {1: "W", 2: "HW", 3: "DHW"}

# kernel taps, input extents, stride, dilation: even, asymmetric, one-tap and larger than the input
GEOMETRIES = [
    ((3,), (7,), (1,), (1,)),
    ((4,), (6,), (1,), (1,)),
    ((5,), (6,), (2,), (1,)),
    ((2,), (9,), (3,), (1,)),
    ((3,), (8,), (2,), (3,)),
    ((7,), (4,), (1,), (1,)),
    ((3, 3), (5, 4), (1, 1), (1, 1)),
    ((3, 4), (4, 6), (2, 2), (1, 1)),
    ((5, 2), (6, 4), (2, 2), (1, 1)),
    ((1, 3), (3, 6), (1, 2), (1, 2)),
    ((2, 3), (6, 5), (3, 1), (2, 1)),
    ((1, 1), (4, 4), (2, 2), (1, 1)),
    ((2, 3, 1), (3, 4, 2), (1, 2, 1), (1, 1, 1)),
    ((3, 2, 3), (3, 2, 4), (1, 1, 1), (1, 2, 1)),
]
CHANNELS = [(3, 2, 1), (2, 3, 1), (4, 2, 2), (3, 3, 3)]  # channels out, channels in, groups


SETTINGS = [
    # A quick run takes each geometry with one choice of channels.
    pytest.param(pair, marks=() if number % (len(CHANNELS) + 1) == 0 else pytest.mark.thorough, id=str(pair))
    for number, pair in enumerate(itertools.product(GEOMETRIES, CHANNELS))
]


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Any:
    return request.param


def drawn(shape: tuple[int, ...], *, complex_values: bool = False) -> Any:
    rng = np.random.default_rng(sum(shape))
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if complex_values else real


def agree(matrix: Any, image: Any, output: Any) -> None:
    """`matrix` takes the flattened `image` to `output`, up to rounding in float64."""
    expected = np.asarray(output)
    assert matrix.shape == (expected.size, image.size)
    product = matrix @ image.reshape(-1)
    scale = np.abs(matrix).sum(axis=1).max() * np.abs(image).max()
    assert np.abs(product - expected.reshape(-1)).max() <= 20 * np.finfo(np.float64).eps * scale


def torch_pad(image: Any, pads: Any, mode: str) -> Any:
    """`torch.nn.functional.pad`, one axis at a time and repeatedly where the padding exceeds the axis."""
    import torch

    ndim = len(pads)
    for axis, (before, after) in enumerate(pads):
        if mode == "circular":  # torch wraps once at most
            extent = image.shape[2 + axis]
            image = torch.index_select(image, 2 + axis, torch.arange(-before, extent + after) % extent)
            continue
        widths = [0] * (2 * ndim)
        widths[2 * (ndim - 1 - axis) : 2 * (ndim - axis)] = [before, after]
        image = torch.nn.functional.pad(image, widths, mode="constant" if mode == "zeros" else mode)
    return image


@pytest.mark.parametrize("complex_values", [False, True], ids=["real", "complex"])
def test_circular_matches_torch(setting: Any, complex_values: bool) -> None:
    torch = pytest.importorskip("torch")
    (taps, extents, stride, dilation), (rows, columns, groups) = setting
    kernel = drawn((rows, columns // groups, *taps), complex_values=complex_values)
    image = drawn((columns, *extents))
    matrix = dense_matrix(kernel, extents, "OI" + LETTERS[len(taps)], stride=stride, dilation=dilation, groups=groups)
    convolve = getattr(torch.nn.functional, f"conv{len(taps)}d")
    padded = torch_pad(torch.from_numpy(image[None]), same_pads(taps, stride, dilation), "circular")
    output = convolve(
        padded.to(torch.from_numpy(kernel).dtype),
        torch.from_numpy(kernel),
        stride=stride,
        dilation=dilation,
        groups=groups,
    )
    agree(matrix, image, output)


def test_circular_transpose_matches_torch(setting: Any) -> None:
    """conv_transpose of the whole plane, whose ends are then wrapped around onto the torus."""
    torch = pytest.importorskip("torch")
    (taps, wide, stride, dilation), (rows, columns, groups) = setting
    extents = tuple(n // s for n, s in zip(wide, stride, strict=True))
    kernel = drawn((rows, columns // groups, *taps))  # I, O of one group: torch's layout
    image = drawn((rows, *extents))
    matrix = dense_matrix(
        kernel,
        extents,
        "IO" + LETTERS[len(taps)],
        stride=stride,
        dilation=dilation,
        groups=groups,
        transposed=True,
    )
    transpose = getattr(torch.nn.functional, f"conv_transpose{len(taps)}d")
    plane = transpose(
        torch.from_numpy(image[None]),
        torch.from_numpy(kernel),
        stride=stride,
        dilation=dilation,
        groups=groups,
    )[0].numpy()
    pads = same_pads(taps, stride, dilation)
    torus = np.zeros((columns, *wide))
    for pixel in itertools.product(*map(range, plane.shape[1:])):
        wrapped = tuple((y - before) % n for y, (before, _), n in zip(pixel, pads, wide, strict=True))
        torus[:, *wrapped] += plane[:, *pixel]
    agree(matrix, image, torus)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("pads", [(0, 0), (1, 1), (2, 2), (1, 2), (3, 0)], ids=str)
@pytest.mark.parametrize("taps", [(3, 3), (2, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
def test_padding_modes_match_torch(mode: str, pads: Any, taps: Any, stride: Any) -> None:
    torch = pytest.importorskip("torch")
    kernel, image = drawn((2, 3, *taps)), drawn((3, 5, 6))
    matrix = dense_matrix(kernel, (5, 6), "OIHW", stride=stride, dilation=(1, 1), pads=(pads, pads), padding_mode=mode)
    padded = torch_pad(torch.from_numpy(image[None]), (pads, pads), mode)
    agree(matrix, image, torch.nn.functional.conv2d(padded, torch.from_numpy(kernel), stride=stride))


@pytest.mark.parametrize("output_padding", [0, 1])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("taps", [(3, 3), (2, 4)], ids=str)
def test_zero_padded_transpose_matches_torch(output_padding: int, padding: int, taps: Any) -> None:
    torch = pytest.importorskip("torch")
    kernel, image = drawn((4, 3, *taps)), drawn((4, 3, 5))
    output = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(image[None]),
        torch.from_numpy(kernel),
        stride=2,
        padding=padding,
        output_padding=output_padding,
        groups=2,
    )
    matrix = dense_matrix(
        kernel,
        (3, 5),
        "IOHW",
        stride=(2, 2),
        dilation=(1, 1),
        groups=2,
        pads=((padding, padding),) * 2,
        padding_mode="zeros",
        transposed=True,
        output_shape=tuple(output.shape[2:]),
    )
    agree(matrix, image, output)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_matches_jax(setting: Any, mode: str) -> None:
    """JAX's own "SAME" padding of zeros, and its convolution of an image padded around the torus."""
    jax = pytest.importorskip("jax")
    (taps, extents, stride, dilation), (rows, columns, groups) = setting
    letters = LETTERS[len(taps)]
    kernel = drawn((*taps, columns // groups, rows))  # the layout of Flax and Keras
    image = drawn((columns, *extents))
    matrix = dense_matrix(
        kernel, extents, letters + "IO", stride=stride, dilation=dilation, groups=groups, padding_mode=mode
    )
    padded, padding = image, "SAME"
    if mode == "circular":
        padding = "VALID"
        padded = np.pad(image, [(0, 0), *same_pads(taps, stride, dilation)], mode="wrap")
    with jax.enable_x64(True):
        output = jax.lax.conv_general_dilated(
            padded[None],
            kernel,
            window_strides=stride,
            padding=padding,
            rhs_dilation=dilation,
            feature_group_count=groups,
            dimension_numbers=("NC" + letters, letters + "IO", "NC" + letters),
            precision="highest",
        )
    agree(matrix, image, output)


def test_layout_is_read_from_its_letters() -> None:
    kernel = drawn((3, 2, 2, 4))
    of = {"stride": (1, 1), "dilation": (1, 1)}
    expected = dense_matrix(kernel, (4, 5), "OIHW", **of)
    for layout in map("".join, itertools.permutations("OIHW")):
        moved = kernel.transpose(["OIHW".index(letter) for letter in layout])
        shape = (4, 5) if layout.index("H") < layout.index("W") else (5, 4)
        got = dense_matrix(moved, shape, layout, **of)
        if shape == (4, 5):
            np.testing.assert_array_equal(got, expected)
        else:  # the same operator on transposed images
            swapped = expected.reshape(3, 4, 5, 2, 4, 5).transpose(0, 2, 1, 3, 5, 4)
            np.testing.assert_array_equal(got, swapped.reshape(expected.shape))


def test_a_transpose_that_cannot_start_at_the_input_is_refused() -> None:
    with pytest.raises(ValueError, match="does not start at"):
        dense_matrix(drawn((1, 1, 3)), (4,), "IOW", stride=(2,), dilation=(1,), pads=((0, 0),), transposed=True)
