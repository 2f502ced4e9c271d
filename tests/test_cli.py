"""The command line, as a user calls it."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from convsv_adapters import _commands, _table
from convsv_adapters._commands import as_json, convsv, write_whole
from convsv_conformance.dense import dense_matrix

from convsv_core import Conv, norm_bounds
from convsv_core.layers import Layer
from convsv_core.plugins import BackendInfo, get_backend
from convsv_core.reports import LayerReport, analyze, bounds_reports

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
NORM_FIELDS = [
    *FIELDS[:6],
    "lower",
    "upper",
    "frequency",
    "evaluations",
    "converged",
    "reshaped_norm",
    "note",
]
MAIN = [sys.executable, "-m", "convsv_adapters.cli"]


def run(*arguments, **environment):
    # A width that the caller's terminal, or the test runner, has set would narrow the table.
    return CliRunner(env={"COLUMNS": None} | environment).invoke(
        convsv, [str(argument) for argument in arguments], prog_name="convsv"
    )


@pytest.fixture
def kernels(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "kernels.npz"
    np.savez(path, first=rng.normal(size=(4, 3, 3, 3)), second=np.zeros((2, 4, 3, 3)), third=rng.normal(size=(2, 2, 5)))
    return path


def spectrum(*arguments):
    result = run("spectrum", *arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ---- spectrum ---------------------------------------------------------------------------------------------


def test_the_network_that_ships():
    result = run("spectrum")
    assert result.exit_code == 0
    assert result.stderr == ""
    for word in ("stem", "block2.grouped", "s2", "g16", "d2", "circular", "spectral_norm", "8x8", "2.47x"):
        assert word in result.stdout
    assert {len(line) for line in result.stdout.splitlines() if line.startswith(("stem", "down"))} == {94}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_keeps_every_figure_in_a_narrow_terminal(columns):
    wide, narrow = run("spectrum").stdout, run("spectrum", COLUMNS=str(columns)).stdout
    assert max(map(len, narrow.splitlines())) <= columns
    rows = [line.split() for line in wide.splitlines() if line.startswith(("stem", "down", "block"))]
    assert len(rows) == 6
    for row in rows:
        assert "  ".join(row[-8:]) in " ".join(narrow.split()).replace(" ", "  ")
    assert "…" not in narrow


def test_json(kernels):
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
    (row,) = json.loads(as_json("model", "numpy", [report], FIELDS))["layers"]
    assert (row["note"], row["condition_number"], row["operator_norm"]) == ("transposed; own", None, None)


def test_the_options_reach_the_figures(kernels):
    plain = spectrum(kernels, "--input-shape", "3,8,6")["layers"][0]
    other = spectrum(kernels, "--input-shape", "first=4,4", "--backend", "torch", "--dtype", "float32")
    assert other["backend"] == "torch"
    assert other["layers"][0]["input_shape"] == [4, 4]
    assert other["layers"][1]["input_shape"] == [32, 32]
    same = spectrum(kernels, "--input-shape", "3,8,6", "--dtype", "float32")["layers"][0]
    assert 0 < abs(same["operator_norm"] - plain["operator_norm"]) < 1e-5 * plain["operator_norm"]


def test_layout(kernels, tmp_path):
    with np.load(kernels) as archive:
        moved = {name: np.moveaxis(archive[name], (0, 1), (-1, -2)) for name in archive.files}
    np.savez(tmp_path / "moved.npz", **moved)
    plain, other = spectrum(kernels)["layers"], spectrum(tmp_path / "moved.npz", "--layout", "HWIO")["layers"]
    for one, two in zip(plain, other, strict=True):
        assert one["operator_norm"] == pytest.approx(two["operator_norm"], rel=1e-12)
        assert one["reshaped_norm"] == pytest.approx(two["reshaped_norm"], rel=1e-12)


def test_bounds_beside_the_spectrum():
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


@pytest.mark.parametrize("sort", list(_table.SPECTRUM.sort_keys))
def test_sort(kernels, sort):
    result = run("spectrum", kernels, "--sort", sort)
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines() if line.startswith(("first", "second", "third"))]
    rows = {layer["name"]: layer for layer in spectrum(kernels)["layers"]}
    if sort == "norm":
        assert names == sorted(rows, key=lambda name: -rows[name]["operator_norm"])
    if sort == "smallest":
        assert names == sorted(rows, key=lambda name: rows[name]["smallest_singular_value"])
    if sort in ("depth", "name"):
        assert names == ["first", "second", "third"]
    if sort == "factor":
        assert names[-1] == "second"  # it has none


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plot(kernels, tmp_path, suffix):
    target = tmp_path / f"figure.{suffix}"
    result = run("spectrum", kernels, "--plot", target)
    assert result.exit_code == 0, result.output
    head = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert target.read_bytes().startswith(head)
    if suffix == "svg":
        assert "<path" in target.read_text()


def test_plot_of_many_layers_names_some_at_a_colour_bar():
    from convsv_adapters import _plot

    curve = np.linspace(5, 0, 100)
    reports = [LayerReport(f"layer{depth}", curve=curve * scale) for depth, scale in enumerate([1.0] * 19 + [200.0])]
    reports[3] = LayerReport("layer3", note="no figures")
    figure = _plot.make_figure(reports, "net")
    axes, bar = figure.axes
    assert len(axes.lines) == 19
    assert axes.get_legend() is None
    assert axes.get_yscale() == "log"
    labels = [label.get_text() for label in bar.get_yticklabels()]
    assert (labels[0], labels[-1]) == ("1  layer0", "20  layer19")
    axes, *bars = _plot.make_figure(reports[:3], "net").axes
    assert not bars
    assert axes.get_yscale() == "linear"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1  layer0", "2  layer1", "3  layer2"]


def test_a_layer_without_figures_is_listed_and_the_rest_go_on(tmp_path):
    np.savez(tmp_path / "m.npz", good=np.ones((2, 2, 3, 3)), bad=np.full((2, 2, 3, 3), np.nan))
    result = run("spectrum", tmp_path / "m.npz")
    assert result.exit_code == 0
    assert "NaN or infinity" in " ".join(result.stdout.split())
    assert result.stderr == "1 of 2 convolutions have no figures; their notes say why.\n"


def test_exit_status_1_where_no_layer_has_figures(tmp_path):
    np.savez(tmp_path / "m.npz", bad=np.full((2, 2, 3, 3), np.nan))
    assert run("spectrum", tmp_path / "m.npz").exit_code == 1
    np.savez(tmp_path / "m.npz", none=np.ones(3))
    result = run("spectrum", tmp_path / "m.npz")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no convolution found" in result.stderr


# ---- norm -----------------------------------------------------------------------------------------------------


def norm(*arguments):
    result = run("norm", *arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_norm_of_the_network_that_ships():
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


def test_norm_json(kernels):
    document = norm(kernels)
    assert list(document) == ["model", "backend", "layers"]
    assert (document["model"], document["backend"]) == (str(kernels), "numpy")
    assert [list(layer) for layer in document["layers"]] == [NORM_FIELDS] * 3
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


def test_the_options_of_norm_reach_the_figures(kernels):
    loose, tight = norm(kernels, "--rtol", "0.1")["layers"][0], norm(kernels, "--rtol", "1e-6")["layers"][0]
    assert tight["upper"] - tight["lower"] <= 1e-6 * tight["lower"]
    assert loose["evaluations"] < tight["evaluations"]
    assert max(loose["lower"], tight["lower"]) <= min(loose["upper"], tight["upper"])
    same = norm(kernels, "--rtol", "1e-6", "--input-shape", "3,8,6")["layers"][0]
    assert (same["lower"], same["upper"]) == (tight["lower"], tight["upper"])
    other = norm(kernels, "--rtol", "1e-6", "--backend", "torch", "--dtype", "float32")
    assert other["backend"] == "torch"
    assert other["layers"][0]["lower"] == pytest.approx(tight["lower"], rel=2e-6)


@pytest.mark.parametrize("sort", list(_table.NORM.sort_keys))
def test_sort_of_norm(kernels, sort):
    result = run("norm", kernels, "--sort", sort)
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines() if line.startswith(("first", "second", "third"))]
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


def test_norm_says_where_the_gap_was_not_reached(kernels, monkeypatch):
    monkeypatch.setattr(analyze, "norm_bounds", functools.partial(norm_bounds, max_evaluations=1))
    result = run("norm", kernels, "--rtol", "1e-6")
    assert result.exit_code == 0
    assert "gap of 1e-06 not reached" in " ".join(result.stdout.split())
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("first")]
    assert row[-3] == "no"


def test_exit_status_1_where_no_layer_has_bounds(tmp_path):
    np.savez(tmp_path / "m.npz", bad=np.full((2, 2, 3, 3), np.nan))
    result = run("norm", tmp_path / "m.npz")
    assert result.exit_code == 1
    assert "NaN or infinity" in " ".join(result.stdout.split())
    assert result.stderr == "1 of 1 convolutions have no figures; their notes say why.\n"


@pytest.mark.parametrize("rtol", ["0", "-1", "small", "nan", "inf"])
def test_a_wrong_rtol_is_status_2(rtol):
    result = run("norm", "--rtol", rtol)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--rtol" in result.stderr


# ---- wrong calls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/file.onnx"], "does not exist"),
        (["--input-shape", "3,x"], "wanted positive integers as in 3,224,224"),
        (["--input-shape", "x=3,0"], "wanted positive integers"),
        (["--input-shape", "8", "--input-shape", "9"], "given twice"),
        (["--layout", "OIHX"], "unknown letter 'X'"),
        (["--backend", "abacus"], "no such backend"),
        (["--device", "abacus"], "numpy on abacus"),
        (["--backend", "torch", "--device", "cuda:99"], "torch on cuda:99"),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--sort", "colour"], "'colour' is not one of"),
        (["--bounds", "lower"], "'lower' is not one of"),
        (["--json", "no/such/folder/out.json"], "there is no directory"),
        (["--json", "."], "is a directory"),
        (["--plot", "figure.doc"], "wanted a name that ends in .png"),
    ],
)
def test_a_wrong_call_is_status_2(arguments, message):
    for command in ("spectrum", "norm"):
        result = run(command, *arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        if command == "spectrum" or arguments[0] not in ("--plot", "--bounds"):
            assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04junk", b"\x08\x08"])
@pytest.mark.parametrize("name", ["m.onnx", "m.pt", "m.npz", "m.safetensors", "m"])
def test_a_file_that_is_no_model_is_one_line_and_status_1(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    result = run("spectrum", tmp_path / name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert str(tmp_path / name) in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_dtype_that_the_backend_lacks(monkeypatch):
    monkeypatch.setattr(get_backend("numpy"), "dtypes", lambda device=None: ("float32",))
    result = run("spectrum", "--dtype", "float64")
    assert result.exit_code == 2
    assert "numpy has float32 here, not float64" in result.stderr


def test_a_backend_that_is_not_available(monkeypatch):
    monkeypatch.setattr(get_backend("torch"), "unavailable", lambda: "it is broken")
    result = run("spectrum", "--backend", "torch")
    assert result.exit_code == 1
    assert "the backend torch is not available: it is broken" in result.stderr


def test_a_file_that_cannot_be_written(kernels, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(_commands, "write_whole", full)
    result = run("spectrum", kernels, "--json", tmp_path / "out.json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "out.json: No space left on device" in result.stderr


def test_files_are_replaced_whole(tmp_path):
    target = tmp_path / "out"
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, b"new")
    assert (target.read_bytes(), link.is_symlink()) == (b"new", True)
    write_whole(type(target)(os.devnull), b"gone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


# ---- the process ------------------------------------------------------------------------------------------------


def test_the_entry_point_is_installed():
    (script,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "convsv"]
    assert script.value == "convsv_adapters.cli:main"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_leaves_no_traceback(tmp_path):
    path = tmp_path / "large.npz"
    np.savez(path, **{f"w{index}": np.ones((64, 64, 3, 3), np.float32) for index in range(200)})
    process = subprocess.Popen(
        [*MAIN, "spectrum", str(path), "--input-shape", "64"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has its background jobs ignore interrupts, and what these start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (1, 130)
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_closed_pipe_leaves_no_traceback(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    target = tmp_path / "out.json"
    for arguments in (["--json", str(target)], ["--json", "-"]):
        done = subprocess.run([*MAIN, "spectrum", *arguments], stdout=write_end, stderr=subprocess.PIPE, text=True)
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr
    os.close(write_end)
    assert len(json.loads(target.read_text())["layers"]) == 7


def test_without_its_libraries_the_command_says_what_to_install():
    code = "import sys; sys.modules['click'] = None; from convsv_adapters.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "convsv: the command line needs click: pip install 'convsv[cli]'\n"


# ---- backends, conformance ------------------------------------------------------------------------------------


def test_backends(monkeypatch):
    rows = (
        BackendInfo("numpy", True, "", ("cpu",), ("float32", "float64")),
        BackendInfo("cupy", False, "cupy cannot be imported", (), ()),
    )
    monkeypatch.setattr(_commands, "backends", lambda: rows)
    result = run("backends")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["numpy", "yes", "cpu", "float32", "float64"] in lines
    assert ["cupy", "no", "cupy", "cannot", "be", "imported"] in lines


def test_conformance_passes_its_arguments_on():
    result = run("conformance", "--help")
    assert result.exit_code == 0
    assert "--backend" in result.stdout
    assert "--report" in result.stdout


def test_help_and_version():
    assert "--input-shape" in run("spectrum", "--help").stdout
    assert importlib.metadata.version("convsv") in run("--version").stdout
