"""The benchmark of all singular values runs, and its report adds up."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ERROR_EPS = 20


@pytest.fixture(scope="module")
def quick(measure: Any) -> dict[str, Any]:
    return measure("spectrum", "--repeats", "2", shows="ratio")


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


def test_wrong_calls_are_refused(tmp_path: Path, run_benchmark: Any) -> None:
    for arguments in (
        ("--only", "no such shape"),
        ("--plot", str(tmp_path / "figure.doc")),
        ("--json", str(tmp_path / "missing" / "out.json")),
    ):
        done = run_benchmark("spectrum", "--tiny", *arguments)
        assert done.returncode == 2, done.stderr
        assert arguments[1] in done.stderr.replace("\n", "")
