"""The suite is tested too: backends that are wrong in one way each, and each must be caught."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convsv_conformance.checks import bounds, spectrum
from convsv_conformance.failures import KnownFailures
from convsv_conformance.features import FEATURES
from convsv_conformance.suite import Item, Skip, select
from convsv_conformance.table import TABLE, by_name, geometry_of
from convsv_conformance.target import Failure, Ledger, Target

import convsv_core as convsv
from convsv_core.plugins import get_backend, plugins

PLANTED = '''
import numpy as np
from convsv_core import hookimpl
from convsv_backends._numpy import NumpyBackend


class Planted(NumpyBackend):
    """NumPy's backend, but for one mistake."""

    name = "planted"

{mistake}


@hookimpl
def convsv_backend():
    return Planted()
'''

# Each mistake, and the feature that must show it.
MISTAKES = {
    "none": ("", ""),
    "an error of 1e-3": (
        """
    def svdvals(self, array): return super().svdvals(array) * 1.001
    def eigvalsh(self, array): return super().eigvalsh(array) * 1.001
""",
        "values",
    ),
    "norms that are too small by 5e-4": (
        "    def eigvalsh(self, array): return super().eigvalsh(array) * 0.999",
        "bounds",
    ),
    "swapped axes": ("    def svd(self, array): return super().svd(array.swapaxes(-1, -2))", "svd"),
    "a dropped conjugate": (
        """
    def svd(self, array):
        u, s, vh = super().svd(array)
        return u, s, vh.conj()
""",
        "singular vectors",
    ),
    "a forgotten half of the spectrum": (
        """
    def map_blocks(self, function, rows, like, **budget):
        found = super().map_blocks(function, rows[: (len(rows) + 1) // 2], like, **budget)
        parts = found if isinstance(found, tuple) else (found,)
        padded = tuple(np.resize(part, (len(rows), *part.shape[1:])) for part in parts)
        return padded if isinstance(found, tuple) else padded[0]
""",
        "values",
    ),
}

ON_THE_HOST = '''
import array_api_strict
from convsv_core import hookimpl
from convsv_array_api_strict import StrictBackend


class Planted(StrictBackend):
    """Takes its arrays from a device and leaves what it computes on the host."""

    name = "planted"

    def devices(self):
        return ("device1",)

    def map_blocks(self, *args, **budget):
        return super().map_blocks(*args, **budget).to_device(array_api_strict.Device("CPU_DEVICE"))


@hookimpl
def convsv_backend():
    return Planted()
'''


ON_DASK = '''
from convsv_core import hookimpl
from convsv_backends._dask import DaskBackend


class Planted(DaskBackend):
    """Dask's backend, but for blocks that are off by 1e-3."""

    name = "planted"

    def map_prepared(self, *arguments):
        found = super().map_prepared(*arguments)
        return found if isinstance(found, tuple) else found * 1.001


@hookimpl
def convsv_backend():
    return Planted()
