"""The dtype that stored kernels are computed in, and what its rounding costs."""

from __future__ import annotations

import numpy as np
import pytest

from convsv_core import Conv, operator_norm
from convsv_core.layers import Layer
from convsv_core.plugins import get_backend
from convsv_core.reports import layer_reports
from convsv_core.reports.certified import certified_norms, layer_operator
from convsv_core.reports.placement import Placement

CONV = Conv("OIW", padding_mode="zeros")


@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_a_complex_kernel_keeps_its_imaginary_part(dtype):
    kernel = np.full((2, 2, 3), 1 + 2j)
    (report,) = layer_reports([Layer("first", kernel, CONV, (8,))], get_backend("numpy"), dtype=dtype)
    assert report.operator_norm == pytest.approx(float(operator_norm(kernel, 8, Conv("OIW"))))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_integers_have_no_figures(dtype):
    kernel = np.ones((2, 2, 3), np.int8)
    (report,) = layer_reports([Layer("first", kernel, CONV, (8,))], get_backend("numpy"), dtype=dtype)
    assert report.operator_norm is None
    assert "int8" in report.note


@pytest.mark.parametrize("scale", [1e-200, 1e-50, 1.0])
def test_a_certified_norm_counts_what_a_narrow_dtype_loses(scale):
    kernel = np.random.default_rng(0).normal(size=(2, 2, 3)) * scale
    operator = layer_operator(Layer("first", kernel, CONV, (8,)))
    (upper,) = certified_norms(kernel, [operator], Placement(get_backend("numpy")), "float32").values()
    assert float(operator_norm(kernel / scale, 64, CONV)) * scale <= upper
