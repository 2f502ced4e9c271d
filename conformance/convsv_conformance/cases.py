"""The convolutions that every backend is tried on: a table, and a strategy that draws more of them."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import ThreadpoolController

import convsv_core as convsv
from convsv_conformance.dense import Array, Pairs, accurate_singular_values, dense_matrix

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


# ---- kernels: (rows, columns, *taps), before they are put into a layout --------------------------------

Fill = Callable[[np.random.Generator, tuple[int, ...]], Array]


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


def _zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape)


def _identity(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """The layer that changes nothing: ones on the diagonal of the tap that stands above the pixel."""
    kernel: Array = np.zeros(shape)
    centre: Any = (..., *((k - 1) // 2 for k in shape[2:]))
    kernel[centre] = np.eye(shape[0], shape[1])
    return kernel


def _one_hot(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    kernel: Array = np.zeros(shape)
    kernel[0, -1].flat[0] = 1.5
    return kernel


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """A product of rotations and of shifts of half of the channels: unitary at every frequency."""
    channels = shape[0]
    kernel: Array = np.zeros(shape)
    corner: Any = (..., *(0 for _ in shape[2:]))
    kernel[corner] = _rotation(rng, channels)
    for axis in range(2, len(shape)):
        shifted = np.arange(channels) < (channels + 1) // 2
        for _ in range(shape[axis] - 1):
            moved = np.where(shifted.reshape(-1, *[1] * (len(shape) - 1)), np.roll(kernel, 1, axis), kernel)
            kernel = np.tensordot(_rotation(rng, channels), moved, axes=1)
    return kernel


def _graded(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Singular values over twelve orders of magnitude, the same at every frequency."""
    values = np.logspace(0, -12, shape[0])
    return np.asarray(values.reshape(-1, *[1] * (len(shape) - 1)) * _orthogonal(rng, shape))


def _repeated(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Each singular value many times over, zero among them."""
    values = np.repeat([2.0, 1.0, 0.0], -(-shape[0] // 3))[: shape[0]]
    return np.asarray(values.reshape(-1, *[1] * (len(shape) - 1)) * _orthogonal(rng, shape))


def _deficient(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Rank one at every frequency, so that all other singular values are exactly zero."""
    rows = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)))
    return np.asarray(rows * rng.standard_normal((1, *shape[1:])))


