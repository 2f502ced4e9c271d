"""Settings for every test of the repository, and the option that runs the thorough half."""

from __future__ import annotations

import os

import pytest

# JAX reads this when it is imported. Without it there is no double precision to test; one test of the suite runs
# JAX in its default mode.
os.environ.setdefault("JAX_ENABLE_X64", "1")

# Keras reads this when it is imported, and would ask for TensorFlow. Other backends are tested in other processes.
os.environ.setdefault("KERAS_BACKEND", "torch")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--thorough``."""
    parser.addoption("--thorough", action="store_true", help="run the tests marked `thorough` too")


def pytest_configure(config: pytest.Config) -> None:
    """Let the conformance suite take few cases, unless the run is thorough."""
    if not (config.option.thorough or config.option.convsv_thorough):
        config.option.convsv_quick = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked `thorough`, unless the run is thorough."""
    if config.option.thorough:
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
