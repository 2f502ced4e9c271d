"""The table of rules: by how much each kind of map can lengthen its inputs, in Euclidean norms of whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from convsv_core._geometry.padding import layer_operators
from convsv_core._geometry.rounding import root_up
from convsv_core._network import elementwise, kinds
from convsv_core._network.derivatives import evaluate
from convsv_core._network.graph import Node, Shape
from convsv_core._network.linear_maps import axis_matrices, axis_sources, stack_shapes, window_reads
from convsv_core._network.norms import EPS, euclidean_norm, kronecker_norm, matrix_norm, product_up, supremum_norm
from convsv_core._network.opaque import Bounded
from convsv_core._network.ranges import RANGES, everything, is_damping, largest_modulus
from convsv_core._network.rule_types import Factors, Float64Array, KindRule, NoRule, Range, Tensor
from convsv_core.plugins import one_line, plugins

__all__ = ["CONV_RTOL", "GIVEN_ROUNDING", "RULES", "copies_between", "node_factors", "node_range", "rule_of"]

Rule: TypeAlias = Callable[[Node, Sequence[Tensor]], Factors]
"""A function that gives the factors of a node, from the facts about its inputs."""

CONV_RTOL = 1e-3
"""Relative gap to which the norm of a convolution is certified.

A network of 50 convolutions loses at most 5 % by it. Measured on Gaussian kernels of 3 x 3 taps: 0.01 costs about
0.8 times as much.
"""


GIVEN_ROUNDING = 8 * EPS
"""Relative rounding of the numbers that front ends compute in float64. A guess: they take a few operations."""


def rule_of(kind: kinds.Kind) -> KindRule:
    """Return the rule of a kind of map: of this package, or of an installed plugin.

    Raises `NoRule` where there is none.
    """
    found = RULES.get(type(kind)) or _added_rules().get(type(kind))
    if found is None:
        raise NoRule(f"there is no rule for the kind {type(kind).__name__}")
    return found


def node_factors(node: Node, inputs: Sequence[Tensor]) -> Factors:
    """Return the factors of a node by the rule of its kind; raise `NoRule` where it has no bound."""
    try:
        found = rule_of(node.kind).factors(node, inputs)
    except (NotImplementedError, ValueError) as error:  # The geometry does not fit the node's input.
        raise NoRule(one_line(error)) from None
    if any(math.isnan(value) for value in found.values):
        raise NoRule("its weights hold NaN or infinity")
    return found


def node_range(node: Node, boxes: Sequence[Range | None]) -> Range:
    """Return bounds of a node's elements, from bounds of the elements of its inputs; None where they are not known."""
    try:
        rule = rule_of(node.kind).range
        return everything(node) if rule is None or any(box is None for box in boxes) else rule(node, *boxes)
    except NoRule:
        return everything(node)


def _added_rules() -> dict[type[kinds.Kind], KindRule]:
    """Return the rules of the plugins that are registered now."""
    rules: dict[type[kinds.Kind], KindRule] = {}
    for added in plugins().manager.hook.convsv_network_rules():
        rules.update(added)
    return rules


def copies_between(small: Shape, large: Shape) -> int:
    """Return how many copies broadcasting makes of each element, from one shape to another."""
    return math.prod(large) // max(math.prod(small), 1)


def given_number(value: float) -> float:
    """Return a number that a front end computed, such as the scale of a batch normalisation, rounded upward.

    Powers of 2, such as 1, are exact.
    """
    return value if math.frexp(value)[0] in (0.0, 0.5) else value * (1 + GIVEN_ROUNDING)


def _finite(*arrays: Float64Array | None) -> None:
    if not all(np.all(np.isfinite(array)) for array in arrays if array is not None):
        raise NoRule("its weights hold NaN or infinity")


# ---- linear kinds ----------------------------------------------------------------------------------------------------


def _nothing(node: Node, inputs: Sequence[Tensor]) -> Factors:
    return Factors(())


def _one(node: Node, inputs: Sequence[Tensor]) -> Factors:
    return Factors((1.0,))


def _convolution(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.Convolution)
    _finite(kind.kernel)
    extents = tuple(inputs[0].shape[kind.layout.index(letter)] for letter in kind.conv.spatial)
    kernel = np.asarray(kind.kernel, np.float64)
    (operator,) = layer_operators(kernel.shape, kind.conv, [extents])
    note = "" if operator.padding_norm == 1 else f"{kind.conv.padding_mode} padding of norm {operator.padding_norm:.4g}"
    return Factors((operator.layer_upper(supremum_norm(kernel, operator.conv, CONV_RTOL)),), note=note)


