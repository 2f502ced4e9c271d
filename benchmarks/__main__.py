"""Entry point of ``python -m benchmarks``: one subcommand a question."""

from __future__ import annotations

import click

from benchmarks.certify import certify
from benchmarks.memory import peak_memory
from benchmarks.network_projection import network_projection
from benchmarks.norm import norm
from benchmarks.project import project
from benchmarks.scale import scale
from benchmarks.spectrum import spectrum
from benchmarks.training import training


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def benchmarks() -> None:
    """Measure convsv against what it replaces, alternately in one process."""


benchmarks.add_command(spectrum)
benchmarks.add_command(norm)
benchmarks.add_command(project)
benchmarks.add_command(network_projection)
benchmarks.add_command(training)
benchmarks.add_command(certify)
benchmarks.add_command(scale)
benchmarks.add_command(peak_memory)

if __name__ == "__main__":
    benchmarks(prog_name="python -m benchmarks")
