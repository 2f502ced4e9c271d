"""The geometry that a constraint or a regularizer of Keras needs, and checks of their arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import keras

from convsv_adapters._layers import one_tap_conv
from convsv_adapters.keras._layers import kernel_shape
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS

__all__ = ["KernelGeometry", "check_dtype", "register"]

T = TypeVar("T")

GEOMETRY = ("strides", "dilation_rate", "groups", "transposed", "depthwise", "input_shape", "linear")
"""Names of the arguments of `KernelGeometry`."""


def register(cls: type[T]) -> type[T]:
    """Decorator: register a class with Keras, under its public path, which saved models contain."""
    cls.__module__ = "convsv_adapters.keras"
    return keras.saving.register_keras_serializable(package="convsv")(cls)


class KernelGeometry:
    """The geometry of a kernel, in Keras's words.

    Keras gives a constraint or a regularizer the kernel, and not its layer.

    Parameters
    ----------
    strides, dilation_rate : int or tuple of int, default 1
    groups : int, default 1
    transposed : bool, default False
        Whether the kernel is one of a `Conv1DTranspose` to `Conv3DTranspose`.
    depthwise : bool, default False
        Whether the kernel is one of a `DepthwiseConv`, or the first of a `SeparableConv`.
    input_shape : tuple of int, optional
        Spatial extents of the input of a circular convolution. Without it, the norm is the one for every input size
        and for the layer's own padding.
    linear : bool, default False
        Whether the kernel is the matrix of a `Dense` layer. No other argument matters then.
    """

    def __init__(
        self,
        strides: int | Iterable[int] = 1,
        dilation_rate: int | Iterable[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        depthwise: bool = False,
        input_shape: Iterable[int] | None = None,
        linear: bool = False,
    ) -> None:
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.dilation_rate = dilation_rate if isinstance(dilation_rate, int) else tuple(dilation_rate)
        self.groups, self.transposed, self.depthwise = groups, transposed, depthwise
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.linear = linear
        if depthwise and (transposed or groups != 1):
            raise ValueError("depthwise=True: the groups follow from the kernel, and there is no transposed such layer")

    def conv(self, shape: tuple[int, ...]) -> Conv:
        """Return the geometry of a kernel whose variable has a shape."""
        if self.linear:
            if len(shape) != 2:
                raise ValueError(f"linear=True, and the kernel has shape {shape}: wanted a matrix")
            return one_tap_conv("WIO")
        if len(shape) - 2 not in SPATIAL_LETTERS:
            raise ValueError(f"the kernel has shape {shape}: wanted a convolution's, with 3 to 5 axes")
        layout = SPATIAL_LETTERS[len(shape) - 2] + ("OI" if self.transposed else "IO")
        groups = shape[-2] if self.depthwise else self.groups
        return Conv(layout, self.strides, self.dilation_rate, groups, transposed=self.transposed)

    def kernel(self, variable: Any) -> Any:
        """Return the kernel of a variable with the axes that `conv` names."""
        kernel = keras.ops.convert_to_tensor(variable)
        return keras.ops.reshape(kernel, kernel_shape(tuple(kernel.shape), self.depthwise))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments, for `from_config`."""
        return {name: getattr(self, name) for name in GEOMETRY}


def check_dtype(kernel: Any, name: str) -> None:
    """Raise TypeError unless a kernel is float32 or float64."""
    dtype = keras.backend.standardize_dtype(kernel.dtype)
    if dtype not in ("float32", "float64"):
        raise TypeError(
            f"{name!r} is a variable of {dtype}: wanted float32 or float64, which variables are under the policy "
            f"'mixed_{dtype}' too"
        )
