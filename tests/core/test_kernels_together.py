"""Kernels of very different sizes, or of different shapes, in one call of the functions for training."""

from __future__ import annotations

import math

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core.training import frobenius_bound, norms_together, rescale_together, rescaling_factors, steepest_together

CONV = convsv.Conv("OIW")
KERNEL = np.random.default_rng(0).normal(size=(4, 3, 3))


@pytest.mark.parametrize("input_shape", [8, None])
@pytest.mark.parametrize(
    ("dtype", "scale", "bound"), [("float32", 1e30, 1.0), ("float32", 1e-30, 1e-30), ("float64", 1e200, 1.0)]
)
def test_a_kernel_beside_a_much_larger_one_is_rescaled(input_shape, dtype, scale, bound):
    kernels = [(KERNEL * scale).astype(dtype), KERNEL.astype(dtype)]
    for kernel, upper in rescale_together(kernels, input_shape, CONV, bound):
        assert float(convsv.operator_norm(kernel, 8, CONV)) <= upper * (1 + 1e-6)
        assert upper <= bound


@pytest.mark.parametrize(
    "call",
    [
        lambda kernels: rescale_together(kernels, 8, CONV, 1.0),
        lambda kernels: norms_together(kernels, 8, CONV),
        lambda kernels: steepest_together(kernels, 8, CONV),
    ],
)
def test_kernels_of_one_call_have_one_shape(call):
    with pytest.raises(ValueError, match="wanted one shape and dtype"):
        call([KERNEL, KERNEL[:2]])


def test_kernels_of_one_call_have_one_dtype():
    with pytest.raises(ValueError, match="wanted one shape and dtype"):
        rescale_together([KERNEL, KERNEL.astype(np.float32)], 8, CONV, 1.0)


@pytest.mark.parametrize("bound", [-1.0, math.nan])
def test_a_bound_of_a_rescaling_is_not_negative(bound):
    with pytest.raises(ValueError, match="wanted a number of at least 0"):
        rescaling_factors([KERNEL], 8, CONV, bound)


@pytest.mark.parametrize("headroom", [-0.1, 1.5])
def test_a_headroom_is_a_share(headroom):
    with pytest.raises(ValueError, match="wanted a share"):
        rescaling_factors([KERNEL], 8, CONV, 1.0, headroom=headroom)


def test_an_infinite_bound_changes_nothing():
    assert rescaling_factors([KERNEL], 8, CONV, math.inf) == [(1.0, math.inf)]


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float16", 300.0), ("float32", 1e-30), ("float32", 1e30), ("float64", 1e-200)]
)
def test_the_bound_from_taps_does_not_depend_on_the_scale(dtype, scale):
    kernel = (KERNEL * scale).astype(dtype)
    assert math.isclose(frobenius_bound(kernel, CONV), frobenius_bound(KERNEL, CONV) * scale, rel_tol=1e-3)
