"""The README holds what CI and newcomers need. `test_pages` runs its examples."""

from __future__ import annotations

import re
import tomllib

from pages import PAGES, README, ROOT, blocks

import convsv_core


def test_there_are_two_set_up_commands() -> None:
    commands = [line for block in blocks(README, "sh") for line in block.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert commands[0].endswith("&& convsv spectrum")
    assert "pytest" in commands[1]


def test_the_table_names_public_calls() -> None:
    page = ROOT / "docs" / "guides" / "library.md"
    rows = re.findall(r"^\| (.*?) \|", page.read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert {"singular_values", "operator_norm", "norm_bounds"} <= named
    assert named <= set(convsv_core.__all__)


def test_the_page_and_a_half_links_to_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    linked = set(re.findall(r"\]\((docs/[^)]*)\)", text))
    assert all((ROOT / link).is_file() for link in linked)
    navigation = {"docs/index.md", "docs/guides/index.md"}
    pages = {str(page.relative_to(ROOT)) for page in PAGES if page != README}
    assert pages - navigation <= linked


def test_the_extras_are_those_of_the_installation_page() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = ROOT / "docs" / "install.md"
    rows = re.findall(r"^\| (`.*?) \|", page.read_text(), flags=re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == set(extras)
