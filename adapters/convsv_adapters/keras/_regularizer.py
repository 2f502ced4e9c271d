"""A regularizer of Keras on the singular values of a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from convsv_adapters._operators import check_penalty, layer_penalty
from convsv_adapters.keras._geometry import Geometry, register

__all__ = ["OperatorNormPenalty"]


@register
class OperatorNormPenalty(keras.regularizers.Regularizer):  # type: ignore[misc]
    """Add a penalty on the singular values of a convolution to the loss.

    Parameters
    ----------
    kind : str, default "norm_hinge"
        A function of `convsv_core.penalties`. Without an `input_shape`, "norm_hinge", "squared_norm" and
        "orthogonality" alone, for every input size.
    weight : float, default 0.001
    options : mapping, optional
        Of that function; a bound of 1 for "norm_hinge" unless given.
    strides, dilation_rate, groups, transposed, depthwise, input_shape
        See `Geometry`; `penalize` fills them in for the layers of a model.

    Notes
    -----
    Differentiable and traceable, on torch and JAX.

    Examples
    --------
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
        self.geometry = Geometry(**geometry)

    def __call__(self, x: Any) -> Any:
        """The weighted penalty: a 0-d tensor."""
        extents = self.geometry.input_shape
        conv = self.geometry.conv(tuple(x.shape))
        name, shapes = getattr(x, "path", "kernel"), () if extents is None else (extents,)
        return self.weight * layer_penalty(name, self.geometry.kernel(x), conv, shapes, self.kind, self.options)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same from."""
        return {"kind": self.kind, "weight": self.weight, "options": self.options, **self.geometry.get_config()}
