"""The benchmarks of norms and of certified bounds run, and their numbers are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ERROR_EPS = 20


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory, run_benchmark: Any) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("norm")
    options = ("--only", "*16*->16 *", "--json", str(folder / "out.json"), "--plot", f"{folder}/out.png")
    done = run_benchmark("norm", "--quick", *options)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "norm_bounds" in done.stdout
    rows: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())["rows"]
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
    assert abs(errors["power 500 n=56"]) <= abs(errors["power 50 n=56"])


def test_certify_finds_no_violation(tmp_path: Path, run_benchmark: Any) -> None:
    done = run_benchmark("certify", "--count", "20", "--seed", "1", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["violations"] == []
    assert sum(one["count"] for one in content["summary"]) == 40
