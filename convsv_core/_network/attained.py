"""A lower bound of a network's Lipschitz constant: the largest norm of its Jacobian at some inputs.

The search goes by turns through new random inputs and through steps from the best input so far. A step along the
direction that the network stretches most is worth a try: the network's change along it is the mean of the stretching
on the way, so where the change is larger than expected, the Jacobian is larger on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from convsv_core._network.dense import node_work
from convsv_core._network.graph import Graph
from convsv_core._network.jacobian import Linearized, linearize, tensors_of
from convsv_core._network.kinds import Input
from convsv_core._network.linear_maps import is_linear
from convsv_core._network.rule_types import Float64Array, NoRule

__all__ = ["Attained", "attained_norm", "inputs_of"]

STEPS = 8
"""Number of power iterations with the Jacobian. A guess: each takes one product with the Jacobian and one back."""

EXPLORING_STEPS = 3
"""Number of power iterations at an input that the search tries, from the best vector so far. A guess."""

POLISHING_STEPS = 40
"""Largest number of power iterations at the best input. A guess."""

MOST_WORK = 1 << 36
"""Largest number of multiplications that the search takes besides `STEPS` iterations at the first input.

Measured on ResNet-18 at 224 x 224: three processor seconds. Networks of more work get fewer inputs.
"""

ROUNDING = 1e-9
"""Relative amount by which a quotient is lowered for rounding. A guess: it is far above the eps of float64."""

SPREAD = 0.1
"""Standard deviation of the inputs without an example, in units of the tensors' elements. A guess."""

SIZES = (1.0, 3.0, 10.0, 0.3, 30.0)
"""Sizes of random inputs in turn, as multiples of the size of the first input. A guess."""

REACHES = (0.3, -0.3, 1.0, -1.0, 0.1, -0.1)
"""Lengths of steps in turn, as multiples of the norm of the best input. A guess."""

INSIDE = 1e-6
"""Distance that inputs keep from the ends of the input's range, as a share of it.

At an end, the derivative on the other side of a kink could be taken. A guess.
"""

NUDGE = 1e-6
"""Size of the random changes of the first input, as a share of the root mean square of its elements.

Where several functions have a kink at once, as at an input of zeros, their derivatives may be those of different sides.
Together they can exceed every derivative of the network: ``x - relu(x) + relu(-x)``, which is 0, would get 1 at the
input 0. A guess, far above the eps of float64.
"""

Point = Mapping[str, Float64Array]
"""A value for each input of a network, by its name."""


class Attained(NamedTuple):
    """The largest norm of the Jacobian that a search has found, rounded downward, and the number of inputs tried."""

    norm: float
    inputs: int


class _Reached(NamedTuple):
    """The norm of a Jacobian from below, and the input direction that has it."""

    norm: float
    direction: Float64Array


