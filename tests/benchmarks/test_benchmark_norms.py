"""The benchmarks of norms and of certified bounds run, and their numbers are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ERROR_EPS = 20


@pytest.fixture(scope="module")
def norms(measure: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = measure("norm", "--only", "*16*->16 *", shows="norm_bounds")["rows"]
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


def test_certify_finds_no_violation(tmp_path: Path, run_benchmark: Any) -> None:
    done = run_benchmark("certify", "--count", "20", "--seed", "1", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["violations"] == []
    assert sum(one["count"] for one in content["summary"]) == 40
