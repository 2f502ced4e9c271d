"""Kernels whose entries are close to the ends of the range of their dtype."""

from __future__ import annotations

import math

import numpy as np
import pytest
from convsv_conformance.dense import dense_matrix

import convsv_core as convsv
from convsv_core._norm.together import norms_together

CONV = convsv.Conv("OIW")


def _kernel(dtype, exponent, shape=(3, 4, 3)):
    """Return a kernel near a power of two, and the values of the same kernel divided by that power."""
    kernel = np.ldexp(np.random.default_rng(0).normal(size=shape), exponent).astype(dtype)
    whole = np.ldexp(kernel.astype(float), -exponent)
    matrix = dense_matrix(whole, (8,), "OIW", stride=(1,), dilation=(1,))
    return kernel, np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize(("dtype", "exponent"), [("float32", -145), ("float32", -128), ("float64", -1070)])
def test_norms_of_subnormal_kernels_do_not_vanish(dtype, exponent):
    kernel, values = _kernel(dtype, exponent)
    spacing = float(np.finfo(dtype).smallest_subnormal)
    norm = math.ldexp(values[0], exponent)
    assert abs(float(convsv.operator_norm(kernel, 8, CONV)) - norm) <= 1e-6 * norm + spacing
    frobenius = math.ldexp(np.linalg.norm(values), exponent)
    assert abs(float(convsv.frobenius_norm(kernel, 8, CONV)) - frobenius) <= 1e-6 * frobenius + spacing
    assert math.isclose(float(convsv.stable_rank(kernel, 8, CONV)), np.sum(values**2) / values[0] ** 2, rel_tol=1e-5)


@pytest.mark.parametrize(("dtype", "exponent"), [("float32", -145), ("float32", -128), ("float64", -1070)])
def test_bounds_of_subnormal_kernels_are_bounds(dtype, exponent):
    kernel, values = _kernel(dtype, exponent)
    norm = math.ldexp(values[0], exponent)
    bounds = convsv.norm_bounds(kernel, CONV, input_shape=8)
    assert float(bounds.lower) <= norm <= float(bounds.upper)
    assert norm <= float(convsv.norm_bounds(kernel, CONV).upper)
    assert norm <= float(convsv.norm_upper_bound(kernel, CONV))
    together = norms_together([kernel, np.ones_like(kernel)], None, CONV, derivatives=False)
    assert norm <= float(together.values[0])
    projection = convsv.project(kernel, 8, CONV, norm / 2)
    image = np.ldexp(projection.kernel.astype(float), -exponent)
    matrix = dense_matrix(image, (8,), "OIW", stride=(1,), dilation=(1,))
    assert math.ldexp(np.linalg.norm(matrix, 2), exponent) <= min(float(projection.norm), norm / 2 * (1 + 1e-6))


@pytest.mark.parametrize(
    ("dtype", "exponent"), [("float32", -140), ("float32", 125), ("float64", -1060), ("float64", 1021)]
)
def test_the_condition_number_does_not_depend_on_the_scale(dtype, exponent):
    kernel, values = _kernel(dtype, exponent)
    assert math.isclose(float(convsv.condition_number(kernel, 8, CONV)), values[0] / values[-1], rel_tol=1e-5)


def test_a_lower_bound_of_a_norm_above_the_range_is_finite():
    kernel = np.full((1, 1, 3), np.finfo(np.float32).max, np.float32)
    bounds = convsv.norm_bounds(kernel, CONV)
    assert math.isfinite(float(bounds.lower))
    assert float(bounds.upper) == math.inf


def test_a_subnormal_gradient_has_a_direction():
    gradient, _ = _kernel("float32", -145)
    found = convsv.steepest_direction(gradient, 8, CONV)
    alignment = float(np.sum(found.direction.astype(float) * gradient))
    assert np.any(found.direction)
    assert float(found.alignment) <= alignment <= float(found.upper)
