"""Random checkpoints and ONNX graphs of layers with a known matrix: no figure that is false."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from convsv_adapters.cli.group import convsv
from onnx import helper, numpy_helper
from wrapped_networks import dense_norm, random_case

from convsv_core import norm_bounds
from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend
from convsv_core.reports import bounds_reports, layer_reports, read_model

QUICK, THOROUGH = 40, 2000
BOUND = 0.4
KNOWN = {"plain", "pruned", "old weight norm", "weight norm"}
"""Wrappings whose layers always have figures."""

halves = [
    pytest.param(range(QUICK), id="quick"),
    pytest.param(range(QUICK, THOROUGH), id="thorough", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("seeds", halves)
@pytest.mark.filterwarnings("ignore")
def test_no_figure_of_a_checkpoint_is_false(tmp_path, seeds):
    for seed in seeds:
        case = random_case(seed)
        torch.save(case.content, tmp_path / "m.pt")
        layers = read_model(tmp_path / "m.pt", ReadOptions({"": (5,)}))
        reports = {report.name: report for report in layer_reports(layers, get_backend("numpy"))}
        for name, report in reports.items():
            assert report.note, (seed, name)
            if report.operator_norm is None:
                continue
            assert name in case.weights, (seed, name, report)
            truth = dense_norm(case.weights[name], name in case.transposed)
            precision = 0.02 if "16" in str(case.dtype(name)) else 1e-4
            assert report.operator_norm == pytest.approx(truth, rel=precision), (seed, name, case.wrapped[name])
        for name, kind in case.wrapped.items():
            if kind in KNOWN and not needs_a_word(case, name):
                assert reports[name].operator_norm is not None, (seed, name, kind, reports[name])
            else:
                assert name in reports, (seed, name, kind)


@pytest.mark.parametrize("seeds", halves)
@pytest.mark.filterwarnings("ignore")
def test_a_projected_checkpoint_is_within_the_bound_in_its_module(tmp_path, seeds):
    for seed in list(seeds)[:: 8 if len(seeds) > QUICK else 4]:
        case = random_case(seed)
        before = copy.deepcopy(case.content)
        torch.save(case.content, tmp_path / "m.pt")
        layers = [layer.name for layer in read_model(tmp_path / "m.pt") if layer.stored is not None]
        only = [option for name in layers for option in ("--only", name)]
        if project(tmp_path, "whole.pt").exit_code == 0:
            case.reload(torch.load(tmp_path / "whole.pt", weights_only=True))
            for name in case.weights:
                assert dense_norm(case.live_weight(name), name in case.transposed) <= BOUND * (1 + 1e-3), (seed, name)
            case.reload(before)
        if not layers:
            continue
        result = project(tmp_path, "out.pt", *only)
        assert result.exit_code == 0, (seed, result.output)
        after = torch.load(tmp_path / "out.pt", weights_only=True)
        case.reload(after)
        for name in layers:
            (layer,) = [found for found in read_model(tmp_path / "out.pt") if found.name == name]
            weight = case.live_weight(name)
            assert float(norm_bounds(weight, layer.conv, rtol=1e-5).upper) <= BOUND * (1 + 1e-6), (seed, name)
        assert unchanged(before, after, case, layers), seed


def project(folder, output, *only):
    """Project the checkpoint in a folder to `BOUND`."""
    arguments = ["project", folder / "m.pt", "--bound", BOUND, "-o", folder / output, "--method", "rescale", "--force"]
    return CliRunner().invoke(convsv, [str(argument) for argument in (*arguments, *only)])


def needs_a_word(case, name):
    """Return whether nothing says that a layer's three axes are those of a convolution."""
    return case.weights[name].ndim == 3 and case.wrapped[name] in ("plain", "mask beside")


def unchanged(before, after, case, layers):
    """Return whether two checkpoints differ in the weights of these layers alone."""
    old, new = dict(leaves(before)), dict(leaves(after))
    assert list(old) == list(new)
    changed = {old[case.key(name)].data_ptr() for name in layers}  # tied tensors change together
    return all(torch.equal(old[key], new[key]) for key in old if old[key].data_ptr() not in changed)


def leaves(content, keys=()):
    if isinstance(content, torch.Tensor):
        yield keys, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, (*keys, key))


# ---- ONNX graphs ---------------------------------------------------------------------------------------------------


