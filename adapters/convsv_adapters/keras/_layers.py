"""The convolutions of Keras models: their kernels, their geometry, and the extents that calling them shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

from convsv_adapters._operators import Extents
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS
from convsv_core.layers import Layer

if keras.backend.backend() not in ("torch", "jax", "numpy"):
    raise ImportError(
        f"Keras runs on its backend {keras.backend.backend()!r}: convsv_adapters.keras takes the arrays of torch, jax "
        f"and numpy; set the environment variable KERAS_BACKEND to one of these before keras is imported"
    )

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """One convolution kernel of a model.

    Attributes
    ----------
    name : str
        Path of the kernel's variable in the model.
    layer : keras.layers.Layer
        A separable one has two kernels, which are two of these.
    part : str
        "kernel", "depthwise" or "pointwise": what Keras's arguments for the kernel begin with, as in
        ``depthwise_constraint``.
    variable : keras.Variable
    conv : Conv
        Geometry, the layer's own padding included, of the kernel that `as_kernel` gives.
    depthwise : bool
        Whether the axis of the input channels becomes part of that of the outputs, as a `Conv` of groups has it.
    input_shapes : tuple of tuple of int
        Each spatial extents of its input that a call of the model showed, in order of appearance.
    note : str
        What a reader must know, or "".
    """

    name: str
    layer: keras.layers.Layer
    part: str
    variable: Any
    conv: Conv
    depthwise: bool = False
    input_shapes: tuple[Extents, ...] = ()
    note: str = ""

    @property
    def input_shape(self) -> Extents | None:
        """The first of `input_shapes`, or None."""
        return self.input_shapes[0] if self.input_shapes else None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel as `conv` names its axes."""
        return kernel_shape(tuple(self.variable.shape), self.depthwise)

    @property
    def kernel(self) -> Any:
        """The kernel as `conv` names its axes, an array of Keras's backend."""
        return keras.ops.reshape(keras.ops.convert_to_tensor(self.variable), self.kernel_shape)


def kernel_shape(shape: tuple[int, ...], depthwise: bool) -> tuple[int, ...]:
    """Shape of a variable's kernel with the axes I and O: of a depthwise one, of which Keras has (C, multiplier)."""
    return (*shape[:-2], 1, shape[-2] * shape[-1]) if depthwise else shape


