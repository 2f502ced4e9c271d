"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

import convsv_core

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def run(containing: str) -> dict[str, Any]:
    """What the one example that contains these words leaves behind."""
    (source,) = [block for block in blocks("python") if containing in block]
    found: dict[str, Any] = {}
    exec(compile(source, str(README), "exec"), found)
    return found


def test_the_library_runs() -> None:
    assert run("all 8192, descending")["values"].shape == (8192,)


def test_the_library_is_lazy_on_dask() -> None:
    found = run("import dask.array")
    assert found["values"].shape == (64 * 64 * 16,)
    assert type(found["median"]).__module__.startswith("dask")


def test_the_library_runs_on_a_mesh() -> None:
    found = run("jax.make_mesh")
    kernel, conv = np.asarray(found["kernel"]), convsv_core.Conv("OIHW")
    expected = float(convsv_core.operator_norm(kernel, (64, 64), conv))
    assert abs(float(found["norm"]) - expected) <= 20 * np.finfo(kernel.dtype).eps * expected


def test_a_pytorch_script_ends_within_the_bound() -> None:
    found = run("import project_after_step")
    layer = found["model"][0]
    conv = convsv_core.Conv("OIHW", padding=1, padding_mode="zeros")
    assert float(convsv_core.norm_bounds(layer.weight.detach(), conv).upper) <= 1 + 1e-6
    assert found["projection"].steps == 5


def test_a_jax_script_ends_within_the_bound() -> None:
    found = run("import operator_norm_bound")
    for layer in found["model"].layers[0], found["model"].layers[2]:
        conv = convsv_core.Conv("HWIO", padding_mode="zeros")
        assert float(convsv_core.norm_bounds(np.asarray(layer.kernel[...]), conv, rtol=1e-7).upper) <= 1 + 1e-6


def test_a_keras_script_ends_within_the_bound() -> None:
    found = run("import constrain")
    kernel = np.asarray(found["keras"].ops.convert_to_numpy(found["conv"].kernel), float)
    conv = convsv_core.Conv("HWIO", padding_mode="zeros")
    assert float(convsv_core.norm_bounds(kernel, conv).upper) <= 1 + 1e-6


def test_every_example_is_run() -> None:
    source = Path(__file__).read_text()
    calls = set(re.findall(r'run\("(.*?)"\)', source))
    for block in blocks("python"):
        assert sum(words in block for words in calls) == 1, block


def test_there_are_two_set_up_commands() -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert commands[0].endswith("&& convsv spectrum")
    assert "pytest" in commands[1]


def test_the_table_names_public_calls() -> None:
    rows = re.findall(r"^\| (.*?) \|", README.read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert {"singular_values", "operator_norm", "norm_bounds"} <= named
    assert named <= set(convsv_core.__all__)
