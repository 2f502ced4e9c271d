"""The matrix of a small linear part of a network, whose norm is exact but for rounding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from convsv_core._network import kinds
from convsv_core._network.graph import Graph, Node, Shape
from convsv_core._network.jacobian import Linearized
from convsv_core._network.linear_maps import is_linear, linear_map
from convsv_core._network.norms import EPS, matrix_norm
from convsv_core._network.ranges import moduli_of
from convsv_core._network.rule_types import Float64Array, LinearMap

__all__ = ["LinearPart", "linear_part", "node_work"]

MOST_SIDE = 1024
"""Largest number of inputs, or of outputs if they are fewer, of a part that is made a matrix. A guess."""

MOST_DECOMPOSED = 256
"""Largest side of a matrix of which all singular values are computed. A guess: about 20 ms."""

MOST_ENTRIES = 1 << 22
"""Largest number of entries of such a matrix: 32 MiB. A guess."""

MOST_WORK = 1 << 31
"""Largest number of multiplications to make such a matrix: about a processor second. A guess."""

MOST_CALLS = 1 << 14
"""Largest number of applications of nodes to make such a matrix, of about 50 us each. A guess."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearPart:
    """A linear part of a network, from one tensor to another.

    Attributes
    ----------
    graph : Graph
        Its only input stands for the first tensor, under that tensor's name.
    """

    graph: Graph

    def norm(self) -> float:
        """Return an upper bound of the norm of the part's matrix, exact but for rounding."""
        return matrix_norm(self._matrix()[None]) + self._rounding()

    def smallest_singular_value(self) -> float | None:
        """Return a lower bound of the matrix's smallest singular value, exact but for rounding; None if it is large.

        A matrix with m rows and n columns has ``min(m, n)`` singular values.
        """
        root, last = self.graph.inputs[0], self.graph[self.graph.outputs[0]]
        if min(root.size, last.size) > MOST_DECOMPOSED:
            return None
        values = np.linalg.svd(self._matrix(), compute_uv=False)
        error = 8 * max(root.size, last.size) * EPS * float(np.max(values, initial=0.0))
        return max(0.0, float(np.min(values, initial=math.inf)) - error - self._rounding())

    def _matrix(self) -> Float64Array:
        """Return the part's matrix, or its transpose."""
        maps = {
            node.name: linear_map(node, [self.graph[name].shape for name in node.inputs])
            for node in self.graph
            if not isinstance(node.kind, kinds.Input)
        }
        part = Linearized(self.graph, maps, {})
        size, outputs = self.graph.inputs[0].size, self.graph[self.graph.outputs[0]].size
        if size <= outputs:
            return np.stack([part.apply(column) for column in np.eye(size)])
        return np.stack([part.adjoint(row) for row in np.eye(outputs)])

    def _rounding(self) -> float:
        """Return a bound of the rounding of the matrix, as an operator.

        Each node adds at most n roundings of a sum of n terms, relative to the moduli of the terms. So the whole error
        is at most their sum times the matrix of the part whose weights are replaced by their moduli. The norm of that
        matrix is at most the root of its largest row sum times its largest column sum.
        """
        moduli: dict[str, LinearMap] = {}
        terms = 0
        for node in self.graph:
            if not isinstance(node.kind, kinds.Input):
                own = [self.graph[name].shape for name in node.inputs]
                moduli[node.name] = linear_map(dataclasses.replace(node, kind=moduli_of(node.kind)), own)
                terms += _terms(node, own) + 2
        part = Linearized(self.graph, moduli, {})
        rows = float(np.max(part.apply(np.ones(self.graph.inputs[0].size)), initial=0.0))
        columns = float(np.max(part.adjoint(np.ones(self.graph[self.graph.outputs[0]].size)), initial=0.0))
        return 2 * EPS * terms * math.sqrt(rows * columns)


def linear_part(graph: Graph, name: str, stops: Iterable[str]) -> LinearPart | None:
    """Return the largest small linear part of a graph that ends in a tensor and begins in one tensor.

    Parameters
    ----------
    graph : Graph
    name : str
        The tensor in which the part ends.
    stops : iterable of str
        Tensors that are not passed by.

    Returns
    -------
    LinearPart or None
        None where the tensor depends on several others by linear maps, or the matrix is too large.
    """
    barred = set(stops)
    needed, roots, constants = {name}, set[str](), set[str]()
    for node in reversed(graph.nodes):
        if node.name not in needed:
            continue
        if node.name != name and (node.name in barred or not is_linear(node.kind)):
            (constants if isinstance(node.kind, kinds.Constant) else roots).add(node.name)
        else:
            needed.update(node.inputs)
    if len(roots) != 1 or name in roots or not is_linear(graph[name].kind):
        return None
    (root,) = roots
    nodes = [Node(root, kinds.Input(), (), graph[root].shape)]
    nodes += [node for node in graph if node.name in (needed | constants) - {root}]
    side = min(graph[root].size, graph[name].size)
    work = sum(node_work(node, [graph[source].shape for source in node.inputs]) for node in nodes)
    calls = side * len(nodes)
    large = side > MOST_SIDE or graph[root].size * graph[name].size > MOST_ENTRIES
    if large or calls > MOST_CALLS or side * work > MOST_WORK or any(node.name in constants for node in nodes):
        return None
    return LinearPart(Graph(tuple(nodes), (name,)))


def _terms(node: Node, shapes: list[Shape]) -> int:
    """Return a bound of how many terms a linear map adds for one element, forwards or backwards."""
    kind = node.kind
    if isinstance(kind, kinds.Convolution):
        return int(kind.kernel.size)
    return max([node.size, *(math.prod(shape) for shape in shapes)])


def node_work(node: Node, shapes: list[Shape]) -> int:
    """Return about how many multiplications a linear map takes."""
    kind = node.kind
    if isinstance(kind, kinds.Convolution):
        places = max(
            node.size // node.shape[kind.layout.index("C")], math.prod(shapes[0]) // shapes[0][kind.layout.index("C")]
        )
        return places * int(kind.kernel.size)
    if isinstance(kind, kinds.Matmul):
        return node.size * int(kind.matrix.shape[0 if kind.matrix.ndim < 2 or kind.side == "right" else -1])
    return node.size
