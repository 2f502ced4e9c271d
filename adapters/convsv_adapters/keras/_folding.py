"""Batch normalisations of Keras models: which kernels they follow directly, and what both do in inference mode.

The layer that a normalisation follows is read from the graph of a functional or sequential model. The scale of the
normalisation, `gamma`, is what is made smaller: in training a smaller kernel soon has a smaller moving variance, and
kernel and normalisation together would be as large as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras

from convsv_adapters._layers import ConvLayer, geometry_of, one_tap_conv, operators_of
from convsv_adapters.keras._geometry import check_dtype
from convsv_core.layers import Operator
from convsv_core.plugins import backend_of
from convsv_core.reports.certified import scaled_outputs
from convsv_core.training import CERTIFICATE_RTOL, rescaling_factors

__all__ = ["Folded", "Following", "bound_normalisations", "following"]

ROUNDING = 4
"""Largest relative rounding error of an entry of a kernel times its scale, in eps: four operations, half of one each.

The rest is a margin.
"""


class Folded(NamedTuple):
    """A normalisation, and the kernel that it follows; None where it stands alone."""

    layer: ConvLayer | None
    norm: keras.layers.BatchNormalization

    @property
    def name(self) -> str:
        """The path of the kernel, or of the normalisation's scale if it stands alone."""
        return self.norm.gamma.path if self.layer is None else self.layer.name


@dataclass(frozen=True)
class Following:
    """The normalisations of a model with the kernels that they follow, and the other kernels.

    Attributes
    ----------
    folded : list of Folded
    bare : list of ConvLayer
        The kernels of layers whose output is used by anything but a normalisation too.
    """

    folded: list[Folded]
    bare: list[ConvLayer]


def following(model: keras.layers.Layer, layers: Iterable[keras.layers.Layer], kernels: list[ConvLayer]) -> Following:
    """Return the normalisations of a model with the kernels that they follow directly.

    Parameters
    ----------
    model : keras.Model
    layers : iterable of keras.layers.Layer
        Every layer of the model, and of the models nested in it.
    kernels : list of ConvLayer

    Raises
    ------
    ValueError
        A normalisation has no scale, or is not in the graph of a functional or sequential model.
    """
    layers = list(layers)
    norms = [one for one in layers if isinstance(one, keras.layers.BatchNormalization)]
    last = {id(kernel.module): kernel for kernel in kernels}  # a separable layer has its second kernel here
    pairs: dict[tuple[int, int], Folded] = {}
    alone: dict[int, Folded] = {}
    reached: set[int] = set()
    used: set[int] = set()  # layers of which an output is used without a normalisation
    folded: set[int] = set()
    for nodes, outputs in _graphs(layers):
        made = {id(tensor): node.operation for node in nodes for tensor in node.outputs}
        used |= {id(made[id(tensor)]) for tensor in outputs if id(tensor) in made}
        for node in nodes:
            for tensor in node.input_tensors:
                layer, norm = made.get(id(tensor)), node.operation
                if isinstance(norm, keras.layers.BatchNormalization):
                    reached.add(id(norm))
                    if layer is not None and id(layer) in last and _folds(layer, norm, tensor):
                        pairs[id(layer), id(norm)] = Folded(last[id(layer)], norm)
                        folded.add(id(layer))
                        continue
                    alone[id(norm)] = Folded(None, norm)
                used.add(id(layer))
    for norm in norms:
        if id(norm) not in reached:
            raise ValueError(
                f"the normalisation {norm.name!r} is in no graph of a functional or sequential model, so it is not "
                f"known which layer it follows: wanted such a model, or batch_norm=None"
            )
        if norm.gamma is None:
            raise ValueError(
                f"the normalisation {norm.name!r} has no scale that could be made smaller: wanted scale=True, or "
                f"batch_norm=None"
            )
    bare = [
        kernel
        for kernel in kernels
        if kernel is not last[id(kernel.module)] or id(kernel.module) in used or id(kernel.module) not in folded
    ]
    return Following([*pairs.values(), *alone.values()], bare)


