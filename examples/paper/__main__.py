"""Entry point of ``python -m examples.paper``: one subcommand an experiment."""

from __future__ import annotations

import click

from examples.paper.certified import certified
from examples.paper.cost import cost
from examples.paper.frameworks import frameworks
from examples.paper.gan import gan
from examples.paper.robustness import robustness
from examples.paper.spectra import spectra

__all__ = ["paper"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def paper() -> None:
    """Run experiments of Sedghi, Gupta and Long (ICLR 2019) on digits or CIFAR-10, in minutes."""


paper.add_command(robustness)
paper.add_command(certified)
paper.add_command(cost)
paper.add_command(spectra)
paper.add_command(frameworks)
paper.add_command(gan)

if __name__ == "__main__":
    paper(prog_name="python -m examples.paper")
