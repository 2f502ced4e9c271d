"""Operator norms of convolutions in Keras 3: constraints, regularizers and callbacks, on torch, JAX and NumPy.

>>> import keras
>>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
>>> layers = constrain(model, 1.0)  # the line that is added to a script
>>> layers[0].layer.kernel_constraint.bound
1.0

Keras's own `SpectralNormalization` divides by the norm of the reshaped kernel, which is not the norm of the layer.
"""

from convsv_adapters._layers import ConvLayer
from convsv_adapters._monitor import LayerFigures, Measurement
from convsv_adapters.keras._attach import constrain, penalize
from convsv_adapters.keras._callback import OperatorNormProjection
from convsv_adapters.keras._constraint import OperatorNorm
from convsv_adapters.keras._layers import conv_layers
from convsv_adapters.keras._monitor import SpectrumMonitor
from convsv_adapters.keras._regularizer import OperatorNormPenalty
from convsv_core import analyze

__all__ = [
    "ConvLayer",
    "LayerFigures",
    "Measurement",
    "OperatorNorm",
    "OperatorNormPenalty",
    "OperatorNormProjection",
    "SpectrumMonitor",
    "analyze",
    "constrain",
    "conv_layers",
    "penalize",
]
