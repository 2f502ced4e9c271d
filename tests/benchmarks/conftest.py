"""Fixtures that run a benchmark and import its modules; how long anything takes is not asserted."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())

for name in ("click", "rich", "matplotlib"):
    pytest.importorskip(name)


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
    """Run ``python -m benchmarks`` with arguments and variables of the environment."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks", *arguments]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600, env=os.environ | environment
        )

    return run