'''


def install(directory: Path, source: str) -> dict[str, str]:
    """Make a distribution with a backend called "planted", first of all in line; an environment that sees it."""
    (directory / "planted_backend.py").write_text(source)
    information = directory / "planted-0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text("[convsv.backends]\naa_planted = planted_backend\n")
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def conformance(directory: Path, source: str, features: set[str], *options: str) -> tuple[int, Any, str]:
    """Run some features of the suite from another directory on the planted backend.

    Returns the exit status, the JSON report and the output.
    """
    report = directory / "report.json"
    chosen = [argument for feature in sorted(features) for argument in ("--feature", feature)]
    fixed = ["--backend", "planted", "--report", str(report)]
    done = subprocess.run(
        [sys.executable, "-m", "convsv_conformance", *fixed, *chosen, *options],
        cwd=directory,
        env=install(directory, source),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert report.exists(), done.stderr
    return done.returncode, json.loads(report.read_text()), done.stdout


def pytest_anywhere(directory: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run the suite under pytest, from a directory without any configuration."""
    plugins = ("-p", "convsv_conformance.plugin", "-p", "no:cacheprovider")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-q", "-rs", "--pyargs", "convsv_conformance", *options],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(tmp_path: Path, name: str) -> None:
    mistake, feature = MISTAKES[name]
    features = {feature} if feature else {feature for _, feature in MISTAKES.values() if feature}
    status, report, output = conformance(tmp_path, PLANTED.format(mistake=mistake), features, "--dtype", "float32")
    failing = {cell["feature"] for cell in report["cells"] if cell["failures"]}
    if name == "none":  # the planting itself is no mistake
        assert (status, failing, report["passed"]) == (0, set(), True)
        assert "FAILED" not in output
        return
    assert status == 1
    assert not report["passed"]
    assert feature in failing
    assert "FAILED" in output


def test_a_result_on_the_host_is_caught(tmp_path: Path) -> None:
    status, report, _ = conformance(tmp_path, ON_THE_HOST, {"values", "symbol"}, "--dtype", "float32")
    assert status == 1
    assert {"values", "symbol"} <= {cell["feature"] for cell in report["cells"] if cell["failures"]}


def test_a_lazy_mistake_is_caught(tmp_path: Path) -> None:
    pytest.importorskip("dask.array")
    status, report, _ = conformance(tmp_path, ON_DASK, {"values", "symbol"}, "--dtype", "complex64")
    assert status == 1
    assert {"values", "symbol"} <= {cell["feature"] for cell in report["cells"] if cell["failures"]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda xp, norm: norm.to_device(xp.Device("CPU_DEVICE")), "on .*CPU_DEVICE"),
        (lambda xp, norm: np.asarray(norm.to_device(xp.Device("CPU_DEVICE"))), "not an array of array_api_strict"),
        (lambda xp, norm: xp.astype(norm, xp.float64), "dtype"),
        (lambda xp, norm: norm[None], "shape"),
        (lambda xp, norm: norm * 1.0001, "units of eps"),
        (lambda xp, norm: norm * float("nan"), "units of eps"),
    ],
    ids=["device", "library", "dtype", "shape", "value", "nan"],
)
def test_a_result_of_another_kind_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: Any, message: str) -> None:
    xp = pytest.importorskip("array_api_strict")
    right = convsv.operator_norm
    target = Target(get_backend("array_api_strict"), "device1", "float32")
    spectrum.scalars(target, by_name("2d")[0], Ledger(target.eps))
    monkeypatch.setattr(convsv, "operator_norm", lambda *arguments: wrong(xp, right(*arguments)))
    with pytest.raises(Failure, match=message):
        spectrum.scalars(target, by_name("2d")[0], Ledger(target.eps))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda b: b._replace(upper=b.upper * 0.999), "lower=.*upper="),
        (lambda b: b._replace(upper=b.lower, lower=b.lower * 0.9995), "not attained|norm_bounds: lower"),
        (lambda b: b._replace(lower=b.upper), "not attained"),
        (lambda b: b._replace(upper=b.upper * 2), "converged=True"),
        (lambda b: b._replace(converged=False), "converged=False"),
        (lambda b: b._replace(frequency=tuple(angle + 0.3 for angle in b.frequency)), "not attained|lower"),
        (lambda b: b._replace(frequency=b.frequency[:1]), "frequency"),
        (lambda b: b._replace(upper=float(b.upper)), "not an array"),
        (lambda b: b._replace(left=b.left.conj()), "A right"),
        (lambda b: b._replace(left=b.left * 0, right=b.right * 0), "not a vector of one group"),
        (lambda b: b._replace(right=b.right[:, ::-1]), "A right"),
    ],
)
@pytest.mark.parametrize("check", [bounds.of_one_size, bounds.of_every_size])
def test_wrong_bounds_are_caught(monkeypatch: pytest.MonkeyPatch, check: Any, wrong: Any, message: str) -> None:
    right = convsv.norm_bounds
    target, case = Target(get_backend("numpy"), "cpu", "complex64"), by_name("2d")[0]
    check(target, case, Ledger(target.eps))
    monkeypatch.setattr(convsv, "norm_bounds", lambda *arguments, **options: wrong(right(*arguments, **options)))
    with pytest.raises(Failure, match=message):
        check(target, case, Ledger(target.eps))


@pytest.mark.parametrize("name", ["local-optimum-63", "two-blocks", "between-grid-points"])
def test_a_bound_that_misses_the_peak_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Consistent in itself, at a frequency where its lower bound is attained, and below the supremum."""
    right = convsv.norm_bounds
    (peak,) = (peak for peak in bounds.PEAKS if peak.name == name)

    def at_one_frequency(kernel: Any, conv: convsv.Conv, **options: Any) -> convsv.NormBounds:
        best = right(kernel, conv, input_shape=(1,) * conv.ndim)  # the frequency 0 alone
        norm = np.linalg.norm(kernel.sum(axis=tuple(range(2, kernel.ndim))), 2)
        lower, upper = (np.asarray(norm * (1 + sign * 1e-14)) for sign in (-1, 1))
        return best._replace(lower=lower, upper=upper, converged=True)

    target = Target(get_backend("numpy"), "cpu", "float64")
    bounds.of_peaks(target, peak, Ledger(target.eps))
    monkeypatch.setattr(convsv, "norm_bounds", at_one_frequency)
    with pytest.raises(Failure, match="the supremum is beyond"):
        bounds.of_peaks(target, peak, Ledger(target.eps))


def test_jax_passes_in_its_default_mode_too(tmp_path: Path) -> None:
    """The other tests enable double precision; here there is none, as most users have it."""
    pytest.importorskip("jax")
    chosen = (
        "--convsv-backend",
        "jax",
        "-k",
        "(values/rectangular or gradients/1d or errors/nan) and float32",
    )
    done = pytest_anywhere(tmp_path, {**os.environ, "JAX_ENABLE_X64": "0"}, *chosen)
    assert done.returncode == pytest.ExitCode.OK, done.stdout
    assert (
        "jax has no float64"
        in pytest_anywhere(
            tmp_path, {**os.environ, "JAX_ENABLE_X64": "0"}, "--convsv-backend", "jax", "--convsv-dtype", "float64"
        ).stdout
    )


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(("-k", "(values/rectangular or gradients/1d or errors/nan or norm/2d) and float32"), id="few"),
        pytest.param(("--convsv-quick",), id="all", marks=pytest.mark.thorough),
    ],
)
def test_jax_passes_without_calls_of_the_host_too(tmp_path: Path, chosen: tuple[str, ...]) -> None:
    """On a CPU, programs call the host; here they are as on an accelerator."""
    pytest.importorskip("jax")
    environment = {**os.environ, "CONVSV_JAX_HOST": "0", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = pytest_anywhere(tmp_path, environment, "--convsv-backend", "jax", *chosen)
    assert done.returncode == pytest.ExitCode.OK, done.stdout


def test_the_suite_runs_under_pytest_from_anywhere(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return pytest_anywhere(tmp_path, environment, *options)

    mistake, _ = MISTAKES["an error of 1e-3"]
    environment = install(tmp_path, PLANTED.format(mistake=mistake))
    chosen = ("--convsv-backend", "planted", "--convsv-dtype", "float16")
    assert run(*chosen, "-k", "values/ and 2d or zero").returncode == pytest.ExitCode.TESTS_FAILED
    assert run(*chosen, "-k", "values/ and zero").returncode == pytest.ExitCode.OK

    skipped = run("--convsv-backend", "numpy", "--convsv-dtype", "bfloat16")
    assert "numpy has no bfloat16" in skipped.stdout
    unknown = run("--convsv-backend", "no-such-library")
    assert unknown.returncode == pytest.ExitCode.INTERRUPTED
    assert "'no-such-library': no such backend" in unknown.stdout


def test_an_entry_that_no_longer_fails_is_an_error(tmp_path: Path) -> None:
    known = tmp_path / "known.txt"
    known.write_text("# comment\n\nvalues/2d/float32: never failed\n")
    options = ("--dtype", "float32", "--known-failures", str(known))
    status, report, _ = conformance(tmp_path, PLANTED.format(mistake=""), {"values"}, *options)
    (failure,) = [failure for cell in report["cells"] for failure in cell["failures"]]
    assert status == 1
    assert "no longer fails" in failure
    assert "never failed" in failure


def test_known_failures_are_matched_and_checked() -> None:
    known = KnownFailures("values/2d/*: has no 2-D\n", "file")
    (target,) = select(["numpy"], dtypes=["float32"]).targets
    items = {item.key: item for item in select(["numpy"], dtypes=["float32"]).items() if hasattr(item, "key")}
    assert known.reason(items["values/2d/float32"]) == "has no 2-D"
    assert known.reason(items["values/3d/float32"]) is None
    assert target.backend.name == "numpy"
    with pytest.raises(ValueError, match="line 1: 'values/4d/float32' matches no case"):
        KnownFailures("values/4d/float32: none", "file")
    with pytest.raises(ValueError, match="line 2: wanted"):
        KnownFailures("# comment\nvalues/2d/float32", "file")


def test_a_quick_run_asks_each_feature_of_each_geometry_in_each_dtype() -> None:
    """A costly feature, a library that takes seconds for a case, and a further device are asked less."""
    selection = select(["numpy", "torch", "array_api_strict"], depth="quick")
    first: dict[str, str] = {}
    asked = {
        (
            item.target.backend.name,
            item.target.device,
            item.feature.name,
            geometry_of(item.subject.name),
            item.target.dtype,
        )
        for item in selection.items()
        if isinstance(item, Item)
    }
    wanted = set()
    for target in selection.targets:
        if target.device == first.setdefault(target.backend.name, target.device):
            for feature in FEATURES:
                if feature.costly or feature.needs or target.dtype not in feature.dtypes:
                    continue
                for geometry in {geometry_of(subject.name) for subject in feature.subjects}:
                    wanted.add((target.backend.name, target.device, feature.name, geometry, target.dtype))
    assert len(wanted) > 1000
    assert wanted <= asked


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "dask", "array_api_strict"])
def test_a_quick_run_asks_every_feature_that_a_usual_run_asks(backend: str) -> None:
    if backend not in plugins().backends:
        pytest.skip(f"{backend} is not installed")
    quick, usual = (
        [item for item in select([backend], depth=depth).items() if isinstance(item, Item)]
        for depth in ("quick", "usual")
    )
    asked, wanted = ({(item.feature.name, item.target) for item in items} for items in (quick, usual))
    assert asked == wanted
    assert {item.id for item in quick} <= {item.id for item in usual}
    assert len(quick) < len(usual)


def test_a_feature_without_its_library_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    items = list(select(["numpy"], dtypes=["float32"], features=["random", "symbol"]).items())
    assert [item.reason for item in items if isinstance(item, Skip)] == ["hypothesis is not installed"]
    assert {item.feature.name for item in items if isinstance(item, Item)} == {"symbol"}


def test_names_are_unique() -> None:
    assert len({case.name for case in TABLE}) == len(TABLE)
    for feature in FEATURES:
        assert len({subject.name for subject in feature.subjects}) == len(feature.subjects)
