"""The group of commands, which imports the module of a command when the command is called."""

from __future__ import annotations

import importlib

import click

__all__ = ["COMMANDS", "convsv"]

COMMANDS = {
    "backends": "List the array libraries, and say why one cannot be used.",
    "compare": "Certify how far apart the weights of two networks are.",
    "conformance": "Check backends against the dense matrix of the operator.",
    "lipschitz": "Certify the Lipschitz constant of a whole network.",
    "norm": "Certify the norm of every convolution for every input size.",
    "project": "Project every convolution onto the kernels of bounded norm.",
    "spectrum": "Compute the singular values of every convolution.",
}
"""The first line of each command's help. The module `convsv_adapters.cli.NAME` holds the command as `command`."""

WELCOME = """Exact singular values of convolutional layers. Three commands to try:

  convsv spectrum
      the singular values of a small network that comes along
  convsv spectrum MODEL --html report.html
      those of your network, as a page for a browser (needs convsv[html])
  convsv norm MODEL
      proved bounds of every layer's norm, for every input size

MODEL is an ONNX model, a PyTorch checkpoint, a safetensors file, a Keras model
or an .npz archive. convsv --help lists every command, and
convsv spectrum --help every option of one."""
"""The text of a call without a command."""

COMPLETION = """\b
Completion of commands and options, by a line of ~/.bashrc, of ~/.zshrc,
or of fish's config.fish:
  eval "$(_CONVSV_COMPLETE=bash_source convsv)"
  eval "$(_CONVSV_COMPLETE=zsh_source convsv)"
  _CONVSV_COMPLETE=fish_source convsv | source"""
"""The end of the help, which says how a shell completes the command line."""


class LazyGroup(click.Group):
    """A group whose help needs no module of its commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments begin with, and import its module."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = importlib.import_module(f"convsv_adapters.cli.{name}").command
        return name, command, rest


@click.group(
    cls=LazyGroup,
    commands={name: click.Command(name, help=line) for name, line in COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    epilog=COMPLETION,
)
@click.version_option(package_name="convsv")
@click.pass_context
def convsv(ctx: click.Context) -> None:
    """Exact singular values of convolutional layers."""
    if ctx.invoked_subcommand is None:
        click.echo(WELCOME)
