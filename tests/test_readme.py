"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import convsv_core

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_python_runs() -> None:
    (source,) = blocks("python")
    found: dict[str, object] = {}
    exec(compile(source, str(README), "exec"), found)
    assert found["values"].shape == (8192,)  # type: ignore[attr-defined]


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
