"""Reports on live layers of Keras: the norm of the kernel that the layer uses, or no figure."""

from __future__ import annotations

from typing import Any

import keras
import pytest
from convsv_adapters.keras import constrain
from keras import ops

import convsv_core as convsv


def test_a_class_with_a_convolution_of_its_own_has_no_figure() -> None:
    class Scaled(keras.layers.Conv2D):  # type: ignore[misc]
        def convolution_op(self, inputs: Any, kernel: Any) -> Any:
            return super().convolution_op(inputs, 3 * kernel)

    model = keras.Sequential([keras.Input((8, 8, 3)), Scaled(4, 3)])
    (report,) = convsv.analyze(model)
    assert (report.operator_norm, "not known" in report.note) == (None, True)
    with pytest.warns(UserWarning, match="forward pass of its own"):
        constrain(model, 1.0)


def test_a_report_includes_the_low_rank_adaptation() -> None:
    layer = keras.layers.Conv2D(4, 3)
    model = keras.Sequential([keras.Input((8, 8, 3)), layer])
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(ops.ones(layer.lora_kernel_b.shape))
    (report,) = convsv.analyze(model)
    expected = convsv.operator_norm(ops.convert_to_numpy(layer.kernel), (8, 8), convsv.Conv("HWIO"))
    assert report.operator_norm == pytest.approx(float(expected), rel=1e-5)
