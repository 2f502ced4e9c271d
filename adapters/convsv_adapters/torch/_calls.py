"""One operator of an exported PyTorch program: its arguments by name, and the nodes that describe it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from convsv_adapters._networks import GraphWriter, Traced, Undescribed
from convsv_adapters.torch._export import Operator, module_path
from convsv_core.networks import Constant, Kind, Shape

__all__ = ["Call", "Result", "Rule", "host"]

Result: TypeAlias = Traced | tuple[Traced, ...]
"""The parts of a tensor that an operator returns, or its one result or the first of its results."""


def host(value: Any) -> npt.NDArray[Any]:
    """Return a tensor or a number as a NumPy array, of float32 in place of bfloat16, and of float64 for a number."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value, np.float64)
    if value.is_complex():
        raise Undescribed("it computes with complex numbers")
    value = value.detach().resolve_neg()
    return (value.float() if value.dtype is torch.bfloat16 else value).cpu().numpy()


class Call:
    """One operator of an exported program, whose arguments are read by their names in the operator's schema.

    Parameters
    ----------
    node : Operator
    known : mapping from Operator to object
        The value of each operator before this one: a `Traced`, a tuple of them, or a constant.
    writer : GraphWriter
    name : str
        The name of the node that describes the operator.
    """

    def __init__(self, node: Operator, known: Mapping[Operator, Any], writer: GraphWriter, name: str) -> None:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
        self._writer = writer
        self._node = node
        self._name = name
        self.op = str(node.target)
        self.source = module_path(node)
        self.arguments = list(args)
        schema = getattr(node.target, "_schema", None)
        self._named: dict[str, Any] = {}
        if schema is not None:
            for place, argument in enumerate(schema.arguments):
                given = args[place] if place < len(args) else kwargs.get(argument.name, argument.default_value)
                self._named[argument.name] = given
        self.tensors = [known[one] for one in node.all_input_nodes if isinstance(known[one], Traced)]

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def __getitem__(self, name: str) -> Any:
        return self._named[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or a default value where the operator has none of that name."""
        return self._named.get(name, default)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Return the shapes of the tensors that the operator returns."""
        held = self._node.meta.get("val")
        held = held if isinstance(held, tuple | list) else (held,)
        return tuple(tuple(int(n) for n in one.shape) if isinstance(one, torch.Tensor) else () for one in held)

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype of the first tensor that the operator returns."""
        held = self._node.meta.get("val")
        held = held[0] if isinstance(held, tuple | list) else held
        return held.dtype if isinstance(held, torch.Tensor) else None

    @property
    def real(self) -> bool:
        """Return whether the operator returns real numbers first, and not integers, booleans or complex numbers."""
        return self.dtype is not None and self.dtype.is_floating_point

    @property
    def shape(self) -> Shape:
        """Return the shape of the first tensor that the operator returns."""
        return self.shapes[0]

    def traced(self, name: str) -> Traced:
        """Return an argument that depends on the network's input; raise Undescribed if it does not."""
        if not isinstance(value := self[name], Traced):
            raise Undescribed(f"its argument {name!r} does not depend on the input of the network, another one does")
        return value

    def constant(self, name: str) -> Any:
        """Return an argument that does not depend on the network's input as an array; None stays None."""
        if isinstance(value := self[name], Traced):
            raise Undescribed(f"its argument {name!r} depends on the input of the network")
        return None if value is None else host(value)

    def step(self, kind: Kind, *inputs: Traced, shape: Sequence[int]) -> Traced:
        """Add a node that is a part of the operator, before its result."""
        return self._writer.add(
            f"{self._name}/{type(kind).__name__.lower()}", kind, inputs, shape, self.op, self.source
        )

    def result(self, kind: Kind, *inputs: Traced, shape: Sequence[int] | None = None) -> Traced:
        """Add the node whose tensor the operator returns."""
        return self._writer.add(self._name, kind, inputs, self.shape if shape is None else shape, self.op, self.source)

    def as_traced(self, operand: Any) -> Traced:
        """Return a tensor of the network as it is, and anything else as a `Constant` node."""
        if isinstance(operand, Traced):
            return operand
        array = host(operand)
        return self._writer.add(f"{self._name}/constant", Constant(array), (), array.shape, "constant")

    def unsupported(self, reason: str) -> Traced:
        """Add a node without a rule for the operator."""
        return self._writer.add_unsupported(self._name, reason, self.tensors, self.shape, self.op, self.source)


Rule: TypeAlias = Callable[[Call], Result]
"""A function that describes an operator by nodes, and returns its tensors. It raises Undescribed where it cannot."""
