"""The shapes that the layers of a Keras configuration take, from the shape of the network's input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from convsv_adapters._keras_rules import per_axis, transposed_pads

__all__ = ["Shape", "ShapeMisfit", "input_names", "inputs_of_layers"]

Shape: TypeAlias = tuple[int | None, ...]
"""A shape with the batch; None for an extent that is not known."""

KEEPS_SHAPE = {
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "ThresholdedReLU", "Softmax", "Identity"),
    *("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "AlphaDropout"),
    *("GaussianDropout", "GaussianNoise", "ActivityRegularization"),
    *("BatchNormalization", "LayerNormalization", "GroupNormalization", "UnitNormalization", "Rescaling"),
}
"""Classes whose output has the shape of their input."""

MERGES = {"Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"}
"""Classes that join several tensors entry by entry."""


class ShapeMisfit(ValueError):
    """A shape that the user gave does not fit the input of the network."""


def inputs_of_layers(config: Mapping[str, Any], given: Mapping[str, tuple[int, ...]]) -> dict[str, Shape]:
    """Return the shape of the input of each layer whose shape is known, by the name that `Configured` gives to it.

    A layer that is called with several shapes is left out, and so is every layer behind a class without a rule.

    Parameters
    ----------
    config : mapping
        The configuration of a Sequential or functional model. Other models give no shapes.
    given : mapping from name of an input to shape
        The shapes that the user gave: with the batch or without it, or of the spatial extents alone. The name ``""``
        stands for the first input.

    Raises
    ------
    ShapeMisfit
        An input is declared with another shape than the given one.
    """
    reading = _Reading(given)
    reading.model(config, "", None, outermost=True)
    found = {name: shapes.pop() for name, shapes in reading.seen.items() if len(shapes) == 1}
    return {name: shape for name, shape in found.items() if shape is not None}


def input_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs of the outermost model, as `inputs_of_layers` takes them."""
    layers = config["config"].get("layers")
    if not isinstance(layers, list):
        return []
    return [str(layer["config"].get("name")) for layer in layers if layer["class_name"] == "InputLayer"]


class _Reading:
    """A configuration on its way to the shapes of its tensors.

    Attributes
    ----------
    given : mapping from name of an input to shape
    seen : dict from name of a layer to set of (Shape or None)
        The shapes with which each layer is called.
    """

    def __init__(self, given: Mapping[str, tuple[int, ...]]) -> None:
        self.given, self.seen = given, dict[str, set[Shape | None]]()

    def model(
        self, entry: Mapping[str, Any], prefix: str, inputs: list[Shape | None] | None, *, outermost: bool = False
    ) -> list[Shape | None]:
        """Return the shapes of a model's outputs; `inputs` are None for the outermost model, which states its own."""
        config = entry["config"]
        layers = config.get("layers")
        if not isinstance(layers, list):
            return [None]
        if entry["class_name"] == "Sequential":
            return self._sequence(layers, prefix, inputs, outermost)
        if entry["class_name"] in ("Functional", "Model") and "output_layers" in config:
            return self._functional(config, prefix, inputs, outermost)
        return [None]

    def _sequence(
        self, layers: Sequence[Any], prefix: str, inputs: list[Shape | None] | None, outermost: bool
    ) -> list[Shape | None]:
        shape = inputs[0] if inputs else None
        for index, layer in enumerate(layers):
            stated = _stated(layer)
            if outermost and index == 0:
                shape = self._input(str(layer["config"].get("name")), stated, first=True)
            if layer["class_name"] != "InputLayer":
                shape = self._call(layer, prefix, [shape])[0]
        return [shape]

    def _functional(
        self, config: Mapping[str, Any], prefix: str, inputs: list[Shape | None] | None, outermost: bool
    ) -> list[Shape | None]:
        tensors: dict[tuple[str, int, int], Shape | None] = {}
        names = [name for name, _, _ in _tensors(config.get("input_layers"))]
        for index, name in enumerate(names):
            if inputs is not None and index < len(inputs):
                tensors[name, 0, 0] = inputs[index]
        for layer in config["layers"]:
            name = str(layer.get("name") or layer["config"].get("name"))
            if layer["class_name"] == "InputLayer":
                if outermost:
                    tensors[name, 0, 0] = self._input(name, _stated(layer), first=names[:1] == [name])
                continue
            for node, call in enumerate(layer.get("inbound_nodes") or ()):
                sources = [tensors.get(source) for source in _tensors(call)]
                for index, shape in enumerate(self._call(layer, prefix, sources)):
                    tensors[name, node, index] = shape
        return [tensors.get(source) for source in _tensors(config["output_layers"])]

    def _input(self, name: str, declared: Shape | None, *, first: bool) -> Shape | None:
        """Return the shape of an input of the network: as declared, with what the user gave."""
        given = self.given.get(name, self.given.get("") if first else None)
        return declared if given is None else _fit(given, declared, name)

    def _call(self, layer: Mapping[str, Any], prefix: str, inputs: list[Shape | None]) -> list[Shape | None]:
        """Note the shape with which a layer is called, and return those of its outputs."""
        kind, config = layer["class_name"], layer["config"]
        name = f"{prefix}{config.get('name') or kind}"
        if isinstance(config.get("layers"), list):
            return self.model(layer, f"{name}/", inputs)
        if isinstance(config.get("layer"), Mapping):
            return [self._wrapped(kind, config["layer"], f"{name}/", inputs)]
        self.seen.setdefault(name, set()).add(inputs[0] if len(inputs) == 1 else None)
        known = [shape for shape in inputs if shape is not None]
        if not known or len(known) != len(inputs):
            return [None]
        try:
            return [_output(kind, config, known)]
        except (ArithmeticError, LookupError, TypeError, ValueError):
            return [None]  # what follows a layer whose configuration is not understood has no shape

    def _wrapped(self, kind: str, inner: Mapping[str, Any], prefix: str, inputs: list[Shape | None]) -> Shape | None:
        shape = inputs[0] if len(inputs) == 1 else None
        if kind != "TimeDistributed" or shape is None or len(shape) < 3:
            self._call(inner, prefix, [None])
            return None
        found = self._call(inner, prefix, [(shape[0], *shape[2:])])[0]
        return None if found is None else (found[0], shape[1], *found[1:])


