"""Tests of projecting a list of layers: the kernel as the file stores it is certified, or the layer has failed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from projected_files import BOUND, weights

from convsv_core import Conv, norm_bounds
from convsv_core.layers import Layer, Stored
from convsv_core.plugins import get_backend
from convsv_core.reports import project_layers
from convsv_core.reports.project_model import STORED_EPS, rounded_to


def report_of(*layers, bound=BOUND, **options):
    return list(project_layers(layers, get_backend("numpy"), bound, method="rescale", **options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_stored_is_within_the_bound_and_no_smaller_than_rounding_asks(dtype):
    for _ in range(5):
        kernel = rounded_to(weights(5, 4, 3, 3, dtype=np.float64), dtype)
        (report,) = report_of(Layer("a", kernel, Conv("OIHW", padding_mode="zeros"), None, "", Stored("a", dtype)))
        np.testing.assert_array_equal(rounded_to(report.kernel, dtype), report.kernel)
        upper = float(norm_bounds(report.kernel, Conv("OIHW")).upper)
        assert report.norm_after == upper <= BOUND
        assert upper >= BOUND * (1 - 2e-3 - 16 * STORED_EPS[dtype])
        assert report.distance == pytest.approx(np.linalg.norm(report.kernel.astype(float) - kernel), rel=1e-6)
        (again,) = report_of(Layer("a", report.kernel, Conv("OIHW"), None, "", Stored("a", dtype)))
        assert (again.kernel, again.distance, again.norm_after) == (None, 0, report.norm_after)


def test_a_float64_kernel_is_certified_in_full_where_it_is_looked_at_in_float32():
    kernel = weights(4, 4, 3, 3, dtype=np.float64)
    (report,) = report_of(Layer("a", kernel, Conv("OIHW"), (8, 8), "", Stored("a", "float64")), dtype="float32")
    assert float(norm_bounds(report.kernel, Conv("OIHW"), rtol=1e-6).upper) <= report.norm_after <= BOUND
    assert report.kernel.dtype == np.float64


def test_shared_weights_satisfy_the_bound_in_every_geometry():
    kernel, stored = weights(4, 4, 3, 3), Stored("w", "float32")
    convs = [Conv("OIHW", padding_mode="zeros"), Conv("OIHW", stride=2), Conv("OIHW", groups=1, dilation=2)]
    layers = [Layer(f"l{index}", kernel, conv, (8, 8), "", stored) for index, conv in enumerate(convs)]
    reports = report_of(*layers)
    assert all(report.kernel is reports[0].kernel for report in reports)
    assert reports[0].note == "its weights are those of l1, l2 too"
    for report, conv in zip(reports, convs, strict=True):
        assert not report.failed
        assert float(norm_bounds(report.kernel, conv).upper) == report.norm_after <= BOUND
    assert max(report.norm_after for report in reports) >= BOUND * (1 - 3e-3)


def test_padding_that_repeats_pixels_is_counted():
    conv = Conv("OIHW", padding=1, padding_mode="reflect")
    (report,) = report_of(Layer("a", weights(4, 4, 3, 3), conv, (8, 8), "", Stored("a", "float32")))
    assert float(norm_bounds(report.kernel, Conv("OIHW")).upper) == pytest.approx(BOUND / 2, rel=2e-3)
    assert float(norm_bounds(report.kernel, conv, input_shape=(8, 8)).upper) <= report.norm_after <= BOUND
    unknown = Layer("a", weights(4, 4, 3, 3), conv, None, "", Stored("a", "float32"))
    assumed = replace(unknown, input_shape=(8, 8), assumed_extents=True)
    for layer in (unknown, assumed):
        (report,) = report_of(layer)
        assert report.failed
        assert "needs the layer's extents" in report.note


def test_what_cannot_be_projected_has_failed_and_says_why():
    kernel = weights(4, 4, 3, 3)
    computed, damaged, unknown, small = report_of(
        Layer("a", kernel, Conv("OIHW"), None),
        Layer("b", np.full_like(kernel, np.nan), Conv("OIHW"), None, "", Stored("b", "float32")),
        Layer("c", None, None, None, "no weights"),
        Layer("d", kernel / 100, Conv("OIHW"), None),
    )
    assert [report.failed for report in (computed, damaged, unknown, small)] == [True, True, True, False]
    assert "computed from other tensors" in computed.note
    assert "NaN" in damaged.note
    assert unknown.note == "no weights"
    assert computed.norm_after == computed.norm_before == pytest.approx(3, rel=2e-3)


def test_layers_that_are_not_selected_stay_and_say_whose_weights_they_have():
    kernel = weights(4, 4, 3, 3)
    first, second, third = report_of(
        Layer("a", kernel, Conv("OIHW"), None, "", Stored("w", "float32")),
        Layer("b", kernel, Conv("OIHW"), None, "", Stored("w", "float32")),
        Layer("c", kernel, Conv("OIHW"), None, "", Stored("v", "float32")),
        selected=lambda name: name == "a",
    )
    assert first.kernel is not None
    assert (second.kernel, second.failed, third.failed) == (None, False, False)
    assert second.note == "not selected: its weights are those of a, which was"
    assert third.note == "not selected"


def test_a_bound_of_zero():
    (report,) = report_of(Layer("a", weights(2, 2, 3, 3), Conv("OIHW"), None, "", Stored("a", "float16")), bound=0.0)
    assert (np.count_nonzero(report.kernel), report.norm_after, report.failed) == (0, 0, False)
