"""The rule of each kind of map, against the largest derivative or the matrix of the map."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from random_networks import FUNCTIONS, dense_norm

from convsv_core import Conv
from convsv_core._network import elementwise
from convsv_core._network.jacobian import linearize
from convsv_core._network.norms import DECOMPOSED_SIDE, matrix_norm
from convsv_core._network.ranges import RANGES
from convsv_core._network.rules import node_factors
from convsv_core.networks import (
    AveragePool,
    AxisMaps,
    Concatenate,
    Convolution,
    Elementwise,
    Expand,
    Extremum,
    Gather,
    Graph,
    Identity,
    Input,
    LocalResponse,
    LogSoftmax,
    Matmul,
    MaxPool,
    Node,
    Normalize,
    NoRule,
    Pad,
    Permute,
    Product,
    Quotient,
    Range,
    Reduce,
    Reshape,
    Scale,
    Slice,
    Softmax,
    Sum,
    Tensor,
)

RNG = np.random.default_rng(0)
UNBOUNDED = [
    (Elementwise("exp"), (-2.0, 1.5)),
    (Elementwise("log"), (0.2, 3.0)),
    (Elementwise("sqrt"), (0.2, 3.0)),
    (Elementwise("reciprocal"), (-3.0, -0.5)),
    (Elementwise("square"), (-2.0, 1.0)),
    (Elementwise("power", {"exponent": 3.0}), (-2.0, 1.0)),
    (Elementwise("power", {"exponent": -0.5}), (0.3, 2.0)),
]
"""Functions that have a slope over an interval alone."""


def named(kind):
    return kind.function + "".join(f"-{value}" for value in kind.parameters.values())


def steepest(kind, low, high):
    """Return the largest modulus of the derivative on a grid, refined around its largest value."""
    for _ in range(4):
        x = np.linspace(low, high, 20_001)
        found = np.abs(elementwise.derivative(kind, x))
        best = x[int(np.argmax(found))]
        step = (high - low) / 20_000
        low, high = max(low, best - 2 * step), min(high, best + 2 * step)
    return float(found.max())


@pytest.mark.parametrize("kind", FUNCTIONS, ids=named)
def test_slopes_are_the_largest_derivatives(kind):
    largest = steepest(kind, -60.0, 60.0)
    slope = elementwise.slope(kind)
    # Where the supremum is only approached far out, as by softplus, the slope is the limit.
    assert largest <= slope * (1 + 1e-14)
    assert slope <= largest * (1 + (1e-3 if kind.function == "softsign" else 2e-7))


@pytest.mark.parametrize("kind", [*FUNCTIONS, *(kind for kind, _ in UNBOUNDED)], ids=named)
def test_derivatives_are_those_of_the_values(kind):
    x = RNG.uniform(0.3, 2.5, 200) * (RNG.choice([-1, 1], 200) if kind in FUNCTIONS else 1)
    step = 1e-6
    quotient = (elementwise.value(kind, x + step) - elementwise.value(kind, x - step)) / (2 * step)
    smooth = np.abs(quotient - elementwise.derivative(kind, x)) < 1e-6 * (1 + np.abs(quotient))
    assert np.mean(smooth) > 0.97  # a step may straddle a kink


@pytest.mark.parametrize(
    ("kind", "box"), UNBOUNDED, ids=lambda value: named(value) if isinstance(value, Elementwise) else ""
)
def test_slopes_over_an_interval(kind, box):
    with pytest.raises(NoRule, match="no bound over all numbers"):
        elementwise.slope(kind)
    slope = elementwise.slope(kind, Range(*map(np.asarray, box)))
    largest = steepest(kind, *box)
    assert largest <= slope <= largest * (1 + 1e-6)


def test_a_slope_with_a_pole_in_the_interval_is_refused():
    for name in ("log", "sqrt", "reciprocal"):
        with pytest.raises(NoRule, match="over the range"):
            elementwise.slope(Elementwise(name), Range(np.asarray(-1.0), np.asarray(1.0)))


@pytest.mark.parametrize("kind", [*FUNCTIONS, *(kind for kind, _ in UNBOUNDED)], ids=named)
def test_ranges_of_functions_hold_and_are_tight(kind):
    for low, high in [(-3.0, -1.0), (-2.0, 2.0), (-0.5, 0.1), (0.3, 4.0)]:
        x = np.linspace(low, high, 5001)
        values = elementwise.value(kind, x)
        found = elementwise.function_range(kind, Range(np.asarray(low), np.asarray(high)))
        values = values[np.isfinite(values)]
        assert not values.size or found.low <= values.min()
        assert not values.size or values.max() <= found.high
        if kind in FUNCTIONS and kind.function not in ("sin", "cos"):
            assert found.high - found.low <= (values.max() - values.min()) * (1 + 1e-3) + 1e-9


# ---- linear kinds against their matrices ------------------------------------------------

X = (1, 4, 6, 5)
PADDED = ((0, 0), (0, 0), (1, 1), (0, 1))
POOL = ((1, 1, 3, 2), (1, 1, 2, 1), (1, 1, 1, 1), PADDED)
LINEAR = {
    "pool that counts its padding": (AveragePool(*POOL, PADDED), X, (1, 4, 3, 5)),
    "pool that does not": (AveragePool(*POOL, ((0, 0),) * 4), X, (1, 4, 3, 5)),
    "resize": (AxisMaps({2: RNG.normal(size=(4, 6)), 3: RNG.normal(size=(7, 5))}), X, (1, 4, 4, 7)),
    "identity": (Identity(), X, X),
    "reshape": (Reshape(), X, (4, 30)),
    "permute": (Permute((0, 2, 3, 1)), X, (1, 6, 5, 4)),
    "slice": (Slice((slice(None), slice(1, 3), slice(None, None, -2), slice(None))), X, (1, 2, 3, 5)),
    "gather": (Gather(np.array([[0, 1], [1, 1]]), 2), X, (1, 4, 2, 2, 5)),
    "pad": (Pad(((0, 0), (0, 0), (2, -1), (1, 1)), "constant", 0.5, (0, 0, 1, 0)), X, (1, 4, 12, 7)),
    "reflect": (Pad(((0, 0), (0, 0), (2, 2), (0, 3)), "reflect"), X, (1, 4, 10, 8)),
    "replicate": (Pad(((0, 0), (0, 0), (2, 2), (0, 3)), "replicate"), X, (1, 4, 10, 8)),
    "circular": (Pad(((0, 0), (0, 0), (2, 2), (0, 3)), "circular"), X, (1, 4, 10, 8)),
    "scale": (Scale(RNG.normal(size=(4, 1, 1)), RNG.normal(size=5)), X, X),
    "scale that repeats": (Scale(RNG.normal(size=(3, 4, 1, 1))), X, (3, *X[1:])),
    "scale of one number that repeats": (Scale(RNG.normal(size=(4, 6))), (1, 6), (4, 6)),
    "expand": (Expand(), (4, 1, 5), (3, 4, 6, 5)),
    "sum": (Reduce("sum", (1, 3)), X, (1, 6)),
    "mean": (Reduce("mean", (2, 3)), X, (1, 4, 1, 1)),
    "matrix": (Matmul(RNG.normal(size=(5, 3)), bias=RNG.normal(size=3)), X, (1, 4, 6, 3)),
    "matrix on the left": (Matmul(RNG.normal(size=(3, 6)), "left"), X, (1, 4, 3, 5)),
    "stack of matrices": (Matmul(RNG.normal(size=(4, 5, 3))), X, (1, 4, 6, 3)),
    "stack of matrices that repeats": (Matmul(RNG.normal(size=(3, 1, 5, 2))), X, (3, 4, 6, 2)),
    "stack on the left that repeats": (Matmul(RNG.normal(size=(2, 3, 6)), "left"), (6, 5), (2, 3, 5)),
    "vector": (Matmul(RNG.normal(size=5)), X, (1, 4, 6)),
    "circular convolution": (
        Convolution(RNG.normal(size=(3, 4, 3, 3)), Conv("OIHW", padding=1), layout="NCHW"),
        X,
        (1, 3, 6, 5),
    ),
    "channels last": (
        Convolution(RNG.normal(size=(1, 1, 5, 2)), Conv("HWIO", padding="valid"), RNG.normal(size=2), "NHWC"),
        X,
        (1, 4, 6, 2),
    ),
}
"""Kinds, the shapes of their inputs and of their outputs."""


def graph_of(kind, shape, out):
    return Graph((Node("x", Input(), (), shape), Node("y", kind, ("x",), out)), ("y",))


@pytest.mark.parametrize("name", LINEAR)
def test_linear_factors_are_the_norms_of_matrices(name):
    kind, shape, out = LINEAR[name]
    graph = graph_of(kind, shape, out)
    exact = dense_norm(graph)
    (factor,) = node_factors(graph["y"], [Tensor(shape)]).values
    assert exact <= factor * (1 + 1e-12)
    # The norm of a convolution is that of every input size.
    assert factor <= exact * (1 + (0.2 if isinstance(kind, Convolution) and "circular" in name else 1e-8))


@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps_have_their_adjoints_and_ranges(name):
    kind, shape, out = LINEAR[name]
    graph = graph_of(kind, shape, out)
    x = RNG.normal(size=shape)
    network = linearize(graph, {"x": x})
    v, w = RNG.normal(size=network.input_size), RNG.normal(size=math.prod(out))
    np.testing.assert_allclose(network.apply(v) @ w, v @ network.adjoint(w), rtol=1e-10)
    box = Range(x - 0.2, x + 0.1)
    found = RANGES[type(kind)](graph["y"], box)
    assert found.low.shape == found.high.shape == out
    for _ in range(20):
        inside = np.where(RNG.random(shape) < 0.5, box.low, box.high)
        y = linearize(graph, {"x": inside}).values["y"]
        assert np.all(found.low <= y)
        assert np.all(y <= found.high)


# ---- other kinds against their Jacobians ------------------------------------------------

CURVED = {
    "softmax": (Softmax((1,)), (1, 5), 0.5),
    "softmax of two": (Softmax((1,)), (1, 2), 0.5),
    "log softmax": (LogSoftmax((1,)), (1, 5), math.sqrt(5)),
    "layer normalisation": (Normalize((1,), 0.04), (1, 6), 5.0),
    "RMS normalisation": (Normalize((1, 2), 0.04, centred=False), (1, 2, 3), 5.0),
    "local response": (LocalResponse(1, 3, 2.0, 0.75, 1.0), (1, 6, 2), 2.1),
    "local response of an even size": (LocalResponse(1, 4, 1.0, 0.5, 2.0), (1, 6), 1.5),
    "max pool": (MaxPool((1, 1, 3), (1, 1, 1), (1, 1, 1), ((0, 0), (0, 0), (1, 1))), (1, 2, 6), math.sqrt(3)),
    "disjoint max pool": (MaxPool((1, 1, 2), (1, 1, 2), (1, 1, 1), ((0, 0),) * 3), (1, 2, 6), 1.0),
    "maximum of an axis": (Reduce("max", (2,)), (1, 2, 4), 1.0),
    "minimum of axes": (Reduce("min", (0, 2)), (1, 2, 4), 1.0),
    "l1": (Reduce("l1", (2,)), (1, 2, 4), 2.0),
    "l2": (Reduce("l2", (2,)), (1, 2, 4), 1.0),
    "logsumexp": (Reduce("logsumexp", (2,)), (1, 2, 4), 1.0),
}
"""Kinds of one input, its shape, and a bound of the factor."""


def output_shape(kind, shape):
    if isinstance(kind, Reduce):
        return tuple(n for axis, n in enumerate(shape) if axis not in kind.axes)
    if isinstance(kind, MaxPool):
        sizes = zip(shape, kind.padding, kind.window, kind.strides, strict=True)
        return tuple((n + sum(pad) - w) // s + 1 for n, pad, w, s in sizes)
    return shape


@pytest.mark.parametrize("name", CURVED)
def test_factors_bound_every_jacobian(name):
    kind, shape, most = CURVED[name]
    out = output_shape(kind, shape)
    graph = graph_of(kind, shape, out)
    (factor,) = node_factors(graph["y"], [Tensor(shape)]).values
    assert factor <= most * (1 + 1e-12)
    reached = 0.0
    for size, _ in itertools.product((0.01, 0.3, 1.0, 3.0, 30.0), range(40)):
        x = RNG.normal(size=shape) * size
        network = linearize(graph, {"x": x})
        columns = np.stack([network.apply(row) for row in np.eye(network.input_size)])
        step = 1e-6 * size
        v = RNG.normal(size=shape)
        quotient = (
            linearize(graph, {"x": x + step * v}).values["y"] - linearize(graph, {"x": x - step * v}).values["y"]
        ).reshape(-1) / (2 * step)
        np.testing.assert_allclose(v.reshape(-1) @ columns, quotient, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            np.stack([network.adjoint(row) for row in np.eye(math.prod(out))]), columns.T, rtol=1e-9, atol=1e-12
        )
        reached = max(reached, float(np.linalg.norm(columns, 2)))
    assert reached <= factor * (1 + 1e-9)
    assert factor <= 2.5 * reached  # the factor is no idle bound


def test_maps_of_several_inputs():
    two = [Tensor((1, 3)), Tensor((1, 3))]
    node = lambda kind: Node("y", kind, ("a", "b"), (1, 3))  # noqa: E731
    assert node_factors(node(Sum((1.0, -2.0))), two).values == (1.0, 2.0)
    assert node_factors(Node("y", Concatenate(1), ("a", "b"), (1, 6)), two) == ((1.0, 1.0), "root", "")
    assert node_factors(node(Extremum("max")), two).join == "root"
    repeated = [Tensor((1, 3)), Tensor((1, 1))]
    assert node_factors(node(Sum()), repeated).values == (1.0, math.nextafter(math.sqrt(3), 2))
    for kind in (Product(), Quotient()):
        with pytest.raises(NoRule, match="a range of the input may give one"):
            node_factors(node(kind), two)


def test_a_normalisation_without_a_floor_has_no_constant():
    with pytest.raises(NoRule, match="epsilon"):
        node_factors(Node("y", Normalize((1,), 0.0), ("x",), (1, 3)), [Tensor((1, 3))])


@pytest.mark.parametrize(("alpha", "beta", "bias"), [(-1.0, 0.75, 2.0), (1.0, -1.0, 1.0), (1.0, 0.75, 0.0)])
def test_a_local_response_that_may_enlarge_has_no_range(alpha, beta, bias):
    node, box = Node("y", LocalResponse(1, 3, alpha, beta, bias), ("x",), (1, 3)), np.ones((1, 3))
    with pytest.raises(NoRule, match="positive bias"):
        node_factors(node, [Tensor((1, 3))])
    assert np.all(RANGES[LocalResponse](node, Range(-box, box)).high == np.inf)


def test_powers_of_several_exponents_have_slopes_and_ranges():
    kind = Elementwise("power", {"exponent": np.asarray([2.0, 0.0])})
    box = Range(np.full(2, -1.0), np.full(2, 2.0))
    assert elementwise.slope(kind, box) == pytest.approx(4)
    assert elementwise.function_range(kind, box).low == pytest.approx([0, 1])


def test_weights_that_are_no_numbers_have_no_constant():
    for kind in (Matmul(np.full((3, 3), np.nan)), Scale(np.asarray(np.inf))):
        with pytest.raises(NoRule, match="NaN or infinity"):
            node_factors(Node("y", kind, ("x",), (1, 3)), [Tensor((1, 3))])


@pytest.mark.parametrize(
    "shape", [(DECOMPOSED_SIDE + 8, DECOMPOSED_SIDE + 40), (DECOMPOSED_SIDE + 40, DECOMPOSED_SIDE + 8)]
)
@pytest.mark.parametrize("spread", ["random", "orthogonal", "one large"])
def test_norms_of_large_matrices(shape, spread):
    matrix = RNG.normal(size=shape)
    if spread == "orthogonal":
        matrix = np.linalg.qr(matrix if shape[0] > shape[1] else matrix.T)[0]
    elif spread == "one large":
        matrix = matrix * 1e-9 + np.outer(np.ones(shape[0]), np.ones(shape[1]))
    exact = np.linalg.norm(matrix, 2)
    assert exact * (1 - 1e-14) <= matrix_norm(matrix) <= exact * 1.002


@pytest.mark.parametrize("count", [2, 4, 75, 275, 300])
def test_a_mean_has_a_factor_that_is_not_rounded_below_its_norm(count):
    node = Node("y", Reduce("mean", (1,)), ("x",), (1,))
    (factor,) = node_factors(node, [Tensor((1, count))]).values
    assert 1 <= Fraction(factor) ** 2 * count <= 1 + Fraction(1, 10**15)
