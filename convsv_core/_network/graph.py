"""A network as a graph of maps: the types that front ends fill in.

**Shapes.** Every shape is the shape of a whole tensor as the framework has it, with the batch axis. Front ends trace a
model with a batch of one example, so that the Lipschitz constant belongs to one example. Axes are counted from 0, and
none is negative. With a larger batch the constant bounds the map between whole batches. It is the same number
where a network treats its examples apart.

**Numbers.** A graph is the map of a network at inference, computed exactly. Arrays are NumPy's, in the dtype in which
the model stores them. What a front end computes, such as the scale of a batch normalisation, it computes in float64.
Each kind holds all that is needed to evaluate it.

**Composing.** A front end states one node for one operator of the source. It folds constants, and nothing else: batch
normalisation is a `Scale`, ``x * sigmoid(x)`` is a `Product`. Folding and patterns are the core's, each rule once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from convsv_core._network.kinds import Input, Kind

__all__ = ["Graph", "Node", "Shape"]

Shape: TypeAlias = tuple[int, ...]
"""The extents of a tensor, with the batch axis."""


@dataclass(frozen=True, eq=False)
class Node:
    """One map of a network, and the tensor that it computes.

    Parameters
    ----------
    name : str
        The name of the tensor, which no other node of the graph has. Users see it, and name outputs by it.
    kind : Kind
        The map.
    inputs : tuple of str
        The names of the nodes whose tensors the map takes, in the order that the kind states.
    shape : tuple of int
        The shape of the tensor.
    op : str, default ""
        The source's own name of the operator, such as "Conv" or "aten.relu.default", for messages. The name of the kind
        stands in for "".
    source : str, default ""
        Another name by which users know the node, such as the path of a module. `Graph.find` looks it up too.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    shape: Shape
    op: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # A frozen dataclass refuses plain assignment to its fields.
        set_field(self, "inputs", tuple(self.inputs))
        set_field(self, "shape", tuple(int(extent) for extent in self.shape))
        set_field(self, "op", self.op or type(self.kind).__name__)

    @property
    def size(self) -> int:
        """Return the number of elements of the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as a graph of maps.

    Parameters
    ----------
    nodes : tuple of Node
        Each node comes after the nodes that it takes its inputs from.
    outputs : tuple of str
        The names of the nodes that are the network's outputs, at least one.

    Raises
    ------
    ValueError
        Two nodes have one name, a node takes a tensor that no node before it computes, or there is no such output.

    Examples
    --------
    >>> from convsv_core._network.kinds import Elementwise, Input
    >>> graph = Graph((Node("x", Input(), (), (1, 4)), Node("y", Elementwise("relu"), ("x",), (1, 4))), ("y",))
    >>> [node.name for node in graph.inputs], graph["y"].op
    (['x'], 'Elementwise')
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    _by_name: dict[str, Node] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # A frozen dataclass refuses plain assignment to its fields.
        set_field(self, "nodes", tuple(self.nodes))
        set_field(self, "outputs", tuple(self.outputs))
        by_name: dict[str, Node] = {}
        for node in self.nodes:
            if node.name in by_name:
                raise ValueError(f"nodes: two are called {node.name!r}: wanted a name of its own for each")
            for name in node.inputs:
                if name not in by_name:
                    raise ValueError(f"nodes: {node.name!r} takes {name!r}, which no node before it computes")
            by_name[node.name] = node
        for name in self.outputs:
            if name not in by_name:
                raise ValueError(f"outputs={self.outputs}: no node is called {name!r}")
        if not self.outputs:
            raise ValueError("outputs=(): wanted the name of at least one node")
        set_field(self, "_by_name", by_name)

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """Return the nodes that are the network's inputs."""
        return tuple(node for node in self.nodes if isinstance(node.kind, Input))

    @cached_property
    def users(self) -> dict[str, tuple[Node, ...]]:
        """Return the nodes that take each tensor, by the tensor's name."""
        found: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def find(self, name: str) -> str:
        """Return the name of the node that a user calls `name`: by its name, or by its source if only one has it.

        Raises ValueError, which lists similar names, if there is no such node.
        """
        if name in self:
            return name
        # A source may be several nodes in turn, as a module is; the last of them is its output.
        found = [node.name for node in self.nodes if node.source == name]
        if found:
            return found[-1]
        import difflib

        near = difflib.get_close_matches(name, [*self._by_name, *(n.source for n in self.nodes if n.source)], 3, 0.4)
        hint = f"; similar: {', '.join(dict.fromkeys(near))}" if near else ""
        raise ValueError(f"output={name!r}: the network computes no tensor of this name{hint}")

    def until(self, outputs: Iterable[str]) -> Graph:
        """Return the part of the graph that these nodes depend on, with them as its outputs. It keeps all inputs."""
        outputs = tuple(outputs)
        needed = set(outputs)
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.inputs)
        return Graph(tuple(node for node in self.nodes if node.name in needed or isinstance(node.kind, Input)), outputs)
