"""Random checkpoints and ONNX graphs of layers with a known matrix: no figure that is false."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from convsv_adapters.cli.group import convsv
from click.testing import CliRunner
from onnx import helper, numpy_helper
from wrapped_networks import dense_norm, random_case

from convsv_core import norm_bounds
from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend
from convsv_core.reports import layer_reports, read_model

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
        arguments = ["project", "m.pt", "--bound", BOUND, "-o", "out.pt", "--method", "rescale", "--force", *only]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            result = CliRunner().invoke(convsv, [str(argument) for argument in arguments])
            refused = CliRunner().invoke(convsv, [str(argument) for argument in arguments[: -len(only) or None]])
        assert refused.exit_code == (0 if set(layers) >= set(case.weights) else refused.exit_code)
        if not layers:
            continue
        assert result.exit_code == 0, (seed, result.output)
        after = torch.load(tmp_path / "out.pt", weights_only=True)
        case.reload(after)
        for name in layers:
            (layer,) = [found for found in read_model(tmp_path / "out.pt") if found.name == name]
            weight = case.live_weight(name)
            assert float(norm_bounds(weight, layer.conv, rtol=1e-5).upper) <= BOUND * (1 + 1e-6), (seed, name)
        assert unchanged(before, after, case, layers), seed


def needs_a_word(case, name):
    """Return whether nothing says that a layer's three axes are those of a convolution."""
    return case.weights[name].ndim == 3 and case.wrapped[name] in ("plain", "mask beside")


def unchanged(before, after, case, layers):
    """Return whether two checkpoints differ in the weights of these layers alone."""
    changed = {case.key(name) for name in layers}
    old, new = dict(leaves(before)), dict(leaves(after))
    assert list(old) == list(new)
    return all(torch.equal(old[key], new[key]) for key in old if key not in changed)


def leaves(content, keys=()):
    if isinstance(content, torch.Tensor):
        yield keys, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, (*keys, key))
