"""Settings for every test of the repository, and the option that runs the thorough half."""

from __future__ import annotations

import os
from typing import Any

import pytest

# JAX reads this when it is imported. Without it there is no double precision to test; one test of the suite runs
# JAX in its default mode.
os.environ.setdefault("JAX_ENABLE_X64", "1")

# Keras reads this when it is imported, and would ask for TensorFlow. Other backends are tested in other processes.
os.environ.setdefault("KERAS_BACKEND", "torch")

# OpenMP and OpenBLAS read these when they are loaded. Their threads else spin while they wait for work, which on a
# machine that runs two processes of tests takes more time than the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--thorough``."""
    parser.addoption("--thorough", action="store_true", help="run the tests marked `thorough` too")


def pytest_configure(config: pytest.Config) -> None:
    """Let the conformance suite take few cases, and XLA compile without LLVM's optimisations, unless thorough."""
    if not (config.option.thorough or config.option.convsv_thorough):
        config.option.convsv_quick = True
        # XLA reads this when JAX starts. Most of the time of a small case in JAX is LLVM's.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `thorough`, unless the run is thorough."""
    if config.option.thorough:
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file to one worker, which then makes the file's fixtures and imports its frameworks once.

    The conformance cases of one backend count as a file: a worker that compiles an operation for one case need not
    compile it for the next.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return f"{file} {test.split('/')[0]}" if test.startswith("test_conformance[") else file

    return ByFile(config, log)
