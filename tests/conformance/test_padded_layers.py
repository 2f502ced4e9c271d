"""The reference for layers with output padding and many taps, against PyTorch; and mistakes that its check must see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from convsv_conformance.checks import padded
from convsv_conformance.checks.padded import LONG, OUTPUT_PADDED, PaddedLayer, norms
from convsv_conformance.target import Failure, Ledger, Target
from torch.nn import functional as F

import convsv_core as convsv
from convsv_core import Conv
from convsv_core.plugins import get_backend

SMALL = [layer for layer in (*OUTPUT_PADDED, *LONG) if np.prod(layer.shape) < 1000]


def torch_matrix(layer: PaddedLayer, values: Any) -> Any:
    """Return the matrix of a layer from PyTorch's own function, applied to the identity."""
    conv, kernel = layer.conv, torch.from_numpy(values)
    pads = conv.pads(layer.shape[2:])
    inputs = layer.shape[0] if conv.transposed else layer.shape[1] * conv.groups
    count = inputs * int(np.prod(layer.input_shape))
    images = torch.eye(count, dtype=kernel.dtype).reshape(count, inputs, *layer.input_shape)
    ndim = len(layer.input_shape)
    options = {"stride": conv.strides, "dilation": conv.dilations, "groups": conv.groups}
    if not conv.transposed:
        images = F.pad(images, [side for pair in reversed(pads) for side in pair])
        return getattr(F, f"conv{ndim}d")(images, kernel, **options).reshape(count, -1).T
    # Without padding and with more outputs than are wanted, which the padding then crops.
    most = [max(stride, dilation) - 1 for stride, dilation in zip(conv.strides, conv.dilations, strict=True)]
    full = getattr(F, f"conv_transpose{ndim}d")(images, kernel, output_padding=most, **options)
    extra = [max(0, before + n - m) for (before, _), n, m in zip(pads, layer.output_shape, full.shape[2:], strict=True)]
    full = F.pad(full, [side for more in reversed(extra) for side in (0, more)])
    for axis, ((before, _), extent) in enumerate(zip(pads, layer.output_shape, strict=True), 2):
        full = full.narrow(axis, before, extent)
    return full.reshape(count, -1).T


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_the_reference_is_pytorch(layer: PaddedLayer) -> None:
    values = layer.values("complex128").real.copy()
    expected = torch_matrix(layer, values).numpy()
    np.testing.assert_allclose(padded._matrix(layer, values), expected, rtol=0, atol=1e-12)
    if len(layer.shape) == 3:
        np.testing.assert_allclose(padded._matrix_of_one_axis(layer, values), expected, rtol=0, atol=1e-12)
    assert layer.norm(values) == pytest.approx(np.linalg.norm(expected, 2), rel=1e-12)


def test_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(get_backend("numpy"), "cpu", "float64")
    layer = OUTPUT_PADDED[1]
    norms(target, layer, Ledger(target.eps))
    right, bounds = convsv.operator_norm, convsv.norm_bounds
    full = Conv("IOHW", stride=2, padding=0, padding_mode="zeros", transposed=True, output_padding=0)

    def ignored(kernel: Any, input_shape: Any, conv: Conv) -> Any:
        return right(kernel, input_shape, full)

    def below(kernel: Any, conv: Conv, **options: Any) -> Any:
        return bounds(kernel / 2, conv, **options)

    for name, mistake in (("operator_norm", ignored), ("norm_bounds", below)):
        with monkeypatch.context() as patch:
            patch.setattr(convsv, name, mistake)
            with pytest.raises(Failure):
                norms(target, layer, Ledger(target.eps))
