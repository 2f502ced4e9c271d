"""The code blocks of the README and of the site's pages, and what runs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "README", "ROOT", "blocks", "run", "run_page"]

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if not {"gallery", "generated"} & set(path.parts)),
]
"""Every page with code blocks that somebody wrote. The gallery runs when the site is built."""


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page that are in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def run(page: Path, containing: str) -> dict[str, Any]:
    """Return what the one example of a page that contains these words leaves behind."""
    (source,) = [block for block in blocks(page, "python") if containing in block]
    return _execute(source, page, {})


def run_page(page: Path) -> dict[str, Any]:
    """Run the examples of a page in their order, as one script, and return what they leave behind."""
    found: dict[str, Any] = {}
    for source in blocks(page, "python"):
        _execute(source, page, found)
    return found


def _execute(source: str, page: Path, namespace: dict[str, Any]) -> dict[str, Any]:
    namespace.setdefault("__name__", "example")
    # Without `dont_inherit` the page would be compiled with the `__future__` imports of this module.
    exec(compile(source, str(page), "exec", dont_inherit=True), namespace)
    return namespace
