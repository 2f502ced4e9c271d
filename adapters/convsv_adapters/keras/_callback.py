"""A callback of Keras that projects convolutions in training."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import keras

import convsv_core
from convsv_adapters._layers import ConvLayer, check_bound, check_method, operators_of
from convsv_adapters.keras._folding import Folded, bound_normalisations, following
from convsv_adapters.keras._geometry import check_dtype, register
from convsv_adapters.keras._layers import conv_layers, every_layer
from convsv_core.conv import as_int
from convsv_core.layers import Operator
from convsv_core.plugins import backend_of
from convsv_core.training import CERTIFICATE_RTOL, ProjectionMethod, rescale_together

__all__ = ["OperatorNormProjection"]


@register
class OperatorNormProjection(keras.callbacks.Callback):  # type: ignore[misc]
    """Bring every convolution of the model within a bound after batches of training, and log the certified norms.

    Unlike `OperatorNorm` it is not compiled. So its certificate is exact on JAX too, and it can leave out batches.

    Parameters
    ----------
    bound : float, default 1
        Positive and finite.
    every : int, default 1
        Batches from one projection to the next. There is one more at the end of every epoch.
    method : str, default "rescale"
        As for `convsv_core.project`.
    circular : bool, default False
        Bound the circular convolution at each layer's extents, in place of the layer with its own padding for every
        input size.
    example_input : optional
        As for `conv_layers`; needed with `circular`.
    linear : bool, default False
        Bound the kernels of `Dense` layers too.
    batch_norm : "fold", optional
        Bound every batch normalisation too, as it is in inference mode: together with the layer that it follows
        directly, whose own kernel is then free, or alone. The normalisation's scale is made smaller, whatever the
        `method`. The model has to be functional or sequential, as have nested models with normalisations.

    Attributes
    ----------
    norms : dict of str to float
        Certified upper bound of each kernel's norm at the last projection, by the path of its variable. It is the norm
        of both where a normalisation follows the layer. A normalisation that stands alone has the path of its scale.

    Notes
    -----
    The logs of an epoch get ``"operator_norm"``, the largest of `norms`. Kernels are left 1e-3 below the bound, so that
    `convsv_core.norm_bounds` finds them within.

    Examples
    --------
    >>> OperatorNormProjection(1.0, every=10).get_config()["every"]
    10
    """

    def __init__(
        self,
        bound: float = 1.0,
        every: int = 1,
        method: ProjectionMethod = "rescale",
        circular: bool = False,
        example_input: Any = None,
        linear: bool = False,
        batch_norm: Literal["fold"] | None = None,
    ) -> None:
        super().__init__()
        self.bound, self.every = check_bound(bound, positive=True), as_int("every", every, least=1)
        self.method, self.circular, self.example_input = check_method(method), circular, example_input
        if batch_norm not in (None, "fold"):
            raise ValueError(f"batch_norm={batch_norm!r}: wanted 'fold' or None")
        self.linear, self.batch_norm = linear, batch_norm
        self.norms: dict[str, float] = {}
        self._batches = 0

    def project(self, model: keras.Model | None = None) -> dict[str, float]:
        """Project the convolutions of `model`, or of the model that is trained, and return `norms`."""
        model = self.model if model is None else model  # on JAX, reading `self.model` writes the trainer's state back
        groups: dict[Any, list[ConvLayer]] = {}
        found = conv_layers(model, self.example_input, linear=self.linear)
        folded: list[Folded] = []
        if self.batch_norm == "fold":
            followed = following(model, every_layer(model), found)
            found, folded = followed.bare, followed.folded
        for layer in found:
            key = layer.kernel_shape, str(layer.kernel.dtype), operators_of(layer, self.circular)
            groups.setdefault(key, []).append(layer)
        self.norms = {}
        for (*_, operators), layers in groups.items():
            for layer, norm in zip(layers, self._project(layers, operators), strict=True):
                self.norms[layer.name] = norm
        for name, norm in bound_normalisations(folded, self.bound, self.circular).items():
            self.norms[name] = max(norm, self.norms.get(name, 0.0))
        return self.norms

    def _project(self, layers: list[ConvLayer], operators: tuple[Operator, ...]) -> list[float]:
        """Project the kernels of layers with the same operators, and return their certified norms."""
        backend = backend_of(layers[0].kernel)
        check_dtype(layers[0].kernel, layers[0].name)
        kernels = [backend.stop_gradient(layer.kernel) for layer in layers]
        norms = [0.0] * len(layers)
        for operator in operators:
            bound = operator.limit(self.bound / (1 + CERTIFICATE_RTOL))
            if self.method == "rescale":
                found = rescale_together(kernels, operator.input_shape, operator.conv, bound)
            else:
                project = functools.partial(
                    convsv_core.project, input_shape=operator.input_shape, conv=operator.conv, bound=bound
                )
                projections = [project(kernel, method=self.method) for kernel in kernels]
                found = [(one.kernel, float(one.norm)) for one in projections]
            kernels = [kernel for kernel, _ in found]
            norms = [max(norm, operator.layer_upper(one)) for norm, (_, one) in zip(norms, found, strict=True)]
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.variable.assign(keras.ops.reshape(kernel, tuple(layer.variable.shape)))
        return norms

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Project if it is due."""
        self._batches += 1
        if self._batches % self.every == 0:
            self.project()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Project, and log the largest norm."""
        self.project()
        if logs is not None:
            logs["operator_norm"] = max(self.norms.values(), default=math.nan)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, without the `example_input`, for `from_config`."""
        names = ("bound", "every", "method", "circular", "linear", "batch_norm")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OperatorNormProjection:
        """Return a callback with the arguments that `get_config` returned."""
        return cls(**config)