def attained_norm(
    graph: Graph, box: tuple[float, float] | None = None, *, search: int = 1, seed: int = 0
) -> Attained | None:
    """Return a lower bound of the Lipschitz constant: the largest norm of the Jacobian at some inputs.

    Parameters
    ----------
    graph : Graph
    box : tuple of float, optional
        The range of the elements of all inputs, in which the inputs lie.
    search : int, default 1
        Largest number of inputs. The first is the graph's example, or a random one. Large networks get fewer, and a
        linear one gets one.
    seed : int, default 0
        The seed of the random numbers, which decide the result together with the other arguments.

    Returns
    -------
    Attained or None
        None for a network with a node that has no value or derivative, and where values are not finite.
    """
    rng = np.random.default_rng(seed)
    work = sum(node_work(node, [graph[name].shape for name in node.inputs]) for node in graph)
    if all(isinstance(node.kind, Input) or is_linear(node.kind) for node in graph):
        search = 1
    at: Point = {name: _inside(_nudged(value, rng), box, rng) for name, value in inputs_of(graph, box, seed).items()}
    points = _Points(graph, at, box, rng)
    # Half of the work is for more iterations at the best input, which often gain more than another input.
    left, inputs, cost = MOST_WORK, 1, (2 * EXPLORING_STEPS + 1) * work
    try:
        with np.errstate(all="ignore"):
            network = linearize(graph, at)
            best = _power(network, rng.standard_normal(network.input_size), STEPS)
            while best is not None and inputs < search and left - cost >= MOST_WORK // 2:
                point = points.next(at, best.direction)
                # A little noise keeps the best vector of one input from being a fixed point at another.
                start = best.direction + 0.1 * rng.standard_normal(best.direction.size) / np.sqrt(best.direction.size)
                found = _power(linearize(graph, point), start, EXPLORING_STEPS)
                if found is not None and found.norm > best.norm:
                    best, at = found, point
                left, inputs = left - cost, inputs + 1
            if best is not None and search > 1 and (steps := min(POLISHING_STEPS, left // max(2 * work, 1))) > 0:
                polished = _power(linearize(graph, at), best.direction, steps)
                best = best if polished is None or polished.norm < best.norm else polished
    except NoRule:
        return None
    return None if best is None else Attained(best.norm * (1 - ROUNDING), inputs)


class _Points:
    """The inputs that a search tries after the first one."""

    def __init__(self, graph: Graph, first: Point, box: tuple[float, float] | None, rng: np.random.Generator) -> None:
        self._inputs, self._box, self._rng, self._count = graph.inputs, box, rng, 0
        self._sizes = {name: _size(value) for name, value in first.items()}

    def next(self, best: Point, direction: Float64Array) -> dict[str, Float64Array]:
        """Return a new random input, or one in some distance from the best one, along a direction or at random."""
        turn, kind = divmod(self._count, 3)
        self._count += 1
        point = {}
        if kind == 0:
            for node in self._inputs:
                size = self._sizes[node.name] * SIZES[turn % len(SIZES)]
                drawn = self._rng.standard_normal(node.shape) * size
                point[node.name] = self._rng.uniform(*self._box, size=node.shape) if self._box is not None else drawn
        else:
            length = float(np.sqrt(sum(np.sum(value**2) for value in best.values())))
            length = length or SPREAD * np.sqrt(direction.size)
            step = direction if kind == 1 else self._rng.standard_normal(direction.size) / np.sqrt(direction.size)
            step = step * (REACHES[turn % len(REACHES)] * length)
            point = {name: best[name] + part for name, part in tensors_of(step, self._inputs)}
        return {name: _inside(value, self._box, self._rng) for name, value in point.items()}


def _size(value: Float64Array) -> float:
    """Return the root mean square of an input's elements, or `SPREAD` where it is 0."""
    return (float(np.sqrt(np.mean(value**2))) if value.size else 0.0) or SPREAD


def _nudged(value: Float64Array, rng: np.random.Generator) -> Float64Array:
    return value + NUDGE * _size(value) * rng.standard_normal(value.shape)


def _inside(value: Float64Array, box: tuple[float, float] | None, rng: np.random.Generator) -> Float64Array:
    """Return an input within the box. Each element keeps a distance of its own, so that no two are equal at an end."""
    if box is None:
        return value
    margin = INSIDE * (box[1] - box[0]) * rng.uniform(0.5, 1.0, value.shape)
    return np.clip(value, box[0] + margin, box[1] - margin)


def inputs_of(graph: Graph, box: tuple[float, float] | None = None, seed: int = 0) -> dict[str, Float64Array]:
    """Return the example of each input, or random numbers: uniform in the box, or else normal ones."""
    rng = np.random.default_rng(seed)
    found = {}
    for node in graph.inputs:
        assert isinstance(node.kind, Input)
        if node.kind.example is not None:
            found[node.name] = np.asarray(node.kind.example, np.float64)
        elif box is not None:
            found[node.name] = rng.uniform(*box, size=node.shape)
        else:
            found[node.name] = SPREAD * rng.standard_normal(node.shape)
    return found


def _power(network: Linearized, vector: Float64Array, steps: int) -> _Reached | None:
    """Return the largest stretching that power iteration meets; None where it is not finite."""
    best = _Reached(0.0, vector / max(float(np.linalg.norm(vector)), np.finfo(np.float64).tiny))
    for _ in range(steps):
        length = float(np.linalg.norm(vector))
        if not 0 < length < np.inf:
            break
        direction = vector / length
        image = network.apply(direction)
        reached = float(np.linalg.norm(image))
        if not np.isfinite(reached):
            return None
        if reached >= best.norm:
            best = _Reached(reached, direction)
        vector = network.adjoint(image)
    return best
