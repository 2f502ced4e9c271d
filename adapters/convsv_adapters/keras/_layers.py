"""The convolutions of Keras models: their kernels, their geometry, and the extents of their inputs in a call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import keras

from convsv_adapters._keras_rules import per_axis, sides, transposed_pads
from convsv_adapters._layers import ConvLayer, make_layer, model_layer, one_tap_conv
from convsv_core import Conv
from convsv_core.conv import SPATIAL_LETTERS, transposed_conv
from convsv_core.layers import Extents, Layer, dense_layer, join_notes

__all__ = ["conv_layers", "declared_input", "kernel_shape", "model_layers"]

if keras.backend.backend() not in ("torch", "jax", "numpy"):
    raise ImportError(
        f"Keras runs on its backend {keras.backend.backend()!r}: convsv_adapters.keras takes the arrays of torch, jax "
        f"and numpy; set the environment variable KERAS_BACKEND to one of these before keras is imported"
    )

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
EVERY_KIND = (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE)
LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)
RECURRENT = (keras.layers.ConvLSTM1D, keras.layers.ConvLSTM2D, keras.layers.ConvLSTM3D)

FREE_EXTENT = 128
"""The extent that a report takes for an axis that `keras.Input` leaves free. A guess, as for models in files."""


def kernel_shape(shape: tuple[int, ...], depthwise: bool) -> tuple[int, ...]:
    """Return the shape of a kernel with the axes I and O, from the variable's.

    The last axes of a depthwise one are (C, multiplier). The matrix of a linear layer gets an axis for its one tap.
    """
    if len(shape) == 2:
        return (1, *shape)
    return (*shape[:-2], 1, shape[-2] * shape[-1]) if depthwise else shape


def conv_layers(model: keras.layers.Layer, example_input: object = None, *, linear: bool = False) -> list[ConvLayer]:
    """Find every convolution kernel of a Keras model, with its geometry and the true extents of its inputs.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        Built. Layers are found in nested models, and shared layers once.
    example_input : array, keras.KerasTensor, tuple of int, or a list or mapping of the first two, optional
        The argument of the model, or the shape of its one array. Keras traces the shapes alone; on the NumPy backend,
        by a call with arbitrary numbers.
    linear : bool, default False
        List `Dense` layers too, as convolutions with one tap on an extent of one pixel. `EinsumDense` layers have no
        geometry.

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
    kinds = (*EVERY_KIND, *LINEAR) if linear else EVERY_KIND
    return [found for _, kernels in _by_layer(model, example_input, kinds) for found in kernels]


def model_layers(model: keras.layers.Layer, example_input: object, linear: bool = False) -> list[Layer]:
    """Return the convolutions with their kernels, as a report of the core takes them.

    Without an example input the extents are those of `keras.Input`, with `FREE_EXTENT` for axes that it leaves free.
    The kernels of recurrent convolutions are listed without geometry, because no norm of one kernel bounds the layer.
    With `linear` the `Dense` layers are among the rows.
    """
    note = ""
    if example_input is None:
        example_input, note = declared_input(model)
    rows: list[Layer] = []
    for layer, kernels in _by_layer(model, example_input, EVERY_KIND):
        for one in kernels:
            row = model_layer(one, one.kernel)
            assumed = bool(note) and row.input_shape is not None
            rows.append(replace(row, note=join_notes(row.note, note), assumed_extents=True) if assumed else row)
        if linear and isinstance(layer, LINEAR):
            rows.append(_dense(layer))
        if isinstance(layer, RECURRENT):
            kind = type(layer).__name__
            reason = (
                f"a recurrent convolution ({kind}): its output comes back as an input, so no kernel's norm bounds it"
            )
            held = [one for one in layer.weights if one.name != "bias"]
            rows.extend(Layer(one.path, keras.ops.convert_to_tensor(one), None, None, reason) for one in held)
    return rows


def _dense(layer: keras.layers.Layer) -> Layer:
    """Return a dense layer with the matrix that its call uses, or with the reason why that is not known."""
    if type(layer) is not keras.layers.Dense or not layer.built or getattr(layer, "quantization_mode", None):
        reason = f"a {type(layer).__name__} that is not built, is quantised or is a class of its own: it is not read"
        return Layer(layer.path, None, None, None, reason, linear=True)
    kernel = keras.ops.convert_to_tensor(layer.kernel)  # with the low-rank adaptation, if there is one
    return dense_layer(layer._kernel.path if hasattr(layer, "_kernel") else layer.path, kernel, "IO")


