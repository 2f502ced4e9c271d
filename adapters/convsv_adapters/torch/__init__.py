"""Operator norms in PyTorch training scripts.

One line bounds every convolution of a model, after each step of the optimizer:

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> projection = project_after_step(optimizer, model, bound=1.0)

`operator_norm` divides a layer's weight by its norm instead, within the forward pass; `penalty` adds to a loss;
`conv_layers` lists a model's convolutions, and `analyze` reports their singular values.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import convsv_core
from convsv_adapters.torch._layers import ConvLayer, conv_layers
from convsv_adapters.torch._parametrization import OperatorNorm, operator_norm
from convsv_adapters.torch._penalty import penalty
from convsv_adapters.torch._project import StepProjection, project_after_step
from convsv_core.analysis import LayerReport

__all__ = [
    "ConvLayer",
    "OperatorNorm",
    "StepProjection",
    "analyze",
    "conv_layers",
    "operator_norm",
    "penalty",
    "project_after_step",
]


def analyze(model: nn.Module, example_input: object = None, **options: Any) -> list[LayerReport]:
    """Report the singular values of every convolution, as `convsv spectrum` does for a file.

    Parameters
    ----------
    model, example_input
        As for `conv_layers`.
    **options
        `backend`, `dtype` and `device` of `convsv_core.analyze`, which this calls.

    Returns
    -------
    list of LayerReport
    """
    return convsv_core.analyze(model, example_input, **options)