def conv_layers(model: keras.layers.Layer, example_input: object = None) -> list[ConvLayer]:
    """Find every convolution kernel of a Keras model, with its geometry and the true extents of its inputs.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        Built; nested models and shared layers are looked into once.
    example_input : array, keras.KerasTensor, tuple of int, or a list or mapping of the first two, optional
        What the model is called with, or the shape of the one array that it is called with. The shapes alone are
        followed, as Keras does it: on the NumPy backend, by a call with arbitrary numbers.

    Returns
    -------
    list of ConvLayer
        In the order of the model. `Conv1D` to `Conv3D`, `DepthwiseConv1D` and `2D`, `SeparableConv1D` and `2D` with two
        kernels each, and `Conv1DTranspose` to `Conv3DTranspose`.

    Raises
    ------
    TypeError
        `model` is of another class.
    ValueError
        A layer is not built.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.SeparableConv2D(8, 3, strides=2)])
    >>> for layer in conv_layers(model, (1, 32, 32, 3)):
    ...     print(layer.part, layer.conv.groups, layer.kernel_shape, layer.input_shape)
    depthwise 3 (3, 3, 1, 3) (32, 32)
    pointwise 1 (1, 1, 3, 8) (15, 15)
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}: wanted a keras.Model or a "
            f"keras.layers.Layer"
        )
    layers = list(dict.fromkeys(_every_layer(model)))
    seen = _extents(model, layers, example_input) if example_input is not None else {}
    return [found for layer in layers for found in _kernels(layer, tuple(seen.get(id(layer), ())))]


def model_layer(layer: ConvLayer) -> Layer:
    """The layer as a report of the core takes it: at the largest of its extents, where there are several."""
    note, extents = layer.note, layer.input_shape
    if len(layer.input_shapes) > 1:
        extents = max(layer.input_shapes, key=math.prod)
        more = f"takes {len(layer.input_shapes)} different extents, of which the largest is used"
        note = f"{note}; {more}" if note else more
    if extents is None and not note:
        note = "extents unknown: wanted an example_input"
    return Layer(layer.name, layer.kernel, layer.conv, extents, note)


def _every_layer(model: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    yield model
    for layer in getattr(model, "_layers", ()):
        if isinstance(layer, keras.layers.Layer):
            yield from _every_layer(layer)


def _kernels(layer: keras.layers.Layer, input_shapes: tuple[Extents, ...]) -> Iterator[ConvLayer]:
    if not isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE)):
        return
    if not layer.built:
        raise ValueError(
            f"the layer {layer.name!r} is not built, and has no kernel: wanted a model that was built or called"
        )
    rank = len(layer.kernel_size)
    letters = SPATIAL_LETTERS[rank]
    strides, dilation = _per_axis(layer.strides, rank), _per_axis(layer.dilation_rate, rank)
    note = "the low-rank adaptation of the kernel is left out" if getattr(layer, "lora_enabled", False) else ""
    geometry: dict[str, Any] = {"stride": strides, "dilation": dilation, "padding_mode": "zeros"}

    def found(part: str, variable: Any, conv: Conv, **more: Any) -> ConvLayer:
        return ConvLayer(variable.path, layer, part, variable, conv, input_shapes=input_shapes, note=note, **more)

    if isinstance(layer, TRANSPOSED):
        yield found("kernel", layer.kernel, Conv(f"{letters}OI", padding=layer.padding, transposed=True, **geometry))
        return
    sides = _sides(layer.padding, tuple(layer.kernel_size), strides, dilation, input_shapes)
    if isinstance(layer, CONVOLUTIONS):
        variable = layer._kernel if hasattr(layer, "_kernel") else layer.kernel
        yield found("kernel", variable, Conv(f"{letters}IO", groups=layer.groups, padding=sides, **geometry))
        return
    separable = isinstance(layer, SEPARABLE)
    variable = layer.depthwise_kernel if separable else layer.kernel
    conv = Conv(f"{letters}IO", groups=int(variable.shape[-2]), padding=sides, **geometry)
    yield found("depthwise", variable, conv, depthwise=True)
    if separable:
        input_shapes = tuple(_outputs(n, tuple(layer.kernel_size), conv) for n in input_shapes)
        yield found("pointwise", layer.pointwise_kernel, Conv(f"{letters}IO", padding="valid", padding_mode="zeros"))


def _sides(padding: str, taps: Extents, strides: Extents, dilation: Extents, shapes: tuple[Extents, ...]) -> Any:
    """Elements added on each side: those of "same" depend on the extents, of which the first are taken."""
    spans = [d * (k - 1) + 1 for k, d in zip(taps, dilation, strict=True)]
    if padding == "causal":
        return tuple((span - 1, 0) for span in spans)
    if padding != "same" or not shapes:
        return padding
    totals = [max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in zip(shapes[0], strides, spans, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def _outputs(extents: Extents, taps: Extents, conv: Conv) -> Extents:
    geometry = zip(extents, conv.pads(taps), taps, conv.dilations, conv.strides, strict=True)
    return tuple((n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, pad, k, d, s in geometry)


def _per_axis(value: Any, rank: int) -> Extents:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(one) for one in value)


def _extents(
    model: keras.layers.Layer, layers: list[keras.layers.Layer], example_input: object
) -> dict[int, dict[Extents, None]]:
    """Spatial extents of the inputs of layers, by their identity, from a call of the model with shapes alone."""
    seen: dict[int, dict[Extents, None]] = {}
    watched = [layer for layer in layers if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE))]

    def watching(layer: keras.layers.Layer) -> Any:
        call = layer.call

        def watch(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            shape = tuple(inputs.shape)
            extents = shape[1:-1] if layer.data_format == "channels_last" else shape[2:]
            seen.setdefault(id(layer), {})[tuple(int(n) for n in extents)] = None
            return call(inputs, *args, **kwargs)

        return watch

    try:
        for layer in watched:
            object.__setattr__(layer, "call", watching(layer))
        _Call(model).compute_output_spec(_symbolic(example_input))
    finally:
        for layer in watched:
            layer.__dict__.pop("call", None)
    return seen


class _Call(keras.layers.Layer):  # type: ignore[misc]
    """A call of a model: what Keras makes symbolic are the calls of a layer."""

    def __init__(self, model: keras.layers.Layer) -> None:
        super().__init__()
        self._model = [lambda: model]  # a list of functions, into which Keras does not look for layers

    def call(self, inputs: Any) -> Any:
        return self._model[0]()(inputs, training=False)


def _symbolic(example_input: object) -> Any:
    if isinstance(example_input, tuple) and all(isinstance(n, int) for n in example_input):
        return keras.KerasTensor(example_input)
    return keras.tree.map_structure(
        lambda one: keras.KerasTensor(tuple(one.shape), keras.backend.standardize_dtype(one.dtype)), example_input
    )
