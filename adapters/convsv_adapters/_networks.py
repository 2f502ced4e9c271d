"""Collect the nodes of a network as a front end finds them, and describe maps that all front ends meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from convsv_core.networks import Concatenate, Gather, Graph, Identity, Kind, Node, Reshape, Scale, Shape, Unsupported

__all__ = [
    "GraphWriter",
    "Traced",
    "Undescribed",
    "adaptive_matrix",
    "as_number",
    "describe_gather",
    "describe_stack",
    "stored_normalization",
]


class Traced(NamedTuple):
    """A tensor of the network that depends on its input: the name of its node, and its shape."""

    name: str
    shape: Shape


class Undescribed(Exception):
    """Raised for an operator that no kind of map describes; the message is the reason, a phrase for people."""


class GraphWriter:
    """Collect the nodes of a network in the order of evaluation."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def add(
        self, name: str, kind: Kind, inputs: Sequence[Traced], shape: Sequence[int], op: str = "", source: str = ""
    ) -> Traced:
        """Add a node, under a name with a number behind it if there is such a name already."""
        unique, number = name, 1
        while unique in self._nodes:
            number += 1
            unique = f"{name}_{number}"
        traced = Traced(unique, tuple(int(extent) for extent in shape))
        self._nodes[unique] = Node(unique, kind, tuple(one.name for one in inputs), traced.shape, op, source)
        return traced

    def add_unsupported(
        self, name: str, reason: str, inputs: Sequence[Traced], shape: Sequence[int], op: str, source: str = ""
    ) -> Traced:
        """Add a node for an operator that no kind describes."""
        return self.add(name, Unsupported(reason), list(dict.fromkeys(inputs)), shape, op, source)

    def graph(self, outputs: Sequence[Traced]) -> Graph:
        """Return the network whose outputs these tensors are, without nodes that no output depends on."""
        names = tuple(dict.fromkeys(one.name for one in outputs))
        return Graph(tuple(self._nodes.values()), names).until(names)


class Describing(Protocol):
    """The interface of the classes that describe one operator of a framework by nodes."""

    def step(self, kind: Kind, *inputs: Traced, shape: Sequence[int]) -> Traced:
        """Add a node that is a part of the operator, before its result."""

    def result(self, kind: Kind, *inputs: Traced) -> Traced:
        """Add the node whose tensor the operator returns."""

    def as_traced(self, operand: Any) -> Traced:
        """Return a tensor of the network as it is, and anything else as a `Constant` node."""


def describe_gather(call: Describing, x: Traced, indices: Mapping[int, Any]) -> Traced:
    """Describe a choice of elements along each of some axes, by the indices of each axis."""
    for axis, chosen in indices.items():
        if not np.array_equal(chosen, np.arange(x.shape[axis])):
            shape = (*x.shape[:axis], *np.shape(chosen), *x.shape[axis + 1 :])
            x = call.step(Gather(np.asarray(chosen, np.int64), axis), x, shape=shape)
    return call.result(Identity(), x)


def describe_stack(call: Describing, tensors: Sequence[Any], axis: int) -> Traced:
    """Describe a concatenation of tensors of one shape along a new axis."""
    flat = [call.as_traced(one) for one in tensors]
    parts = [call.step(Reshape(), one, shape=(*one.shape[:axis], 1, *one.shape[axis:])) for one in flat]
    return call.result(Concatenate(axis), *parts)


def stored_normalization(
    x_rank: int, mean: Any, variance: Any, epsilon: float, weight: Any = None, bias: Any = None
) -> Scale:
    """Return a normalisation by stored statistics as a kind of map.

    Parameters
    ----------
    x_rank : int
        Number of axes of the input.
    mean, variance : array
        Of shape (channels,) for the channels of axis 1, or of the shape of an input without its batch.
    epsilon : float
    weight, bias : array, optional
        The factors behind the normalisation, and what is added after them. Their shape is the shape of `mean`.
    """
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    scale = (1.0 if weight is None else np.asarray(weight, np.float64)) / np.sqrt(variance + epsilon)
    shift = (0.0 if bias is None else np.asarray(bias, np.float64)) - mean * scale
    shape = (-1, *(1,) * (x_rank - 2)) if scale.ndim == 1 else scale.shape
    return Scale(scale.reshape(shape), shift.reshape(shape))


def adaptive_matrix(outputs: int, inputs: int) -> npt.NDArray[np.float64]:
    """Return the matrix of adaptive average pooling along an axis, of shape (outputs, inputs).

    Window i reaches from ``floor(i * inputs / outputs)`` to ``ceil((i + 1) * inputs / outputs)``, as in PyTorch.
    """
    matrix = np.zeros((outputs, inputs))
    for row in range(outputs):
        start, stop = row * inputs // outputs, -(-(row + 1) * inputs // outputs)
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix


def as_number(array: npt.NDArray[Any]) -> Any:
    """Return an array whose elements are all equal as one number, and any other array as it is."""
    return float(array.flat[0]) if array.size and np.all(array == array.flat[0]) else array
