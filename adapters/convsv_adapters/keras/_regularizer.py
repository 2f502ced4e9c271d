"""A regularizer of Keras on the singular values of a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from convsv_adapters._layers import check_penalty, layer_penalty, make_layer
from convsv_adapters.keras._geometry import KernelGeometry, register

__all__ = ["OperatorNormPenalty"]


@register
class OperatorNormPenalty(keras.regularizers.Regularizer):  # type: ignore[misc]
    """Add a penalty on the singular values of a convolution to the loss.

    Parameters
    ----------
    kind : str, default "norm_hinge"
        A function of `convsv_core.penalties`. Without an `input_shape` it is "norm_hinge", "squared_norm" or
        "orthogonality", for every input size.
    weight : float, default 0.001
        Factor of the penalty.
    options : mapping, optional
        Arguments of the penalty. By default a bound of 1 for "norm_hinge", and none for others.
    strides, dilation_rate, groups, transposed, depthwise, input_shape, linear
        Geometry of the layer, as for `OperatorNorm`. `penalize` takes it from the layers of a model.

    Notes
    -----
    Differentiable and traceable, on torch and JAX.

    Examples
    --------
    >>> import keras
    >>> penalty = OperatorNormPenalty("orthogonality", 0.01)
    >>> layer = keras.layers.Conv2D(8, 3, kernel_regularizer=penalty)
    """

    def __init__(
        self,
        kind: str = "norm_hinge",
        weight: float = 1e-3,
        options: Mapping[str, Any] | None = None,
        **geometry: Any,
    ) -> None:
        check_penalty(kind)
        self.kind, self.weight = kind, float(weight)
        self.options = dict(options) if options is not None else {"bound": 1.0} if kind == "norm_hinge" else {}
        self.geometry = KernelGeometry(**geometry)

    def __call__(self, x: Any) -> Any:
        """Return the weighted penalty: a 0-d tensor."""
        extents, kernel = self.geometry.input_shape, self.geometry.kernel(x)
        layer = make_layer(
            name=getattr(x, "path", "kernel"),
            kernel_shape=tuple(kernel.shape),
            conv=self.geometry.conv(tuple(x.shape)),
            input_shapes=() if extents is None else (extents,),
        )
        return self.weight * layer_penalty(layer, kernel, self.kind, self.options)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, for `from_config`."""
        return {"kind": self.kind, "weight": self.weight, "options": self.options, **self.geometry.get_config()}
