"""The benchmarks of clip and project run, and their kernels are feasible."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ERROR_EPS = 20


@pytest.fixture(scope="module")
def projections(measure: Any) -> dict[str, Any]:
    return measure("project", shows="just projected")


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


def test_the_projection_of_a_network_is_timed_both_ways(run_benchmark: Any, tmp_path: Path) -> None:
    path = tmp_path / "kernels.npz"
    np.savez(path, first=np.random.default_rng(0).normal(size=(3, 2, 3, 3)).astype(np.float32))
    figures = tmp_path / "figures.json"
    shown = run_benchmark("network-projection", str(path), "--repeats", "1", "--json", str(figures)).stdout
    assert "plain / now" in shown
    rows = json.loads(figures.read_text())["rows"]
    assert [row["layer"] for row in rows] == ["first", "total"]
    assert all(row["converged"] and row["plain_converged"] for row in rows)
    assert all(row["distance"] == pytest.approx(row["plain_distance"], rel=1e-2) for row in rows)
