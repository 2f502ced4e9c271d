"""`convsv spectrum` for many models: the table, what is left of it, and wrong calls."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.dataset
import pytest
from click.testing import CliRunner, Result
from convsv_adapters.cli import many as many_command
from convsv_adapters.cli import parquet, plot
from convsv_adapters.cli.checkpoints import run_and_step
from convsv_adapters.cli.group import convsv as command
from convsv_adapters.cli.parquet import Norm, SpectraTable, TableError
from distributed import LocalCluster

from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend
from convsv_core.reports import ModelReport, layer_reports, read_model

OPTIONS = ReadOptions({"": (32, 32)})
FIGURES = [
    "operator_norm",
    "smallest_singular_value",
    "condition_number",
    "stable_rank",
    "norm_upper",
    "reshaped_norm",
]


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": None}).invoke(command, ["spectrum", *map(str, arguments)], prog_name="convsv")


def rows_of(table: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(table).to_table().to_pylist()
    return rows


def test_the_table(cluster: LocalCluster, checkpoints: list[Path], tmp_path: Path) -> None:
    out, plot = tmp_path / "spectra.parquet", tmp_path / "norms.svg"
    result = run(
        tmp_path / "run" / "*.npz", "--scheduler", cluster.scheduler_address, "--out", out, "--plot", plot,
        "--input-shape", "32,32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "dashboard: " in result.stderr
    rows = rows_of(out)
    assert list(rows[0]) == parquet.SCHEMA.names
    assert [(row["run"], row["step"], row["layer"]) for row in rows] == [
        ("run", step, layer) for step in (0, 5, 10) for layer in ("stem", "pointwise", "depthwise")
    ]
    for path, part in zip(checkpoints, np.split(np.asarray(rows, object), 3), strict=True):
        assert {row["model"] for row in part} == {f"run/{path.name}"}
        for row, report in zip(
            part, layer_reports(read_model(path, OPTIONS), get_backend("numpy"), bounds="upper"), strict=True
        ):
            wanted = [getattr(report, name) for name in FIGURES]
            assert [row[name] for name in FIGURES] == pytest.approx(wanted, rel=1e-5)
            assert [row[name] for name in ("q01", "q05", "q25", "q50", "q75", "q95", "q99")] == pytest.approx(
                list(report.quantiles or ()), rel=1e-5
            )
            assert tuple(row["kernel_shape"]) == report.kernel_shape
    assert "<path" in plot.read_text()
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:4] for line in lines if line[:1] == ["run"] and len(line) > 6 and line[2] == "3"] == [
        ["run", layer, "3", "0-10"] for layer in ("stem", "pointwise", "depthwise")
    ]


def test_a_second_call_computes_what_is_missing(
    cluster: LocalCluster, checkpoints: list[Path], write_checkpoint: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    out = tmp_path / "spectra.parquet"
    (tmp_path / "run" / "step_7.npz").write_bytes(b"still being written")

    def call() -> dict[str, Any]:
        result = run(
            tmp_path / "run" / "*.npz", "--scheduler", cluster.scheduler_address, "--out", out, "--json", "-",
            "--bounds", "none",
        )  # fmt: skip
        document: dict[str, Any] = json.loads(result.stdout)
        assert result.exit_code == bool(document["failed"])
        return document | {"failed": [failure["model"] for failure in document["failed"]]}

    def models() -> list[tuple[int, str | None]]:
        return sorted((row["step"], row["layer"] or "") for row in rows_of(out))

    def complete(*steps: int) -> list[tuple[int, str]]:
        return sorted((step, layer) for step in steps for layer in ("stem", "pointwise", "depthwise"))

    common = {"table": str(out), "backend": "numpy", "models": 4}
    assert call() == common | {"computed": 3, "failed": ["run/step_7.npz"]}
    assert models() == sorted([*complete(0, 5, 10), (7, "")])
    assert call() == common | {"computed": 0, "failed": ["run/step_7.npz"]}
    assert models() == sorted([*complete(0, 5, 10), (7, "")])
    write_checkpoint(tmp_path / "run" / "step_7.npz", 7)
    write_checkpoint(tmp_path / "run" / "step_5.npz", 55)
    before = {row["layer"]: row["operator_norm"] for row in rows_of(out) if row["step"] == 5}
    assert call() == common | {"computed": 2, "failed": []}
    assert models() == complete(0, 5, 7, 10)
    after = {row["layer"]: row["operator_norm"] for row in rows_of(out) if row["step"] == 5}
    assert before.keys() == after.keys()
    assert all(before[layer] != after[layer] for layer in before)
    assert call() == common | {"computed": 0, "failed": []}


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_damaged_and_malicious_files_have_their_reason(
    cluster: LocalCluster, checkpoints: list[Path], tmp_path: Path
) -> None:
    folder, trap = tmp_path / "run", tmp_path / "trap"
    (folder / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{damaged")
    (folder / "b.pth").write_bytes(pickle.dumps({"w": Payload(trap)}, protocol=2))
    np.savez(folder / "c.npz", none=np.ones(3))
    np.savez(folder / "d.npz", w=np.asarray([Payload(trap)], object))
    out = tmp_path / "spectra.parquet"
    result = run(folder / "*", "--scheduler", cluster.scheduler_address, "--out", out, "--bounds", "none")
    assert result.exit_code == 1
    assert not trap.exists()
    reasons = {row["model"]: row["note"] for row in rows_of(out) if row["layer"] is None}
    assert reasons.keys() == {"run/a.safetensors", "run/b.pth", "run/c.npz", "run/d.npz"}
    assert "safetensors" in reasons["run/a.safetensors"]
    assert "objects and code are never loaded" in reasons["run/b.pth"]
    assert "no convolution found" in reasons["run/c.npz"]
    assert "never loaded" in reasons["run/d.npz"]
    assert len({row["model"] for row in rows_of(out) if row["operator_norm"] is not None}) == len(checkpoints)
    assert result.stderr.count("has no figures") == 4


@pytest.mark.thorough
def test_the_table_of_a_killed_client_is_readable_and_can_be_completed(
    cluster: LocalCluster, run_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "spectra.parquet"
    arguments = [str(run_folder / "*.npz"), "--scheduler", cluster.scheduler_address, "--bounds", "none"]
    code = (
        "from convsv_adapters import cli; from convsv_adapters.cli import parquet; "
        "from convsv_core.reports import many; "
        "parquet.SECONDS_PER_PART = 0; many.SECONDS_PER_TASK = 0; cli.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "spectrum", *arguments, "--out", str(out)])
    while process.poll() is None and len(list(out.glob("*.parquet"))) < 2:
        time.sleep(0.005)
    process.kill()
    process.wait()
    (out.parent / f".{out.name}.0123abcd.part.parquet").write_bytes(b"PAR1")  # what dies while a file is written
    held = {row["model"] for row in rows_of(out)}
    assert len(held) >= 2
    result = run(*arguments, "--out", out, "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["computed"] == 12 - len(held)
    assert not list(out.parent.glob("*.part.parquet"))
    whole = tmp_path / "whole.parquet"
    assert run(*arguments, "--out", whole).exit_code == 0
    assert rows_of(out) == rows_of(whole)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_terminated_run_leaves_no_process(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "spectra.parquet"
    arguments = [str(run_folder / "*.npz"), "--scheduler", "local", "--workers", "1", "--out", str(out)]
    code = "from convsv_adapters import cli\nif __name__ == '__main__':\n cli.main()"
    script = tmp_path / "main.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script), "spectrum", *arguments, "--input-shape", "256,256"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "dashboard" in process.stderr.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_no_scheduler_is_one_line(checkpoints: list[Path], tmp_path: Path) -> None:
    result = run(
        *checkpoints, "--scheduler", "tcp://127.0.0.1:9", "--out", tmp_path / "s.parquet", "--connect-timeout", "0.5"
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "no scheduler answers at tcp://127.0.0.1:9" in result.stderr
    assert not (tmp_path / "s.parquet").exists()


def test_a_scheduler_that_goes_is_one_line(checkpoints: list[Path], tmp_path: Path) -> None:
    def reports() -> Iterator[ModelReport]:
        raise ConnectionError("the scheduler has gone")
        yield

    with pytest.raises(Exception, match="has gone; call again for what is missing"):
        list(many_command._in_words(reports()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none*.npz", "--scheduler", "local", "--out", "s.parquet"], "no file matches 'none*.npz'"),
        (["run", "--scheduler", "local", "--out", "s.parquet"], "folders only"),
        (["run/*.npz", "--scheduler", "local"], "--scheduler and --out go together"),
        (["run/*.npz", "--out", "s.parquet"], "--scheduler and --out go together"),
        (["run/*.npz", "--scheduler", "local", "--out", "s.csv"], "ends in .parquet"),
        (["run/*.npz", "--scheduler", "local", "--out", "file.parquet"], "is a file"),
        (["run/*.npz", "--scheduler", "local", "--out", "no/s.parquet"], "there is no directory"),
        (["run/*.npz", "--scheduler", "local", "--out", "other.parquet"], "a folder of other files"),
        (["run/*.npz", "--scheduler", "nowhere", "--out", "s.parquet"], "missing port number"),
        (["run/*.npz", "--scheduler", "tcp://a:1", "--workers", "2", "--out", "s.parquet"], "workers of its own"),
        (
            ["run/*.npz", "--scheduler", "local", "--out", "s.parquet", "--sort", "name"],
            "--sort is for the table of one",
        ),
        (["run/*.npz", "--workers", "2"], "--workers is for many models"),
        (["run/*.npz"], "of many models by a pattern, --scheduler and --out are wanted"),
        (["run/step_0.npz", "run/step_5.npz"], "2 models: give --scheduler and --out"),
        (["run/*.npz", "--scheduler", "local", "--out", "s.parquet", "--backend", "abacus"], "no such backend"),
    ],
)
def test_a_wrong_call_is_status_2(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.parquet").touch()
    Path("other.parquet").mkdir()
    Path("other.parquet/letter.txt").touch()
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())


def test_without_its_libraries_the_command_says_what_to_install(checkpoints: list[Path], tmp_path: Path) -> None:
    code = "import sys; sys.modules['distributed'] = None; from convsv_adapters.cli import main; main()"
    arguments = [str(checkpoints[0]), "--scheduler", "local", "--out", str(tmp_path / "s.parquet")]
    done = subprocess.run([sys.executable, "-c", code, "spectrum", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: --scheduler needs distributed: pip install 'convsv[many]'\n"


# ---- the table and the figure -------------------------------------------------------------------------------


def test_a_table_of_other_settings_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    with SpectraTable(out, {"--bounds": "upper"}) as table:
        table._write(table_of_one(table), out / "part-000000.parquet")
    with pytest.raises(TableError, match="is of --bounds upper, not none"), SpectraTable(out, {"--bounds": "none"}):
        pass
    with pytest.raises(TableError, match="not a table of this version"), SpectraTable(out, {"--dtype": None}):
        pass


def table_of_one(table: SpectraTable) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist([{"run": "a", "model": "a/1", "layer": "w"}], table._schema)


def test_only_one_process_adds_to_a_table(tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    with (
        SpectraTable(out, {}),
        pytest.raises(TableError, match="another process is adding"),
        SpectraTable(out, {}),
    ):
        pass


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    out.mkdir()
    (out / "part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(TableError, match=r"part-000000\.parquet: cannot be read"), SpectraTable(out, {}):
        pass


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("run/step_000100.safetensors", ("run", 100)),
        ("run/resnet50-step7.pth", ("run", 7)),
        ("run/epoch=3-step=4000-v1.ckpt", ("run", 4000)),
        ("run/epoch12.pt", ("run", 12)),
        ("run/checkpoint-500/model.safetensors", ("run", 500)),
        ("run/checkpoint-500/model-00001-of-00002.safetensors", ("run", 500)),
        ("run3/model.onnx", ("run3", None)),
        ("final.npz", (".", None)),
    ],
)
def test_run_and_step(model: str, expected: tuple[str, int | None]) -> None:
    assert run_and_step(model) == expected


def test_the_figure_has_a_panel_a_run_and_a_line_a_layer() -> None:
    norms = [
        Norm(run, step, depth, f"layer{depth}", float(depth + step))
        for run in ("a", "b")
        for step in (20, 0, 10)
        for depth in (1, 2)
    ]
    first, second = plot.make_norms_figure(norms, "table").axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["a", "b"]
    assert list(first.lines[0].get_xdata()) == [0, 10, 20]
    assert list(first.lines[1].get_ydata()) == [2, 12, 22]
    assert first.lines[0].get_color() == second.lines[0].get_color() != first.lines[1].get_color()
    assert all(float(tick).is_integer() for tick in first.get_xticks())
    many_layers = [Norm("a", step, depth, f"layer{depth}", 1.0) for step in (0, 1) for depth in range(1, 21)]
    axes, bar = plot.make_norms_figure([*many_layers, Norm("a", 2, 1, "layer1", 200.0)], "table").axes
    assert axes.get_yscale() == "log"
    assert [label.get_text() for label in bar.get_yticklabels()][-1] == "20  layer20"
    (axes,) = plot.make_norms_figure([], "table").axes
    assert axes.texts[0].get_text() == "no layer has figures"


@pytest.mark.parametrize("names", [("gen", "critic"), ("resnet18", "resnet50")])
def test_networks_of_one_folder_that_share_their_steps_have_panels_of_their_own(names: tuple[str, str]) -> None:
    norms = [Norm("run", step, 1, "conv", 1.0, f"run/{name}-{step:04d}.npz") for name in names for step in (7, 1, 3)]
    panels = plot.make_norms_figure(norms, "table").axes
    assert [axes.get_title(loc="left") for axes in panels] == sorted(f"run: {name}-#.npz" for name in names)
    assert all(list(axes.lines[0].get_xdata()) == [1, 3, 7] for axes in panels)
