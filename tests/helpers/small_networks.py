"""Small networks as graphs of maps, node by node."""

from __future__ import annotations

import numpy as np

from convsv_core import Conv
from convsv_core.networks import Convolution, Graph, Input, Node

__all__ = ["conv", "network"]


def conv(name, source, kernel, shape, padding, *, mode="zeros", stride=1, dilation=1):
    """Return a node that convolves an input of this shape."""
    kernel = np.asarray(kernel, float)
    letters = {3: "W", 4: "HW"}[kernel.ndim]
    geometry = Conv("OI" + letters, stride, dilation, shape[1] // kernel.shape[1], padding, mode)
    sizes = zip(shape[2:], kernel.shape[2:], geometry.pads(kernel.shape[2:]), geometry.strides, strict=True)
    out = tuple((n + sum(pads) - dilation * (k - 1) - 1) // s + 1 for n, k, pads, s in sizes)
    return Node(name, Convolution(kernel, geometry), (source,), (1, len(kernel), *out))


def network(shape, *nodes, outputs=None):
    return Graph((Node("x", Input(), (), shape), *nodes), outputs or (nodes[-1].name,))
