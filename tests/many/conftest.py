"""Checkpoints, and a cluster of two workers, for the tests of many models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

LARGE = (128, 128, 3, 3)  # at 52 x 52, more than one task


def written(path: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        stem=rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        pointwise=rng.normal(size=(8, 8, 1, 1)).astype(np.float32),
        depthwise=rng.normal(size=(8, 1, 3, 3)).astype(np.float32),
    )
    return path


@pytest.fixture
def write_checkpoint() -> Callable[[Path, int], Path]:
    return written


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    return [written(tmp_path / "run" / f"step_{step}.npz", step) for step in (0, 5, 10)]


@pytest.fixture(scope="package")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        client.wait_for_workers(2)  # a test may have killed one
        yield client


@pytest.fixture
def client_here() -> Iterator[Client]:
    """Yield the client of a cluster in this process, where functions can be replaced."""
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as client:
        yield client


@pytest.fixture(scope="package")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of small models, one of which has a layer that is split."""
    folder = tmp_path_factory.mktemp("many") / "run"
    for step in range(12):
        written(folder / f"step_{step}.npz", step)
    kernel = np.random.default_rng(0).normal(size=LARGE).astype(np.float32)
    np.savez(folder / "step_3.npz", large=kernel)
    return folder
