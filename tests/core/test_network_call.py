"""`lipschitz` on graphs: outputs, ranges, nodes without a bound, and functions that are recognised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from random_networks import largest_jacobian
from small_networks import conv, network

import convsv_core as convsv
from convsv_core import Conv, lipschitz
from convsv_core._network import rules
from convsv_core._network.attained import inputs_of
from convsv_core._network.jacobian import linearize
from convsv_core._network.patterns import simplify
from convsv_core.layers import ModelError
from convsv_core.networks import (
    BranchMatmul,
    Constant,
    Convolution,
    Elementwise,
    Factors,
    Graph,
    Identity,
    Input,
    Kind,
    KindRule,
    Matmul,
    Node,
    Normalize,
    Permute,
    Product,
    Quotient,
    Reduce,
    Scale,
    Softmax,
    Sum,
    Unsupported,
)

RNG = np.random.default_rng(0)


# ---- the call ----------------------------------------------------------------------


def test_outputs_ranges_and_the_table():
    shape = (1, 6)
    graph = network(
        shape,
        Node("logits", Matmul(3 * np.eye(6)), ("x",), shape, "Gemm", "head.fc"),
        Node("y", Softmax((1,)), ("logits",), shape, "Softmax"),
    )
    assert lipschitz(graph).upper == pytest.approx(1.5)
    for name in ("logits", "head.fc"):
        found = lipschitz(graph, output=name)
        assert (found.output, len(found.nodes)) == ("logits", 2)
        assert found.upper == pytest.approx(3)
        assert found.lower == pytest.approx(3)
    text = str(lipschitz(graph))
    assert all(word in text for word in ("logits", "Gemm", "Softmax", "upper: 10^0.1761 = 1.5", "lower: "))
    with pytest.raises(ValueError, match="similar: logits"):
        lipschitz(graph, output="logit")
    for wrong in ((1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="input_range"):
            lipschitz(graph, input_range=wrong)


def test_the_lower_bound_of_a_range_is_attained_inside_of_it():
    shape = (1, 4)
    example = np.asarray([[-9.0, 0.0, 2.0, 9.0]])
    graph = Graph((Node("x", Input(example), (), shape), Node("y", Elementwise("square"), ("x",), shape)), ("y",))
    found = lipschitz(graph, input_range=(0.0, 2.0))
    assert found.upper == pytest.approx(4)
    assert found.lower == pytest.approx(4, rel=1e-5)
    assert found.lower <= found.upper


def test_several_outputs_are_bounded_together():
    shape = (1, 4)
    graph = network(
        shape,
        Node("a", Scale(np.asarray(3.0)), ("x",), shape),
        Node("b", Scale(np.asarray(-4.0)), ("x",), shape),
        outputs=("a", "b"),
    )
    found = lipschitz(graph)
    assert found.upper == pytest.approx(5)
    assert found.lower == pytest.approx(5)
    assert found.output == "a, b"


def test_products_of_activations_need_a_range():
    shape = (1, 3, 4)
    nodes = [
        Node("m", Reduce("mean", (2,)), ("x",), (1, 3, 1)),
        Node("g", Elementwise("sigmoid"), ("m",), (1, 3, 1)),
        Node("y", Product(), ("x", "g"), shape, "Mul"),
        Node("z", Elementwise("relu"), ("y",), shape),
    ]
    graph = network(shape, *nodes)
    found = lipschitz(graph)
    assert (found.upper, found.log10_upper) == (math.inf, math.inf)
    (missing,) = found.missing
    assert (missing.name, missing.op) == ("y", "Mul")
    assert "a range of the input may give one" in missing.reason
    assert 0 <= missing.log10_before < 0.1  # the root of 1 + 1/64
    assert "no bound for y (Mul)" in str(found)
    assert found.to_dict()["upper"] is None
    bounded = lipschitz(graph, input_range=(-1, 1))
    assert 0.5 < bounded.upper < 1.3
    assert largest_jacobian(graph, 0, (-1.0, 1.0)) <= bounded.upper


def test_attention_and_quotients_have_a_bound_over_a_range():
    shape = (1, 4, 3)
    graph = network(
        shape,
        Node("q", Matmul(RNG.normal(size=(3, 3))), ("x",), shape),
        Node("k", Permute((0, 2, 1)), ("x",), (1, 3, 4)),
        Node("s", BranchMatmul(), ("q", "k"), (1, 4, 4)),
        Node("p", Softmax((2,)), ("s",), (1, 4, 4)),
        Node("y", BranchMatmul(), ("p", "x"), shape),
        Node("e", Elementwise("exp"), ("x",), shape),
        Node("z", Quotient(), ("y", "e"), shape),
    )
    assert [one.name for one in lipschitz(graph).missing] == ["s", "y", "e", "z"]
    found = lipschitz(graph, input_range=(-1, 1))
    assert math.isfinite(found.upper)
    assert largest_jacobian(graph, 0, (-1.0, 1.0)) <= found.upper


def test_unknown_kinds_are_named_and_never_taken_as_1(monkeypatch):
    class Custom(Kind):
        pass

    shape = (1, 3)
    graph = network(
        shape, Node("a", Scale(np.asarray(2.0)), ("x",), shape), Node("y", Custom(), ("a",), shape, "my_op")
    )
    found = lipschitz(graph)
    assert found.upper == math.inf
    assert found.missing[0].log10_before == pytest.approx(math.log10(2))
    assert found.lower is None
    added = {Custom: KindRule(lambda node, inputs: Factors((3.0,)))}
    monkeypatch.setattr(rules, "_added_rules", lambda: added)
    assert lipschitz(graph).upper == pytest.approx(6)
    refused = network(shape, Node("y", Unsupported("a recurrent cell"), ("x",), shape, "LSTM"))
    assert lipschitz(refused).missing[0].reason == "a recurrent cell"


def test_a_norm_of_1_is_certified_closely():
    kernel = RNG.normal(size=(8, 8, 3, 3))
    kernel /= float(convsv.norm_bounds(kernel, Conv("OIHW"), rtol=1e-9).upper)
    shape = (1, 8, 40, 40)
    graph = network(shape, conv("y", "x", kernel * (1 - 1e-6), shape, 1))
    assert lipschitz(graph, lower=False).upper <= 1
    assert lipschitz(network(shape, conv("y", "x", kernel * 1.001, shape, 1)), lower=False).upper > 1


def test_a_geometry_that_does_not_fit_is_named():
    shape = (1, 1, 3)
    kind = Convolution(np.ones((1, 1, 9)), Conv("OIW", padding=4, padding_mode="reflect"))
    found = lipschitz(network(shape, Node("y", kind, ("x",), shape)))
    assert "wanted less than the extent 3" in found.missing[0].reason


def test_deep_networks_do_not_overflow():
    shape = (1, 2)
    nodes, name = [], "x"
    for index in range(700):
        nodes += [
            Node(f"a{index}", Matmul(4 * np.eye(2)), (name,), shape),
            Node(f"b{index}", Elementwise("relu"), (f"a{index}",), shape),
        ]
        name = f"b{index}"
    found = lipschitz(network(shape, *nodes), lower=False)
    assert found.upper == math.inf
    assert found.missing == ()
    assert found.log10_upper == pytest.approx(700 * math.log10(4))
    assert found.to_dict()["upper"] is None


def test_factors_of_one_are_exact():
    shape = (1, 1, 4, 4)
    graph = network(
        shape,
        Node("a", Elementwise("relu"), ("x",), shape),
        Node("b", Elementwise("clip", {"low": 0.0, "high": 6.0}), ("a",), shape),
        Node("c", Scale(np.asarray(1.0), np.asarray(2.0)), ("b",), shape),
        Node("d", Elementwise("tanh"), ("c",), shape),
    )
    assert lipschitz(graph).upper == 1.0
    constant = network(shape, Node("c", Constant(np.ones(shape)), (), shape))
    assert lipschitz(constant).upper == 0.0


def test_wrong_models_and_graphs(tmp_path):
    with pytest.raises(TypeError, match="wanted a model of a framework"):
        lipschitz(object())
    np.savez(tmp_path / "weights.npz", kernel=np.ones((1, 1, 3)))
    with pytest.raises(ModelError, match="weights alone"):
        lipschitz(tmp_path / "weights.npz")
    x = Node("x", Input(), (), (1, 2))
    with pytest.raises(ValueError, match="two are called 'x'"):
        Graph((x, x), ("x",))
    with pytest.raises(ValueError, match="no node before it"):
        Graph((Node("y", Identity(), ("x",), (1, 2)), x), ("y",))
    with pytest.raises(ValueError, match="no node is called 'z'"):
        Graph((x,), ("z",))


# ---- patterns ----------------------------------------------------------------------

SHAPE = (1, 5)


def gated(*nodes):
    return network(SHAPE, *(Node(name, kind, inputs, SHAPE) for name, kind, inputs in nodes))


PATTERNS = {
    "silu": gated(
        ("b", Scale(np.asarray(1.7)), ("x",)), ("s", Elementwise("sigmoid"), ("b",)), ("y", Product(), ("s", "x"))
    ),
    "hard_swish": gated(
        ("a", Scale(shift=np.asarray(3.0)), ("x",)),
        ("c", Elementwise("clip", {"low": 0.0, "high": 6.0}), ("a",)),
        ("p", Product(), ("x", "c")),
        ("y", Scale(np.asarray(1 / 6)), ("p",)),
    ),
    "hard_swish behind a shift": gated(
        ("z", Scale(np.asarray(2.0), np.asarray(0.5)), ("x",)),
        ("h", Elementwise("hard_sigmoid"), ("z",)),
        ("y", Product(), ("z", "h")),
    ),
    "mish": gated(
        ("s", Elementwise("softplus"), ("x",)), ("t", Elementwise("tanh"), ("s",)), ("y", Product(), ("x", "t"))
    ),
    "gelu": gated(
        ("d", Scale(np.asarray(1 / math.sqrt(2))), ("x",)),
        ("e", Elementwise("erf"), ("d",)),
        ("o", Scale(shift=np.asarray(1.0)), ("e",)),
        ("p", Product(), ("x", "o")),
        ("y", Scale(np.asarray(0.5)), ("p",)),
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_gates_are_recognised(name):
    graph = PATTERNS[name]
    found = simplify(graph)
    functions = [node.kind.function for node in found if isinstance(node.kind, Elementwise)]
    assert functions == [name.split()[0]]
    inputs = inputs_of(graph)
    expected, got = (linearize(one, inputs).values["y"] for one in (graph, found))
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert lipschitz(graph).upper < 3.1
    assert largest_jacobian(graph, 0) <= lipschitz(graph).upper


def test_a_square_is_recognised_and_other_products_are_not():
    assert simplify(gated(("y", Product(), ("x", "x"))))["y"].kind.function == "square"
    other = gated(
        ("s", Elementwise("sigmoid"), ("x",)), ("t", Elementwise("tanh"), ("x",)), ("y", Product(), ("s", "t"))
    )
    assert isinstance(simplify(other)["y"].kind, Product)


@pytest.mark.parametrize("centred", [True, False])
def test_normalisations_in_parts_are_recognised(centred):
    kept = (1, 1)
    nodes = [
        Node("m", Reduce("mean", (1,)), ("x",), kept),
        Node("d", Sum((1.0, -1.0)), ("x", "m"), SHAPE),
    ]
    source = "d" if centred else "x"
    nodes = [*(nodes if centred else []), Node("q", Elementwise("power", {"exponent": 2.0}), (source,), SHAPE)]
    nodes += [
        Node("v", Reduce("mean", (1,)), ("q",), kept),
        Node("e", Scale(shift=np.asarray(0.01)), ("v",), kept),
        Node("r", Elementwise("sqrt"), ("e",), kept),
        Node("y", Quotient(), (source, "r"), SHAPE),
    ]
    graph = network(SHAPE, *nodes)
    found = simplify(graph)
    assert [type(node.kind) for node in found] == [Input, Normalize]
    assert found["y"].kind.centred is centred
    inputs = inputs_of(graph)
    np.testing.assert_allclose(linearize(found, inputs).values["y"], linearize(graph, inputs).values["y"], atol=1e-12)
    assert lipschitz(graph).upper == pytest.approx(10)


def test_a_normalisation_along_one_axis_and_broadcast_along_another_is_none():
    """Without ``keepdims`` the spread of each row divides a column, and no epsilon bounds the derivative."""
    shape = (4, 4)
    graph = network(
        shape,
        Node("q", Elementwise("square"), ("x",), shape),
        Node("v", Reduce("mean", (1,)), ("q",), (4,)),
        Node("e", Scale(shift=np.asarray(0.01)), ("v",), (4,)),
        Node("r", Elementwise("sqrt"), ("e",), (4,)),
        Node("y", Quotient(), ("x", "r"), shape),
    )
    at = np.zeros(shape)
    at[0, 1], at[1, 0] = 50.0, 0.1
    jacobian = linearize(graph, {"x": at})
    columns = [jacobian.apply(unit) for unit in np.eye(jacobian.input_size)]
    reached = float(np.linalg.norm(np.stack(columns), 2))
    assert reached > 100  # ten times the constant of the normalisation
    assert lipschitz(graph).upper == math.inf
    assert reached <= lipschitz(graph, input_range=(-50, 50)).upper < math.inf


# ---- the search for a lower bound ----------------------------------------------------


def test_the_lower_bound_is_the_largest_at_several_inputs():
    shape = (1, 6)
    weights = np.random.default_rng(3).normal(size=(2, 6, 6))
    graph = network(
        shape,
        Node("a", Matmul(weights[0]), ("x",), shape),
        Node("s", Elementwise("silu"), ("a",), shape),
        Node("b", Matmul(weights[1]), ("s",), shape),
        Node("y", Elementwise("gelu"), ("b",), shape),
    )
    one = lipschitz(graph, search=1)
    many = lipschitz(graph)
    assert (one.lower_inputs, many.lower_inputs) == (1, 32)
    assert many.lower > 1.2 * one.lower
    assert many.lower <= many.upper
    assert lipschitz(graph, seed=0).lower == many.lower != lipschitz(graph, seed=1).lower
    assert "the largest at 32 inputs" in str(many)
    assert "at one input" in str(one)
    # A linear network has one Jacobian, and a large one gets few inputs.
    assert lipschitz(graph, output="a").lower_inputs == 1
    with pytest.raises(ValueError, match="search=0"):
        lipschitz(graph, search=0)


def test_the_search_stays_in_the_range_of_the_input():
    shape = (1, 3)
    cube = Node("y", Elementwise("power", {"exponent": 3.0}), ("x",), shape)
    for example in (None, np.full(shape, 9.0)):
        graph = Graph((Node("x", Input(example), (), shape), cube), ("y",))
        found = lipschitz(graph, input_range=(0, 2))
        assert 10 < found.lower <= 12 <= found.upper  # the slope at 2


@pytest.mark.parametrize("search", [1, 32])
@pytest.mark.parametrize("box", [None, (0, 1)])
def test_kinks_that_meet_at_the_example_raise_no_lower_bound(search, box):
    """At 0 the derivatives of the two functions, each of some side, would add up to 1. The network is 0."""
    shape = (1, 3)
    nodes = [
        Node("r", Elementwise("relu"), ("x",), shape),
        Node("m", Scale(np.asarray(-1.0)), ("x",), shape),
        Node("s", Elementwise("relu"), ("m",), shape),
        Node("y", Sum((1.0, -1.0, 1.0)), ("x", "r", "s"), shape),
    ]
    graph = Graph((Node("x", Input(np.zeros(shape)), (), shape), *nodes), ("y",))
    found = lipschitz(graph, input_range=box, search=search)
    assert found.lower == 0 < found.upper
