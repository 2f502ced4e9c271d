"""Plugins are found, reported when broken, and cost nothing until they are used."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convsv_core as convsv


def python(code: str, *paths: Path) -> str:
    """Output of `code`, run by a fresh interpreter with `paths` in front."""
    found = [str(path) for path in paths] + list(filter(None, [os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def distribution(directory: Path, entry_points: str, **modules: str) -> None:
    """A distribution called "planted" in `directory`, with modules and entry points of the group of backends."""
    information = directory / "planted-0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text(f"[convsv.backends]\n{entry_points}\n")
    for name, source in modules.items():
        (directory / f"{name}.py").write_text(source)


def test_importing_the_core_imports_no_framework() -> None:
    code = """
import sys, convsv_core
frameworks = {"torch", "jax", "jaxlib", "cupy", "dask", "tensorflow", "keras", "onnx", "matplotlib", "click", "rich"}
print(sorted(frameworks & set(sys.modules)))
"""
    assert python(code).strip() == "[]"


def test_a_call_imports_only_the_library_of_its_argument() -> None:
    code = """
import sys, numpy, convsv_core as convsv
convsv.operator_norm(numpy.ones((1, 1, 3)), (8,), convsv.Conv("OIW"))
print(sorted({"torch", "jax", "cupy", "dask", "array_api_strict"} & set(sys.modules)))
"""
    assert python(code).strip() == "[]"


def test_all_is_the_public_face() -> None:
    """`__all__` holds what the package's own modules define for it, and nothing else is public."""
    tree = ast.parse(Path(str(convsv.__file__)).read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("convsv_core")
        for alias in node.names
    }
    assert sorted(convsv.__all__) == sorted(imported)
    modules = {module.name for module in pkgutil.iter_modules(convsv.__path__)}
    public = {name for name in vars(convsv) if not name.startswith("_")} - (modules - imported)
    assert public == set(convsv.__all__)
    for name in convsv.__all__:
        assert getattr(convsv, name).__doc__, name
    # what is in one of the modules under a public name is the same thing; `penalties` are a namespace of their own
    for module in modules - {"penalties"}:
        for name in set(vars(importlib.import_module(f"convsv_core.{module}"))) & set(convsv.__all__) - {module}:
            assert getattr(importlib.import_module(f"convsv_core.{module}"), name) is getattr(convsv, name)


def test_a_third_partys_backend_is_listed_and_used() -> None:
    xp = pytest.importorskip("array_api_strict")
    pytest.importorskip("convsv_array_api_strict", reason="install tests/strict_backend")
    rows = {row.name: row for row in convsv.backends()}
    row = rows["array_api_strict"]
    assert row.available
    assert row.devices == ("CPU_DEVICE", "device1")
    assert "float32" in row.dtypes
    assert "float16" not in row.dtypes
    norm = convsv.operator_norm(xp.ones((1, 1, 3)), (8,), convsv.Conv("OIW"))
    assert isinstance(norm, type(xp.ones(1)))
    assert float(norm) == pytest.approx(3.0)


def test_the_librarys_own_backends_are_listed() -> None:
    rows = {row.name: row for row in convsv.backends()}
    assert {"numpy", "torch", "jax", "cupy", "dask"} <= set(rows)
    assert rows["numpy"] == ("numpy", True, "", ("cpu",), rows["numpy"].dtypes)
    for row in rows.values():
        assert row.available == (row.reason == "")
        assert row.available == bool(row.devices)
        assert row.available == bool(row.dtypes)


def test_cupy_without_a_device_is_listed_with_the_reason() -> None:
    row = {row.name: row for row in convsv.backends()}["cupy"]
    if row.available:
        pytest.skip("CuPy has a device here")
    assert "cupy" in row.reason
    assert "device" in row.reason or "import" in row.reason


def test_a_library_that_is_not_installed_is_listed_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    code = """
import convsv_core as convsv
rows = {row.name: row for row in convsv.backends()}
print(rows["torch"].available, rows["torch"].reason, rows["numpy"].available, sep="|")
"""
    available, reason, numpy_available = python(code, tmp_path).strip().split("|")
    assert (available, numpy_available) == ("False", "True")
    assert "no torch here" in reason


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise RuntimeError('broken on load')", "broken on load"),
        pytest.param("import a_module_that_does_not_exist", "a_module_that_does_not_exist", marks=pytest.mark.thorough),
        pytest.param(
            "from convsv_core import hookimpl\n@hookimpl\ndef convsv_backend(): raise KeyError('later')",
            "later",
            marks=pytest.mark.thorough,
        ),
        ("x = 1", "convsv_backend"),
    ],
    ids=["raises", "imports", "raises-in-hook", "no-hook"],
)
def test_a_broken_plugin_is_reported_and_the_others_work(tmp_path: Path, source: str, words: str) -> None:
    distribution(tmp_path, "aa_broken = planted_broken", planted_broken=source)
    code = """
import numpy, convsv_core as convsv
(row,) = [row for row in convsv.backends() if row.name == "aa_broken"]
print(row.available, row.reason, sep="|")
print(float(convsv.operator_norm(numpy.ones((1, 1, 3)), (8,), convsv.Conv("OIW"))))
"""
    row, norm = python(code, tmp_path).strip().splitlines()
    assert row.startswith("False|")
    assert words in row
    assert float(norm) == pytest.approx(3.0)


def test_a_backend_that_fails_when_asked_is_reported(tmp_path: Path) -> None:
    source = """
from convsv_core import Backend, hookimpl

class Moody(Backend):
    name = "moody"
    module = "json"
    def devices(self):
        raise OSError("driver gone")

@hookimpl
def convsv_backend():
    return Moody()
"""
    distribution(tmp_path, "moody = planted_moody", planted_moody=source)
    code = """
import convsv_core as convsv
rows = {row.name: row for row in convsv.backends()}
print(rows["moody"].available, rows["moody"].reason, rows["numpy"].available, sep="|")
"""
    available, reason, numpy_available = python(code, tmp_path).strip().split("|")
    assert (available, numpy_available) == ("False", "True")
    assert "driver gone" in reason


def test_an_array_of_no_installed_library_is_refused() -> None:
    class Foreign:
        shape, dtype = (1, 1, 3), np.dtype("float32")

    with pytest.raises(TypeError, match=r"Foreign.*numpy"):
        convsv.operator_norm(Foreign(), (8,), convsv.Conv("OIW"))
