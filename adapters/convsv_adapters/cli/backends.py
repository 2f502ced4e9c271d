"""The command `convsv backends`."""

from __future__ import annotations

import click

from convsv_adapters.cli.table import show_backends
from convsv_core.plugins import backends

__all__ = ["command"]


@click.command("backends")
def command() -> None:
    """Array libraries that a plugin brings, and which of them can be used here."""
    show_backends(backends())
