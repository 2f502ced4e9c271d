"""Bounds of networks whose weights are so small or so large that their squares vanish or overflow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from convsv_core import Conv, lipschitz
from convsv_core._network.ranges import moduli_of
from convsv_core.networks import (
    BranchMatmul,
    Convolution,
    Elementwise,
    Graph,
    Input,
    Matmul,
    Node,
    Quotient,
    Scale,
)

RNG = np.random.default_rng(0)


def _upper(kind, shape, out, **options):
    graph = Graph((Node("x", Input(), (), shape), Node("y", kind, ("x",), out)), ("y",))
    return lipschitz(graph, lower=False, **options).upper


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-160, 1e200])
def test_a_broadcast_scale(scale):
    norm = _upper(Scale(np.full((3, 4), scale)), (1, 4), (3, 4))
    assert scale * math.sqrt(3) <= norm <= scale * math.sqrt(3) * (1 + 1e-10)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e200])
def test_large_matrices_and_symbols(scale):
    matrix = np.eye(600)
    matrix[0] = 0.1
    norm = np.linalg.norm(matrix, 2)
    assert scale * norm <= _upper(Matmul(matrix * scale), (1, 600), (1, 600)) <= scale * norm * 1.01
    kernel = np.zeros((260, 260, 2))
    kernel[:, :, 0] = np.eye(260)
    conv = Conv("OIW", padding_mode="zeros")
    upper = _upper(Convolution(kernel * scale, conv, "NCW"), (1, 260, 4), (1, 260, 4))
    assert scale * (1 - 1e-12) <= upper <= scale * 1.1


def test_products_and_quotients_over_tiny_ranges():
    tiny = Node("s", Scale(np.asarray(1e-200)), ("x",), (1, 2, 2))
    nodes = (Node("x", Input(), (), (1, 2, 2)), tiny, Node("y", BranchMatmul(), ("s", "s"), (1, 2, 2)))
    found = lipschitz(Graph(nodes, ("y",)), input_range=(1.0, 2.0), lower=False)
    assert found.nodes[-1].log10_factor >= -200
    huge = Node("s", Scale(np.asarray(1e200)), ("x",), (1, 4))
    nodes = (Node("x", Input(), (), (1, 4)), huge, Node("y", Quotient(), ("s", "s"), (1, 4)))
    found = lipschitz(Graph(nodes, ("y",)), input_range=(1.0, 2.0), lower=False)
    assert math.isfinite(found.upper)
    assert found.nodes[-1].log10_factor >= -200


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("silu", {"beta": np.asarray([0.0, 1.0, 2.0, -1.0])}),
        ("hard_swish", {"alpha": np.asarray([0.0, 1 / 6, 1.0, -1.0]), "beta": np.asarray(0.5)}),
    ],
)
def test_the_range_of_a_function_with_a_turn_for_some_elements(function, parameters):
    from convsv_core._network import elementwise
    from convsv_core._network.rule_types import Range

    kind = Elementwise(function, parameters)
    low, high = np.full(4, -4.0), np.full(4, 4.0)
    found = elementwise.function_range(kind, Range(low, high))
    values = elementwise.value(kind, np.linspace(low, high, 4001))
    assert np.all(found.low <= values.min(axis=0))
    assert np.all(values.max(axis=0) <= found.high)


def test_moduli_of_integer_weights_do_not_overflow() -> None:
    """The least integer of a dtype has no modulus in that dtype."""
    assert moduli_of(Scale(np.asarray([-128, 3], np.int8))).scale.tolist() == [128, 3]
