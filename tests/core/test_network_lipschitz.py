"""`lipschitz` on graphs: what is composed, what is not, and residual blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from random_networks import block_values, dense_norm, largest_jacobian
from small_networks import conv, network

import convsv_core as convsv
from convsv_core import Conv, lipschitz
from convsv_core._network import dense
from convsv_core._network.candidates import node_form
from convsv_core._network.forms import add, compose
from convsv_core._network.jacobian import linearize
from convsv_core.networks import (
    AveragePool,
    Concatenate,
    Convolution,
    Elementwise,
    Identity,
    Node,
    Permute,
    Scale,
    Slice,
    Sum,
)

RNG = np.random.default_rng(0)


@pytest.fixture
def no_matrices(monkeypatch):
    """Switch off the matrices of small linear parts, so that the composition of symbols alone is tested."""
    monkeypatch.setattr(dense, "MOST_SIDE", 0)


# ---- when symbols may be multiplied ------------------------------------------------


def padded_chain(extent=12):
    first, second = [[[-2.13, -2.20, -0.84]]], [[[0.46, -1.12, 1.11]]]
    a = conv("a", "x", first, (1, 1, extent), 1)
    return network((1, 1, extent), a, conv("b", "a", second, a.shape, 1)), np.asarray(first), np.asarray(second)


@pytest.mark.parametrize("matrices", [True, False])
def test_symbols_of_padded_convolutions_are_not_multiplied(matrices, monkeypatch):
    graph, first, second = padded_chain()
    exact = dense_norm(graph)
    product = np.convolve(first[0, 0], second[0, 0])[None, None]
    supremum = float(convsv.norm_bounds(product, Conv("OIW")).upper)
    assert supremum < 0.92 * exact  # the product of the symbols lies below the truth
    if not matrices:
        monkeypatch.setattr(dense, "MOST_SIDE", 0)
    found = lipschitz(graph)
    assert exact <= found.upper <= 10**found.log10_product * (1 + 1e-9)
    a, b = (node_form(graph[name], (1, 1, 12), 1) for name in "ab")
    assert compose(b, a) is None


def test_symbols_multiply_where_the_second_convolution_pads_nothing(no_matrices):
    kernel = RNG.normal(size=(4, 3, 3, 3))
    a = conv("a", "x", kernel, (1, 3, 24, 24), 1)
    for b in (
        conv("b", "a", RNG.normal(size=(2, 4, 1, 1)), a.shape, 0),
        conv("b", "a", RNG.normal(size=(2, 4, 3, 2)), a.shape, 0),
        conv("b", "a", RNG.normal(size=(2, 4, 3, 3)), a.shape, 0, stride=2),
        Node(
            "b", AveragePool((1, 1, 2, 2), (1, 1, 2, 2), (1,) * 4, ((0, 0),) * 4, ((0, 0),) * 4), ("a",), (1, 4, 12, 12)
        ),
        Node("b", Scale(RNG.normal(size=(4, 1, 1)), RNG.normal(size=(4, 1, 1))), ("a",), a.shape),
    ):
        graph = network((1, 3, 24, 24), a, b)
        found = lipschitz(graph, lower=False)
        reached = largest_jacobian(graph, 0)
        assert reached <= found.upper
        assert found.log10_upper < found.log10_product - 1e-3
        # The norm on 24 x 24 pixels is a little below that of every size; the search below stops at 1 %.
        assert found.upper <= 1.06 * reached


def test_symbols_multiply_where_the_first_convolution_gives_nothing_outside(no_matrices):
    one = conv("a", "x", RNG.normal(size=(4, 3, 1)), (1, 3, 16), 0)
    full = conv("a", "x", RNG.normal(size=(4, 3, 3)), (1, 3, 16), 2)
    partly = conv("a", "x", RNG.normal(size=(4, 3, 3)), (1, 3, 16), 1)
    for a, composed in ((one, True), (full, True), (partly, False)):
        b = conv("b", "a", RNG.normal(size=(2, 4, 3)), a.shape, 1)
        graph = network((1, 3, 16), a, b)
        found = lipschitz(graph)
        exact = dense_norm(graph)
        assert exact <= found.upper
        assert (found.log10_upper < found.log10_product - 1e-3) is composed
        assert not composed or found.upper <= 1.1 * exact


def test_circular_convolutions_multiply(no_matrices):
    a = conv("a", "x", RNG.normal(size=(3, 3, 3)), (1, 3, 32), 1, mode="circular")
    b = conv("b", "a", RNG.normal(size=(3, 3, 3)), (1, 3, 32), 1, mode="circular")
    graph = network((1, 3, 32), a, b, Node("y", Sum(), ("b", "x"), (1, 3, 32)))
    exact = dense_norm(graph)
    assert exact <= lipschitz(graph).upper <= 1.02 * exact


@pytest.mark.parametrize("extent", [3, 4, 15, 16])
def test_part_of_a_periodic_image_folds_where_the_stride_divides_the_period(extent, no_matrices):
    a = conv("a", "x", np.ones((1, 1, 2)), (1, 1, extent), "same", mode="circular")
    part = Slice((slice(None), slice(None), slice(None, None, 2)))
    graph = network((1, 1, extent), a, Node("y", part, ("a",), (1, 1, -(-extent // 2))))
    exact, found = dense_norm(graph), lipschitz(graph)
    assert exact <= found.upper  # with an odd period, the last and the first output share an input
    assert extent % 2 or found.upper <= exact * (1 + 1e-3) < 10**found.log10_product


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_repeats_pixels_has_its_norm(mode, no_matrices):
    kernel = np.ones((1, 1, 3, 3))
    graph = network((1, 1, 6, 6), conv("y", "x", kernel, (1, 1, 6, 6), 1, mode=mode))
    found = lipschitz(graph)
    assert dense_norm(graph) <= found.upper
    assert f"{mode} padding of norm" in found.nodes[1].note
    scaled = network(
        (1, 1, 6, 6),
        conv("a", "x", kernel, (1, 1, 6, 6), 1, mode=mode),
        Node("y", Scale(np.asarray(0.5)), ("a",), (1, 1, 6, 6)),
    )
    assert lipschitz(scaled).upper == pytest.approx(found.upper / 2, rel=1e-6)
    two = network(
        (1, 1, 6, 6),
        conv("a", "x", kernel, (1, 1, 6, 6), 1, mode=mode),
        conv("b", "a", -kernel, (1, 1, 6, 6), 1, mode=mode),
    )
    assert dense_norm(two) <= lipschitz(two).upper


def test_small_linear_networks_are_exact():
    shape = (1, 2, 6, 6)
    a = conv("a", "x", RNG.normal(size=(3, 2, 3, 3)), shape, 1)
    b = conv("b", "a", RNG.normal(size=(2, 3, 3, 3)), a.shape, 1, mode="reflect")
    graph = network(shape, a, b, Node("s", Sum((1.0, -1.0)), ("x", "b"), shape))
    exact = dense_norm(graph)
    assert exact <= lipschitz(graph).upper <= exact * (1 + 1e-9)


def test_a_sum_with_the_identity_is_one_map(no_matrices):
    shape = (1, 4, 20)
    kernel = RNG.normal(size=(4, 4, 3)) / 4
    f = conv("f", "x", kernel, shape, 1)
    minus = network(shape, f, Node("y", Sum((1.0, -1.0)), ("x", "f"), shape))
    plus = network(shape, f, Node("y", Sum(), ("f", "x"), shape))
    for graph in (minus, plus):
        exact = dense_norm(graph)
        found = lipschitz(graph)
        assert exact <= found.upper <= 1.03 * exact
        assert found.log10_upper < found.log10_product
    # A map less itself is zero.
    none = network(shape, f, Node("y", Sum((1.0, -1.0)), ("f", "f"), shape))
    assert lipschitz(none).upper < 1e-9


def test_channels_last_folds_too(no_matrices):
    kernel, scale = RNG.normal(size=(3, 3, 2, 4)), RNG.uniform(0.1, 3, 4)
    first = Node(
        "c", Convolution(kernel, Conv("HWIO", padding=1, padding_mode="zeros"), None, "NHWC"), ("x",), (1, 9, 9, 4)
    )
    graph = network((1, 9, 9, 2), first, Node("y", Scale(scale), ("c",), (1, 9, 9, 4)))
    folded = float(convsv.norm_bounds(kernel * scale, Conv("HWIO")).upper)
    assert lipschitz(graph).upper == pytest.approx(folded, rel=2e-3)
    moved = network(
        (1, 9, 9, 2),
        first,
        Node("p", Permute((0, 3, 1, 2)), ("c",), (1, 4, 9, 9)),
        Node("y", Scale(scale.reshape(4, 1, 1)), ("p",), (1, 4, 9, 9)),
    )
    assert lipschitz(moved).upper == pytest.approx(folded, rel=2e-3)


def test_concatenated_branches_of_one_tensor_are_one_map(no_matrices):
    shape = (1, 3, 16)
    a, b = conv("a", "x", RNG.normal(size=(2, 3, 3)), shape, 1), conv("b", "x", RNG.normal(size=(2, 3, 1)), shape, 0)
    joined = Node("j", Concatenate(1), ("a", "b"), (1, 4, 16))
    graph = network(shape, a, b, joined, conv("y", "j", RNG.normal(size=(3, 4, 1)), (1, 4, 16), 0))
    exact = dense_norm(graph)
    assert exact <= lipschitz(graph).upper <= 1.05 * exact


def test_the_sum_of_forms_is_the_sum_of_matrices():
    shape = (1, 2, 9)
    for dilation, pads in itertools.product((1, 2), ((1, 1), (2, 0))):
        parts = [
            conv("a", "x", RNG.normal(size=(2, 2, 3)), shape, (pads,)),
            conv("b", "x", RNG.normal(size=(2, 2, 2)), shape, ((dilation, 0),), dilation=dilation),
        ]
        if parts[0].shape != parts[1].shape:
            continue
        total = add(*(node_form(part, shape, 1) for part in parts))
        graph = network(shape, *parts, Node("y", Sum(), ("a", "b"), parts[0].shape))
        assert dense_norm(graph) <= total.norm(1e-3)


# ---- residual blocks ---------------------------------------------------------------


def residual(scale, shape=(1, 3, 8, 8)):
    kernel = RNG.normal(size=(3, 3, 3, 3))
    kernel *= scale / float(convsv.norm_bounds(kernel, Conv("OIHW")).upper)
    return network(
        shape,
        Node("h", Elementwise("tanh"), ("x",), shape),
        Node("i", Identity(), ("h",), shape),
        conv("c", "h", kernel, shape, 1),
        Node("f", Elementwise("relu"), ("c",), shape),
        Node("y", Sum((-1.0, 1.0)), ("f", "i"), shape),
    )


def test_residual_blocks_have_an_interval_of_singular_values():
    found = lipschitz(residual(0.5))
    (block,) = found.blocks
    assert (block.name, block.start) == ("y", "h")
    assert 0.3 < block.branch_upper <= 0.5 * (1 + 1e-9)
    assert (block.smallest_singular_value, block.largest_singular_value) == pytest.approx(
        (1 - block.branch_upper, 1 + block.branch_upper)
    )
    graph = residual(0.5).until(["y"])
    at = linearize(graph, {"x": np.zeros(graph.inputs[0].shape)})
    values = np.linalg.svd(np.stack([at.apply(row) for row in np.eye(at.input_size)]), compute_uv=False)
    assert block.smallest_singular_value <= values[-1]
    assert values[0] <= block.largest_singular_value
    (large,) = lipschitz(residual(3.0)).blocks
    assert large.smallest_singular_value == 0


def test_a_branch_that_has_another_source_is_no_block():
    shape = (1, 4)
    graph = network(
        shape,
        Node("a", Elementwise("tanh"), ("x",), shape),
        Node("b", Elementwise("relu"), ("x",), shape),
        Node("y", Sum(), ("a", "b"), shape),
    )
    assert lipschitz(graph).blocks == ()


def projected(channels, outputs, stride, branch=0.1, pooled=False):
    """Return a block whose shortcut is a 1 x 1 convolution with a stride and a normalisation."""
    shape, out = (1, channels, 6, 6), (1, outputs, 6 // stride, 6 // stride)
    window, strides = (1, 1, stride, stride), (1, 1, stride, stride)
    kind = AveragePool(window, strides, (1,) * 4, ((0, 0),) * 4, ((0, 0),) * 4)
    pool = Node("p", kind, ("x",), (1, channels, *out[2:]))
    start, step = ("p", 1) if pooled else ("x", stride)
    return network(
        shape,
        *([pool] if pooled else []),
        conv("s", start, RNG.normal(size=(outputs, channels, 1, 1)), pool.shape if pooled else shape, 0, stride=step),
        Node("n", Scale(RNG.uniform(0.5, 2, (outputs, 1, 1))), ("s",), out),
        conv("f", "x", branch * RNG.normal(size=(outputs, channels, 3, 3)), shape, 1, stride=stride),
        Node("t", Elementwise("tanh"), ("f",), out),
        Node("y", Sum(), ("n", "t"), out),
    )


@pytest.mark.parametrize(
    ("channels", "outputs", "stride", "pooled", "positive"),
    [
        (4, 3, 1, False, True),
        (3, 5, 1, False, True),  # no element of the image is lost
        (5, 3, 2, False, True),  # every output has a pixel of its own
        (3, 5, 2, False, False),  # two outputs of each pixel depend on the others
        (2, 5, 2, True, False),
        (5, 2, 2, True, True),
    ],
)
def test_blocks_with_a_projection_have_an_interval_too(channels, outputs, stride, pooled, positive, no_matrices):
    graph = projected(channels, outputs, stride, 0.001, pooled)
    (block,) = lipschitz(graph).blocks
    assert (block.name, block.start) == ("y", "x")
    for seed in range(3):
        values = block_values(graph, block, seed)
        assert block.smallest_singular_value <= values[-1]
        assert values[0] <= block.largest_singular_value
    shortcut = dense_norm(graph.until(["n"]))
    assert shortcut <= block.shortcut_upper <= shortcut * (1 + 1e-3)
    assert block.largest_singular_value == pytest.approx(block.shortcut_upper + block.branch_upper)
    assert (block.smallest_singular_value > 0) is positive
    if positive:  # the branch is small, so the interval is that of the shortcut
        assert block.smallest_singular_value == pytest.approx(values[-1], rel=0.2)


def test_the_smallest_singular_value_of_a_shortcut_may_be_unknown(monkeypatch):
    shape = (1, 2, 5, 5)
    kernel = RNG.normal(size=(2, 2, 3, 3)) / 20
    kernel[:, :, 1, 1] += np.eye(2)  # its matrix is near the identity
    graph = network(
        shape,
        conv("s", "x", kernel, shape, 1),
        conv("f", "x", 1e-4 * RNG.normal(size=(2, 2, 3, 3)), shape, 1),
        Node("t", Elementwise("relu"), ("f",), shape),
        Node("y", Sum((0.5, -2.0)), ("s", "t"), shape),
    )
    (block,) = lipschitz(graph).blocks  # from the matrix of the shortcut
    values = block_values(graph, block, 0)
    assert 0 < block.smallest_singular_value <= values[-1] <= values[0] <= block.largest_singular_value
    monkeypatch.setattr(dense, "MOST_SIDE", 0)
    found = lipschitz(graph)
    (block,) = found.blocks
    assert block.smallest_singular_value == 0
    assert "singular values in [0, " in str(found)
    assert found.to_dict()["blocks"][0]["smallest_singular_value"] == 0
