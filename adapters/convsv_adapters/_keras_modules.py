"""The plugin that knows Keras layers; it imports Keras for no other object."""

from __future__ import annotations

import sys

from convsv_core.layers import Layer
from convsv_core.plugins import hookimpl


@hookimpl(tryfirst=True)  # on its backend torch a layer of Keras is a torch.nn.Module too
def convsv_model_layers(model: object, example_input: object) -> list[Layer] | None:
    """Find every convolution of a Keras model: see `convsv_adapters.keras.conv_layers`."""
    keras = sys.modules.get("keras")
    if keras is None or not isinstance(model, keras.layers.Layer):
        return None
    from convsv_adapters.keras._layers import conv_layers, model_layer

    return [model_layer(layer) for layer in conv_layers(model, example_input)]
