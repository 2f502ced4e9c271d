"""The command `convsv`, with one module for each of its commands."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what to install where its libraries are missing.

    If stdout cannot be written, one line says why and the exit status is 1.
    """
    try:
        from convsv_adapters.cli.group import convsv

        try:
            try:
                convsv(prog_name="convsv")
            finally:
                sys.stdout.flush()
        except OSError as error:
            if error.filename is not None:  # an error of a file is a fault of the command, which should report it
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end
            sys.exit(f"Error: stdout: {error.strerror or error}")
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"convsv: the command line needs {error.name}: pip install 'convsv[cli]'")
