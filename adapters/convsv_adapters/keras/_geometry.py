"""How a kernel of Keras acts, and checks of what its constraints are told."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras

from convsv_adapters.keras._layers import kernel_shape
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS
from convsv_core.projection import METHODS, ProjectionMethod

__all__ = ["GEOMETRY", "Geometry", "check_bound", "check_dtype", "check_method", "register"]

register = keras.saving.register_keras_serializable(package="convsv")

GEOMETRY = ("strides", "dilation_rate", "groups", "transposed", "depthwise", "input_shape")
"""What the constraint and the regularizer have to know of a layer beside its kernel."""


class Geometry:
    """How a kernel acts, in Keras's words: neither a constraint nor a regularizer is told of its layer.

    Parameters
    ----------
    strides, dilation_rate : int or tuple of int, default 1
    groups : int, default 1
    transposed : bool, default False
        The kernel of a `Conv1DTranspose` to `Conv3DTranspose`.
    depthwise : bool, default False
        The kernel of a `DepthwiseConv`, or the first of a `SeparableConv`.
    input_shape : tuple of int, optional
        Spatial extents of the input, for the circular convolution of these. Without it, what is meant holds for every
        input size and for the layer's own padding.
    """

    def __init__(
        self,
        strides: int | Iterable[int] = 1,
        dilation_rate: int | Iterable[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        depthwise: bool = False,
        input_shape: Iterable[int] | None = None,
    ) -> None:
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.dilation_rate = dilation_rate if isinstance(dilation_rate, int) else tuple(dilation_rate)
        self.groups, self.transposed, self.depthwise = groups, transposed, depthwise
        self.input_shape = None if input_shape is None else tuple(input_shape)
        if depthwise and (transposed or groups != 1):
            raise ValueError("depthwise=True: the groups follow from the kernel, and there is no transposed such layer")

    def conv(self, shape: tuple[int, ...]) -> Conv:
        """Describe the kernel of a variable's shape."""
        if len(shape) - 2 not in SPATIAL_LETTERS:
            raise ValueError(f"the kernel has shape {shape}: wanted that of a convolution, with 3 to 5 axes")
        layout = SPATIAL_LETTERS[len(shape) - 2] + ("OI" if self.transposed else "IO")
        groups = shape[-2] if self.depthwise else self.groups
        return Conv(layout, self.strides, self.dilation_rate, groups, transposed=self.transposed)

    def kernel(self, variable: Any) -> Any:
        """The kernel of a variable with the axes that `conv` names."""
        kernel = keras.ops.convert_to_tensor(variable)
        return keras.ops.reshape(kernel, kernel_shape(tuple(kernel.shape), self.depthwise))

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same from."""
        return {name: getattr(self, name) for name in GEOMETRY}


def check_bound(bound: float) -> float:
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
        raise ValueError(f"bound={bound!r}: wanted a positive number")
    return float(bound)


def check_method(method: ProjectionMethod) -> ProjectionMethod:
    if method not in METHODS:
        raise ValueError(f"method={method!r}: wanted one of {', '.join(METHODS)}")
    return method


def check_dtype(kernel: Any, name: str) -> None:
    dtype = keras.backend.standardize_dtype(kernel.dtype)
    if dtype not in ("float32", "float64"):
        raise TypeError(
            f"{name!r} is a variable of {dtype}: wanted float32 or float64, which variables are under the policy "
            f"'mixed_{dtype}' too"
        )