def _tensors(value: Any) -> Iterator[tuple[str, int, int]]:
    """Yield the tensors that a node or a list of outputs names, by layer, node and index, in both formats of Keras."""
    if isinstance(value, Mapping):
        history = value["config"].get("keras_history") if value.get("class_name") == "__keras_tensor__" else None
        if history is not None:
            yield str(history[0]), int(history[1]), int(history[2])
            return
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return
    if len(value) > 2 and isinstance(value[0], str) and all(isinstance(number, int) for number in value[1:3]):
        yield value[0], value[1], value[2]
        return
    for part in value:
        yield from _tensors(part)


def _stated(layer: Mapping[str, Any]) -> Shape | None:
    """Return the shape of the input that a layer states with its own configuration."""
    config = layer["config"]
    shape = config.get("batch_shape") or config.get("batch_input_shape")
    shape = shape or (layer.get("build_config") or {}).get("input_shape")
    if not isinstance(shape, list | tuple) or any(isinstance(part, list | tuple | dict) for part in shape):
        return None
    return tuple(shape)


def _fit(given: tuple[int, ...], declared: Shape | None, name: str) -> Shape:
    """Return the whole shape that `given` stands for; `ShapeMisfit` if the model declares another one."""
    if declared is None:
        return (1, *given)
    candidates: list[Shape] = [given, (1, *given), (1, *given[1:], *given[:1]), (*given[:1], *given[2:], *given[1:2])]
    if len(given) == len(declared) - 2:  # the spatial extents alone
        candidates += [(1, *given, declared[-1]), (1, declared[1], *given)]
    for candidate in candidates:
        pairs = zip(declared[1:], candidate[1:], strict=False)
        if len(candidate) == len(declared) and all(d is None or d == g for d, g in pairs):
            return candidate
    shape = "x".join("?" if d is None else str(d) for d in declared)
    raise ShapeMisfit(f"input {name!r} is {shape} in the model, which {','.join(map(str, given))} does not fit")


# ---- the shapes of outputs ---------------------------------------------------------------------------


def _output(kind: str, config: Mapping[str, Any], inputs: list[Shape]) -> Shape | None:
    """Return the shape of the output of a layer; None if its class has no rule."""
    shape = inputs[0]
    if kind in MERGES:
        return _broadcast(inputs)
    if kind == "Concatenate":
        return _concatenated(inputs, int(config.get("axis", -1)))
    if len(inputs) > 1:
        return None
    if kind in KEEPS_SHAPE:
        return shape
    if kind == "Dense":
        return (*shape[:-1], int(config["units"]))
    if kind == "Flatten":
        return (shape[0], None if None in shape[1:] else math.prod(d for d in shape[1:] if d is not None))
    if kind == "Permute":
        return (shape[0], *(shape[axis] for axis in config["dims"]))
    if kind == "Reshape":
        return _reshaped(shape, config["target_shape"])
    return _over_images(kind, config, shape)


