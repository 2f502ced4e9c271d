"""The benchmark of steepest directions runs, and its shares are proved."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.thorough


def test_steepest_has_every_method_and_optimizer(measure: Any) -> None:
    pytest.importorskip("torch")
    found = measure("steepest", shows="ConvMuon, exact")
    labels = {row["label"] for row in found["directions"]}
    assert len(labels) == 4
    for label in labels:
        shares = {row["method"]: row["share"] for row in found["directions"] if row["label"] == label}
        assert set(shares) >= {"flat", "polar", "exact, 3 iterations", "exact, to 0.99", "exact, warm, 3 iterations"}
        assert all(share <= 1 + 1e-6 for share in shares.values())
        assert shares["exact, to 0.99"] >= 0.99 * (1 - 1e-6)
    steps = {row["optimizer"]: row for row in found["steps"]}
    assert steps["SGD"]["to_plain"] == 1.0
    assert all(row["own_seconds"] <= row["seconds"] for row in steps.values())
