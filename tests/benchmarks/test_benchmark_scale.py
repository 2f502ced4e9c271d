"""The benchmark of many workers runs, and its workers agree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

ERROR_EPS = 20

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def scaling(measure: Any) -> dict[str, Any]:
    pytest.importorskip("distributed")
    pytest.importorskip("pyarrow")
    return measure("scale", shows="list scheduling", plot=False)


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
