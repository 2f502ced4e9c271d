"""Transposed convolutions with any padding and output padding: their outputs, exact norms and bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from convsv_conformance.dense import dense_matrix

import convsv_core as convsv
from convsv_core import Conv
from convsv_core._geometry.padding import lattice, tap_reads
from convsv_core._geometry.shapes import forward_extents
from convsv_core.conv import transposed_conv
from convsv_core.plugins import get_backend

EPS = float(np.finfo(np.float64).eps)

# taps, stride, padding, output padding and extent, as U-Nets and generators have them
GEOMETRIES = [
    (2, 2, 0, 0, 4),
    (3, 2, 0, 0, 4),
    (4, 1, 0, 0, 1),
    (4, 1, 0, 0, 4),
    (4, 2, 1, 0, 4),
    (3, 2, 1, 0, 4),
    (3, 2, 1, 1, 4),
    (3, 1, 0, 0, 5),
    (5, 2, 2, 1, 4),
    (3, 3, 0, 0, 4),
    (2, 3, 0, 0, 4),
    (2, 3, 0, 1, 4),
    (2, 3, 0, 2, 4),
    (1, 3, 0, 2, 3),
]


def outputs(taps: int, stride: int, padding: int, extra: int, extent: int, dilation: int = 1) -> int:
    """PyTorch's number of outputs along an axis."""
    return (extent - 1) * stride - 2 * padding + dilation * (taps - 1) + extra + 1


