"""From named arrays to layers, for formats that store no geometry.

An array is a kernel where its name, its shape and the arrays beside it say so (`names`, `companions`). Weights that are
stored in parts are put together (`parts`), and matrices are dense layers (`dense`).
"""

from convsv_adapters.parameters.layers import (
    NetworkArrays,
    kernel_ranks,
    layers_from_arrays,
    layers_from_networks,
    refuse_geometry,
)
from convsv_adapters.parameters.names import LAYOUTS, in_natural_order, is_kernel, may_be_kernel, not_floating
from convsv_adapters.parameters.parts import HostArray, put_together

__all__ = [
    "LAYOUTS",
    "HostArray",
    "NetworkArrays",
    "in_natural_order",
    "is_kernel",
    "kernel_ranks",
    "layers_from_arrays",
    "layers_from_networks",
    "may_be_kernel",
    "not_floating",
    "put_together",
    "refuse_geometry",
]