def _by_layer(
    model: keras.layers.Layer, example_input: object, kinds: tuple[type[Any], ...]
) -> Iterator[tuple[keras.layers.Layer, list[ConvLayer]]]:
    """Yield each layer of a model, once, with its kernels, which are none unless it is of one of the given classes."""
    layers = list(dict.fromkeys(every_layer(model)))
    traced = example_input is not None
    seen = _extents(model, [one for one in layers if isinstance(one, kinds)], example_input) if traced else {}
    for layer in layers:
        kernels: Iterator[ConvLayer] = iter(())
        if isinstance(layer, kinds):
            kernels = _kernels(layer, tuple(seen.get(id(layer), ())), reached=not traced or id(layer) in seen)
        yield layer, list(kernels)


def declared_input(model: keras.layers.Layer) -> tuple[Any, str]:
    """Return an input of the shapes that `keras.Input` declares, and a note on free axes; None if there are none."""
    declared = getattr(model, "_inputs_struct", None)
    if declared is None:
        inputs = getattr(model, "inputs", None) or []
        declared = inputs[0] if len(inputs) == 1 else list(inputs)
    shapes = [tuple(one.shape) for one in keras.tree.flatten(declared)]
    if not shapes:
        return None, ""

    def pinned(shape: tuple[int | None, ...]) -> tuple[int, ...]:
        return tuple((FREE_EXTENT if axis else 1) if n is None else int(n) for axis, n in enumerate(shape))

    example = keras.tree.map_structure(lambda one: keras.KerasTensor(pinned(tuple(one.shape)), one.dtype), declared)
    free = [shape for shape in shapes if None in shape[1:]]
    if not free:
        return example, ""
    taken = " and ".join(str(pinned(shape)) for shape in free)
    return example, f"keras.Input leaves axes free: the extents are those for {taken}; an example_input gives others"


