"""Many models on a cluster: the figures, what happens to a run, and the table that it leaves."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow.dataset
import pytest
from click.testing import CliRunner, Result
from convsv_adapters import _many, _plot, _spectra
from convsv_adapters._checkpoints import run_and_step
from convsv_adapters._commands import convsv as command
from convsv_adapters._spectra import Norm, SpectraTable, TableError
from distributed import Client, KilledWorker, LocalCluster

import convsv_core as convsv
from convsv_core import many, tasks
from convsv_core.analysis import QUANTILES, LayerReport, analyse, read_model
from convsv_core.layers import ReadOptions
from convsv_core.many import ModelReport
from convsv_core.plan import make_plan
from convsv_core.plugins import get_backend

OPTIONS = ReadOptions({"": (32, 32)})
LARGE = (128, 128, 3, 3)  # at 52 x 52, more than one task
FIGURES = [
    "operator_norm",
    "smallest_singular_value",
    "condition_number",
    "stable_rank",
    "norm_upper",
    "reshaped_norm",
]


def write_checkpoint(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        stem=rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        pointwise=rng.normal(size=(8, 8, 1, 1)).astype(np.float32),
        depthwise=rng.normal(size=(8, 1, 3, 3)).astype(np.float32),
    )
    return path


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    return [write_checkpoint(tmp_path / "run" / f"step_{step}.npz", step) for step in (0, 5, 10)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        client.wait_for_workers(2)  # a test may have killed one
        yield client


@pytest.fixture
def client_here() -> Iterator[Client]:
    """Of a cluster in this process, where functions can be replaced."""
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as client:
        yield client


def as_rows(reports: list[ModelReport]) -> list[Any]:
    return [(report.path, report.note, [vars(layer) for layer in report.layers]) for report in reports]


# ---- the figures ----------------------------------------------------------------------------------------


def test_layers_have_the_figures_of_one_model(client_here: Client, checkpoints: list[Path]) -> None:
    reports = list(convsv.analyze_many(checkpoints, client_here, options=OPTIONS))
    assert [report.path for report in reports] == checkpoints
    for path, report in zip(checkpoints, reports, strict=True):
        wanted = list(analyse(read_model(path, OPTIONS), get_backend("numpy"), bounds="upper"))
        assert_alike(report.layers, wanted)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_split_layers_have_the_same_figures(
    client_here: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(tasks, "WORK_PER_TASK", 1e5)
    rng = np.random.default_rng(0)
    kernels = {
        "wide": rng.normal(size=(4, 6, 3, 3)),
        "single": rng.normal(size=(6, 4, 5, 5)).astype(np.float32),
        "complex": rng.normal(size=(3, 4, 3, 3)) + 1j * rng.normal(size=(3, 4, 3, 3)),
        "line": rng.normal(size=(5, 5, 3)).astype(np.float32),
        "constant": np.ones((4, 4, 3, 3)),
    }
    path = tmp_path / "m.npz"
    np.savez(path, **kernels)
    options = ReadOptions({"": (24, 22)})
    (report,) = convsv.analyze_many([path], client_here, options=options, backend=backend)
    layers = read_model(path, options)
    found = tasks.survey([path], tasks.Settings(options, backend, "upper", None, None))[0]
    assert len(found.splits) == len(kernels) - 1
    assert min(len(split.blocks) for split in found.splits) > 2
    wanted = list(analyse(layers, get_backend(backend), bounds="upper"))
    assert_alike(report.layers, wanted)


def assert_alike(found: list[LayerReport], wanted: list[LayerReport]) -> None:
    """The same to rounding: sums may be taken in another order where a layer was split."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.name, one.note, one.input_shape) == (other.name, other.note, other.input_shape)
        assert one.curve is None
        assert other.operator_norm is not None
        assert one.quantiles is not None
        atol = 20 * float(np.finfo(np.float32).eps) * other.operator_norm
        for name in ("operator_norm", "smallest_singular_value", "norm_upper", "reshaped_norm"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=atol), (one.name, name)
        assert one.quantiles == pytest.approx(other.quantiles, abs=atol)
        assert one.stable_rank == pytest.approx(other.stable_rank, rel=atol / other.operator_norm)


def test_quantiles_are_those_of_numpy() -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 2, 3))
    conv = convsv.Conv("OIW")
    (report,) = analyse([convsv_layer(kernel, conv, (7,))], get_backend("numpy"))
    values = convsv.singular_values(kernel, (7,), conv)
    assert report.quantiles == pytest.approx(tuple(np.quantile(values, QUANTILES)), rel=1e-14)


