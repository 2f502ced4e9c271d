"""The benchmarks run, and their baselines are right; how long anything takes is not asserted."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import convsv_core as convsv

ROOT = Path(__file__).resolve().parents[1]
ERROR_EPS = 20

pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threadpool_limits(1):  # threads that wait for a processor spend more of its time than the work
        yield


@pytest.fixture
def import_benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def shapes(import_benchmark: Any) -> ModuleType:
    return import_benchmark("shapes")


@pytest.fixture
def baselines(import_benchmark: Any) -> ModuleType:
    return import_benchmark("baselines")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(tmp_path_factory, "spectrum", "--repeats", "2", shows="ratio")


def measure(folders: pytest.TempPathFactory, command: str, *options: str, shows: str, plot: bool = True) -> Any:
    """Run the tiny form of a command, and return its JSON."""
    folder = folders.mktemp(command)
    figure = ("--plot", str(folder / "out.png")) if plot else ()
    done = run(command, "--tiny", *options, "--json", str(folder / "out.json"), *figure)
    assert done.returncode == 0, done.stderr
    assert not plot or (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert shows in done.stdout
    return json.loads((folder / "out.json").read_text())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1"}  # other tests may want the other processors
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600, env=os.environ | environment
    )


def test_json_tells_the_machine(quick: dict[str, Any]) -> None:
    machine = quick["machine"]
    assert machine["processor"]
    assert machine["processors_usable"] >= 1
    assert {"python", "numpy", "convsv"} <= set(machine["versions"])
    assert all(pool["num_threads"] >= 1 for pool in machine["thread_pools"])
    assert not any("filepath" in pool for pool in machine["thread_pools"])
    assert quick["matrix_product"]["numpy"]["flops"] > 0
    assert quick["failures"] == []


def test_json_has_a_row_for_each_shape(quick: dict[str, Any], shapes: ModuleType) -> None:
    assert [f"{row['network']} {row['label']}" for row in quick["rows"]] == [shape.name for shape in shapes.QUICK]
    for row in quick["rows"]:
        assert len(row["ours_times"]) == len(row["baseline_times"]) == 2
        assert row["ours_seconds"] == pytest.approx(np.median(row["ours_times"]))
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["ours_seconds"])
        assert 1 <= row["baseline_frequencies"] <= row["frequencies"]
        assert row["extrapolated"] or row["baseline_frequencies"] == row["frequencies"]
        assert row["ours_compile_seconds"] is None


def test_every_error_is_small(quick: dict[str, Any]) -> None:
    errors = {row["label"]: row["error_eps"] for row in quick["rows"]}
    assert max(errors.values()) <= ERROR_EPS, errors


def test_sums_are_of_their_rows(quick: dict[str, Any], shapes: ModuleType) -> None:
    for summary in quick["summary"]:
        names = {shape.name for shape in shapes.GROUPS[summary["group"]]}
        rows = [row for row in quick["rows"] if f"{row['network']} {row['label']}" in names]
        assert summary["count"] == len(rows)
        assert summary["ours_seconds"] == pytest.approx(sum(row["ours_seconds"] for row in rows))
        assert summary["least_ratio"] == min(row["ratio"] for row in rows)


def test_memory_is_measured_in_other_processes(quick: dict[str, Any]) -> None:
    assert {peak["method"] for peak in quick["memory"]} == {"ours", "two lines"}
    assert all(0 < peak["imported_bytes"] <= peak["peak_bytes"] for peak in quick["memory"])


def test_sweeps_have_the_whole_matrix_where_it_is_small(quick: dict[str, Any]) -> None:
    assert [sweep["name"] for sweep in quick["sweeps"]] == ["extent", "channels"]
    for sweep in quick["sweeps"]:
        assert sweep["rows"][0]["dense_seconds"] > 0
        assert sweep["rows"][-1]["dense_seconds"] is None


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    for arguments in (
        ("--only", "no such shape"),
        ("--plot", str(tmp_path / "figure.doc")),
        ("--json", str(tmp_path / "missing" / "out.json")),
    ):
        done = run("spectrum", "--tiny", *arguments)
        assert done.returncode == 2, done.stderr
        assert arguments[1] in done.stderr.replace("\n", "")


def test_polyphase_kernel_has_the_values_of_the_operator(shapes: ModuleType, baselines: ModuleType) -> None:
    for shape in shapes.QUICK:
        kernel = shape.kernel()
        folded = baselines.polyphase(shape, kernel)
        transform = np.fft.fftn(folded, s=shape.grid, axes=tuple(range(len(shape.grid))))
        wanted = convsv.singular_values(kernel, shape.extents, shape.conv).astype(np.float64)
        found = np.zeros_like(wanted)
        values = np.sort(np.linalg.svd(transform, compute_uv=False), axis=None)[::-1]
        found[: values.size] = values
        tolerance = ERROR_EPS * np.finfo(np.float32).eps * wanted[0]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance, err_msg=shape.name)
        frequencies = np.arange(0, math.prod(shape.grid), 7)
        direct = baselines.matrices_at(folded, shape.grid, frequencies)
        rows = transform.reshape(-1, *transform.shape[-3:])[frequencies]
        np.testing.assert_allclose(rows, direct, rtol=0, atol=tolerance, err_msg=shape.name)


def test_whole_matrix_has_the_values_of_the_operator(shapes: ModuleType, baselines: ModuleType) -> None:
    shape = shapes.square("test", 3, 2, 3, 5)
    found = np.linalg.svd(baselines.dense_matrix(shape).astype(np.float64), compute_uv=False)
    wanted = convsv.singular_values(shape.kernel(), shape.extents, shape.conv)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ERROR_EPS * np.finfo(np.float32).eps * wanted[0])


def test_extrapolation_weighs_what_was_sampled(
    import_benchmark: Any, shapes: ModuleType, baselines: ModuleType
) -> None:
    library = import_benchmark("libraries").open_library("numpy")
    shape = shapes.square("test", 3, 4, 4, 16)
    full = baselines.TwoLines(library, shape, limit=math.inf, sample_seconds=0.0).prepare()
    assert not full.extrapolated
    sampled = baselines.TwoLines(library, shape, limit=0.0, sample_seconds=0.0).prepare()
    assert sampled.extrapolated
    assert sampled.sampled == 2
    assert sampled.combine({"fft": [1.0, 2.0], "svd": [0.5, 0.25]}) == [1 + 0.5 * 128, 2 + 0.25 * 128]


def test_times_are_taken_in_turns(import_benchmark: Any) -> None:
    timing = import_benchmark("timing")
    order: list[str] = []
    tasks = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.alternate(tasks, dict.fromkeys("ab", 1.0), repeats=4)
    assert order == list("abbaabba")
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4}


def test_networks_are_complete(shapes: ModuleType) -> None:
    def held(listed: list[Any]) -> int:
        return sum(shape.multiplicity for shape in listed)

    assert held(shapes.RESNET_50) == 53
    assert held(shapes.RESNET_32) == 31
    assert held(shapes.MOBILENET_V2) == 17
    assert held(shapes.VGG_16) == 13
    assert held(shapes.R3D_18) == 20
    everything = [*shapes.NETWORKS, *shapes.QUICK]
    assert all(one == other or one.name != other.name for one, other in itertools.combinations(everything, 2))
    grouped = {shape.name for group in shapes.GROUPS.values() for shape in group}
    assert {shape.name for shape in everything} <= grouped


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = measure(tmp_path_factory, "norm", "--only", "*16*->16 *", shows="norm_bounds")["rows"]
    return rows


def test_certified_norms_hold_the_truth(norms: list[dict[str, Any]]) -> None:
    ours = [row for row in norms if row["method"].startswith("norm_bounds")]
    assert {row["certified"] for row in ours} == {"both"}
    assert all(0 <= row["error"] <= 1e-3 + ERROR_EPS * np.finfo(np.float32).eps for row in ours)
    assert all(row["evaluations"] > 0 for row in ours)


def test_other_norms_err_on_the_side_they_should(norms: list[dict[str, Any]]) -> None:
    noise = ERROR_EPS * np.finfo(np.float32).eps
    errors = {row["method"]: row["error"] for row in norms}
    assert all(row["error"] >= -noise for row in norms if row["certified"] == "upper")
    assert all(error <= noise for method, error in errors.items() if method.startswith("power"))
    assert all(abs(error) <= noise for method, error in errors.items() if method.startswith("FFT"))
    assert abs(errors["power 500 n=16"]) <= abs(errors["power 50 n=16"])


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_convolutions_are_alike_and_have_adjoints(import_benchmark: Any, shapes: ModuleType, name: str) -> None:
    library = pytest.importorskip(name) and import_benchmark("libraries").open_library(name)
    judge = import_benchmark("libraries").open_library("numpy")
    dilated = shapes.Shape("test", (3, 1), 2, 3, (7, 5), (1, 1), (2, 1))
    for shape in (shapes.square("test", 3, 2, 3, 6, 2), shapes.square("test", 2, 3, 2, 5), dilated):
        image = np.random.default_rng(0).standard_normal((shape.inputs, *shape.extents)).astype(np.float32)
        sizes = []
        for one in (library, judge):
            apply, adjoint, start = one.convolution(one.asarray(shape.kernel()), shape, image)
            result = apply(start)
            sizes.append(float((result**2).sum()))
            assert float((start * adjoint(result)).sum()) == pytest.approx(sizes[-1], rel=1e-5)
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


@pytest.fixture(scope="module")
def projections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(tmp_path_factory, "project", shows="just projected")


def test_clip_is_the_clip_of_the_paper(projections: dict[str, Any]) -> None:
    for row in projections["clip"]:
        if row["question"] == "check":
            assert row["error_eps"] == 0
        else:
            assert row["extrapolated"] or row["error_eps"] <= ERROR_EPS, row
    assert {row["case"] for row in projections["clip"] if row["question"] == "clip"} == {
        "half exceed",
        "2 % exceed",
        "all exceed",
    }


def test_sums_of_clip_count_repeated_layers(projections: dict[str, Any]) -> None:
    for summary in projections["clip_summary"]:
        rows = [
            row for row in projections["clip"] if all(row[key] == summary[key] for key in ("group", "question", "case"))
        ]
        assert summary["count"] == sum(max(1, row["multiplicity"]) for row in rows)
        total = sum(max(1, row["multiplicity"]) * row["baseline_seconds"] for row in rows)
        assert summary["baseline_seconds"] == pytest.approx(total)


def test_projections_are_feasible_and_the_nearest_is_nearest(projections: dict[str, Any]) -> None:
    gap = projections["arguments"]["gap"]
    for row in projections["projections"]:
        if row["method"] == "clip once":
            assert row["norm_ratio"] > 1
            continue
        assert row["norm_ratio"] <= 1 + ERROR_EPS * np.finfo(np.float32).eps, row
        # The least distance is within the gap below that of dykstra, and of no feasible kernel above it.
        assert row["distance_ratio"] >= math.sqrt(1 - gap) - ERROR_EPS * np.finfo(np.float32).eps, row
        if row["method"] in ("dykstra", "dykstra, warm"):
            assert row["converged"]
            assert row["distance_ratio"] <= 1 / math.sqrt(1 - gap) + ERROR_EPS * np.finfo(np.float32).eps


def test_polyphase_kernel_returns_to_its_taps(shapes: ModuleType, baselines: ModuleType) -> None:
    for shape in shapes.QUICK:
        if all(d * (k - 1) < n for d, k, n in zip(shape.dilation, shape.taps, shape.extents, strict=True)):
            kernel = shape.kernel()
            np.testing.assert_array_equal(baselines.from_polyphase(shape, baselines.polyphase(shape, kernel)), kernel)


def test_plain_dykstra_ends_where_project_does(import_benchmark: Any, shapes: ModuleType) -> None:
    plain, gap = import_benchmark("clip_baselines").plain_dykstra, 1e-3
    for shape in (
        shapes.square("test", 3, 2, 3, 6),
        shapes.square("test", 3, 4, 4, 8, 2, groups=2),
        shapes.convolution("test", (3,), 2, 2, 9, dilation=2),
    ):
        kernel = shape.kernel().astype(np.float64)
        bound = 0.5 * float(convsv.operator_norm(kernel, shape.extents, shape.conv))
        found = plain(shape, kernel, bound, gap, 2000)
        wanted = convsv.project(kernel, shape.extents, shape.conv, bound, rtol=gap)
        assert found.gap <= gap
        assert float(convsv.operator_norm(found.kernel, shape.extents, shape.conv)) <= bound * (1 + 1e-12)
        distance = float(convsv.frobenius_norm(found.kernel - kernel, shape.extents, shape.conv))
        assert distance == pytest.approx(float(wanted.distance), rel=gap)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("torch")
    return measure(tmp_path_factory, "training", "--case", "all layers", shows="clip of the paper")


def test_training_overheads_are_of_the_same_turns(training: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in training["rows"]}
    plain = np.asarray(rows["plain step"]["times"])
    assert len(plain) == training["arguments"]["turns"]
    for row in rows.values():
        taken = np.asarray(row["times"]).reshape(-1, row["period"]).sum(axis=1)
        same = plain[: row["steps"]].reshape(-1, row["period"]).sum(axis=1)
        assert row["overhead"] == pytest.approx(np.median(taken / same - 1))
        assert row["quartiles"][0] <= row["overhead"] <= row["quartiles"][1]
        assert all(own <= whole for own, whole in zip(row["own_times"], row["times"], strict=True))


def test_training_holds_the_bound_where_it_promises_to(training: dict[str, Any]) -> None:
    slack = 1 + 1e-6  # of the certificate
    norms = {row["method"]: row["norm"] for row in training["rows"]}
    circular = {row["method"]: row["circular_norm"] for row in training["rows"]}
    assert min(training["norms"]) > training["rows"][0]["bound"]
    for method in ("project", "project, every 2", "parametrization"):
        assert norms[method] <= slack, norms
    for method in ("project, circular", "project, circular, every 2"):
        assert circular[method] <= slack, circular
    for method in ("plain step", "clip of the paper"):
        assert circular[method] > 1, circular


def test_training_replays_every_layer_and_step(training: dict[str, Any]) -> None:
    assert sum(row["count"] for row in training["layers"]) == len(training["norms"])
    (ranks,) = training["ranks"]
    assert len(ranks["alone_times"]) == len(ranks["shared_times"]) == training["arguments"]["turns"]
    assert all(seconds > 0 for seconds in ranks["alone_times"] + ranks["shared_times"])


def test_certify_finds_no_violation(tmp_path: Path) -> None:
    done = run("certify", "--count", "20", "--seed", "1", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["violations"] == []
    assert sum(one["count"] for one in content["summary"]) == 40


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("distributed")
    pytest.importorskip("pyarrow")
    return measure(tmp_path_factory, "scale", shows="list scheduling", plot=False)


def test_workers_agree_bit_for_bit(scaling: dict[str, Any]) -> None:
    (speed,) = scaling["speed"]
    assert (speed["checkpoints"], speed["rows"]) == (4, 28)
    assert speed["equal"]
    assert speed["equal_after_kill"]
    assert len(speed["one_times"]) == len(speed["two_times"]) == 2
    assert speed["ratio"] == pytest.approx(np.median(speed["one_times"]) / np.median(speed["two_times"]))


def test_simulated_workers_do_no_more_than_they_can(scaling: dict[str, Any]) -> None:
    assert scaling["overhead"]["one_worker"] > 0
    assert [block["channels"] for block in scaling["blocks"]] == [16, 64]
    for row in scaling["simulated"]:
        assert 0 < row["speedup"] <= row["workers"] * (1 + 1e-9), row
        assert max(row["scheduler_share"], row["store_share"], row["worker_share"]) <= 1 + 1e-9, row


def test_arrays_beyond_one_process_are_measured(scaling: dict[str, Any]) -> None:
    sharded = scaling["sharded_jax"]
    assert sharded["share"] == math.ceil(sharded["visited"] / 8)
    assert sharded["largest_collective_bytes"] < sharded["symbol_bytes"]
    assert sharded["error_eps"] <= ERROR_EPS
    assert [one["what"] for one in scaling["grid"]] == ["operator norm", "quantiles", "all singular values"]
    assert all(one["agrees"] for one in scaling["grid"])
    assert all(one["worker_start_bytes"] <= one["worker_peak_bytes"] <= 2 << 30 for one in scaling["grid"])


def test_simulation_counts_what_each_task_waits_for(import_benchmark: Any) -> None:
    simulation = import_benchmark("simulation")
    jobs = [simulation.Job(1.0, size=10, layers=[[1.0, 1.0], [2.0]], combine=0.5)] * 3

    def seconds(**engine: float) -> float:
        free = {"workers": 1, "service": 0.0, "overhead": 0.0, "bytes_per_second": math.inf}
        return float(simulation.simulate(jobs, simulation.Engine(**(free | engine))).seconds)

    work, count = 3 * jobs[0].seconds, 3 * jobs[0].tasks
    assert (work, count) == (18.0, 18)
    assert seconds() == pytest.approx(work)
    assert seconds(service=0.1) == seconds(overhead=0.1) == pytest.approx(work + count * 0.1)
    assert seconds(bytes_per_second=10.0) == pytest.approx(work + 9)  # the survey's and two layers' files
    assert seconds(workers=1000) == pytest.approx(1 + 2 + 0.5)
    assert seconds(workers=1000, service=1.0) >= count
    assert [job.survey for job in simulation.packed([simulation.Job(0.25)] * 7, 1.0)] == [1.0, 0.75]
