"""Entry point of the command `convsv`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; says what to install where its libraries are missing."""
    try:
        from convsv_adapters.cli.commands import convsv
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"convsv: the command line needs {error.name}: pip install 'convsv[cli]'")
    convsv(prog_name="convsv")
