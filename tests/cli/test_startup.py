"""Count the modules that an import and the help of the command line load. No time is taken."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from convsv_adapters.cli.group import COMMANDS

FOREIGN_MODULES = 30
"""The number of modules, neither NumPy's nor this project's, that an import of the core may load: 18 on Python 3.11."""


def loaded(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded once it has run `code`, whatever that prints."""
    report = "import sys, atexit; atexit.register(lambda: print('loaded:', *sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def called(*arguments: str) -> set[str]:
    return loaded(f"sys.argv = ['convsv', *{arguments!r}]\nfrom convsv_adapters.cli import main\nmain()")


def test_the_core_imports_little_besides_numpy() -> None:
    new = loaded("import numpy, convsv_core") - loaded("import numpy")
    used_by_calls = {"array_api_compat", "concurrent", "email", "importlib.metadata", "logging", "pluggy"}
    assert not new & (used_by_calls | {"threadpoolctl", "convsv_adapters", "convsv_backends", "convsv_conformance"})
    foreign = {name for name in new if not name.startswith("convsv_core")}
    assert len(foreign) <= FOREIGN_MODULES, sorted(foreign)


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_the_command_line_imports_neither_numpy_nor_the_core(option: str) -> None:
    modules = called(option)
    assert "click" in modules
    assert not modules & {"numpy", "convsv_core", "rich", "importlib.metadata", "matplotlib", "onnx", "pluggy"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_imports_no_plugin(name: str) -> None:
    modules = called(name, "--help")
    assert not modules & {"convsv_backends", "matplotlib", "onnx", "safetensors", "torch", "jax", "dask", "distributed"}


def test_the_version_imports_no_numpy() -> None:
    assert "numpy" not in called("--version")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_begins_its_help_with_the_line_in_the_list(name: str) -> None:
    command = importlib.import_module(f"convsv_adapters.cli.{name}").command
    assert command.name == name
    assert command.help.partition("\n\n")[0] == COMMANDS[name]
