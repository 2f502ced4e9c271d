"""Orthogonal kernels: against the dense matrix, on each library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from convsv_conformance.cases import make_case

import convsv_core as convsv
from convsv_core.plugins import get_backend

LIBRARIES = ("numpy", "torch", "jax", "array_api_strict")
GEOMETRIES: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "square": ((4, 4, 3, 3), "OIHW", {}),
    "tall": ((6, 3, 3, 3), "OIHW", {}),
    "wide": ((3, 6, 3, 3), "HWIO", {}),
    "strided": ((8, 2, 3, 3), "OIHW", {"stride": 2}),
    "transposed": ((8, 2, 4, 4), "IOHW", {"stride": 2, "transposed": True}),
    "depthwise": ((4, 1, 3, 3), "OIHW", {"groups": 4}),
    "dilated": ((3, 5, 3), "OIW", {"dilation": 2}),
    "one tap": ((4, 4, 1, 1), "OIHW", {}),
}
TOLERANCE = 1e-3


def geometry(name: str) -> tuple[tuple[int, ...], convsv.Conv]:
    shape, layout, options = GEOMETRIES[name]
    if layout == "HWIO":
        shape = (*shape[2:], shape[1], shape[0])
    return shape, convsv.Conv(layout, **options)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_singular_value_of_an_orthogonal_kernel_is_the_gain(name: str, library: str) -> None:
    pytest.importorskip(library)
    if library == "array_api_strict":
        pytest.importorskip("convsv_array_api_strict", reason="install tests/strict_backend")
    shape, conv = geometry(name)
    kernel = convsv.orthogonal_kernel(shape, (6,) * conv.ndim, conv, seed=1, gain=2.0, backend=library)
    assert get_backend(library).owns_array(kernel)
    values = get_backend(library).to_numpy(kernel).astype(np.float64)
    dense = dense_singular_values(values, (6,) * conv.ndim, conv)
    assert np.abs(dense - 2.0).max() <= 2.0 * (TOLERANCE + 20 * np.finfo(np.float32).eps)
    again = convsv.orthogonal_kernel(shape, (6,) * conv.ndim, conv, seed=1, gain=2.0, backend="numpy")
    assert np.abs(again - values).max() <= 2.0 * TOLERANCE


def dense_singular_values(values: np.ndarray[Any, Any], extents: tuple[int, ...], conv: convsv.Conv) -> Any:
    channels = values.shape[conv.layout.index("O")], values.shape[conv.layout.index("I")]
    taps = tuple(values.shape[conv.layout.index(letter)] for letter in conv.spatial)
    channels = (channels[0] * conv.groups, channels[1]) if conv.transposed else (channels[0], channels[1] * conv.groups)
    case = make_case(
        "orthogonal",
        channels,
        taps,
        extents,
        layout=conv.layout,
        stride=conv.strides,
        dilation=conv.dilations,
        groups=conv.groups,
        transposed=conv.transposed,
    )
    return np.linalg.svd(case.matrix(values), compute_uv=False)


def test_the_deviation_is_that_of_the_dense_matrix() -> None:
    conv = convsv.Conv("OIHW")
    kernel = np.random.default_rng(0).standard_normal((4, 4, 3, 3))
    found = convsv.nearest_orthogonal(kernel, (5, 5), conv, max_iterations=20)
    dense = dense_singular_values(found.kernel, (5, 5), conv)
    # the smallest values come from the SVD in float64, to eps of the largest
    assert float(found.deviation) == pytest.approx(np.abs(dense - 1).max(), abs=20 * np.finfo(float).eps * dense.max())
    assert found.iterations == 20


def test_an_orthogonal_kernel_is_left_where_it_is() -> None:
    conv = convsv.Conv("OIHW")
    kernel = np.zeros((3, 3, 3, 3))
    kernel[:, :, 1, 1] = np.eye(3)
    found = convsv.nearest_orthogonal(kernel, (6, 6), conv)
    assert found.converged
    assert np.abs(found.kernel - kernel).max() <= 20 * np.finfo(float).eps


def test_no_kernel_of_the_support_is_nearer() -> None:
    """The result is a stationary point: a polar factor cut to the taps gives it back."""
    conv = convsv.Conv("OIW")
    start = np.random.default_rng(2).standard_normal((3, 2, 3))
    found = convsv.nearest_orthogonal(start, (8,), conv, tolerance=1e-9, max_iterations=5000)
    again = convsv.nearest_orthogonal(found.kernel, (8,), conv, tolerance=1e-9, max_iterations=1)
    assert np.abs(again.kernel - found.kernel).max() <= 1e-6


def test_scales_do_not_matter() -> None:
    conv = convsv.Conv("OIHW")
    kernel = np.random.default_rng(0).standard_normal((4, 2, 3, 3)).astype(np.float32)
    one = convsv.nearest_orthogonal(kernel, (6, 6), conv, max_iterations=10)
    for power in (-100, 100):
        other = convsv.nearest_orthogonal(np.ldexp(kernel, power), (6, 6), conv, max_iterations=10)
        assert np.array_equal(one.kernel, other.kernel)


def test_bad_input() -> None:
    conv = convsv.Conv("OIHW")
    kernel = np.ones((2, 2, 3, 3))
    with pytest.raises(ValueError, match="tolerance=-1"):
        convsv.nearest_orthogonal(kernel, (4, 4), conv, tolerance=-1)
    with pytest.raises(ValueError, match="max_iterations"):
        convsv.nearest_orthogonal(kernel, (4, 4), conv, max_iterations=0)
    with pytest.raises(ValueError, match="NaN"):
        convsv.nearest_orthogonal(kernel * np.nan, (4, 4), conv)
    with pytest.raises(ValueError, match="no such backend"):
        convsv.orthogonal_kernel((2, 2, 3, 3), (4, 4), conv, backend="fortran")
    with pytest.raises(ValueError, match="layout"):
        convsv.orthogonal_kernel((2, 2, 3), (4, 4), conv)
