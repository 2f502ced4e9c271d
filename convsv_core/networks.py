"""Networks as graphs of maps: what front ends and authors of rules for further kinds of maps use.

A front end implements `convsv_core.plugins.Hooks.convsv_model_graph` for model objects, or
`Hooks.convsv_read_graph` for files, and returns a `Graph`. The docstring of `convsv_core._network.graph` says how
shapes and numbers are meant. `convsv_core.lipschitz` takes a `Graph` too.
"""

from __future__ import annotations

from convsv_core._network.difference import output_difference
from convsv_core._network.graph import Graph, Node, Shape
from convsv_core._network.kinds import (
    AveragePool,
    AxisMaps,
    BranchMatmul,
    Concatenate,
    Constant,
    Convolution,
    Elementwise,
    Expand,
    Extremum,
    Gather,
    Identity,
    Input,
    Kind,
    LocalResponse,
    LogSoftmax,
    Matmul,
    MaxPool,
    Normalize,
    Pad,
    Permute,
    Product,
    Quotient,
    Reduce,
    Reshape,
    Scale,
    Slice,
    Softmax,
    Sum,
    Unsupported,
)
from convsv_core._network.opaque import Bounded
from convsv_core._network.rule_types import Evaluated, Factors, KindRule, LinearMap, NoRule, Range, Tensor
from convsv_core.reports.constant import network_graph, network_lipschitz

__all__ = [
    "AveragePool",
    "AxisMaps",
    "Bounded",
    "BranchMatmul",
    "Concatenate",
    "Constant",
    "Convolution",
    "Elementwise",
    "Evaluated",
    "Expand",
    "Extremum",
    "Factors",
    "Gather",
    "Graph",
    "Identity",
    "Input",
    "Kind",
    "KindRule",
    "LinearMap",
    "LocalResponse",
    "LogSoftmax",
    "Matmul",
    "MaxPool",
    "NoRule",
    "Node",
    "Normalize",
    "Pad",
    "Permute",
    "Product",
    "Quotient",
    "Range",
    "Reduce",
    "Reshape",
    "Scale",
    "Shape",
    "Slice",
    "Softmax",
    "Sum",
    "Tensor",
    "Unsupported",
    "network_graph",
    "network_lipschitz",
    "output_difference",
]
