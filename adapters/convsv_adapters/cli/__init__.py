"""The command `convsv`, with one module for each of its commands."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what to install where its libraries are missing."""
    try:
        from convsv_adapters.cli.group import convsv

        convsv(prog_name="convsv")
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"convsv: the command line needs {error.name}: pip install 'convsv[cli]'")
