"""Check norms of layers with their own padding: transposed layers with output padding, and kernels of many taps."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import numpy as np

import convsv_core as convsv
from convsv_conformance.checks.spectrum import VALUE_FACTOR
from convsv_conformance.dense import Array, dense_matrix
from convsv_conformance.kernels import random_kernel
from convsv_conformance.target import Ledger, Target
from convsv_core.conv import Conv, transposed_conv

__all__ = ["LONG", "OUTPUT_PADDED", "PaddedLayer", "norms"]

RTOL = 1e-3
"""Relative gap that is asked of the bounds; the library's own default."""


@dataclass(frozen=True)
class PaddedLayer:
    """A layer and the input that it acts on.

    Parameters
    ----------
    name : str
        It seeds the kernel.
    shape : tuple of int
        The kernel's shape, with the axes of ``conv.layout``, which begins with the two channels.
    conv : Conv
        With zero padding.
    input_shape : tuple of int
    """

    name: str
    shape: tuple[int, ...]
    conv: Conv
    input_shape: tuple[int, ...]

    def values(self, dtype: str) -> Array:
        """Return the kernel, equal in every process: complex128 for a complex `dtype`, else float64."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        kernel: Array = random_kernel(rng, self.shape)
        return kernel + 1j * random_kernel(rng, self.shape) if dtype.startswith("complex") else kernel

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Return the spatial extents of the output, by the definition of PyTorch and ONNX."""
        conv, taps = self.conv, self.shape[2:]
        axes = zip(self.input_shape, conv.strides, conv.dilations, taps, conv.pads(taps), strict=True)
        if not conv.transposed:
            return tuple((n + sum(pads) - d * (k - 1) - 1) // s + 1 for n, s, d, k, pads in axes)
        extra = conv.output_padding
        assert isinstance(extra, tuple)
        return tuple(
            (n - 1) * s + d * (k - 1) + 1 - sum(pads) + e for (n, s, d, k, pads), e in zip(axes, extra, strict=True)
        )

    def norm(self, values: Array) -> float:
        """Return the norm of the dense matrix for a kernel, cached since every backend asks for it."""
        return _norm(self, values.dtype.str, values.tobytes())


def norms(target: Target, layer: PaddedLayer, ledger: Ledger) -> None:
    """Check the exact norm with the layer's own padding, and the bounds for its extents and for every input size."""
    kernel = target.array(layer.values(target.dtype))
    norm = layer.norm(target.exact(kernel))
    got = target.fetch("operator_norm", convsv.operator_norm(kernel, layer.input_shape, layer.conv), ())
    ledger.close("operator_norm", got, norm, scale=norm, factor=VALUE_FACTOR)
    for what, input_shape in (("of these extents", layer.input_shape), ("of every size", None)):
        bounds = convsv.norm_bounds(kernel, layer.conv, input_shape=input_shape, rtol=RTOL)
        lower = float(target.fetch("norm_bounds: lower", bounds.lower, ()))
        upper = float(target.fetch("norm_bounds: upper", bounds.upper, ()))
        ledger.true(f"norm_bounds {what}: lower={lower}, upper={upper}", 0 <= lower <= upper)
        ledger.not_above(f"norm_bounds {what}: the upper bound {upper} is violated", norm, upper)
        if input_shape is not None:
            ledger.not_above("norm_bounds: the lower bound is violated", lower, norm)
            ledger.true(f"norm_bounds: {lower} is far below {norm}", lower >= norm * (1 - RTOL))
        else:
            # In 32 bits the rounding error bound of many taps may be wider than the gap, and the answer says so.
            ledger.true("norm_bounds did not converge", bounds.converged or target.answer == "float32")


@functools.lru_cache(maxsize=512)
def _norm(layer: PaddedLayer, dtype: str, data: bytes) -> float:
    values = np.frombuffer(data, dtype=dtype).reshape(layer.shape)
    matrix = _matrix_of_one_axis(layer, values) if len(layer.shape) == 3 else _matrix(layer, values)
    narrow = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.conj().T
    return float(np.sqrt(np.linalg.eigvalsh(narrow @ narrow.conj().T)[-1]))


def _matrix(layer: PaddedLayer, values: Array) -> Array:
    conv = layer.conv
    return dense_matrix(
        values,
        layer.input_shape,
        conv.layout,
        stride=conv.strides,
        dilation=conv.dilations,
        groups=conv.groups,
        pads=conv.pads(layer.shape[2:]),
        padding_mode="zeros",
        transposed=conv.transposed,
        output_shape=layer.output_shape if conv.transposed else None,
    )


def _matrix_of_one_axis(layer: PaddedLayer, values: Array) -> Array:
    """Return the matrix of a layer of one spatial axis, one tap after another: it may have thousands of taps."""
    conv, groups = layer.conv, layer.conv.groups
    rows_all, columns, taps = values.shape  # a transposed layer is the adjoint of a convolution with these axes
    wide, narrow = layer.input_shape[0], layer.output_shape[0]
    if conv.transposed:
        wide, narrow = narrow, wide
    ((before, _),), (stride,), (dilation,) = conv.pads((taps,)), conv.strides, conv.dilations
    matrix: Array = np.zeros((rows_all, narrow, columns * groups, wide), dtype=values.dtype)
    outputs, rows = np.arange(narrow), rows_all // groups
    for tap in range(taps):
        places = outputs * stride + tap * dilation - before
        inside = (places >= 0) & (places < wide)
        for group in range(groups):
            block = slice(group * rows, (group + 1) * rows)
            inputs = slice(group * columns, (group + 1) * columns)
            matrix[block, outputs[inside], inputs, places[inside]] += values[block, :, tap]
    flat: Array = matrix.reshape(rows_all * narrow, -1)
    return flat.T if conv.transposed else flat


def _zeros(layout: str, **geometry: object) -> Conv:
    return Conv(layout, padding_mode="zeros", **geometry)  # type: ignore[arg-type]


def _transposed(layout: str, **geometry: object) -> Conv:
    return _zeros(layout, transposed=True, **geometry)


OUTPUT_PADDED = (
    PaddedLayer("output-padding", (2, 3, 3, 3), _transposed("IOHW", stride=2, padding=1, output_padding=1), (3, 4)),
    PaddedLayer(
        "output-padding-none", (3, 2, 3, 3), _transposed("IOHW", stride=2, padding=1, output_padding=0), (4, 3)
    ),
    PaddedLayer("output-padding-valid", (2, 2, 4, 2), _transposed("IOHW", padding=0, output_padding=0), (3, 4)),
    PaddedLayer(
        "output-padding-one-axis",
        (2, 3, 3, 2),
        _transposed("IOHW", stride=(3, 2), padding=1, output_padding=(2, 0)),
        (3, 3),
    ),
    PaddedLayer(
        "output-padding-groups",
        (4, 2, 3, 3),
        _transposed("IOHW", stride=2, groups=2, padding=1, output_padding=1),
        (3, 3),
    ),
    PaddedLayer(
        "output-padding-dilation",
        (2, 2, 3, 2),
        _transposed("IOHW", stride=2, dilation=(2, 3), padding=1, output_padding=(1, 0)),
        (3, 3),
    ),
    PaddedLayer("output-padding-1d", (3, 2, 2), _transposed("IOW", stride=3, padding=0, output_padding=2), (4,)),
    PaddedLayer(
        "output-padding-3d", (2, 2, 3, 2, 3), _transposed("IODHW", stride=2, padding=1, output_padding=1), (2, 3, 2)
    ),
    # Fewer elements than the output padding adds stand at the end of the axis, which makes the padding negative.
    PaddedLayer("outputs-that-no-tap-reaches", (2, 3, 2), transposed_conv("IOW", [2], [(0, -2)], stride=4), (4,)),
    PaddedLayer("cropped-on-one-side", (3, 2, 5), transposed_conv("IOW", [5], [(3, 1)], stride=2), (6,)),
)
"""Transposed layers whose number of outputs is not the number of inputs times the stride."""

LONG = (
    PaddedLayer("long", (3, 2, 130), _zeros("OIW"), (40,)),
    PaddedLayer("long-one-channel", (1, 1, 1100), _zeros("OIW"), (30,)),
    PaddedLayer("long-one-input-channel", (4, 1, 150), _zeros("OIW", stride=3, padding=60), (90,)),
    PaddedLayer("long-depthwise", (3, 1, 200), _zeros("OIW", groups=3, dilation=2, padding=199), (50,)),
    PaddedLayer("long-transposed", (2, 1, 140), _transposed("IOW", stride=2, padding=20, output_padding=1), (40,)),
    PaddedLayer("long-two-axes", (2, 2, 11, 12), _zeros("OIHW"), (6, 5)),
    # With so many taps and pixels, a table of both is larger than transforms.
    PaddedLayer("long-on-many-pixels", (1, 1, 1200), _zeros("OIW"), (900,)),
)
"""Kernels of more taps than products of pairs are formed of."""
