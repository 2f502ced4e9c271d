"""The bound of how far the outputs of two networks of one structure are apart, over a range of the input."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from random_networks import RandomNetwork
from small_networks import conv, network

from convsv_core._network.difference import WEIGHTS, output_difference
from convsv_core._network.jacobian import linearize
from convsv_core.networks import Elementwise, Graph, Matmul, Node, NoRule, Scale

BOX = (-1.0, 2.0)

QUICK, ALL = 40, 400
"""Number of pairs of random networks in the quick half and in both halves together."""


def perturbed(graph: Graph, size: float, rng: np.random.Generator) -> Graph:
    """Return the network with a relative change of this size in each weight, under other names."""
    nodes = []
    for node in graph:
        changes = {}
        for field in dataclasses.fields(node.kind):
            value = getattr(node.kind, field.name)
            if field.name in WEIGHTS and isinstance(value, np.ndarray):
                changes[field.name] = value * (1 + size * rng.standard_normal(value.shape))
        kind = dataclasses.replace(node.kind, **changes)
        inputs = tuple(f"other {name}" for name in node.inputs)
        nodes.append(dataclasses.replace(node, name=f"other {node.name}", kind=kind, inputs=inputs))
    return Graph(tuple(nodes), tuple(f"other {name}" for name in graph.outputs))


def distance(first: Graph, second: Graph, x: np.ndarray) -> float:
    values = [linearize(one, {one.inputs[0].name: x}).values for one in (first, second)]
    ends = zip(first.outputs, second.outputs, strict=True)
    return math.sqrt(sum(np.sum((values[0][one] - values[1][two]) ** 2) for one, two in ends))


def largest_distance(first: Graph, second: Graph, rng: np.random.Generator, tries: int = 12) -> float:
    """Return the largest distance that a search in the box finds, which begins from random inputs and corners."""
    shape = first.inputs[0].shape
    best, at = 0.0, np.zeros(shape)
    for turn in range(tries):
        if turn % 3 == 0:
            x = rng.uniform(*BOX, size=shape)
        elif turn % 3 == 1:
            x = rng.choice(BOX, size=shape)
        else:
            x = np.where(rng.random(shape) < 0.2, rng.choice(BOX, size=shape), at)
        found = distance(first, second, x)
        if found > best:
            best, at = found, x
    return best


def check(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = RandomNetwork(seed, ranged=seed % 2 == 0).graph
    second = perturbed(first, float(rng.choice([1e-3, 0.1])), rng)
    upper = output_difference(first, second, BOX)
    try:
        assert largest_distance(first, second, rng) <= upper
    except NoRule:
        assert upper >= 0
    assert output_difference(first, first, BOX) == 0


@pytest.mark.parametrize("first", range(0, QUICK, 10))
def test_no_outputs_are_further_apart(first: int) -> None:
    with np.errstate(all="ignore"):
        for seed in range(first, first + 10):
            check(seed)


@pytest.mark.thorough
@pytest.mark.parametrize("first", range(QUICK, ALL, 60))
def test_no_outputs_of_many_networks_are_further_apart(first: int) -> None:
    with np.errstate(all="ignore"):
        for seed in range(first, first + 60):
            check(seed)


def test_one_layer_is_bounded_by_the_norm_of_the_difference() -> None:
    rng = np.random.default_rng(0)
    kernel, change = rng.normal(size=(3, 2, 3, 3)), 1e-3 * rng.normal(size=(3, 2, 3, 3))
    shape = (1, 2, 12, 12)
    first, second = (network(shape, conv("y", "x", one, shape, 1)) for one in (kernel, kernel + change))
    upper = output_difference(first, second, (-1, 1))
    reached = max(distance(first, second, rng.choice([-1.0, 1.0], size=shape)) for _ in range(20))
    assert reached <= upper <= 4 * reached
    # Twice the input, twice the difference; and a point alone has the difference of the values.
    assert output_difference(first, second, (-2, 2)) == pytest.approx(2 * upper, rel=1e-6)
    assert output_difference(first, second, (1, 1)) == pytest.approx(distance(first, second, np.ones(shape)), rel=1e-6)


def test_a_network_kept_at_norm_one_has_a_useful_bound() -> None:
    """The bound grows with the sum over the layers, not with the product of their norms."""
    rng = np.random.default_rng(1)
    nodes, name = [], "x"
    for depth in range(8):
        matrix, _ = np.linalg.qr(rng.normal(size=(32, 32)))
        nodes += [
            Node(f"m{depth}", Matmul(matrix), (name,), (1, 32)),
            Node(f"a{depth}", Elementwise("tanh"), (f"m{depth}",), (1, 32)),
        ]
        name = f"a{depth}"
    first = network((1, 32), *nodes)
    second = perturbed(first, 2**-9, rng)
    upper = output_difference(first, second, BOX)
    assert largest_distance(first, second, rng) <= upper <= 8 * 2**-9 * 2 * math.sqrt(32) * 2


def test_networks_of_other_structure_are_refused() -> None:
    shape = (1, 4)
    first = network(shape, Node("y", Matmul(np.eye(4)), ("x",), shape))
    longer = network(shape, *first.nodes[1:], Node("z", Elementwise("relu"), ("y",), shape))
    other = network(shape, Node("y", Elementwise("relu"), ("x",), shape))
    clipped = [network(shape, Node("y", Elementwise("clip", {"low": low}), ("x",), shape)) for low in (0.0, 1.0)]
    scaled = [network(shape, Node("y", Scale(scale), ("x",), shape)) for scale in (np.ones(()), np.ones(4))]
    for pair, message in (
        ((first, longer), "2 and 3 maps"),
        ((first, other), "wanted two networks of one structure"),
        (clipped, "differ in parameters"),
        (scaled, "scale of 'y' and 'y' have other shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            output_difference(*pair, BOX)