def _matmul(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.Matmul)
    _finite(kind.matrix)
    matrix, shape = stack_shapes(kind, inputs[0].shape)
    leading, own = shape[:-2], matrix.shape[:-2]
    rank = max(len(leading), len(own))
    leading, own = (1,) * (rank - len(leading)) + leading, (1,) * (rank - len(own)) + own
    # Where x is repeated for several matrices, these stand side by side and are one matrix.
    grown = [axis for axis in range(rank) if leading[axis] == 1 and own[axis] > 1]
    kept = [axis for axis in range(rank) if axis not in grown]
    matrix = matrix.reshape(*own, *matrix.shape[-2:])
    matrix = np.transpose(matrix, (*kept, rank, *grown, rank + 1))
    return Factors((matrix_norm(matrix.reshape(*(own[axis] for axis in kept), shape[-1], -1)),))


def _scale(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.Scale)
    scale, shape = np.abs(np.asarray(kind.scale, np.float64)), inputs[0].shape
    _finite(scale)
    if node.shape == shape:
        return Factors((given_number(float(np.max(scale, initial=0.0))),))
    extra = len(node.shape) - len(shape)
    grown = tuple(axis for axis, n in enumerate(node.shape) if axis < extra or (shape[axis - extra] == 1 and n > 1))
    scale = scale.reshape((1,) * (len(node.shape) - scale.ndim) + scale.shape)
    repeated = math.prod(node.shape[axis] for axis in grown if scale.shape[axis] == 1)
    largest = float(np.max(euclidean_norm(scale, grown)))
    return Factors((given_number(product_up((largest, root_up(repeated), 1 + (scale.size + 4) * EPS))),))


def _axis_maps(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.AveragePool | kinds.AxisMaps)
    matrices = axis_matrices(kind, inputs[0].shape, node.shape)
    _finite(*matrices.values())
    return Factors((kronecker_norm(matrices),))


def _gathering(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.Slice | kinds.Gather | kinds.Pad)
    most = [
        np.bincount(source[source >= 0], minlength=1).max() for source in axis_sources(kind, inputs[0].shape).values()
    ]
    return Factors((root_up(math.prod(int(count) for count in most)),))


def _expand(node: Node, inputs: Sequence[Tensor]) -> Factors:
    return Factors((root_up(copies_between(inputs[0].shape, node.shape)),))


def _sum(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.Sum)
    weights = kind.weights or (1.0,) * len(inputs)
    copies = [root_up(copies_between(tensor.shape, node.shape)) for tensor in inputs]
    return Factors(tuple(product_up((abs(weight), count)) for weight, count in zip(weights, copies, strict=True)))


def _concatenate(node: Node, inputs: Sequence[Tensor]) -> Factors:
    return Factors((1.0,) * len(inputs), "root")


def _extremum(node: Node, inputs: Sequence[Tensor]) -> Factors:
    return Factors(tuple(root_up(copies_between(x.shape, node.shape)) for x in inputs), "root")


def _reduce(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.Reduce)
    count = math.prod(inputs[0].shape[axis] for axis in kind.axes)
    if kind.function in ("sum", "l1"):
        return Factors((root_up(count),))
    if kind.function == "mean":
        return Factors((root_up(Fraction(1, count)) if count else 1.0,))
    return Factors((1.0,))


# ---- other kinds -----------------------------------------------------------------------------------------------------


def _elementwise(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.Elementwise)
    return Factors((elementwise.slope(kind, inputs[0].range),))


def _max_pool(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.MaxPool)
    most = 1
    for axis in window_reads(kind, inputs[0].shape, node.shape):
        places = axis.places()
        most *= int(np.bincount(places[(places >= 0) & (places < axis.extent)], minlength=1).max())
    return Factors((root_up(most),))


def _softmax(node: Node, inputs: Sequence[Tensor]) -> Factors:
    return Factors((0.5,))


def _log_softmax(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.LogSoftmax)
    # The Jacobian ``I - 1 p^T`` is affine in p, so its norm is largest where p is a unit vector; there it is sqrt(n).
    return Factors((root_up(math.prod(inputs[0].shape[axis] for axis in kind.axes)),))


def _normalize(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, kinds.Normalize)
    if not kind.epsilon > 0:
        raise NoRule("a normalisation by the input's own spread has no constant without a positive epsilon")
    # The Jacobian is a projection less a positive semidefinite matrix of norm at most 1, divided by the spread.
    floor = math.nextafter(math.sqrt(kind.epsilon), 0.0)
    return Factors((math.nextafter(1 / floor, math.inf),), note=f"its spread is at least sqrt({kind.epsilon:g})")


def _local_response(node: Node, inputs: Sequence[Tensor]) -> Factors:
    r"""Bound the derivative of ``x_i s_i^-beta``, where ``s_i = bias + q_i`` and q_i sums weighted squares near i.

    The derivative is diagonal, of at most ``bias^-beta``, less the matrix with the rows
    ``2 beta alpha / size x_i x_W s_i^(-beta - 1)``. As ``|x_i| |x_W| alpha / size <= q_i``, a row has a norm of at most
    ``2 beta q / (bias + q)^(beta + 1)``, which is largest at ``q = bias / beta``. An element is in at most `size`
    rows, so the norm of the matrix is at most the root of `size` times that.
    """
    kind = node.kind
    assert isinstance(kind, kinds.LocalResponse)
    if not is_damping(kind):
        raise NoRule("a local response normalisation needs a positive bias and beta, and an alpha that is not negative")
    size = min(kind.size, inputs[0].shape[kind.axis])
    worst = kind.bias / kind.beta
    row = 2 * kind.beta * worst / (kind.bias + worst) ** (kind.beta + 1) if kind.alpha else 0.0
    return Factors(((kind.bias**-kind.beta + math.sqrt(size) * row) * (1 + 16 * EPS),))


