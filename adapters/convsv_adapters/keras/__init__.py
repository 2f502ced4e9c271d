"""Operator norms of convolutions in Keras 3: a constraint, a regularizer and a callback, on torch, JAX and NumPy.

>>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
>>> layers = constrain(model, 1.0)  # the line that is added to a script
>>> layers[0].layer.kernel_constraint.bound
1.0

Keras's own `SpectralNormalization` divides by the norm of the reshaped kernel, which is not that of the layer.
"""

from __future__ import annotations

from typing import Any

import keras

import convsv_core
from convsv_adapters.keras._attach import constrain, penalize
from convsv_adapters.keras._callback import OperatorNormProjection
from convsv_adapters.keras._constraint import OperatorNorm
from convsv_adapters.keras._layers import ConvLayer, conv_layers
from convsv_adapters.keras._regularizer import OperatorNormPenalty
from convsv_core.analysis import LayerReport

__all__ = [
    "ConvLayer",
    "OperatorNorm",
    "OperatorNormPenalty",
    "OperatorNormProjection",
    "analyze",
    "constrain",
    "conv_layers",
    "penalize",
]


def analyze(model: keras.layers.Layer, example_input: object = None, **options: Any) -> list[LayerReport]:
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
