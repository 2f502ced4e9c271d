"""The plugin that knows PyTorch modules; it imports PyTorch for no other object."""

from __future__ import annotations

import sys

from convsv_core.layers import Layer
from convsv_core.plugins import hookimpl


@hookimpl
def convsv_model_layers(model: object, example_input: object) -> list[Layer] | None:
    """Find every convolution of a `torch.nn.Module`: see `convsv_adapters.torch.conv_layers`."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        return None
    from convsv_adapters.torch._layers import conv_layers, model_layer

    return [model_layer(layer) for layer in conv_layers(model, example_input)]
