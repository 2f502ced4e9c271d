"""From the nodes of an ONNX graph to dense layers: products with a constant matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from convsv_adapters.formats.onnx.graph import STANDARD, Place, attributes, operator_name
from convsv_adapters.formats.onnx.neighbours import Uses, following_normalisation, layer_name
from convsv_adapters.parameters import HostArray
from convsv_core.layers import Layer, Stored, dense_layer
from convsv_core.plugins import one_line

__all__ = ["dense_layers"]

READ = ("Gemm", "MatMul")
"""The operators of dense layers that are read. Others with these words in their names are listed with a reason."""


class _Weight(NamedTuple):
    """The constant factor of a product.

    Attributes
    ----------
    name : str
        The name of the constant.
    matrix : array, two axes
    layout : str
        "OI" if the rows are the outputs, else "IO".
    factor : float
        The number that the product is multiplied by.
    """

    name: str
    matrix: HostArray
    layout: str
    factor: float


def dense_layers(place: Place, uses: Uses, stored: Callable[[str], Stored | None]) -> Iterator[Layer]:
    """Yield the dense layer that a node is, or its name and the reason why it is not read; nothing for other nodes.

    Parameters
    ----------
    place : Place
        A node and its scope.
    uses : Uses
        All uses of the names of the model.
    stored : callable
        Returns where the file stores a constant of the node's scope; None if it cannot be written there.
    """
    scope, node = place
    if not any(word in node.op_type for word in READ):
        return
    constant = [name for name in node.input if name and scope.is_constant(name)]
    if not constant or all(scope.is_constant(name) for name in node.input[:2] if name):
        return
    name = layer_name(place)
    if node.op_type not in READ or node.domain not in STANDARD:
        yield Layer(name, None, None, None, f"{operator_name(node)} is not read as a dense layer", linear=True)
        return
    try:
        weight = _weight(place)
    except (LookupError, OSError, ValueError) as error:
        yield Layer(name, None, None, None, f"no weights: {one_line(error)}", linear=True)
        return
    if weight is None:
        return
    kept = stored(weight.name) if weight.factor == 1 else None
    note = ""
    if kept is not None and not all(use in READ for use in uses.operators_of(scope, weight.name)):
        kept, note = None, "its weights are used by other operators too, so they are not replaced"
    matrix = weight.matrix if weight.factor == 1 else weight.matrix.astype(np.float64) * weight.factor
    yield dense_layer(
        name, matrix, weight.layout, note=note, stored=kept, normalisation=following_normalisation(place, uses)
    )


def _weight(place: Place) -> _Weight | None:
    """Return the matrix of a Gemm or MatMul node; None if no matrix of real numbers is a constant factor.

    Raises `LookupError` or `ValueError` if the constant cannot be evaluated or has too many axes.
    """
    scope, node = place
    values = attributes(node)
    left = scope.is_constant(node.input[0])
    name = node.input[0 if left else 1]
    if not scope.is_constant(name):
        return None
    matrix = scope.constant(name)
    if matrix.dtype.kind != "f" or not matrix.size:
        return None
    if matrix.ndim > 2:
        raise ValueError(f"a constant of {matrix.ndim} axes is a batch of matrices, which no dense layer has")
    if matrix.ndim < 2:
        matrix = matrix.reshape((1, -1) if left else (-1, 1))
    # A product x W has the rows of W as inputs, a product W x has them as outputs. Gemm may transpose either factor.
    rows_are_outputs = left != bool(values.get("transA" if left else "transB", 0))
    return _Weight(name, matrix, "OI" if rows_are_outputs else "IO", float(values.get("alpha", 1.0)))