def convsv_layer(kernel: np.ndarray[Any, Any], conv: convsv.Conv, extents: tuple[int, ...]) -> Any:
    from convsv_core.layers import Layer

    return Layer("layer", kernel, conv, extents)


@pytest.mark.parametrize("most", [1000, 3])
def test_blocks_hold_every_frequency_once(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(tasks, "WORK_PER_TASK", 1e5)
    monkeypatch.setattr(tasks, "MOST_BLOCKS", most)
    plan = make_plan((8, 8, 3, 3), True, (20, 15), convsv.Conv("OIHW"))
    blocks = tasks.cut(plan)
    held: dict[int, list[int]] = {}
    for block in blocks:
        held.setdefault(block.part, []).extend(range(block.first, block.last))
    assert held == {0: list(range(plan.self_conjugate)), 1: list(range(len(plan.frequencies) - plan.self_conjugate))}
    assert 2 < len(blocks) <= most + 1


def test_small_layers_are_packed_and_none_is_lost(
    client_here: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.npz"
    np.savez(path, **{f"w{index}": np.full((2, 2, 3, 3), float(index + 1)) for index in range(9)})
    settings = tasks.Settings(OPTIONS, "numpy", "none", None, None)
    layer = make_plan((2, 2, 3, 3), True, (32, 32), convsv.Conv("OIHW"))
    monkeypatch.setattr(tasks, "WORK_PER_TASK", 2.5 * len(layer.frequencies) * tasks.work_per_frequency(layer))
    (found,) = tasks.survey([path], settings)
    assert [report is None for report in found.reports] == [False] * 2 + [True] * 7
    assert found.packs == [[2, 3], [4, 5], [6, 7], [8]]
    (report,) = convsv.analyze_many([path], client_here, options=OPTIONS, bounds="none")
    assert [layer.name for layer in report.layers] == [f"w{index}" for index in range(9)]
    assert [layer.operator_norm for layer in report.layers] == pytest.approx([18.0 * (n + 1) for n in range(9)])


def test_a_layer_that_cannot_be_computed_says_why_and_the_rest_go_on(
    client_here: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "WORK_PER_TASK", 1e5)
    path = tmp_path / "m.npz"
    np.savez(path, bad=np.full((4, 4, 3, 3), np.nan), good=np.ones((4, 4, 3, 3)))
    (report,) = convsv.analyze_many([path], client_here, options=OPTIONS)
    bad, good = report.layers
    assert "NaN or infinity" in bad.note
    assert (bad.operator_norm, good.operator_norm) == (None, pytest.approx(36.0))


# ---- the client -------------------------------------------------------------------------------------------


def test_what_is_no_client_is_refused() -> None:
    with pytest.raises(TypeError, match=r"client is a builtins.str: wanted distributed\.Client"):
        convsv.analyze_many([], "tcp://127.0.0.1:8786")  # type: ignore[arg-type]


def test_wrong_options_are_refused_before_anything_runs(client_here: Client) -> None:
    with pytest.raises(ValueError, match="bounds='lower': wanted one of none, upper, both"):
        convsv.analyze_many([], client_here, bounds="lower")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such backend"):
        convsv.analyze_many([], client_here, backend="abacus")
    assert list(convsv.analyze_many([], client_here)) == []


def test_the_client_holds_what_is_under_way_alone(client_here: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 400

    def survey(paths: list[Path], settings: tasks.Settings) -> list[tasks.Survey]:
        return [tasks.Survey([LayerReport(path.name)], seconds=many.SECONDS_PER_TASK) for path in paths]

    monkeypatch.setattr(tasks, "survey", survey)
    settings = tasks.Settings(OPTIONS, "numpy", "none", None, None)
    run = many._Run(client_here, [Path(f"model{number}") for number in range(count)], settings)
    most = 0
    for number, report in enumerate(run.reports()):
        assert report.layers[0].name == f"model{number}"
        most = max(most, len(run._window))
    assert number == count - 1
    assert most <= 4 * many.TASKS_PER_THREAD  # twice what two threads are given at a time


def test_models_of_which_workers_die_are_found_out(
    client_here: Client, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tasks.survey

    def survey(paths: list[Path], settings: tasks.Settings) -> list[tasks.Survey]:
        if any(path.name == "step_5.npz" for path in paths):
            raise KilledWorker("survey", SimpleNamespace(address="tcp://1"), 3)  # type: ignore[arg-type]
        return original(paths, settings)

    monkeypatch.setattr(tasks, "survey", survey)
    monkeypatch.setattr(many._Run, "_pack_size", lambda run: min(3, len(run._left)))
    reports = list(convsv.analyze_many(checkpoints, client_here, options=OPTIONS))
    assert [len(report.layers) for report in reports] == [3, 0, 3]
    assert "worker after worker died" in reports[1].note


def test_an_abandoned_run_is_cancelled(client_here: Client, checkpoints: list[Path]) -> None:
    reports = convsv.analyze_many(checkpoints * 20, client_here, options=OPTIONS)
    next(reports)
    reports.close()
    deadline = time.monotonic() + 60
    while client_here.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- workers that come and go -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of small models, one of which has a layer that is split."""
    folder = tmp_path_factory.mktemp("many") / "run"
    for step in range(12):
        write_checkpoint(folder / f"step_{step}.npz", step)
    kernel = np.random.default_rng(0).normal(size=LARGE).astype(np.float32)
    np.savez(folder / "step_3.npz", large=kernel)
    return folder


@pytest.fixture(scope="module")
def reference(run_folder: Path) -> list[Any]:
    """What one worker finds."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as alone,
        Client(alone) as client,
    ):
        paths = sorted(run_folder.glob("*.npz"))
        reports = list(convsv.analyze_many(paths, client, options=ReadOptions({"": (52, 52)})))
    (large,) = next(report for report in reports if report.path.name == "step_3.npz").layers
    assert large.operator_norm is not None
    return as_rows(reports)


def test_two_workers_find_the_same_bits_as_one(client: Client, run_folder: Path, reference: list[Any]) -> None:
    paths = sorted(run_folder.glob("*.npz"))
    found = list(convsv.analyze_many(paths, client, options=ReadOptions({"": (52, 52)})))
    assert as_rows(found) == reference


def holder_of_results(client: Client) -> str:
    """A worker with results of which the client has been told, and which it has not fetched."""
    while True:
        for worker, keys in client.has_what().items():
            if any(key.startswith("survey") for key in keys):
                return worker
        time.sleep(0.01)


def test_a_killed_worker_changes_nothing(client: Client, run_folder: Path, reference: list[Any]) -> None:
    paths = sorted(run_folder.glob("*.npz"))
    pids = client.run(os.getpid)
    found = []
    for report in convsv.analyze_many(paths, client, options=ReadOptions({"": (52, 52)})):
        if not found:
            os.kill(pids[holder_of_results(client)], signal.SIGKILL)
        found.append(report)
    assert as_rows(found) == reference


# ---- convsv spectrum --scheduler --out ---------------------------------------------------------------------


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
    assert list(rows[0]) == _spectra.SCHEMA.names
    assert [(row["run"], row["step"], row["layer"]) for row in rows] == [
        ("run", step, layer) for step in (0, 5, 10) for layer in ("stem", "pointwise", "depthwise")
    ]
    for path, part in zip(checkpoints, np.split(np.asarray(rows, object), 3), strict=True):
        assert {row["model"] for row in part} == {f"run/{path.name}"}
        for row, report in zip(
            part, analyse(read_model(path, OPTIONS), get_backend("numpy"), bounds="upper"), strict=True
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


def test_a_second_call_computes_what_is_missing(cluster: LocalCluster, checkpoints: list[Path], tmp_path: Path) -> None:
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
        "from convsv_adapters import _spectra, cli; from convsv_core import many; "
        "_spectra.SECONDS_PER_PART = 0; many.SECONDS_PER_TASK = 0; cli.main()"
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
        list(_many._in_words(reports()))


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


def test_the_figure_has_a_line_a_layer_and_a_dash_a_run() -> None:
    norms = [
        Norm(run, step, depth, f"layer{depth}", float(depth + step))
        for run in ("a", "b")
        for step in (20, 0, 10)
        for depth in (1, 2)
    ]
    (axes,) = _plot.make_norms_figure(norms, "table").axes
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "--"]
    assert list(axes.lines[0].get_xdata()) == [0, 10, 20]
    assert list(axes.lines[1].get_ydata()) == [2, 12, 22]
    assert axes.lines[0].get_color() == axes.lines[2].get_color() != axes.lines[1].get_color()
    assert len(axes.artists) == 1  # the first legend, beside that of the runs
    many_layers = [Norm("a", step, depth, f"layer{depth}", 1.0) for step in (0, 1) for depth in range(1, 21)]
    axes, bar = _plot.make_norms_figure([*many_layers, Norm("a", 2, 1, "layer1", 200.0)], "table").axes
    assert axes.get_yscale() == "log"
    assert [label.get_text() for label in bar.get_yticklabels()][-1] == "20  layer20"
    (axes,) = _plot.make_norms_figure([], "table").axes
    assert axes.texts[0].get_text() == "no layer has figures"


def test_importing_the_core_imports_no_engine() -> None:
    code = (
        "import sys, convsv_core, convsv_adapters._commands; print({'dask', 'distributed', 'pyarrow'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
