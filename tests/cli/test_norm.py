"""`convsv norm`, as a user calls it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from convsv_adapters.cli import table
from convsv_conformance.dense import dense_matrix

from convsv_core import Conv, norm_bounds
from convsv_core.layers import Layer
from convsv_core.plugins import get_backend
from convsv_core.reports import analysis, bounds_reports

FIELDS = [
    "name",
    "kernel_shape",
    "layout",
    "stride",
    "dilation",
    "groups",
    "lower",
    "upper",
    "frequency",
    "evaluations",
    "converged",
    "reshaped_norm",
    "note",
]


def test_norm_of_the_network_that_ships(run, spectrum, norm):
    result = run("norm")
    assert (result.exit_code, result.stderr) == (0, "")
    for word in ("stem", "block2.grouped", "s2", "g16", "d2", "every input size", "spectral_norm", "yes"):
        assert word in result.stdout
    reports = {layer["name"]: layer for layer in norm()["layers"]}
    for layer in spectrum()["layers"]:
        bounds = reports[layer["name"]]
        assert layer["operator_norm"] <= bounds["upper"] <= 1.001 * bounds["lower"]
        # the table rounds each bound to the side on which it stays one
        (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith(f"{layer['name']} ")]
        lower, upper = map(float, row[-6:-4])
        assert lower <= bounds["lower"] <= lower * (1 + 1e-3)
        assert upper * (1 - 1e-3) <= bounds["upper"] <= upper


def test_norm_json(spectrum, norm, kernels):
    document = norm(kernels)
    assert list(document) == ["model", "backend", "layers"]
    assert (document["model"], document["backend"]) == (str(kernels), "numpy")
    assert [list(layer) for layer in document["layers"]] == [FIELDS] * 3
    first, second, third = document["layers"]
    with np.load(kernels) as archive:
        bounds = norm_bounds(archive["first"], Conv("OIHW"))
    assert (first["lower"], first["upper"]) == (float(bounds.lower), float(bounds.upper))
    assert (tuple(first["frequency"]), first["evaluations"]) == (bounds.frequency, bounds.evaluations)
    assert first["converged"] is True
    assert (second["lower"], second["upper"], second["converged"]) == (0, 0, True)
    assert len(third["frequency"]) == 1
    plain = spectrum(kernels)["layers"]
    for field in ("kernel_shape", "layout", "stride", "dilation", "groups", "reshaped_norm"):
        assert [layer[field] for layer in document["layers"]] == [layer[field] for layer in plain]


def test_the_options_of_norm_reach_the_figures(norm, kernels):
    loose, tight = norm(kernels, "--rtol", "0.1")["layers"][0], norm(kernels, "--rtol", "1e-6")["layers"][0]
    assert tight["upper"] - tight["lower"] <= 1e-6 * tight["lower"]
    assert loose["evaluations"] < tight["evaluations"]
    assert max(loose["lower"], tight["lower"]) <= min(loose["upper"], tight["upper"])
    same = norm(kernels, "--rtol", "1e-6", "--input-shape", "3,8,6")["layers"][0]
    assert (same["lower"], same["upper"]) == (tight["lower"], tight["upper"])
    other = norm(kernels, "--rtol", "1e-6", "--backend", "torch", "--dtype", "float32")
    assert other["backend"] == "torch"
    assert other["layers"][0]["lower"] == pytest.approx(tight["lower"], rel=2e-6)


@pytest.mark.parametrize("sort", list(table.NORM.sort_keys))
def test_sort_of_norm(run, norm, kernels, sort):
    result = run("norm", kernels, "--sort", sort)
    assert result.exit_code == 0
    names = [
        line.split()[0] for line in result.stdout.splitlines() if line.startswith(("first", "second", "third_conv"))
    ]
    lower = {layer["name"]: layer["lower"] for layer in norm(kernels)["layers"]}
    expected = {"norm": sorted(lower, key=lambda name: -lower[name]), "depth": list(lower), "name": sorted(lower)}
    assert names == expected.get(sort, names)
    assert sort != "factor" or names[-1] == "second"  # it has none


def test_norm_lists_layers_that_have_no_bound_for_every_size():
    kernel = np.random.default_rng(0).normal(size=(2, 2, 4, 4))
    cases = {
        "zeros": (Conv("OIHW", padding=9, padding_mode="zeros"), None),
        "valid": (Conv("OIHW", padding="valid", padding_mode="zeros"), None),
        "circular": (Conv("OIHW", padding=((1, 2), (2, 1))), None),
        "one more": (Conv("OIHW", padding=2), "gives more outputs than inputs"),
        "reflect": (Conv("OIHW", padding_mode="reflect"), "reflect padding repeats pixels"),
        "replicate": (Conv("OIHW", padding_mode="replicate"), "replicate padding repeats pixels"),
        "no weights": (None, "their own note"),
    }
    layers = [
        Layer(name, kernel if conv else None, conv, None, "" if conv else "their own note")
        for name, (conv, _) in cases.items()
    ]
    for report in bounds_reports(layers, get_backend("numpy")):
        conv, reason = cases[report.name]
        assert (report.lower is None) == (reason is not None), report.name
        assert (reason or "") in report.note
        if reason is None:
            assert report.converged
            matrix = dense_matrix(
                kernel,
                (6, 6),
                "OIHW",
                stride=(1, 1),
                dilation=(1, 1),
                pads=conv.pads((4, 4)),
                padding_mode=conv.padding_mode,
            )
            assert np.linalg.norm(matrix, 2) <= report.upper


def test_norm_says_where_the_gap_was_not_reached(run, kernels, monkeypatch):
    monkeypatch.setattr(analysis, "norm_bounds", functools.partial(norm_bounds, max_evaluations=1))
    result = run("norm", kernels, "--rtol", "1e-6")
    assert result.exit_code == 0
    assert "gap of 1e-06 not reached" in " ".join(result.stdout.split())
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("first")]
    assert row[-3] == "no"


def test_exit_status_1_where_no_layer_has_bounds(run, tmp_path):
    np.savez(tmp_path / "m.npz", bad=np.full((2, 2, 3, 3), np.nan))
    result = run("norm", tmp_path / "m.npz")
    assert result.exit_code == 1
    assert "NaN or infinity" in " ".join(result.stdout.split())
    assert result.stderr == "1 of 1 convolutions have no figures; their notes say why.\n"


@pytest.mark.parametrize("rtol", ["0", "-1", "small", "nan", "inf"])
def test_a_wrong_rtol_is_status_2(run, rtol):
    result = run("norm", "--rtol", rtol)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--rtol" in result.stderr
