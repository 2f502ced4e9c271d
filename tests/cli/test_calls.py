"""Wrong calls, the process, and the commands that read no network."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from convsv_adapters.cli import backends as backends_command
from convsv_adapters.cli import output, request
from convsv_adapters.cli.files import write_whole
from convsv_adapters.cli.group import COMMANDS

from convsv_core.plugins import BackendInfo, get_backend

MAIN = [sys.executable, "-m", "convsv_adapters.cli"]


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
        (["--html", "report.doc"], "wanted a name that ends in .html"),
    ],
)
def test_a_wrong_call_is_status_2(run, arguments, message):
    for command in ("spectrum", "norm"):
        result = run(command, *arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        if command == "spectrum" or arguments[0] not in ("--plot", "--bounds"):
            assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04junk", b"\x08\x08"])
@pytest.mark.parametrize("name", ["m.onnx", "m.pt", "m.npz", "m.safetensors", "m"])
def test_a_file_that_is_no_model_is_one_line_and_status_1(run, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    result = run("spectrum", tmp_path / name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert str(tmp_path / name) in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_dtype_that_the_backend_lacks(run, monkeypatch):
    monkeypatch.setattr(get_backend("numpy"), "dtypes", lambda device=None: ("float32",))
    result = run("spectrum", "--dtype", "float64")
    assert result.exit_code == 2
    assert "numpy has float32 here, not float64" in result.stderr


def test_a_backend_that_is_not_available(run, monkeypatch):
    monkeypatch.setattr(get_backend("torch"), "unavailable", lambda: "it is broken")
    result = run("spectrum", "--backend", "torch")
    assert result.exit_code == 1
    assert "the backend torch is not available: it is broken" in result.stderr


def test_a_file_that_cannot_be_written(run, kernels, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(output, "write_whole", full)
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


# ---- what newcomers meet ------------------------------------------------------------------------------------------


def test_a_call_without_a_command_shows_three_to_try(run):
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    shown = [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("  convsv")]
    assert shown == [["convsv", "spectrum"], ["convsv", "spectrum"], ["convsv", "norm"]]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["spectrm"], "Did you mean 'spectrum'?"),
        (["spectrum", "--input-shap", "3,8,8"], "Did you mean '--input-shape'?"),
        (["norm", "--htm", "x.html"], "Did you mean '--html'?"),
        (["lipschitz", "--htm", "x.html"], "'--html'"),
    ],
)
def test_a_slip_of_the_pen_is_answered_with_what_was_meant(run, arguments, meant):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert meant in " ".join(result.stderr.split())


@pytest.mark.parametrize(("words", "found"), [("convsv sp", "spectrum"), ("convsv spectrum --ht", "--html")])
def test_a_shell_completes_commands_and_options(words, found):
    environment = {"_CONVSV_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(MAIN, capture_output=True, text=True, env=os.environ | environment, timeout=60)
    assert f"plain,{found}" in done.stdout.splitlines()


def test_the_help_says_how_a_shell_completes(run):
    assert 'eval "$(_CONVSV_COMPLETE=bash_source convsv)"' in run("--help").stdout


def test_what_a_newcomer_reads_fits_80_columns(run):
    for arguments in ([], ["--help"], *([command, "--help"] for command in COMMANDS)):
        result = run(*arguments, COLUMNS="80")
        assert result.exit_code == 0, result.output
        assert max(map(len, result.stdout.splitlines())) <= 80
    commands = run("--help", COLUMNS="80").stdout.partition("Commands:")[2]
    assert "..." not in commands  # a line about a command is shown whole


@pytest.mark.parametrize("command", ["norm", "lipschitz", "project", "compare"])
def test_more_models_than_a_call_takes_are_refused_with_what_to_do(run, kernels, command):
    models = [kernels] * (2 if command == "compare" else 1)
    given = ["--bound", "1", "-o", kernels.with_name("out.npz")] if command == "project" else []
    result = run(command, *models, kernels, *given)
    assert (result.exit_code, result.stdout) == (2, "")
    said = " ".join(result.stderr.split())
    assert (
        f"one call takes {'MODEL and OTHER' if command == 'compare' else 'MODEL'}; call convsv {command} again" in said
    )


def test_a_call_without_an_input_shape_says_how_to_give_one(run, kernels):
    assert "--input-shape 3,224,224" in " ".join(run("spectrum", kernels).stdout.split())
    assert "--input-shape" not in run("spectrum", kernels, "--input-shape", "3,8,6").stdout


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["spectrum", "norm"])
def test_a_page_is_written_beside_the_table(run, kernels, tmp_path, command):
    pytest.importorskip("vl_convert")
    plain, result = run(command, kernels), run(command, kernels, "--html", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert result.stdout == plain.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert ("top singular vectors" in page) == (command == "spectrum")


def test_a_page_without_its_libraries_names_the_extra_before_the_work(run, kernels, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for module in ("page", "page_parts", "comparison_page", "layer_cards", "pictures"):
        monkeypatch.delitem(sys.modules, f"convsv_core.reports.{module}", raising=False)
    result = run("spectrum", kernels, "--html", tmp_path / "report.html")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--html needs vl_convert: pip install 'convsv[html]'" in result.stderr
    assert run("spectrum", kernels).exit_code == 0


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
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
@pytest.mark.parametrize(
    "arguments", [["norm"], ["norm", "--json", "-"], ["backends"], ["norm", "--json", "/dev/full"]]
)
def test_a_full_disk_is_one_line_and_status_1(arguments):
    with open("/dev/full", "w") as full:
        command = [*MAIN, *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    what = "/dev/full" if arguments[-1] == "/dev/full" else "stdout"
    assert (result.returncode, result.stderr) == (1, f"Error: {what}: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="there is no folder that nobody can write to")
@pytest.mark.parametrize(
    "arguments",
    [["norm", "--json"], ["spectrum", "--plot"], ["project", "--bound", "1", "-o"]],
)
def test_a_folder_that_cannot_be_written_is_found_before_the_work(run, monkeypatch, arguments):
    monkeypatch.setattr(request.Request, "layers", property(lambda _: pytest.fail("the work began")))
    result = run(*arguments, "/proc/out.png")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: /proc/out.png: no file can be written in /proc: ")
    assert result.stderr.count("\n") == 1


def test_an_output_that_has_to_be_a_file_does_not_go_to_stdout(run):
    for arguments in (["project", "--bound", "1", "-o", "-"], ["spectrum", "--plot", "-"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "cannot go to stdout: give a name" in result.stderr


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


def test_backends(run, monkeypatch):
    rows = (
        BackendInfo("numpy", True, "", ("cpu",), ("float32", "float64")),
        BackendInfo("cupy", False, "cupy cannot be imported", (), ()),
    )
    monkeypatch.setattr(backends_command, "backends", lambda: rows)
    result = run("backends")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["numpy", "yes", "cpu", "float32", "float64"] in lines
    assert ["cupy", "no", "cupy", "cannot", "be", "imported"] in lines


def test_conformance_passes_its_arguments_on(run):
    result = run("conformance", "--help")
    assert result.exit_code == 0
    assert "--backend" in result.stdout
    assert "--report" in result.stdout


def test_help_and_version(run):
    assert "--input-shape" in run("spectrum", "--help").stdout
    assert importlib.metadata.version("convsv") in run("--version").stdout
