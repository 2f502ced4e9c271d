"""The benchmark of training steps runs, and holds the bounds that it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def training(measure: Any) -> dict[str, Any]:
    pytest.importorskip("torch")
    return measure("training", "--case", "all layers", shows="clip of the paper")


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


def check_overheads(rows: dict[str, Any], turns: int) -> None:
    """Compare the overheads with the times of the same turns, each of which has a plain step."""
    plain = np.asarray(rows["plain step"]["times"])
    assert len(plain) == turns
    for row in rows.values():
        assert row["overhead"] == pytest.approx(np.median(np.asarray(row["times"]) / plain[: row["steps"]] - 1))


def test_compiled_training_holds_the_bound_where_it_promises_to(measure: Any) -> None:
    pytest.importorskip("optax")
    found = measure("training-jax", shows="rescale, every size", plot=False)
    rows = {row["method"]: row for row in found["rows"]}
    check_overheads(rows, found["arguments"]["turns"])
    for method in ("rescale", "dykstra"):
        assert rows[f"{method}, every size"]["norm"] <= 1 + 1e-6
        assert rows[f"{method}, circular"]["circular_norm"] <= 1 + 1e-6
    assert rows["plain step"]["circular_norm"] > 1


def test_keras_trains_on_each_backend_within_the_bound(measure: Any) -> None:
    for name in ("keras", "torch", "jax"):
        pytest.importorskip(name)
    found = measure("training-keras", shows="constrain, every size", plot=False)
    assert found["machine"]["versions"].keys() > {"keras", "torch", "jax"}
    assert found["arguments"]["backends"] == ["torch", "jax"]
    for backend in found["arguments"]["backends"]:
        rows = {row["method"]: row for row in found["rows"] if row["backend"] == backend}
        check_overheads(rows, found["arguments"]["turns"])
        for row in rows.values():
            assert row["compile_seconds"] == pytest.approx(row["first_seconds"] - np.median(row["times"]))
        # Each constraint bounds its own operator, and the plain step and the wrapper bound neither.
        assert rows["constrain, every size"]["norm"] <= 1 + 1e-6
        assert rows["constrain, circular"]["circular_norm"] <= 1 + 1e-6
        for method in ("plain step", "SpectralNormalization"):
            assert rows[method]["circular_norm"] > 1.1, rows