def _leading(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """One singular value, of a single tap, far above the others at every frequency."""
    kernel: Array = 0.1 * rng.standard_normal(shape)
    corner: Any = (..., *(0 for _ in shape[2:]))
    kernel[corner] += _deficient(rng, shape[:2])
    return kernel


def _rotation(rng: np.random.Generator, size: int) -> Array:
    q: Array = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return q


FILLS: dict[str, Fill] = {
    "random": _random,
    "zero": _zero,
    "identity": _identity,
    "one-hot": _one_hot,
    "orthogonal": _orthogonal,
    "graded": _graded,
    "repeated": _repeated,
    "deficient": _deficient,
    "leading": _leading,
}


# ---- cases -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One convolution and the input that it acts on.

    Parameters
    ----------
    name : str
        Unique in the table; it seeds the kernel.
    channels : tuple of int
        Output and input channels of the layer.
    taps, input_shape, stride, dilation : tuple of int
        One value a spatial axis, in the order of the letters of `layout`.
    layout, groups, transposed
        As for `convsv_core.Conv`.
    padding : pairs of int or None
        Explicit padding; None is "same".
    fill : str
        A key of `FILLS`: how the kernel is drawn.
    """

    name: str
    channels: tuple[int, int]
    taps: tuple[int, ...]
    input_shape: tuple[int, ...]
    layout: str
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    padding: Pairs | None = None
    fill: str = "random"

    @property
    def conv(self) -> convsv.Conv:
        """The description that the library under test is given."""
        return convsv.Conv(
            self.layout,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            padding="same" if self.padding is None else self.padding,
            transposed=self.transposed,
        )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Spatial extents of the output."""
        pairs = zip(self.input_shape, self.stride, strict=True)
        return tuple(n * s if self.transposed else n // s for n, s in pairs)

    @property
    def grid(self) -> tuple[int, ...]:
        """Extents of the grid of frequencies: those of the smaller image."""
        return self.input_shape if self.transposed else self.output_shape

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the symbol of one group: the side of the larger image carries the residues."""
        rows, columns = (channels // self.groups for channels in self.channels)
        residues = math.prod(self.stride)
        return (rows * residues, columns) if self.transposed else (rows, columns * residues)

    @property
    def count(self) -> int:
        """Number of singular values of the operator."""
        return min(self.channels[0] * math.prod(self.output_shape), self.channels[1] * math.prod(self.input_shape))

    def values(self, dtype: str) -> Array:
        """The kernel in `layout`, float64 or complex128, the same in every process; `dtype` says which."""
        outputs, inputs = self.channels
        rows, columns = (inputs, outputs) if self.transposed else (outputs, inputs)
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        shape = (rows, columns // self.groups, *self.taps)
        kernel = FILLS[self.fill](rng, shape)
        if dtype.startswith("complex"):
            # a phase for each row keeps a kernel orthogonal, graded or zero; random ones get a second part
            phase = np.exp(2j * np.pi * rng.random((rows, *[1] * (len(shape) - 1))))
            kernel = kernel * phase + (1j * _random(rng, shape) if self.fill == "random" else 0)
        letters = ("IO" if self.transposed else "OI") + "".join(x for x in self.layout if x not in "OI")
        return kernel.transpose([letters.index(letter) for letter in self.layout])

    def matrix(self, values: Array, padding_mode: str = "circular") -> Array:
        """The whole operator, with `values` for the kernel; see `dense_matrix` for the order of its indices."""
        return dense_matrix(
            values,
            self.input_shape,
            self.layout,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            pads=self.padding,
            padding_mode=padding_mode,
            transposed=self.transposed,
        )

    def truth(self, values: Array) -> Truth:
        """Everything known of the operator with these `values`; kept, since every backend asks for it."""
        return _truth(self, values.shape, values.dtype.str, values.tobytes())


class Truth:
    """The dense matrix of one case and what follows from it in double precision."""

    def __init__(self, case: Case, values: Array) -> None:
        self.case = case
        self.values = values
        self.matrix = case.matrix(values)

    @functools.cached_property
    def singular_values(self) -> Array:
        """Every singular value, descending."""
        with _one_thread():
            return accurate_singular_values(self.matrix)

    @property
    def norm(self) -> float:
        """The largest singular value."""
        return float(self.singular_values[0])

    @functools.cached_property
    def zero_padded_norm(self) -> float:
        """The norm of the layer that pads with zeros."""
        with _one_thread():
            return float(np.linalg.norm(self.case.matrix(self.values, "zeros"), 2))

    def derivative(self, weights: Array, direction: Array) -> float:
        """Derivative of ``sum_i weights[i] * sigma[i]`` as the kernel moves in `direction`.

        By ``d sigma = Re(u* dA v)``, which holds for the values of a conjugate pair too, and for all equal
        values if their weights are equal.
        """
        u, _, vh = self._vectors
        change = self.case.matrix(direction)
        slopes = np.einsum("ij,ij->j", u.conj()[:, : len(weights)], change @ vh.conj().T[:, : len(weights)])
        return float(np.real(weights @ slopes))

    @functools.cached_property
    def _vectors(self) -> tuple[Array, Array, Array]:
        with _one_thread():
            u, s, vh = np.linalg.svd(self.matrix, full_matrices=False)
        return u, s, vh

    @functools.cached_property
    def symbol(self) -> Array:
        """The matrices to which the Fourier basis reduces the operator: (*grid, groups, rows, columns).

        An image ``x_j = v exp(i j theta)`` gives ``y_j = A(theta) v exp(i j theta)``, where a pixel of the
        larger image is a pixel ``j`` of the grid and a residue modulo the stride. It is read off at ``j = 0``.
        """
        case = self.case
        ndim, grid, ones = len(case.taps), case.grid, (1,) * len(case.taps)
        residues = (case.stride, ones) if case.transposed else (ones, case.stride)
        split = self.matrix.reshape(
            case.channels[0],
            *_interleave(grid, residues[0]),
            case.channels[1],
            *_interleave(grid, residues[1]),
        )
        # to (grid of the output, grid of the input, residues, output channels, residues, input channels)
        pixels_out, pixels_in = range(1, 2 * ndim + 1), range(2 * ndim + 2, 4 * ndim + 2)
        ordered = split.transpose(
            *pixels_out[::2], *pixels_in[::2], *pixels_out[1::2], 0, *pixels_in[1::2], 2 * ndim + 1
        )[(0,) * ndim]
        total: Array = ordered.astype(np.complex128)
        for axis, extent in enumerate(grid):
            turns = np.outer(np.arange(extent), np.arange(extent)) % extent / extent
            total = np.moveaxis(np.tensordot(np.exp(2j * np.pi * turns), total, axes=(1, axis)), 0, axis)
        (rows, columns), groups = case.block, case.groups
        out, inner = (channels // groups for channels in case.channels)
        total = total.reshape(*grid, rows // out, groups, out, columns // inner, groups, inner)
        blocks = [total[..., :, g, :, :, g, :].reshape(*grid, rows, columns) for g in range(groups)]
        return np.stack(blocks, axis=ndim)

    def clipped(self, bound: float, lower: float = 0.0) -> Array:
        """The kernel of one clip-and-cut step: the clipped operator's entries, averaged for each tap.

        Singular values are brought between `lower` and `bound`. Where taps fall on one entry of the operator, its
        change is shared equally among them.
        """
        case = self.case
        u, s, vh = self._vectors
        change = (u * (np.clip(s, lower, bound) - s)) @ vh
        letters = ["OI".index(x) if x in "OI" else 2 for x in case.layout]
        taps_on = case.matrix(np.ones(self.values.shape))  # how many fall on each entry of the matrix
        moved = np.zeros(self.values.shape, dtype=change.dtype)
        for tap in np.ndindex(case.taps):
            spatial = iter(tap)
            index = tuple(slice(None) if letter < 2 else next(spatial) for letter in letters)
            only = np.zeros(self.values.shape)
            only[index] = 1
            entries = case.matrix(only)
            shared = np.divide(change * entries, taps_on, where=taps_on > 0, out=np.zeros_like(change))
            channels = (case.channels[0], -1, case.channels[1], math.prod(case.input_shape))
            used = np.maximum(entries.reshape(channels).sum(axis=(1, 3)), 1)
            means = shared.reshape(channels).sum(axis=(1, 3)) / used  # zero outside of the groups
            moved[index] += (
                _of_groups(means, case).T if letters.index(0) > letters.index(1) else _of_groups(means, case)
            )
        return self.values + (moved if np.iscomplexobj(self.values) else moved.real)


def _of_groups(means: Array, case: Case) -> Array:
    """From (output channels, input channels) to the channels of a kernel, of which one side holds one group."""
    out, inner = (channels // case.groups for channels in case.channels)
    blocks = [means[g * out : (g + 1) * out, g * inner : (g + 1) * inner] for g in range(case.groups)]
    return np.concatenate(blocks, axis=1 if case.transposed else 0)


@functools.lru_cache(maxsize=4096)
def _truth(case: Case, shape: tuple[int, ...], dtype: str, data: bytes) -> Truth:
    return Truth(case, np.frombuffer(data, dtype=dtype).reshape(shape))


def _one_thread() -> AbstractContextManager[Any]:
    """Hold the reference's linear algebra to one thread: on matrices this small more of them cost time."""
    return _threads().limit(limits=1, user_api="blas")


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _interleave(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value for pair in zip(first, second, strict=True) for value in pair)


def make_case(
    name: str,
    channels: tuple[int, int],
    taps: tuple[int, ...],
    input_shape: tuple[int, ...],
    *,
    layout: str = "",
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    **others: Any,
) -> Case:
    """A `Case` with PyTorch's layout unless another is given, and numbers spread over the axes."""
    ndim = len(taps)
    torch_layout = ("IO" if others.get("transposed") else "OI") + "DHW"[3 - ndim :]
    return Case(
        name,
        channels,
        taps,
        input_shape,
        layout or torch_layout,
        (stride,) * ndim if isinstance(stride, int) else stride,
        (dilation,) * ndim if isinstance(dilation, int) else dilation,
        **others,
    )


TABLE = (
    # one dimension
    make_case("1d", (3, 2), (3,), (8,)),
    make_case("1d-even", (2, 3), (4,), (7,)),
    make_case("1d-one-channel", (1, 1), (3,), (6,)),
    make_case("1d-flax-layout", (3, 2), (3,), (7,), layout="WIO"),
    make_case("1d-stride", (3, 2), (5,), (9,), stride=3),
    make_case("1d-dilation", (2, 2), (3,), (9,), dilation=3),
    make_case("1d-kernel-larger-than-input", (2, 2), (7,), (4,)),
    make_case("1d-transposed", (2, 3), (4,), (5,), stride=2, transposed=True),
    make_case("1d-depthwise-dilated", (4, 4), (3,), (10,), dilation=2, groups=4),
    # two dimensions: extents
    make_case("2d", (4, 3), (3, 3), (6, 6)),
    make_case("rectangular", (3, 4), (3, 3), (5, 8)),
    make_case("odd-extents", (3, 3), (3, 3), (7, 5)),
    make_case("one-pixel", (3, 2), (3, 3), (1, 1)),
    make_case("one-pixel-wide", (2, 3), (3, 3), (1, 6)),
    make_case("two-pixels", (2, 2), (3, 3), (2, 2)),
    # channels: sides of 1, 2 and 3 have closed forms
    make_case("tall", (6, 2), (3, 3), (4, 5)),
    make_case("wide", (2, 6), (3, 3), (4, 5)),
    make_case("one-input-channel", (5, 1), (3, 3), (4, 5)),
    make_case("one-output-channel", (1, 4), (3, 3), (4, 5)),
    make_case("three-channels", (3, 3), (3, 3), (4, 5)),
    make_case("three-of-many-channels", (3, 7), (2, 3), (4, 4)),
    # layouts
    make_case("keras-layout", (3, 2), (3, 2), (4, 5), layout="HWIO"),
    make_case("mlx-layout", (3, 2), (3, 2), (4, 5), layout="OHWI"),
    make_case("outputs-second", (3, 2), (3, 2), (4, 5), layout="IOHW"),
    make_case("width-first", (3, 2), (2, 3), (5, 4), layout="OIWH"),
    make_case("scattered-layout", (3, 2), (3, 2), (4, 5), layout="HOWI"),
    # taps
    make_case("even", (3, 3), (2, 2), (5, 4)),
    make_case("taps-3-4", (2, 3), (3, 4), (6, 5)),
    make_case("taps-5-2", (3, 2), (5, 2), (6, 4)),
    make_case("one-tap", (4, 3), (1, 1), (4, 5)),
    make_case("one-tap-an-axis", (3, 3), (1, 5), (4, 6)),
    make_case("one-tap-other-axis", (3, 3), (4, 1), (5, 3)),
    # kernels larger than the input are folded
    make_case("kernel-larger-than-input", (3, 3), (7, 5), (4, 3)),
    make_case("kernel-larger-in-one-axis", (2, 3), (3, 9), (6, 4)),
    make_case("dilated-beyond-input", (3, 2), (3, 3), (5, 6), dilation=4),
    make_case("dilated-onto-itself", (2, 2), (3, 3), (6, 4), dilation=(3, 2)),
    # stride
    make_case("stride", (3, 2), (3, 3), (6, 4), stride=2),
    make_case("stride-one-axis", (3, 2), (3, 3), (6, 3), stride=(2, 1)),
    make_case("stride-taps-3-4", (3, 2), (3, 4), (4, 6), stride=2),
    make_case("stride-taps-5-2", (3, 2), (5, 2), (6, 4), stride=2),
    make_case("stride-3-2", (4, 1), (3, 3), (6, 6), stride=(3, 2)),
    make_case("stride-of-the-taps", (4, 2), (2, 2), (6, 4), stride=2),
    make_case("stride-beyond-taps", (2, 2), (2, 1), (6, 6), stride=3),
    make_case("stride-of-one-tap", (3, 4), (1, 1), (4, 6), stride=2),
    make_case("stride-of-the-input", (3, 1), (3, 3), (2, 3), stride=(2, 3)),
    make_case("stride-many-outputs", (9, 2), (3, 3), (4, 4), stride=2),
    make_case("stride-kernel-larger", (2, 2), (5, 7), (4, 4), stride=2),
    make_case("stride-keras-layout", (3, 2), (3, 3), (6, 4), stride=(2, 1), layout="HWIO"),
    # dilation
    make_case("dilation", (3, 3), (3, 3), (7, 8), dilation=2),
    make_case("dilation-one-axis", (2, 3), (3, 2), (4, 7), dilation=(1, 3)),
    make_case("dilation-stride", (3, 2), (3, 3), (8, 6), dilation=(2, 3), stride=2),
    # groups
    make_case("groups", (4, 6), (3, 3), (4, 5), groups=2),
    make_case("groups-3", (3, 6), (3, 2), (4, 4), groups=3),
    make_case("depthwise", (4, 4), (3, 3), (5, 4), groups=4),
    make_case("depthwise-multiplier", (6, 3), (3, 3), (4, 4), groups=3),
    make_case("depthwise-stride", (4, 4), (3, 3), (6, 4), groups=4, stride=2),
    make_case("groups-stride-keras-layout", (4, 4), (3, 3), (4, 6), groups=2, stride=2, layout="HWIO"),
    # transposed
    make_case("transposed", (3, 2), (3, 3), (4, 5), transposed=True),
    make_case("transposed-stride", (2, 3), (3, 3), (3, 2), stride=2, transposed=True),
    make_case("transposed-stride-taps-4-2", (2, 3), (4, 2), (2, 3), stride=2, transposed=True),
    make_case("transposed-stride-one-axis", (2, 2), (3, 4), (3, 4), stride=(1, 2), transposed=True),
    make_case("transposed-keras-layout", (2, 3), (3, 2), (3, 4), stride=(2, 1), transposed=True, layout="HWOI"),
    make_case("transposed-groups", (4, 6), (3, 3), (3, 2), groups=2, stride=2, transposed=True),
    make_case("transposed-depthwise", (3, 3), (4, 4), (2, 3), groups=3, stride=2, transposed=True),
    make_case("transposed-dilation", (2, 3), (3, 2), (3, 4), dilation=(2, 3), stride=2, transposed=True),
    make_case("transposed-kernel-larger", (2, 2), (5, 7), (2, 2), stride=2, transposed=True),
    # explicit padding
    make_case("padding-of-torch", (3, 2), (3, 5), (4, 6), padding=((1, 1), (2, 2))),
    make_case("padding-on-one-side", (3, 2), (3, 4), (5, 5), padding=((0, 2), (3, 0))),
    make_case("padding-of-torch-stride", (3, 2), (3, 3), (6, 4), stride=2, padding=((1, 1), (1, 1))),
    make_case("padding-transposed", (2, 3), (3, 3), (3, 2), stride=2, transposed=True, padding=((1, 1), (1, 1))),
    # three dimensions
    make_case("3d", (2, 2), (2, 3, 1), (3, 4, 2)),
    make_case("3d-keras-layout", (2, 3), (3, 2, 2), (2, 3, 3), layout="DHWIO"),
    make_case("3d-stride", (3, 1), (3, 3, 2), (4, 3, 2), stride=(2, 1, 2)),
    make_case("3d-depthwise-dilated", (3, 3), (2, 3, 2), (3, 5, 3), groups=3, dilation=(1, 2, 1)),
    make_case("3d-transposed", (2, 2), (2, 2, 3), (2, 2, 1), stride=(1, 2, 2), transposed=True),
    # kernels that are hard on an algorithm
    make_case("zero", (3, 3), (3, 3), (4, 5), fill="zero"),
    make_case("identity", (3, 3), (3, 3), (4, 4), fill="identity"),
    make_case("one-hot", (3, 4), (3, 3), (4, 4), fill="one-hot"),
    make_case("orthogonal", (4, 4), (3, 3), (4, 5), fill="orthogonal"),
    make_case("orthogonal-1d", (5, 5), (4,), (8,), fill="orthogonal"),
    make_case("deficient", (4, 4), (3, 3), (4, 4), fill="deficient"),
    make_case("deficient-two-channels", (2, 2), (3, 3), (4, 4), fill="deficient"),
    make_case("deficient-three-channels", (3, 3), (3, 3), (4, 4), fill="deficient"),
    make_case("graded", (7, 7), (2, 2), (4, 4), fill="graded"),
    make_case("graded-two-channels", (2, 2), (3, 2), (4, 4), fill="graded"),
    make_case("graded-three-channels", (3, 3), (3, 2), (4, 4), fill="graded"),
    make_case("repeated", (6, 6), (3, 2), (4, 4), fill="repeated"),
    make_case("zero-stride", (2, 3), (3, 3), (4, 4), stride=2, fill="zero"),
    make_case("zero-depthwise", (3, 3), (3, 3), (4, 4), groups=3, fill="zero"),
)


def by_name(*names: str) -> tuple[Case, ...]:
    """The cases of the table that are called `names`."""
    cases = {case.name: case for case in TABLE}
    return tuple(cases[name] for name in names)


def random_cases() -> SearchStrategy[Case]:
    """A hypothesis strategy for convolutions of one to three dimensions whose matrix stays small."""
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        ndim = draw(st.integers(1, 3))
        largest = {1: 9, 2: 5, 3: 3}[ndim]

        def per_axis(low: int, high: int) -> tuple[int, ...]:
            return tuple(draw(st.integers(low, high)) for _ in range(ndim))

        stride = per_axis(1, min(3, largest))
        grid = tuple(draw(st.integers(1, max(1, largest // s))) for s in stride)
        transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 3]))
        wide = tuple(n * s for n, s in zip(grid, stride, strict=True))
        return Case(
            name=f"random-{draw(st.integers(0, 999))}",
            channels=(groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))),
            taps=per_axis(1, largest),
            input_shape=grid if transposed else wide,
            layout="".join(draw(st.permutations("OI" + "DHW"[3 - ndim :]))),
            stride=stride,
            dilation=per_axis(1, 3),
            groups=groups,
            transposed=transposed,
        )

    return draw_case()