def _need_ranges(inputs: Sequence[Tensor], what: str) -> list[Range]:
    ranges = [tensor.range for tensor in inputs]
    if any(box is None for box in ranges):
        raise NoRule(f"{what} has no constant over all inputs; a range of the input may give one")
    return [box for box in ranges if box is not None]


def _bounded(*values: float) -> Factors:
    if not all(map(math.isfinite, values)):
        raise NoRule("the range of its inputs has no bound")
    return Factors(tuple(value * (1 + 1e-12) for value in values), note="over the range of the input")


def _weight(weights: Float64Array, shape: Shape, out: Shape) -> float:
    """Return the norm of ``x -> weights * x`` where x is broadcast from `shape` to `out`."""
    node = Node("", kinds.Scale(np.where(np.isfinite(weights), weights, 0.0)), (), out)
    return _scale(node, [Tensor(shape)]).values[0] if np.all(np.isfinite(weights)) else math.inf


def _product(node: Node, inputs: Sequence[Tensor]) -> Factors:
    x, y = (largest_modulus(box) for box in _need_ranges(inputs, "a product of activations"))
    return _bounded(_weight(y, inputs[0].shape, node.shape), _weight(x, inputs[1].shape, node.shape))


def _quotient(node: Node, inputs: Sequence[Tensor]) -> Factors:
    x, y = _need_ranges(inputs, "a quotient of activations")
    least = elementwise.least_modulus(*y)
    with np.errstate(all="ignore"):
        by_x, by_y = 1 / least, np.nan_to_num(largest_modulus(x) / least / least, nan=math.inf)
    return _bounded(_weight(by_x, inputs[0].shape, node.shape), _weight(by_y, inputs[1].shape, node.shape))


def _branch_matmul(node: Node, inputs: Sequence[Tensor]) -> Factors:
    boxes = _need_ranges(inputs, "a matrix product of activations")
    norms = []
    for box, tensor in zip(boxes, inputs, strict=True):
        moduli = np.broadcast_to(largest_modulus(box), tensor.shape)
        moduli = moduli.reshape(-1, *moduli.shape[-2:]) if moduli.ndim > 1 else moduli.reshape(1, 1, -1)
        # A matrix whose entries have at most these moduli has at most this norm.
        norms.append(math.prod(math.sqrt(float(np.max(np.sum(moduli, axis=axis)))) for axis in (1, 2)))
    left, right = (tensor.shape[:-2] for tensor in inputs)
    whole = np.broadcast_shapes(left, right)
    repeated = [root_up(copies_between(shape, whole)) for shape in (left, right)]
    return _bounded(norms[1] * repeated[0], norms[0] * repeated[1])


def _opaque(node: Node, inputs: Sequence[Tensor]) -> Factors:
    kind = node.kind
    assert isinstance(kind, Bounded)
    return Factors((kind.bound,))


def _unsupported(node: Node, inputs: Sequence[Tensor]) -> Factors:
    assert isinstance(node.kind, kinds.Unsupported)
    raise NoRule(node.kind.reason)


_FACTORS: dict[type[kinds.Kind], Rule] = {
    kinds.Constant: _nothing,
    kinds.Convolution: _convolution,
    kinds.Matmul: _matmul,
    kinds.Scale: _scale,
    kinds.AveragePool: _axis_maps,
    kinds.AxisMaps: _axis_maps,
    kinds.Identity: _one,
    kinds.Reshape: _one,
    kinds.Permute: _one,
    kinds.Expand: _expand,
    kinds.Slice: _gathering,
    kinds.Gather: _gathering,
    kinds.Pad: _gathering,
    kinds.Sum: _sum,
    kinds.Concatenate: _concatenate,
    kinds.Extremum: _extremum,
    kinds.Reduce: _reduce,
    kinds.Elementwise: _elementwise,
    kinds.MaxPool: _max_pool,
    kinds.Softmax: _softmax,
    kinds.LogSoftmax: _log_softmax,
    kinds.Normalize: _normalize,
    kinds.LocalResponse: _local_response,
    kinds.Product: _product,
    kinds.Quotient: _quotient,
    kinds.BranchMatmul: _branch_matmul,
}
"""The factors of the kinds whose values this package computes."""

RULES: dict[type[kinds.Kind], KindRule] = {
    **{kind: KindRule(factors, evaluate, RANGES.get(kind)) for kind, factors in _FACTORS.items()},
    Bounded: KindRule(_opaque),
    kinds.Unsupported: KindRule(_unsupported),
}
"""The rules of the kinds of this package, by their classes."""
