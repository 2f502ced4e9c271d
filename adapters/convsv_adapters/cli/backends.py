"""The command `convsv backends`."""

from __future__ import annotations

import click

from convsv_adapters.cli.table import show_backends
from convsv_core.plugins import backends

__all__ = ["command"]


@click.command("backends")
def command() -> None:
    """List the array libraries, and say why one cannot be used."""
    show_backends(backends())