def _graphs(layers: Sequence[keras.layers.Layer]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield the nodes and the output tensors of each functional or sequential model among some layers."""
    for layer in layers:
        graph = getattr(layer, "_functional", None) if isinstance(layer, keras.Sequential) else layer
        if isinstance(graph, keras.Model) and hasattr(graph, "_nodes_by_depth"):
            nodes = [node for level in graph._nodes_by_depth.values() for node in level]
            yield nodes, keras.tree.flatten(graph.outputs)


def _folds(layer: keras.layers.Layer, norm: keras.layers.BatchNormalization, tensor: Any) -> bool:
    """Return whether a normalisation multiplies the very channels that a layer's kernel computes."""
    if getattr(layer, "activation", None) not in (None, keras.activations.linear):
        return False
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return norm.axis % len(tensor.shape) == (1 if first else len(tensor.shape) - 1)


def bound_normalisations(folded: Sequence[Folded], bound: float, circular: bool) -> dict[str, float]:
    """Make scales smaller so that every normalisation, with the kernel that it follows, is within a bound.

    Returns the certified norms, by name.
    """
    found = [_factor(one, bound, circular) for one in folded]
    smallest: dict[str, float] = {}
    for one, (factor, _) in zip(folded, found, strict=True):
        smallest[one.norm.gamma.path] = min(factor, smallest.get(one.norm.gamma.path, 1.0))
    for path, factor in smallest.items():
        gamma = next(one.norm.gamma for one in folded if one.norm.gamma.path == path)
        if factor < 1:
            gamma.assign(gamma.value * (factor * (1 - 2 * _eps(gamma))))
    norms: dict[str, float] = {}
    for one, (factor, norm) in zip(folded, found, strict=True):
        share = smallest[one.norm.gamma.path] / factor if factor else 1.0
        norms[one.name] = max(norms.get(one.name, 0.0), norm * min(share * (1 + 1e-15), 1.0))
    return norms


def _eps(variable: Any) -> float:
    array = keras.ops.convert_to_tensor(variable)
    return float(backend_of(array).namespace(array).finfo(array.dtype).eps)


def _factor(one: Folded, bound: float, circular: bool) -> tuple[float, float]:
    """Return the factor with which a normalisation and its kernel are within the bound, and their norm then."""
    norm = one.norm
    check_dtype(norm.gamma, norm.gamma.path)
    scale = norm.gamma.value / keras.ops.sqrt(norm.moving_variance.value + norm.epsilon)
    if one.layer is None:
        conv = one_tap_conv("WIO", int(scale.shape[0]))
        operators: tuple[Operator, ...] = (Operator(conv, (1,)),)
        kernel = keras.ops.reshape(scale, (1, 1, -1))
    else:
        conv, operators = geometry_of(one.layer), operators_of(one.layer, circular)
        kernel = scaled_outputs(one.layer.kernel, conv, scale)
    backend = backend_of(kernel)
    kernel = backend.stop_gradient(kernel)
    xp = backend.namespace(kernel)
    axes = tuple(conv.layout.index(letter) for letter in "OI")
    error = ROUNDING * float(xp.finfo(kernel.dtype).eps) * float(xp.sum(xp.sqrt(xp.sum(kernel**2, axis=axes))))
    factor, norm_then = 1.0, 0.0
    for operator in operators:
        limit = operator.limit(bound / (1 + CERTIFICATE_RTOL))
        (result,) = rescaling_factors([kernel], operator.input_shape, operator.conv, limit)
        upper = operator.layer_upper(result.upper) + error * operator.padding_norm * result.factor
        own = result.factor * min(bound / upper, 1.0) if upper > 0 else result.factor
        factor, norm_then = min(factor, own), max(norm_then, min(upper, bound))
    return factor, math.nextafter(norm_then, math.inf) if norm_then < bound else norm_then
