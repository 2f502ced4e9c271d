"""A lower bound of a network's Lipschitz constant: the norm of its Jacobian at some inputs."""

from __future__ import annotations

import numpy as np

from convsv_core._network.graph import Graph
from convsv_core._network.jacobian import Linearized, linearize
from convsv_core._network.kinds import Input
from convsv_core._network.rule_types import Float64Array, NoRule

__all__ = ["attained_norm", "inputs_of", "jacobian_norm"]

STEPS = 8
"""Number of power iterations with the Jacobian. A guess: each takes one product with the Jacobian and one back."""

ROUNDING = 1e-9
"""Relative amount by which a quotient is lowered for rounding. A guess: it is far above the eps of float64."""

SPREAD = 0.1
"""Standard deviation of the inputs without an example, in units of the tensors' elements. A guess."""


MARGIN = 1e-6
"""Distance of the examples' elements from the ends of an input range, in units of its length. A guess.

At an end, the derivative may be that of the other side of a kink.
"""


def attained_norm(graph: Graph, box: tuple[float, float] | None = None, steps: int = STEPS) -> float | None:
    """Return a lower bound of the norm of the Jacobian at the example or a random input, by power iteration.

    The Lipschitz constant is at least that. None for a network with a node that has no value or derivative, and where
    the network's values are not finite.
    """
    try:
        with np.errstate(all="ignore"):
            return jacobian_norm(linearize(graph, inputs_of(graph, box)), steps)
    except NoRule:
        return None


def inputs_of(graph: Graph, box: tuple[float, float] | None = None, seed: int = 0) -> dict[str, Float64Array]:
    """Return the example of each input, moved into the box, or random numbers: uniform in the box, or normal ones."""
    rng = np.random.default_rng(seed)
    found = {}
    for node in graph.inputs:
        assert isinstance(node.kind, Input)
        if node.kind.example is not None:
            example = np.asarray(node.kind.example, np.float64)
            found[node.name] = example if box is None else _inside(example, *box)
        elif box is not None:
            found[node.name] = rng.uniform(*box, size=node.shape)
        else:
            found[node.name] = SPREAD * rng.standard_normal(node.shape)
    return found


def _inside(example: Float64Array, low: float, high: float) -> Float64Array:
    """Return an example whose elements are inside of a range, where derivatives are those of the range."""
    margin = MARGIN * (high - low)
    return np.clip(example, low + margin, high - margin)


def jacobian_norm(network: Linearized, steps: int = STEPS) -> float | None:
    """Return the norm of a Jacobian from below, by power iteration from a fixed random vector."""
    vector = np.random.default_rng(0).standard_normal(network.input_size)
    best = 0.0
    for _ in range(steps):
        length = float(np.linalg.norm(vector))
        if not 0 < length < np.inf:
            break
        image = network.apply(vector / length)
        reached = float(np.linalg.norm(image))
        if not np.isfinite(reached):
            return None
        best = max(best, reached)
        vector = network.adjoint(image)
    return best * (1 - ROUNDING)
