"""Run ``python -m benchmarks``, which has one subcommand for each question."""

from __future__ import annotations

import click

from benchmarks.accelerator import accelerator
from benchmarks.certify import certify
from benchmarks.memory import peak_memory
from benchmarks.network_projection import network_projection
from benchmarks.norm import norm
from benchmarks.project import project
from benchmarks.scale import scale
from benchmarks.spectrum import spectrum
from benchmarks.steepest import steepest
from benchmarks.training import training
from benchmarks.training_jax import training_jax
from benchmarks.training_keras import training_keras

__all__ = ["benchmarks"]

COMMANDS: tuple[click.Command, ...] = (
    spectrum,
    norm,
    project,
    network_projection,
    training,
    training_jax,
    training_keras,
    steepest,
    certify,
    scale,
    accelerator,
    peak_memory,
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    commands={command.name or "": command for command in COMMANDS},
)
def benchmarks() -> None:
    """Measure convsv against what it replaces, alternately in one process."""


if __name__ == "__main__":
    benchmarks(prog_name="python -m benchmarks")
