"""Operator norms in PyTorch training scripts.

One line bounds every convolution of a model, after each step of the optimizer:

>>> import torch
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> projection = project_after_step(optimizer, model, bound=1.0)

`operator_norm` divides a layer's weight by its norm within the forward pass, `penalty` is a term for a loss,
`ConvMuon` is an optimizer with steps in the norms of the convolutions, `conv_layers` lists a model's convolutions, and
`analyze` reports their singular values. `SpectrumMonitor` measures them in training and changes nothing.
"""

from convsv_adapters._layers import ConvLayer
from convsv_adapters._monitor import LayerFigures, Measurement
from convsv_adapters.torch._layers import conv_layers
from convsv_adapters.torch._monitor import SpectrumMonitor
from convsv_adapters.torch._muon import ConvMuon
from convsv_adapters.torch._options import StepOptions
from convsv_adapters.torch._parametrization import OperatorNorm, operator_norm
from convsv_adapters.torch._penalty import penalty
from convsv_adapters.torch._project import StepProjection, project_after_step
from convsv_core import analyze

__all__ = [
    "ConvLayer",
    "ConvMuon",
    "LayerFigures",
    "Measurement",
    "OperatorNorm",
    "SpectrumMonitor",
    "StepOptions",
    "StepProjection",
    "analyze",
    "conv_layers",
    "operator_norm",
    "penalty",
    "project_after_step",
]
