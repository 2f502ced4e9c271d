"""The plugin that knows equinox modules; it imports equinox for no other object."""

from __future__ import annotations

import sys

from convsv_core.layers import Layer
from convsv_core.plugins import hookimpl


@hookimpl
def convsv_model_layers(model: object, example_input: object) -> list[Layer] | None:
    """Find every convolution of an equinox module: see `convsv_adapters.equinox.conv_layers`."""
    equinox = sys.modules.get("equinox")
    if equinox is None or not isinstance(model, equinox.Module):
        return None
    from convsv_adapters.equinox import model_layers

    return model_layers(model, example_input)
