"""The command `convsv conformance`, which passes its arguments to `python -m convsv_conformance`."""

from __future__ import annotations

import click

__all__ = ["command"]


@click.command("conformance", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(arguments: tuple[str, ...]) -> None:
    """Check backends against the dense matrix of the operator."""
    from convsv_conformance.__main__ import main

    main(args=list(arguments), prog_name="convsv conformance")