def every_layer(model: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """Yield a model and every layer in it, one that is shared several times."""
    yield model
    for layer in getattr(model, "_layers", ()):
        if isinstance(layer, keras.layers.Layer):
            yield from every_layer(layer)


def _kernels(layer: keras.layers.Layer, input_shapes: tuple[Extents, ...], *, reached: bool) -> Iterator[ConvLayer]:
    """Yield the kernels of a convolution: two if it is separable."""
    if not layer.built:
        raise ValueError(
            f"the layer {layer.name!r} is not built, and has no kernel: wanted a model that was built or called"
        )
    if isinstance(layer, LINEAR):
        yield _linear(layer, reached=reached)
        return
    rank = len(layer.kernel_size)
    letters = SPATIAL_LETTERS[rank]
    strides, dilation = per_axis(layer.strides, rank), per_axis(layer.dilation_rate, rank)
    note = _lora_note(layer)
    geometry: dict[str, Any] = {"stride": strides, "dilation": dilation, "padding_mode": "zeros"}

    def found(part: str, variable: Any, conv: Conv) -> ConvLayer:
        return make_layer(
            note,
            name=variable.path,
            kernel_shape=kernel_shape(tuple(variable.shape), part == "depthwise"),
            conv=conv,
            input_shapes=input_shapes,
            module=layer,
            variable=variable,
            part=part,
            reached=reached,
            unknown_forward=_has_own_call(layer),
            read=_kernel,
        )

    if isinstance(layer, TRANSPOSED):
        pads = transposed_pads(layer.padding, layer.kernel_size, strides, dilation, layer.output_padding)
        conv = transposed_conv(f"{letters}OI", layer.kernel_size, pads, stride=strides, dilation=dilation)
        yield found("kernel", layer.kernel, conv)
        return
    first = input_shapes[0] if input_shapes else None
    padding = sides(layer.padding, tuple(layer.kernel_size), strides, dilation, first)
    if isinstance(layer, CONVOLUTIONS):
        variable = layer._kernel if hasattr(layer, "_kernel") else layer.kernel
        yield found("kernel", variable, Conv(f"{letters}IO", groups=layer.groups, padding=padding, **geometry))
        return
    separable = isinstance(layer, SEPARABLE)
    variable = layer.depthwise_kernel if separable else layer.kernel
    conv = Conv(f"{letters}IO", groups=int(variable.shape[-2]), padding=padding, **geometry)
    yield found("depthwise", variable, conv)
    if separable:
        input_shapes = tuple(_outputs(n, tuple(layer.kernel_size), conv) for n in input_shapes)
        yield found("pointwise", layer.pointwise_kernel, Conv(f"{letters}IO", padding="valid", padding_mode="zeros"))


def _linear(layer: keras.layers.Layer, *, reached: bool) -> ConvLayer:
    """Return the kernel of a linear layer."""
    variable = layer._kernel if hasattr(layer, "_kernel") else layer.kernel
    shape = tuple(variable.shape)
    matrix = isinstance(layer, keras.layers.Dense) and len(shape) == 2
    return make_layer(
        _lora_note(layer),
        "" if matrix else f"its kernel has the shape {shape}, and may map several axes: wanted a matrix",
        name=variable.path,
        kernel_shape=kernel_shape(shape, False),
        conv=one_tap_conv("WIO") if matrix else None,
        input_shapes=((1,),),
        module=layer,
        variable=variable,
        linear=True,
        reached=reached,
        read=_kernel,
    )


def _has_own_call(layer: keras.layers.Layer) -> bool:
    """Return whether a layer's class replaces a method by which Keras's own class convolves."""
    kind = next(kind for kind in EVERY_KIND if isinstance(layer, kind))
    own = type(layer)
    return any(getattr(own, name, None) is not getattr(kind, name, None) for name in ("call", "convolution_op"))


def _lora_note(layer: keras.layers.Layer) -> str:
    return "the low-rank adaptation of the kernel is left out" if getattr(layer, "lora_enabled", False) else ""


def _kernel(layer: ConvLayer) -> Any:
    return keras.ops.reshape(keras.ops.convert_to_tensor(layer.variable), layer.kernel_shape)


def _outputs(extents: Extents, taps: Extents, conv: Conv) -> Extents:
    """Return the extents of a convolution's output."""
    geometry = zip(extents, conv.pads(taps), taps, conv.dilations, conv.strides, strict=True)
    return tuple((n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, pad, k, d, s in geometry)


def _extents(
    model: keras.layers.Layer, layers: list[keras.layers.Layer], example_input: object
) -> dict[int, dict[Extents, None]]:
    """Return the spatial extents of the layers' inputs, by the layers' `id`, from a call with shapes alone."""
    seen: dict[int, dict[Extents, None]] = {}

    def watching(layer: keras.layers.Layer) -> Any:
        call = layer.call

        def watch(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            shape = tuple(inputs.shape)
            extents = shape[1:-1] if getattr(layer, "data_format", "channels_last") == "channels_last" else shape[2:]
            reached = seen.setdefault(id(layer), {})
            if not isinstance(layer, LINEAR):
                reached[tuple(int(n) for n in extents)] = None
            return call(inputs, *args, **kwargs)

        return watch

    try:
        for layer in layers:
            object.__setattr__(layer, "call", watching(layer))
        _Call(model).compute_output_spec(_symbolic(example_input))
    finally:
        for layer in layers:
            layer.__dict__.pop("call", None)
    return seen


class _Call(keras.layers.Layer):  # type: ignore[misc]
    """A layer whose call is the call of a model: Keras traces shapes for calls of layers only."""

    def __init__(self, model: keras.layers.Layer) -> None:
        super().__init__()
        self._model = [lambda: model]  # a list of functions, into which Keras does not look for layers

    def call(self, inputs: Any) -> Any:
        return self._model[0]()(inputs, training=False)


def _symbolic(example_input: object) -> Any:
    """Return symbolic tensors of the shapes and dtypes of an example input."""
    if isinstance(example_input, tuple) and all(isinstance(n, int) for n in example_input):
        return keras.KerasTensor(example_input)
    return keras.tree.map_structure(
        lambda one: keras.KerasTensor(tuple(one.shape), keras.backend.standardize_dtype(one.dtype)), example_input
    )
