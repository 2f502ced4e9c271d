"""Constraints and regularizers for every convolution kernel of a Keras model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras

from convsv_adapters._layers import ConvLayer, geometry_of, operators_of
from convsv_adapters.keras._constraint import OperatorNorm
from convsv_adapters.keras._geometry import check_dtype
from convsv_adapters.keras._layers import conv_layers
from convsv_adapters.keras._regularizer import OperatorNormPenalty
from convsv_core.training import ProjectionMethod

__all__ = ["constrain", "penalize"]


def constrain(
    model: keras.layers.Layer,
    bound: float = 1.0,
    *,
    method: ProjectionMethod = "rescale",
    steps: int = 10,
    circular: bool = False,
    example_input: object = None,
    linear: bool = False,
) -> list[ConvLayer]:
    """Give every convolution kernel of a model an `OperatorNorm` constraint with the geometry of its layer.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        Built, and not yet trained: a trainer that has compiled its step ignores later constraints.
    bound, method, steps
        As for `OperatorNorm`.
    circular : bool, default False
        Bound the circular convolution at each layer's extents, in place of the layer with its own padding for every
        input size.
    example_input : optional
        As for `conv_layers`; needed with `circular`.
    linear : bool, default False
        Constrain the kernels of `Dense` layers too.

    Returns
    -------
    list of ConvLayer

    Raises
    ------
    TypeError, ValueError
        As for `conv_layers`. Also if there is no convolution, if a kernel has a constraint already, or if `circular` is
        true and a layer has no known extents, or several.

    Notes
    -----
    Keras gives a constraint one weight. So a batch normalisation cannot be bounded with the layer before it in this
    way: `OperatorNormProjection` with ``batch_norm="fold"`` bounds both.

    The constraints hold from the first update on. They are saved with the model; import this module before loading it.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.DepthwiseConv2D(3)])
    >>> [layer.name for layer in constrain(model, 0.5)] == [model.layers[0].kernel.path]
    True
    """

    def make(layer: ConvLayer, geometry: dict[str, Any]) -> OperatorNorm:
        check_dtype(layer.kernel, layer.name)
        return OperatorNorm(bound, method, steps, **geometry)

    return _attach("constraint", make, conv_layers(model, example_input, linear=linear), circular)


def penalize(
    model: keras.layers.Layer,
    kind: str = "norm_hinge",
    weight: float = 1e-3,
    *,
    circular: bool = False,
    example_input: object = None,
    linear: bool = False,
    **options: Any,
) -> list[ConvLayer]:
    """Give every convolution kernel of a model an `OperatorNormPenalty` with the geometry of its layer.

    Parameters
    ----------
    model
        As for `constrain`.
    kind, weight
        As for `OperatorNormPenalty`.
    circular, example_input
        As for `constrain`. Penalties that are not defined for every input size need both.
    linear : bool, default False
        Penalise the kernels of `Dense` layers too, as for "log_lipschitz", whose sum is the logarithm of a product.
    **options
        Arguments of the penalty, such as ``bound=1.0``.

    Returns
    -------
    list of ConvLayer

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])
    >>> _ = penalize(model, "orthogonality", 0.01)
    >>> len(model.losses)
    1
    """

    def make(layer: ConvLayer, geometry: dict[str, Any]) -> OperatorNormPenalty:
        return OperatorNormPenalty(kind, weight, options or None, **geometry)

    return _attach("regularizer", make, conv_layers(model, example_input, linear=linear), circular)


def _attach(
    attribute: str, make: Callable[[ConvLayer, dict[str, Any]], Any], found: list[ConvLayer], circular: bool
) -> list[ConvLayer]:
    """Give kernels a constraint or a regularizer: set the attribute of their variables and of their layers."""
    if not found:
        raise ValueError(f"model has no convolution to give a {attribute} to")
    for layer in found:
        held = getattr(layer.variable, attribute)
        if held is not None:
            raise ValueError(f"{layer.name!r} has a {attribute}, {held!r}: wanted a kernel without one")
    for layer in found:
        if layer.unknown_forward:
            warnings.warn(f"the layer {layer.name!r} is {layer.note}", stacklevel=4)
    for layer, geometry in [(layer, _geometry(layer, circular)) for layer in found]:
        made = make(layer, geometry)
        setattr(layer.variable, attribute, made)
        setattr(layer.module, f"{layer.part}_{attribute}", made)
    return found


def _geometry(layer: ConvLayer, circular: bool) -> dict[str, Any]:
    """Return the arguments of `KernelGeometry` for a layer."""
    conv = geometry_of(layer)
    if layer.linear:
        return {"linear": True}
    geometry: dict[str, Any] = {
        "strides": conv.strides,
        "dilation_rate": conv.dilations,
        "groups": 1 if layer.depthwise else conv.groups,
        "transposed": conv.transposed,
        "depthwise": layer.depthwise,
    }
    if circular:
        operators = operators_of(layer, circular)
        if len(operators) > 1:
            raise ValueError(
                f"{layer.name!r} takes inputs of several extents, {layer.input_shapes}: wanted circular=False, which "
                f"bounds every input size"
            )
        geometry["input_shape"] = operators[0].input_shape
    return geometry
