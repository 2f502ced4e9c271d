"""A constraint of Keras on the operator norm of a kernel."""

from __future__ import annotations

from typing import Any

import keras

import convsv_core
from convsv_adapters._layers import check_bound, check_method
from convsv_adapters.keras._geometry import KernelGeometry, check_dtype, register
from convsv_core.conv import as_int
from convsv_core.plugins import backend_of
from convsv_core.training import CERTIFICATE_RTOL, ProjectionMethod, rescale_together

__all__ = ["OperatorNorm"]


@register
class OperatorNorm(keras.constraints.Constraint):  # type: ignore[misc]
    """Keep the operator norm of a convolution at or below a bound after every update of its kernel.

    Parameters
    ----------
    bound : float, default 1
        Positive and finite.
    method : {"rescale", "dykstra", "alternating", "newton-schulz"}, default "rescale"
        As for `convsv_core.project`. "rescale" multiplies the kernel by one number, "dykstra" comes near the nearest
        kernel within the bound.
    steps : int, default 10
        Iterations of the methods that iterate.
    strides, dilation_rate, groups, transposed, depthwise, input_shape, linear
        Geometry of the layer, in Keras's words. `constrain` takes it from the layers of a model. `depthwise` is for
        the kernels of `DepthwiseConv` and the first of `SeparableConv`, and `linear` for those of `Dense`. With an
        `input_shape`, the circular convolution on these extents is bounded; without it, the layer with its own padding
        for every input size.

    Notes
    -----
    A call takes a variable and returns a tensor of its shape and dtype, float32 or float64 (with mixed precision,
    variables are float32). Traceable: Keras's trainer on JAX compiles the constraint. The certificate is then that of a
    fixed grid, up to 1 % above the norm. The result is 1e-3 below the bound, so that `convsv_core.norm_bounds` finds it
    within. A constant to differentiation.

    Examples
    --------
    >>> import keras
    >>> layer = keras.layers.Conv2D(8, 3, strides=2, kernel_constraint=OperatorNorm(1.0, strides=2))
    >>> OperatorNorm.from_config(layer.kernel_constraint.get_config()).geometry.strides
    2
    """

    def __init__(
        self, bound: float = 1.0, method: ProjectionMethod = "rescale", steps: int = 10, **geometry: Any
    ) -> None:
        self.bound, self.method = check_bound(bound, positive=True), check_method(method)
        self.steps = as_int("steps", steps, least=1)
        self.geometry = KernelGeometry(**geometry)

    def __call__(self, w: Any) -> Any:
        """Return the kernel within the bound."""
        kernel = self.geometry.kernel(w)
        check_dtype(kernel, getattr(w, "path", "kernel"))
        conv, extents = self.geometry.conv(tuple(w.shape)), self.geometry.input_shape
        backend, bound = backend_of(kernel), self.bound / (1 + CERTIFICATE_RTOL)
        traced = backend.truth(keras.ops.all(keras.ops.isfinite(kernel))) is None
        if self.method == "rescale" and not traced:
            ((found, _),) = rescale_together([backend.stop_gradient(kernel)], extents, conv, bound)
        else:
            options: dict[str, Any] = {"steps": self.steps} if traced else {"max_iterations": self.steps}
            found = convsv_core.project(kernel, extents, conv, bound, method=self.method, **options).kernel
        return keras.ops.reshape(keras.ops.cast(found, kernel.dtype), tuple(w.shape))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, for `from_config`."""
        return {"bound": self.bound, "method": self.method, "steps": self.steps, **self.geometry.get_config()}
