"""The pages of the API have every public name, and no other."""

from __future__ import annotations

import importlib
import re

from pages import ROOT

MODULES = (
    "convsv_core",
    "convsv_core.backend",
    "convsv_core.blocks",
    "convsv_core.conv",
    "convsv_core.dtypes",
    "convsv_core.layers",
    "convsv_core.networks",
    "convsv_core.penalties",
    "convsv_core.plugins",
    "convsv_core.reports",
    "convsv_core.reports.texts",
    "convsv_core.training",
    "convsv_adapters.equinox",
    "convsv_adapters.flax",
    "convsv_adapters.keras",
    "convsv_adapters.lightning",
    "convsv_adapters.optax",
    "convsv_adapters.parameters",
    "convsv_adapters.torch",
    "convsv_adapters.transformers",
)
"""The public modules with names for users and authors of plugins."""

EMPTY = ("convsv_adapters", "convsv_adapters.cli", "convsv_adapters.formats", "convsv_backends", "convsv_conformance")
"""The public packages without such names. The command line has a page of its own."""


def documented() -> set[tuple[str, str]]:
    """Return the module and name of every entry of the API's pages."""
    found = set()
    for page in (ROOT / "docs" / "api").glob("*.rst"):
        module = ""
        for line in page.read_text().splitlines():
            if match := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
                module = match[1]
            elif match := re.fullmatch(r"   (\w+)", line) or re.fullmatch(r"\.\. py:data:: (\w+)", line):
                found.add((module, match[1]))
    return found


def public_modules() -> set[str]:
    """Return the public modules and packages of each package of the distribution, from the folders."""
    found = set()
    for folder in ("", "adapters", "backends", "conformance"):
        for package in (ROOT / folder).glob("convsv_*"):
            for path in (package, *package.iterdir()):
                if (path.is_dir() and (path / "__init__.py").exists()) or (path.suffix == ".py"):
                    name = path.relative_to(ROOT / folder).with_suffix("").as_posix().replace("/", ".")
                    if not re.search(r"(^|\.)_", name):
                        found.add(name)
    return found


def test_every_public_name_is_documented() -> None:
    pages = documented()
    shown = {id(getattr(importlib.import_module(module), name)) for module, name in pages if module in MODULES}
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            # A name that several modules give to users is documented in one of them.
            known = (module, name) in pages or id(getattr(importlib.import_module(module), name)) in shown
            assert known or f"{module}.{name}" in MODULES, f"{module}.{name} is on no page of docs/api"


def test_every_entry_of_the_pages_is_a_public_name() -> None:
    for module, name in documented():
        if module:  # the table of contents is of no module
            assert name in importlib.import_module(module).__all__, f"{module}.{name}"


def test_every_public_module_is_known() -> None:
    conformance = {name for name in public_modules() if name.startswith("convsv_conformance.")}
    assert public_modules() - conformance == {*MODULES, *EMPTY} - {"convsv_core.reports.texts"}  # the last is deeper
