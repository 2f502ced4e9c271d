"""The types with which a rule says how much a kind of map can lengthen its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy.typing as npt

from convsv_core._network.graph import Node, Shape

__all__ = ["Evaluated", "Factors", "Float64Array", "KindRule", "LinearMap", "NoRule", "Range", "Tensor"]

Float64Array: TypeAlias = npt.NDArray[Any]
"""An array of float64 on the host."""


class NoRule(Exception):
    """A rule has no bound for a node; the message says why, without the name of the node."""


class Range(NamedTuple):
    """Bounds of every element of a tensor, as arrays that broadcast to the tensor's shape."""

    low: Float64Array
    high: Float64Array


class Tensor(NamedTuple):
    """The facts that a rule has about an input of its node.

    Attributes
    ----------
    shape : tuple of int
    range : Range or None
        Bounds of the elements, where the call gave a range of the network's input.
    """

    shape: Shape
    range: Range | None = None


class Factors(NamedTuple):
    """The numbers by which the bound of a node follows from the bounds ``L_i`` of its inputs.

    Attributes
    ----------
    values : tuple of float
        One factor ``f_i`` for each input, rounded upward.
    join : {"sum", "root"}, default "sum"
        The node's bound is the sum of the ``f_i L_i``, or the root of the sum of their squares.
    note : str, default ""
        For people: how the factor was found, where that is not plain.
    """

    values: tuple[float, ...]
    join: Literal["sum", "root"] = "sum"
    note: str = ""


class LinearMap(NamedTuple):
    """A linear map of one or more arrays.

    Attributes
    ----------
    apply : callable
        ``apply(*arrays)`` returns the output.
    adjoint : callable
        ``adjoint(output)`` returns an array for each input: ``<output, apply(*x)> == sum_i <adjoint(output)[i], x_i>``.
    """

    apply: Callable[..., Float64Array]
    adjoint: Callable[[Float64Array], tuple[Float64Array, ...]]


class Evaluated(NamedTuple):
    """The value of a node at its inputs, and its derivative there; at a kink, one of the derivatives nearby."""

    value: Float64Array
    derivative: LinearMap


@dataclass(frozen=True)
class KindRule:
    """The rule of one kind of map.

    Parameters
    ----------
    factors : callable
        ``factors(node, inputs)`` returns the `Factors` of a node from a `Tensor` for each input, or raises `NoRule`.
    evaluate : callable, optional
        ``evaluate(node, *arrays)`` returns `Evaluated`, in float64. Without it a network with such a node has no lower
        bound.
    range : callable, optional
        ``range(node, *ranges)`` returns a `Range` of the node's elements. Without it they are not known.
    """

    factors: Callable[[Node, Sequence[Tensor]], Factors]
    evaluate: Callable[..., Evaluated] | None = None
    range: Callable[..., Range] | None = None
