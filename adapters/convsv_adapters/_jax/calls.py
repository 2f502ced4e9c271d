"""One equation of a JAX function: its operands, and the nodes that describe it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from convsv_adapters._jax.equations import Constant, Equation, Value
from convsv_adapters._networks import GraphWriter, Traced, Undescribed
from convsv_core.networks import Constant as ConstantKind
from convsv_core.networks import Kind, Shape

__all__ = ["Call", "Result", "Rule"]

Result: TypeAlias = Traced | tuple[Traced, ...]
"""The tensor or tensors that an equation computes."""


class Call:
    """One equation, whose operands are read as tensors of the network or as constants.

    Parameters
    ----------
    equation : Equation
    known : mapping from Value to Traced
        The tensors of the network so far.
    writer : GraphWriter
    """

    def __init__(self, equation: Equation, known: Mapping[Value, Traced], writer: GraphWriter) -> None:
        self.equation = equation
        self.known = known
        self._writer = writer

    @property
    def _source(self) -> str:
        """Return the path of the layer whose parameter is an operand, or else the scope of the equation."""
        return self.equation.layer or self.equation.scope

    def _name(self, op: str) -> str:
        """Return the path of the layer whose parameter is an operand, or else the operation within its scope."""
        return self.equation.layer or "/".join(filter(None, (self.equation.scope, op)))

    @property
    def params(self) -> Mapping[str, Any]:
        """Return the parameters of the primitive."""
        return self.equation.params

    @property
    def shape(self) -> Shape:
        """Return the shape of the equation's first result."""
        return self.equation.results[0].shape

    @property
    def operands(self) -> list[Traced | npt.NDArray[Any]]:
        """Return the operands: tensors of the network, and arrays."""
        return [self.known[one] if isinstance(one, Value) else one.array for one in self.equation.operands]

    @property
    def tensors(self) -> list[Traced]:
        """Return the operands that are tensors of the network."""
        return [self.known[one] for one in self.equation.operands if isinstance(one, Value)]

    @property
    def x(self) -> Traced:
        """Return the first operand, which must be a tensor of the network."""
        return self.known[self.value(0)]

    def value(self, place: int) -> Value:
        """Return an operand that depends on the network's input; raise Undescribed if it does not."""
        if not isinstance(value := self.equation.operands[place], Value):
            raise Undescribed(f"its operand {place} does not depend on the input of the network, another one does")
        return value

    def constant(self, place: int) -> npt.NDArray[Any]:
        """Return an operand that does not depend on the network's input; raise Undescribed if it does."""
        if not isinstance(value := self.equation.operands[place], Constant):
            raise Undescribed(f"its operand {place} depends on the input of the network")
        return value.array

    def step(self, kind: Kind, *inputs: Traced, shape: Sequence[int]) -> Traced:
        """Add a node that is a part of the equation, before its result."""
        name = f"{self._name(self.equation.primitive)}/{type(kind).__name__.lower()}"
        return self._writer.add(name, kind, inputs, shape, self.equation.primitive, self._source)

    def result(self, kind: Kind, *inputs: Traced, shape: Sequence[int] | None = None, op: str = "") -> Traced:
        """Add the node whose tensor the equation computes."""
        op = op or self.equation.primitive
        shape = self.shape if shape is None else shape
        return self._writer.add(self._name(op), kind, inputs, shape, op, self._source)

    def as_traced(self, operand: Traced | npt.NDArray[Any]) -> Traced:
        """Return a tensor of the network as it is, and an array as a `Constant` node."""
        if isinstance(operand, Traced):
            return operand
        array = np.array(operand)
        return self._writer.add("constant", ConstantKind(array), (), array.shape, "constant")

    def unsupported(self, reason: str) -> Result:
        """Add a node without a rule for each result of the equation."""
        equation = self.equation
        found = tuple(
            self._writer.add_unsupported(
                self._name(equation.primitive), reason, self.tensors, one.shape, equation.primitive, self._source
            )
            for one in equation.results
        )
        return found if len(found) > 1 else found[0]


Rule: TypeAlias = Callable[[Call], Result]
"""A function that describes an equation by nodes, and returns its tensors. It raises Undescribed where it cannot."""
