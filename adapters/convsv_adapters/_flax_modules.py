"""The plugin that knows flax modules; it imports flax for no other object."""

from __future__ import annotations

import sys

from convsv_core.layers import Layer
from convsv_core.plugins import hookimpl


@hookimpl
def convsv_model_layers(model: object, example_input: object) -> list[Layer] | None:
    """Find every convolution of a flax module: see `convsv_adapters.flax.conv_layers`."""
    loaded = [sys.modules[name].Module for name in ("flax.nnx", "flax.linen") if name in sys.modules]
    if not isinstance(model, tuple(loaded)):
        return None
    from convsv_adapters.flax import model_layers

    return model_layers(model, example_input)