def stored_as(kind, name, kernel, rng):
    """Return the nodes, initialisers and sparse initialisers that make a kernel, and the kernel that they make."""
    make, wide = helper.make_node, kernel.astype(np.float64)
    if kind == "initialiser":
        return [], [numpy_helper.from_array(kernel, name)], [], wide
    if kind == "constant":
        return [make("Constant", [], [name], value=numpy_helper.from_array(kernel))], [], [], wide
    if kind == "sparse":
        kernel = np.where(rng.random(kernel.shape) < 0.5, kernel, 0).astype(np.float32)
        places = np.flatnonzero(kernel)
        values = numpy_helper.from_array(kernel.ravel()[places], name)
        by_axis = rng.random() < 0.5
        indices = np.stack(np.unravel_index(places, kernel.shape), 1) if by_axis else places
        sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices.astype(np.int64)), kernel.shape)
        return [], [], [sparse], kernel.astype(np.float64)
    inner, scale = numpy_helper.from_array(kernel, f"{name}.raw"), np.float32(0.5 + rng.random())
    if kind == "scaled":
        factor = numpy_helper.from_array(scale, f"{name}.scale")
        return [make("Mul", [inner.name, factor.name], [name])], [inner, factor], [], wide * scale
    if kind == "masked":
        mask = (rng.random(kernel.shape) < 0.6).astype(np.float32)
        factor = numpy_helper.from_array(mask, f"{name}.mask")
        return [make("Mul", [inner.name, factor.name], [name])], [inner, factor], [], wide * mask
    if kind == "turned":
        return [make("Transpose", [inner.name], [name], perm=[1, 0, 2, 3])], [inner], [], wide.swapaxes(0, 1)
    integers = np.rint(kernel * 50).astype(np.int8)
    parts = [numpy_helper.from_array(integers, inner.name), numpy_helper.from_array(scale, f"{name}.scale")]
    return [make("DequantizeLinear", [p.name for p in parts], [name])], parts, [], integers * np.float64(scale)


STORED = ["initialiser", "constant", "sparse", "scaled", "masked", "turned", "quantised"]
OPERATORS = ["Conv", "Conv", "ConvTranspose", "com.microsoft.FusedConv", "com.microsoft.nchwc.Conv", "local.Block"]


def random_graph(path, seed):
    """Write a chain of convolutions of four channels, and return by each one's name its kernel, or None."""
    rng = np.random.default_rng(seed)
    nodes, initialisers, sparse, truth, source = [], [], [], {}, "x"
    for index in range(3):
        taps = int(rng.integers(1, 4))
        kernel = rng.normal(size=(4, 4, taps, taps)).astype(np.float32)
        more = stored_as(str(rng.choice(STORED)), f"w{index}", kernel, rng)
        nodes, initialisers, sparse = nodes + more[0], initialisers + more[1], sparse + more[2]
        operator = str(rng.choice(OPERATORS))
        domain, _, kind = operator.rpartition(".")
        total, name = taps - 1, f"n{index}"
        pads = {} if domain == "local" else {"pads": [total // 2, total // 2, total - total // 2, total - total // 2]}
        target = "y" if index == 2 else f"a{index}"
        nodes.append(helper.make_node(kind, [source, f"w{index}"], [target], name=name, domain=domain, **pads))
        source = target
        if domain == "local":
            truth[index] = more[3], False
        else:
            truth[index] = None if "nchwc" in domain else (more[3], kind == "ConvTranspose")
    body = [helper.make_node("Conv", ["a", "b"], ["c"], auto_pad="SAME_UPPER")]
    block = helper.make_function("local", "Block", ["a", "b"], ["c"], body, [helper.make_opsetid("", 17)])
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, 5, 5])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "net", [value], [output], initialisers, sparse_initializer=sparse)
    opsets = [helper.make_opsetid(domain, 1) for domain in ("local", "com.microsoft", "com.microsoft.nchwc")]
    opsets.append(helper.make_opsetid("", 17))
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[block], ir_version=8), path)
    return truth


@pytest.mark.parametrize("seeds", halves)
def test_no_figure_of_an_onnx_graph_is_false(tmp_path, seeds):
    for seed in seeds:
        truth = random_graph(tmp_path / "m.onnx", seed)
        layers = read_model(tmp_path / "m.onnx")
        reports = list(layer_reports(layers, get_backend("numpy")))
        bounds = list(bounds_reports(layers, get_backend("numpy"), rtol=1e-2))
        assert len(reports) == len(truth)
        for index, (report, bound) in enumerate(zip(reports, bounds, strict=True)):
            if truth[index] is None:
                assert (report.operator_norm, bound.upper) == (None, None), (seed, index)
                assert report.note
                continue
            kernel, transposed = truth[index]
            norm = dense_norm(kernel, transposed)
            assert bound.upper >= norm * (1 - 1e-5), (seed, index)
            assert report.operator_norm is None or report.operator_norm == pytest.approx(norm, rel=1e-4), (seed, index)
            if None not in truth.values():  # a graph with an unknown operator may have extents that nothing tells
                assert report.operator_norm is not None, (seed, index, report.note)
