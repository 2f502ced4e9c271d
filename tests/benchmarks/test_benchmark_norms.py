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


def test_shares_are_of_the_times_in_the_same_turns(measure: Any) -> None:
    pytest.importorskip("jax")
    found = measure("norm-share", "--backend", "numpy", "--backend", "jax", shows="operator_norm", plot=False)
    rows = {(row["library"], row["network"], row["method"]): row for row in found["rows"]}
    libraries = [name for name in ("numpy", "jax") if any(key[0] == name for key in rows)]
    assert libraries == ["numpy", "jax"]
    for (library, network, method), row in rows.items():
        base = np.asarray(rows[library, network, "singular_values"]["times"])
        assert row["share"] == pytest.approx(np.median(np.asarray(row["times"]) / base))
        same = "singular_values" if method == "singular_values, compiled" else method
        numpy = np.asarray(rows["numpy", network, same]["times"])
        assert row["over_numpy"] == pytest.approx(np.median(np.asarray(row["times"]) / numpy))
    for summary in found["summary"]:
        spent = [
            row for row in found["rows"] if (row["library"], row["group"]) == (summary["library"], summary["group"])
        ]
        seconds = {
            method: sum(row["seconds"] for row in spent if row["method"] == method)
            for method in ("singular_values", "operator_norm")
        }
        assert summary["shares"]["operator_norm"] == pytest.approx(
            seconds["operator_norm"] / seconds["singular_values"]
        )
        assert summary["count"] == len({row["network"] for row in spent})
        assert (summary["compiled_over_numpy"] is not None) == (summary["library"] == "jax")
    first = {(row["library"], row["method"]): row for row in found["first_calls"]}
    assert len(first) == 2 * 2
    for (_, method), row in first.items():
        assert row["numpy_seconds"] == first["numpy", method]["first_seconds"] > 0


def test_trained_layers_have_the_extents_of_a_resnet_and_fit_into_them(
    import_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, size = import_benchmark("norm_share_layers"), import_benchmark("command").Size
    kernels = {"small": (8, 4, 3, 3), "wide": (130, 4, 3, 3), "long": (4, 4, 57, 3)}
    np.savez(tmp_path / "trained.npz", **{name: np.ones(shape, np.float32) for name, shape in kernels.items()})
    found = module.find([tmp_path / "trained.npz"], size.FULL)["trained"]
    assert {shape.layer: shape.extents for shape in found} == {"small": (56, 56), "wide": (14, 14)}
    # A list of wheels that are not installed leaves the network of the package.
    (tmp_path / "networks.txt").write_text("# a comment\nno-such-wheel==1.0\n")
    monkeypatch.setattr(module, "REQUIREMENTS", tmp_path / "networks.txt")
    assert {shape.network for shape in module.find((), size.FULL)["trained"]} == {"digits"}
