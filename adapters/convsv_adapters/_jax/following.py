"""Which layers' outputs batch normalisations take directly, read from the equations of one call of a JAX model.

The outputs of layers and the inputs of normalisations are marked with names, which JAX keeps as equations. A
normalisation follows a layer where it takes the very array that the layer returned. Calls of other functions are looked
into, and loops are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
from jax.ad_checkpoint import checkpoint_name

from convsv_adapters._jax.equations import BODIES, CALLS
from convsv_adapters._jax.tracing import jaxpr_of

__all__ = ["Following", "FollowingWatch"]

PREFIX = "convsv following"
"""The beginning of the names of marks."""


@dataclasses.dataclass(frozen=True)
class Following:
    """The facts that a call has shown about the layers and normalisations of a model, by their names.

    Attributes
    ----------
    pairs : set of pairs of str
        A layer, and a normalisation that took an output of the layer directly.
    bare : set of str
        The layers of which an output was used by anything but a normalisation, or by nothing.
    alone : set of str
        The normalisations that took something else than a layer's output, or whose channels are on another axis.
    reached : set of str
        The normalisations that the call has reached.
    """

    pairs: set[tuple[str, str]]
    bare: set[str]
    alone: set[str]
    reached: set[str]


@dataclasses.dataclass(frozen=True)
class _Mark:
    """The mark of a layer's output, or of a normalisation's input.

    Attributes
    ----------
    name : str
    channels : int
        The axis of the channels, counted from the end.
    shape : tuple of int
        The shape of the array where it was marked. The shape in the equations is larger within `jax.vmap`.
    is_layer : bool
    """

    name: str
    channels: int
    shape: tuple[int, ...]
    is_layer: bool


@dataclasses.dataclass(eq=False)
class _Output:
    """An output of a layer, and the normalisations that took it; None stands for any other use."""

    mark: _Mark
    users: set[str | None] = dataclasses.field(default_factory=set)


class FollowingWatch:
    """Marks arrays in a call of a model, and finds the marks in the call's equations."""

    def __init__(self) -> None:
        self._marks: list[_Mark] = []
        self._outputs: list[_Output] = []
        self._alone: set[str] = set()
        self._reached: set[str] = set()

    def made(self, name: str, output: jax.Array, channels: int) -> jax.Array:
        """Return a layer's output with a mark; `channels` is the axis of its channels."""
        return self._marked(name, output, channels, is_layer=True)

    def taken(self, name: str, image: jax.Array, channels: int | None) -> jax.Array:
        """Return a normalisation's input with a mark; `channels` is the axis that it scales, None if it is several."""
        return self._marked(name, image, image.ndim if channels is None else channels, is_layer=False)

    def _marked(self, name: str, array: jax.Array, channels: int, is_layer: bool) -> jax.Array:
        # Axes are counted from the end. An axis past the end, which no layer has, stands for several axes.
        axis = channels if channels < 0 else channels - array.ndim
        self._marks.append(_Mark(name, axis, tuple(array.shape), is_layer))
        return checkpoint_name(array, f"{PREFIX} {len(self._marks) - 1}")

    def follow(self, call: Callable[..., object], tree: object, example_input: object) -> Following:
        """Trace a call in which arrays are marked, and return what it shows; the arguments are as for `trace`."""
        jaxpr = jaxpr_of(call, tree, example_input)
        for output in self._walk(jaxpr, [None] * len(jaxpr.invars)):
            if output is not None:
                output.users.add(None)
        pairs = {(one.mark.name, user) for one in self._outputs for user in one.users if user is not None}
        bare = {one.mark.name for one in self._outputs if None in one.users or not one.users}
        return Following(pairs, bare, self._alone, self._reached)

    def _walk(self, jaxpr: Any, given: list[_Output | None]) -> list[_Output | None]:
        """Note the uses of outputs in a function's equations, and return the outputs among the function's results."""
        held: dict[Any, _Output | None] = dict(zip(jaxpr.invars, given, strict=True))

        def read(atom: Any) -> _Output | None:
            return None if isinstance(atom, jax.extend.core.Literal) else held.get(atom)

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            primitive = equation.primitive.name
            mark = self._mark_of(equation)
            if mark is not None:
                shape = tuple(equation.invars[0].aval.shape)
                held[equation.outvars[0]] = self._met(mark, shape, operands[0])
            elif primitive in CALLS:
                body = next(equation.params[name] for name in BODIES if name in equation.params)
                held.update(zip(equation.outvars, self._walk(getattr(body, "jaxpr", body), operands), strict=True))
            else:
                _used(operands)
        return [read(atom) for atom in jaxpr.outvars]

    def _mark_of(self, equation: Any) -> _Mark | None:
        name = equation.params.get("name") if equation.primitive.name == "name" else None
        if not isinstance(name, str) or not name.startswith(PREFIX):
            return None
        return self._marks[int(name.removeprefix(PREFIX))]

    def _met(self, mark: _Mark, shape: tuple[int, ...], operand: _Output | None) -> _Output | None:
        """Return the output that an equation marks, or note that a normalisation takes an output."""
        if mark.is_layer:
            _used([operand])
            output = _Output(mark)
            self._outputs.append(output)
            return output
        self._reached.add(mark.name)
        fits = operand is not None and operand.mark.shape == mark.shape == shape
        if operand is not None and fits and operand.mark.channels == mark.channels:
            operand.users.add(mark.name)
        else:
            self._alone.add(mark.name)
            _used([operand])
        return None


def _used(operands: list[_Output | None]) -> None:
    for output in operands:
        if output is not None:
            output.users.add(None)
