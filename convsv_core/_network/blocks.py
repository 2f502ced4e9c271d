"""The residual blocks of a network: sums of a linear map of a tensor, as a rule the identity, and of a branch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from convsv_core._network import kinds
from convsv_core._network.bounds import Bounds
from convsv_core._network.candidates import node_form
from convsv_core._network.dense import linear_part
from convsv_core._network.forms import Form, compose
from convsv_core._network.graph import Graph, Node
from convsv_core._network.linear_maps import is_linear
from convsv_core._network.logarithms import power_of_ten
from convsv_core._network.norms import EPS

__all__ = ["ResidualBlock", "residual_blocks"]


@dataclass(frozen=True)
class ResidualBlock:
    """A residual block ``S x + f(x)`` with a linear shortcut S, as a rule the identity.

    Attributes
    ----------
    name : str
        The name of the sum.
    start : str
        The name of x.
    branch_upper : float
        Upper bound of the Lipschitz constant of f.
    smallest_singular_value : float
        Lower bound of all singular values of the block's Jacobian, at every input: the smallest singular value of S
        less `branch_upper`, at least 0. A Jacobian with m rows and n columns has ``min(m, n)`` singular values. If the
        bound is positive, the Jacobian has full rank, and ``x + f(x)`` is invertible. It is 0 too where no
        positive bound for S is known: of a shortcut that is no small map and whose windows overlap.
    largest_singular_value : float
        Upper bound of all singular values: ``shortcut_upper + branch_upper``, rounded upward.
    shortcut_upper : float
        Upper bound of the norm of S, 1 for the identity.
    """

    name: str
    start: str
    branch_upper: float
    smallest_singular_value: float
    largest_singular_value: float
    shortcut_upper: float = 1.0

    def __str__(self) -> str:
        shortcut = "" if self.shortcut_upper == 1 else f"shortcut {self.shortcut_upper:.4g}, "
        values = f"in [{self.smallest_singular_value:.4g}, {self.largest_singular_value:.4g}]"
        return f"block {self.name}: {shortcut}branch {self.branch_upper:.4g}, singular values {values}"


class _Shortcut(NamedTuple):
    """The linear path of a block, from a tensor to an input of the sum.

    Attributes
    ----------
    smallest : float
        Lower bound of the path's smallest singular value; 0 where none is known.
    largest : float
        Upper bound of the path's norm.
    """

    smallest: float
    largest: float


def residual_blocks(graph: Graph, bounds: Bounds) -> Iterator[ResidualBlock]:
    """Yield every sum of a linear map of a tensor and of a function of this tensor alone."""
    for node in graph:
        if not isinstance(node.kind, kinds.Sum) or len(node.inputs) != 2:
            continue
        if any(graph[name].shape != node.shape for name in node.inputs):
            continue
        weights = [abs(weight) for weight in node.kind.weights or (1.0, 1.0)]
        first, second = (_behind_identities(graph, name) for name in node.inputs)
        if first == second:
            continue
        orders = [((first, second), weights), ((second, first), weights[::-1])]
        plain = [order for order in orders if _depends_only_on(graph, order[0][1], order[0][0])]
        blocks = (_block(graph, bounds, node.name, paths, factors) for paths, factors in plain or orders)
        found = [block for block in blocks if block is not None]
        if found:
            # Where both paths are linear, each of them may count as the shortcut, and both intervals hold.
            yield max(found, key=lambda block: block.smallest_singular_value)


def _behind_identities(graph: Graph, name: str) -> str:
    while isinstance(graph[name].kind, kinds.Identity):
        (name,) = graph[name].inputs
    return name


def _block(
    graph: Graph, bounds: Bounds, name: str, paths: tuple[str, str], factors: list[float]
) -> ResidualBlock | None:
    """Return the block of a sum whose first path is a shortcut, each path times a factor; None if it is none."""
    path, branch = paths
    start = _start(graph, path, branch)
    if start is None:
        return None
    shortcut = _shortcut(graph, bounds, start, path)
    branch_upper = _product(power_of_ten(bounds.from_tensor(start, branch)), factors[1])
    largest = upper = _product(shortcut.largest, factors[0])
    smallest = _product(shortcut.smallest, factors[0], down=True)
    if branch_upper:
        largest = math.nextafter(largest + branch_upper, math.inf)
        smallest = max(0.0, math.nextafter(smallest - branch_upper, -math.inf))
    return ResidualBlock(name, start, branch_upper, smallest, largest, upper)


def _product(value: float, factor: float, down: bool = False) -> float:
    """Return a product that is rounded upward, or downward; exact for the factor 1."""
    return value if factor == 1 or not value else math.nextafter(value * factor, -math.inf if down else math.inf)


def _start(graph: Graph, path: str, branch: str) -> str | None:
    """Return the nearest tensor that a linear path begins from and that the branch depends on alone."""
    name = path
    while True:
        if name != branch and _depends_only_on(graph, branch, name):
            return name
        node = graph[name]
        if len(node.inputs) != 1 or not is_linear(node.kind):
            return None
        (name,) = node.inputs


def _depends_only_on(graph: Graph, name: str, source: str) -> bool:
    """Return whether a tensor depends on another, and on the network's inputs by that one alone."""
    waiting, seen, met = [name], {name}, False
    while waiting:
        node = graph[waiting.pop()]
        if node.name == source:
            met = True
            continue
        if isinstance(node.kind, kinds.Input):
            return False
        waiting += [one for one in node.inputs if one not in seen]
        seen.update(node.inputs)
    return met


