"""Fixtures that run a benchmark and import its modules; how long anything takes is not asserted."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from threadpoolctl import threadpool_limits

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())

for name in ("click", "rich", "matplotlib"):
    pytest.importorskip(name)


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


@pytest.fixture(scope="session")
def run_benchmark() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m benchmarks`` with arguments, in one thread, since other tests may want the other processors."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # It narrows tables.
        environment["OMP_NUM_THREADS"] = "1"
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600, env=environment
        )

    return run


@pytest.fixture(scope="session")
def measure(tmp_path_factory: pytest.TempPathFactory, run_benchmark: Any) -> Callable[..., Any]:
    """Run the tiny form of a command, check what it prints and draws, and return its JSON."""

    def run(command: str, *options: str, shows: str, plot: bool = True) -> Any:
        folder = tmp_path_factory.mktemp(command)
        figure = ("--plot", str(folder / "out.png")) if plot else ()
        done = run_benchmark(command, "--tiny", *options, "--json", str(folder / "out.json"), *figure)
        assert done.returncode == 0, done.stderr
        assert not plot or (folder / "out.png").read_bytes().startswith(b"\x89PNG")
        assert shows in done.stdout
        return json.loads((folder / "out.json").read_text())

    return run
