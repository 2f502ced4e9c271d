"""Operator norms in PyTorch training scripts."""

from __future__ import annotations

from convsv_adapters._torch_layers import ConvLayer, conv_layers

__all__ = ["ConvLayer", "conv_layers"]