def kernel_of(taps: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(taps).standard_normal((4, 3, taps, taps))


def conv_of(taps: int, stride: int, padding: int, extra: int) -> Conv:
    return Conv("IOHW", stride, padding=padding, padding_mode="zeros", transposed=True, output_padding=extra)


def truth(taps: int, stride: int, padding: int, extra: int, extent: int) -> float:
    shape = (outputs(taps, stride, padding, extra, extent),) * 2
    pads = ((padding, padding),) * 2
    steps: dict[str, Any] = {"stride": (stride, stride), "dilation": (1, 1), "pads": pads, "padding_mode": "zeros"}
    matrix = dense_matrix(kernel_of(taps), (extent,) * 2, "IOHW", output_shape=shape, transposed=True, **steps)
    return float(np.linalg.norm(matrix, 2))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_norm_and_bounds_are_those_of_the_dense_matrix(geometry: Any) -> None:
    taps, *_, extent = geometry
    kernel, conv, norm = kernel_of(taps), conv_of(*geometry[:4]), truth(*geometry)
    assert float(convsv.operator_norm(kernel, (extent,) * 2, conv)) == pytest.approx(norm, rel=64 * EPS)
    at_extents = convsv.norm_bounds(kernel, conv, input_shape=(extent, extent))
    assert norm * (1 - 1e-8) <= float(at_extents.lower) <= norm <= float(at_extents.upper)
    assert norm <= float(convsv.norm_bounds(kernel, conv).upper)
    assert norm <= float(convsv.norm_upper_bound(kernel, conv))


@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize("geometry", [(3, 2, 0, 0, 4), (2, 3, 0, 2, 4)], ids=str)
def test_other_libraries_give_the_same_norm(name: str, geometry: Any) -> None:
    pytest.importorskip(name)
    taps, *_, extent = geometry
    kernel = get_backend(name).asarray(kernel_of(taps).astype(np.float32))
    conv, norm = conv_of(*geometry[:4]), truth(*geometry)
    assert float(convsv.operator_norm(kernel, (extent,) * 2, conv)) == pytest.approx(norm, rel=1e-5)
    bounds = convsv.norm_bounds(kernel, conv, input_shape=(extent, extent))
    assert norm * (1 - 1e-5) <= float(bounds.lower) <= norm * (1 + 1e-6)
    assert norm * (1 - 1e-6) <= float(bounds.upper)


@pytest.mark.parametrize("geometry", [(3, 2, 0, 0, 4), (4, 1, 0, 0, 1), (3, 2, 1, 0, 4), (2, 3, 0, 2, 4)], ids=str)
def test_a_module_gets_its_own_norm(geometry: Any) -> None:
    torch = pytest.importorskip("torch")
    from convsv_adapters.torch import conv_layers

    taps, stride, padding, extra, extent = geometry
    module = torch.nn.ConvTranspose2d(4, 3, taps, stride, padding, extra, bias=False).double()
    module.weight.data = torch.from_numpy(kernel_of(taps))
    with torch.no_grad():
        images = module(torch.eye(4 * extent**2, dtype=torch.float64).reshape(-1, 4, extent, extent))
    norm = float(np.linalg.norm(images.reshape(len(images), -1).numpy(), 2))
    assert norm == pytest.approx(truth(*geometry), rel=64 * EPS)
    (layer,) = conv_layers(module, torch.zeros(1, 4, extent, extent, dtype=torch.float64))
    assert layer.note == ""
    found = convsv.operator_norm(kernel_of(taps), layer.input_shape, layer.conv)
    assert float(found) == pytest.approx(norm, rel=64 * EPS)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_dilated_layer_has_the_outputs_of_torch(dilation: int) -> None:
    torch = pytest.importorskip("torch")
    conv = Conv("IOW", 3, dilation, padding=1, padding_mode="zeros", transposed=True, output_padding=2)
    module = torch.nn.ConvTranspose1d(1, 1, 4, 3, padding=1, output_padding=2, dilation=dilation)
    found = module(torch.zeros(1, 1, 5)).shape[-1]
    assert forward_extents((4,), (5,), conv) == (found,) == (outputs(4, 3, 1, 2, 5, dilation),)
    (reads,) = tap_reads((4,), (5,), conv)
    assert reads.places().shape == (5, 4)


def test_pads_may_be_negative_where_outputs_are_added() -> None:
    """Pads that count the output padding describe the same layer as pads and output padding apart."""
    kernel = kernel_of(2)
    apart = Conv("IOHW", 3, padding=0, padding_mode="zeros", transposed=True, output_padding=2)
    counted = transposed_conv("IOHW", (2, 2), [(0, -2)] * 2, stride=3)
    before = transposed_conv("IOHW", (2, 2), [(-2, 0)] * 2, stride=3)
    norms = [float(convsv.operator_norm(kernel, (4, 4), conv)) for conv in (apart, counted, before)]
    assert norms == pytest.approx([norms[0]] * 3, rel=64 * EPS)
    assert forward_extents((2, 2), (4, 4), counted) == (13, 13)


def test_outputs_of_inputs_times_stride_keep_the_plain_geometry() -> None:
    plain = Conv("IOHW", 2, padding=1, padding_mode="zeros", transposed=True)
    assert transposed_conv("IOHW", (4, 4), [(1, 1)] * 2, stride=2) == plain
    assert plain.output_padding is None
    exact = Conv("IOHW", 2, padding=1, padding_mode="zeros", transposed=True, output_padding=0)
    assert float(convsv.operator_norm(kernel_of(4), (3, 3), plain)) == float(
        convsv.operator_norm(kernel_of(4), (3, 3), exact)
    )
    assert lattice(exact) == lattice(plain)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"output_padding": 1, "padding_mode": "zeros"}, ValueError, "transposed=False"),
        ({"output_padding": 1, "transposed": True}, ValueError, "padding_mode='circular'"),
        ({"output_padding": -1, "transposed": True, "padding_mode": "zeros"}, ValueError, "at least 0"),
        ({"output_padding": 0.5, "transposed": True, "padding_mode": "zeros"}, TypeError, "integer"),
        ({"padding": -1, "transposed": True, "padding_mode": "zeros"}, ValueError, "at least 0"),
    ],
)
def test_impossible_output_padding_is_refused(options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Conv("IOW", **options)


def test_a_layer_without_outputs_is_refused() -> None:
    conv = Conv("IOW", padding=2, padding_mode="zeros", transposed=True, output_padding=0)
    with pytest.raises(ValueError, match="has \\(0,\\) outputs"):
        convsv.operator_norm(np.ones((1, 1, 3)), (2,), conv)
    assert math.isfinite(float(convsv.operator_norm(np.ones((1, 1, 3)), (3,), conv)))