# ---- the shortcut ----------------------------------------------------------------------------------------------------


def _shortcut(graph: Graph, bounds: Bounds, start: str, path: str) -> _Shortcut:
    nodes = _between(graph, start, path)
    if all(isinstance(node.kind, kinds.Identity) for node in nodes):
        return _Shortcut(1.0, 1.0)
    largest = power_of_ten(bounds.from_tensor(start, path))
    smallest = _smallest_of_form(graph, start, nodes)
    if smallest is None:
        part = linear_part(graph, path, {start})
        if part is not None and part.graph.inputs[0].name == start:
            smallest = part.smallest_singular_value()
    return _Shortcut(smallest or 0.0, largest)


def _between(graph: Graph, start: str, path: str) -> list[Node]:
    """Return the nodes of a path of maps of one input, in the order of execution."""
    nodes: list[Node] = []
    while path != start:
        nodes.insert(0, graph[path])
        (path,) = graph[path].inputs
    return nodes


def _smallest_of_form(graph: Graph, start: str, nodes: list[Node]) -> float | None:
    """Return a lower bound of the smallest singular value of maps in a row, or None."""
    shape, form = graph[start].shape, None
    for node in nodes:
        if not isinstance(node.kind, kinds.Identity):
            own = node_form(node, shape, None if form is None else form.axes_out[0])
            if own is None:
                return None
            form = own if form is None else compose(own, form)
            if form is None:
                return None
        shape = node.shape
    return None if form is None else _smallest_of_windows(form)


def _smallest_of_windows(form: Form) -> float | None:
    """Return a lower bound of the smallest singular value of a convolution whose windows share no element, or None.

    Each output pixel has a window of its own, which lies inside the image. So the map is one matrix for each group of
    channels, as many times as there are output pixels. The matrix multiplies the elements of a window. All singular
    values are those of these matrices, and zeros if the whole map has more rows and columns than they have together.
    """
    if form.mode != "zeros" or form.adjoint or form.factor != 1:
        return None
    for axis, taps in enumerate(form.taps):
        reach = form.dilation[axis] * (taps - 1) + 1
        last = form.start[axis] + (form.outputs[axis] - 1) * form.stride[axis] + reach
        apart = taps == 1 or form.outputs[axis] == 1 or reach <= form.stride[axis]
        if not apart or form.start[axis] < 0 or last > form.extents[axis]:
            return None
    groups, rows, columns = form.kernel.shape[:3]
    matrices = form.kernel.reshape(groups, rows, -1)
    pixels = math.prod(form.outputs)
    inputs, outputs = math.prod(form.extents) * groups * columns, pixels * groups * rows
    if pixels * groups * min(matrices.shape[1:]) < min(inputs, outputs):
        return 0.0
    values = np.linalg.svd(matrices, compute_uv=False)
    # The error of a singular value is of the order of eps times the norm; the factor is a wide margin.
    rounding = 8 * max(matrices.shape[1:]) * EPS * float(np.max(values, initial=0.0))
    return max(0.0, float(np.min(values)) - rounding - form.error)
