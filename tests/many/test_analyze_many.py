"""Many models on a cluster: the figures, the client, and workers that come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from distributed import Client, KilledWorker, LocalCluster

import convsv_core as convsv
from convsv_core._geometry.plan import make_plan
from convsv_core.layers import ReadOptions
from convsv_core.plugins import get_backend
from convsv_core.reports import QUANTILES, LayerReport, ModelReport, layer_reports, many, read_model, tasks

OPTIONS = ReadOptions({"": (32, 32)})


def as_rows(reports: list[ModelReport]) -> list[Any]:
    return [(report.path, report.note, [vars(layer) for layer in report.layers]) for report in reports]


# ---- the figures ----------------------------------------------------------------------------------------


def test_layers_have_the_figures_of_one_model(client_here: Client, checkpoints: list[Path]) -> None:
    reports = list(convsv.analyze_many(checkpoints, client_here, options=OPTIONS))
    assert [report.path for report in reports] == checkpoints
    for path, report in zip(checkpoints, reports, strict=True):
        wanted = list(layer_reports(read_model(path, OPTIONS), get_backend("numpy"), bounds="upper"))
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
        "conv_line": rng.normal(size=(5, 5, 3)).astype(np.float32),
        "constant": np.ones((4, 4, 3, 3)),
    }
    path = tmp_path / "m.npz"
    np.savez(path, **kernels)
    options = ReadOptions({"": (24, 22)})
    (report,) = convsv.analyze_many([path], client_here, options=options, backend=backend)
    layers = read_model(path, options)
    found = tasks.survey([path], tasks.TaskOptions(options, backend, "upper", None, None))[0]
    assert len(found.splits) == len(kernels) - 1
    assert min(len(split.blocks) for split in found.splits) > 2
    wanted = list(layer_reports(layers, get_backend(backend), bounds="upper"))
    assert_alike(report.layers, wanted)


def assert_alike(found: list[LayerReport], wanted: list[LayerReport]) -> None:
    """Check that reports agree up to rounding: a split layer may sum in another order."""
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
    (report,) = layer_reports([convsv_layer(kernel, conv, (7,))], get_backend("numpy"))
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
    settings = tasks.TaskOptions(OPTIONS, "numpy", "none", None, None)
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

    def survey(paths: list[Path], settings: tasks.TaskOptions) -> list[tasks.Survey]:
        return [tasks.Survey([LayerReport(path.name)], seconds=many.SECONDS_PER_TASK) for path in paths]

    monkeypatch.setattr(tasks, "survey", survey)
    settings = tasks.TaskOptions(OPTIONS, "numpy", "none", None, None)
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

    def survey(paths: list[Path], settings: tasks.TaskOptions) -> list[tasks.Survey]:
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
def reference(run_folder: Path) -> list[Any]:
    """Return the results of one worker."""
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


def test_importing_the_core_imports_no_engine() -> None:
    code = (
        "import sys, convsv_core, convsv_adapters.cli.spectrum; "
        "engines = {'dask', 'distributed', 'pyarrow'}; print(engines & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
