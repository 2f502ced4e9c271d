"""Print the lowest versions that pyproject.toml allows, for pip: ``python tests/lowest.py cli > lowest.txt``.

The arguments name extras. What the named packages themselves need is left to pip.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def lowest(extras: list[str]) -> list[str]:
    """Return the direct dependencies and those of the extras, each at its lower bound."""
    wanted = [*PROJECT["dependencies"], *(one for extra in extras for one in PROJECT["optional-dependencies"][extra])]
    unbounded = [one for one in wanted if ">=" not in one]
    if unbounded:
        raise SystemExit(f"without a lower bound: {', '.join(unbounded)}")
    return [one.replace(">=", "==") for one in wanted]


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
