"""`convsv spectrum`, as a user calls it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from convsv_adapters.cli import output, table
from matplotlib.figure import Figure
from onnx_models import two_convolutions

from convsv_core.reports import LayerReport, Report

FIELDS = [
    "name",
    "kernel_shape",
    "layout",
    "stride",
    "dilation",
    "groups",
    "input_shape",
    "operator_norm",
    "smallest_singular_value",
    "condition_number",
    "stable_rank",
    "norm_lower",
    "norm_upper",
    "reshaped_norm",
    "note",
]


def test_the_network_that_ships(run):
    result = run("spectrum")
    assert result.exit_code == 0
    assert result.stderr == ""
    for word in ("stem", "block2.grouped", "s2", "g16", "d2", "circular", "spectral_norm", "8x8", "2.47x"):
        assert word in result.stdout
    assert {len(line) for line in result.stdout.splitlines() if line.startswith(("stem", "down"))} == {94}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_keeps_every_figure_in_a_narrow_terminal(run, columns):
    wide, narrow = run("spectrum").stdout, run("spectrum", COLUMNS=str(columns)).stdout
    assert max(map(len, narrow.splitlines())) <= columns
    rows = [line.split() for line in wide.splitlines() if line.startswith(("stem", "down", "block"))]
    assert len(rows) == 6
    for row in rows:
        assert "  ".join(row[-8:]) in " ".join(narrow.split()).replace(" ", "  ")
    assert "…" not in narrow


@pytest.mark.parametrize("command", [["spectrum", "--bounds", "both"], ["norm"]])
@pytest.mark.parametrize("columns", [30, 40])
def test_a_narrow_table_drops_columns_and_names_them(run, command, columns):
    wide, narrow = (run(*command, COLUMNS=str(width)).stdout for width in (200, columns))
    head, _, rest = narrow.partition("\n\n")
    assert max(map(len, narrow.splitlines())) <= columns
    figure = r"(?<!\S)\d+\.\d+\S*"
    shown = [re.findall(figure, line) for line in head.splitlines() if re.search(figure, line)]
    assert len(shown) == 7
    assert {cell for row in shown for cell in row} <= set(re.findall(figure, wide))
    assert rest.startswith("Too narrow here for the")
    assert "reshaped norm, factor; --json has every figure." in " ".join(rest.split())
    assert "factor" not in head
    headings = {line.split()[0] for line in head.splitlines() if line.startswith("layer")}
    assert headings == {"layer"}


def test_a_table_wider_than_the_terminal_breaks_no_heading(run):
    narrow = run("spectrum", COLUMNS="12").stdout
    assert re.search(r"^layer +kernel +norm$", narrow, re.MULTILINE)


def test_json(spectrum, kernels):
    document = spectrum(kernels, "--input-shape", "3,8,6")
    assert list(document) == ["model", "backend", "layers"]
    assert (document["model"], document["backend"]) == (str(kernels), "numpy")
    assert [list(layer) for layer in document["layers"]] == [FIELDS] * 3
    first, second, third = document["layers"]
    assert (first["kernel_shape"], first["input_shape"], first["layout"]) == ([4, 3, 3, 3], [8, 6], "OIHW")
    assert first["operator_norm"] > first["smallest_singular_value"] > 0
    assert (second["operator_norm"], second["condition_number"]) == (0, None)
    assert "singular" in second["note"]
    assert third["input_shape"] == [6]


def test_json_marks_transposed_layers_and_has_no_infinity():
    report = LayerReport(
        "up", (1, 1, 2), "IOW", (2,), (1,), 1, transposed=True, condition_number=float("inf"), note="own"
    )
    (row,) = json.loads(json.dumps(output.figures_of([report], FIELDS), allow_nan=False))
    assert (row["note"], row["condition_number"], row["operator_norm"]) == ("transposed; own", None, None)


def test_the_options_reach_the_figures(spectrum, kernels):
    plain = spectrum(kernels, "--input-shape", "3,8,6")["layers"][0]
    other = spectrum(kernels, "--input-shape", "first=4,4", "--backend", "torch", "--dtype", "float32")
    assert other["backend"] == "torch"
    assert other["layers"][0]["input_shape"] == [4, 4]
    assert other["layers"][1]["input_shape"] == [32, 32]
    same = spectrum(kernels, "--input-shape", "3,8,6", "--dtype", "float32")["layers"][0]
    assert 0 < abs(same["operator_norm"] - plain["operator_norm"]) < 1e-5 * plain["operator_norm"]


def test_layout(spectrum, kernels, tmp_path):
    with np.load(kernels) as archive:
        moved = {name: np.moveaxis(archive[name], (0, 1), (-1, -2)) for name in archive.files}
    np.savez(tmp_path / "moved.npz", **moved)
    plain, other = spectrum(kernels)["layers"], spectrum(tmp_path / "moved.npz", "--layout", "HWIO")["layers"]
    for one, two in zip(plain, other, strict=True):
        assert one["operator_norm"] == pytest.approx(two["operator_norm"], rel=1e-12)
        assert one["reshaped_norm"] == pytest.approx(two["reshaped_norm"], rel=1e-12)


def test_bounds_beside_the_spectrum(run, spectrum, norm):
    upper, both, none = (spectrum("--bounds", bounds)["layers"] for bounds in ("upper", "both", "none"))
    for one, two, bare, bounds in zip(upper, both, none, norm("--rtol", "1e-2")["layers"], strict=True):
        assert (one["norm_lower"], bare["norm_lower"], bare["norm_upper"]) == (None, None, None)
        assert one["norm_upper"] == bounds["upper"]
        assert one["operator_norm"] <= one["norm_upper"]
        assert 0 < two["norm_lower"] <= two["norm_upper"] <= 1.01 * one["norm_upper"]
    headings = {bounds: run("spectrum", "--bounds", bounds).stdout for bounds in ("upper", "both", "none")}
    assert [("lower" in text, "upper" in text) for text in headings.values()] == [
        (False, True),
        (True, True),
        (False, False),
    ]
    (row,) = [line.split() for line in headings["both"].splitlines() if line.startswith("stem ")]
    stem = both[0]
    assert float(row[-4]) <= stem["norm_lower"] <= stem["norm_upper"] <= float(row[-3])


@pytest.mark.parametrize("sort", list(table.SPECTRUM.sort_keys))
def test_sort(run, spectrum, kernels, sort):
    result = run("spectrum", kernels, "--sort", sort)
    assert result.exit_code == 0
    names = [
        line.split()[0] for line in result.stdout.splitlines() if line.startswith(("first", "second", "third_conv"))
    ]
    rows = {layer["name"]: layer for layer in spectrum(kernels)["layers"]}
    if sort == "norm":
        assert names == sorted(rows, key=lambda name: -rows[name]["operator_norm"])
    if sort == "smallest":
        assert names == sorted(rows, key=lambda name: rows[name]["smallest_singular_value"])
    if sort in ("depth", "name"):
        assert names == ["first", "second", "third_conv"]
    if sort == "factor":
        assert names[-1] == "second"  # it has none


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plot(run, kernels, tmp_path, suffix):
    target = tmp_path / f"figure.{suffix}"
    result = run("spectrum", kernels, "--plot", target)
    assert result.exit_code == 0, result.output
    head = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert target.read_bytes().startswith(head)
    if suffix == "svg":
        assert "<path" in target.read_text()


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("layers", [7, 20, 64])
def test_the_figure_tells_every_layer_apart_and_shows_every_value(layers, scale):
    curve = np.linspace(5, 0, 100)
    reports = [LayerReport(f"layer{depth}", curve=curve * (200 if depth == 19 else 1)) for depth in range(layers)]
    reports[3] = LayerReport("layer3", note="no figures")
    figure, axes = Report(reports, title="net").plot(Figure(), scale=scale)
    panels = np.atleast_1d(axes)
    assert list(panels) == figure.axes
    assert len(panels) == -(-(layers - 1) // 8)
    assert all(panel.get_yscale() == scale and len(panel.lines) <= 8 for panel in panels)
    for panel in panels:
        assert len({line.get_color() for line in panel.lines}) == len(panel.lines)
        drawn = np.concatenate([line.get_ydata() for line in panel.lines])
        low, high = panel.get_ylim()
        assert low <= np.nanmin(drawn) <= np.nanmax(drawn) <= high
    named = [text.get_text() for panel in panels for text in panel.get_legend().get_texts()]
    assert named == [f"{depth + 1}  layer{depth}" for depth in range(layers) if depth != 3]


def test_the_figure_of_no_layers_says_so():
    figure, axes = Report([LayerReport("layer", note="no figures")]).plot(Figure())
    assert figure.axes == [axes]
    assert axes.texts[0].get_text() == "no layer has singular values"


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="'linear' or 'log'"):
        Report([]).plot(Figure(), scale="square")


def test_a_layer_without_figures_is_listed_and_the_rest_go_on(run, tmp_path):
    np.savez(tmp_path / "m.npz", good=np.ones((2, 2, 3, 3)), bad=np.full((2, 2, 3, 3), np.nan))
    result = run("spectrum", tmp_path / "m.npz")
    assert result.exit_code == 0
    assert "NaN or infinity" in " ".join(result.stdout.split())
    assert result.stderr == "1 of 2 convolutions have no figures; their notes say why.\n"


def test_exit_status_1_where_no_layer_has_figures(run, tmp_path):
    np.savez(tmp_path / "m.npz", bad=np.full((2, 2, 3, 3), np.nan))
    assert run("spectrum", tmp_path / "m.npz").exit_code == 1
    np.savez(tmp_path / "m.npz", none=np.ones(3))
    result = run("spectrum", tmp_path / "m.npz")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no convolution found" in result.stderr


def test_a_network_with_free_axes_has_figures_and_says_for_which_input(run, spectrum, tmp_path):
    path = two_convolutions(tmp_path / "m.onnx", ["N", 3, "H", "W"])
    result = run("spectrum", path, "--bounds", "both")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = " ".join(result.stdout.split())
    assert shown.count("the model leaves axes free, x=1,3,?,?") == 1
    assert "for the input x=1,3,128,128; --input-shape gives others" in shown
    for layer in spectrum(path, "--input-shape", "3,16,16", "--bounds", "both")["layers"]:
        assert layer["note"] == ""
        assert layer["norm_lower"] <= layer["norm_upper"]


def test_what_depends_on_no_extents_is_printed_without_them(spectrum, tmp_path):
    path = two_convolutions(tmp_path / "m.onnx", None)
    for layer in spectrum(path, "--bounds", "both")["layers"]:
        assert layer["operator_norm"] is layer["norm_lower"] is None
        assert layer["norm_upper"] > 0
        assert layer["reshaped_norm"] > 0
        assert "give the shape of the input" in layer["note"]