def _over_images(kind: str, config: Mapping[str, Any], shape: Shape) -> Shape | None:
    """Return the shape of the output of a layer that acts on the spatial extents; None if its class has no rule."""
    rank = len(shape) - 2
    base = kind.removesuffix("Transpose")
    if not base.endswith(f"{rank}D"):
        return None
    base = base.removesuffix(f"{rank}D")
    last = config.get("data_format") != "channels_first"
    extents, channels = (shape[1:-1], shape[-1]) if last else (shape[2:], shape[1])
    if base in ("Conv", "DepthwiseConv", "SeparableConv"):
        multiple = int(config.get("depth_multiplier", 1))
        is_depthwise = base == "DepthwiseConv"
        channels = (None if channels is None else channels * multiple) if is_depthwise else int(config["filters"])
        rule = _transposed if kind.endswith("Transpose") else _strided
        extents = rule(extents, config, per_axis(config["kernel_size"], rank), config.get("strides", 1))
    elif base in ("MaxPooling", "AveragePooling"):
        pool = per_axis(config["pool_size"], rank)
        extents = _strided(extents, config, pool, config["pool_size"] if not config["strides"] else config["strides"])
    elif base in ("GlobalMaxPooling", "GlobalAveragePooling"):
        if not config.get("keepdims", False):
            return (shape[0], channels)
        extents = (1,) * rank
    elif base in ("ZeroPadding", "Cropping"):
        sign = 1 if base == "ZeroPadding" else -1
        stated = config["padding" if sign > 0 else "cropping"]
        both = [sum(per_axis(one, 2)) for one in ([stated] if rank == 1 else stated)]
        extents = tuple(None if n is None else n + sign * extra for n, extra in zip(extents, both, strict=True))
    elif base == "UpSampling":
        factors = per_axis(config["size"], rank)
        extents = tuple(None if n is None else n * factor for n, factor in zip(extents, factors, strict=True))
    else:
        return None
    if any(n is not None and n < 1 for n in extents):
        return None
    return (shape[0], *extents, channels) if last else (shape[0], channels, *extents)


def _strided(extents: Shape, config: Mapping[str, Any], window: tuple[int, ...], strides: Any) -> Shape:
    """Return the extents behind a window that moves with a stride."""
    rank = len(extents)
    rates, padding = per_axis(config.get("dilation_rate", 1), rank), config.get("padding", "valid")
    axes = zip(extents, window, rates, per_axis(strides, rank), strict=True)
    return tuple(
        None if n is None else -(-n // s) if padding in ("same", "causal") else (n - d * (k - 1) - 1) // s + 1
        for n, k, d, s in axes
    )


def _transposed(extents: Shape, config: Mapping[str, Any], window: tuple[int, ...], strides: Any) -> Shape:
    """Return the extents behind a transposed convolution."""
    rank = len(extents)
    steps, rates = per_axis(strides, rank), per_axis(config.get("dilation_rate", 1), rank)
    pads = transposed_pads(config["padding"], window, steps, rates, config.get("output_padding"))
    axes = zip(extents, window, rates, steps, pads, strict=True)
    return tuple(None if n is None else s * (n - 1) + d * (k - 1) + 1 - sum(both) for n, k, d, s, both in axes)


def _broadcast(inputs: list[Shape]) -> Shape | None:
    if len({len(shape) for shape in inputs}) > 1:
        return None
    axes = []
    for extents in zip(*inputs, strict=True):
        large = {extent for extent in extents if extent != 1} or {1}
        if len(large) > 1:
            return None
        axes.append(large.pop())
    return tuple(axes)


def _concatenated(inputs: list[Shape], axis: int) -> Shape | None:
    rank = len(inputs[0])
    if any(len(shape) != rank for shape in inputs):
        return None
    axis %= rank
    extents = [shape[axis] for shape in inputs]
    total = None if None in extents else sum(extent for extent in extents if extent is not None)
    return (*inputs[0][:axis], total, *inputs[0][axis + 1 :])


def _reshaped(shape: Shape, target: Sequence[int]) -> Shape | None:
    if None in shape[1:] or list(target).count(-1) > 1:
        return None if -1 in target else (shape[0], *target)
    size = math.prod(extent for extent in shape[1:] if extent is not None)
    rest = math.prod(extent for extent in target if extent != -1)
    return (shape[0], *(size // rest if extent == -1 else extent for extent in target))
