"""``python -m benchmarks training-keras``: measure what `constrain` adds to a step of Keras's own trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from benchmarks.command import Size, json_option, size_options, write_json
from benchmarks.libraries import open_library
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.tables import say, show_table, words
from benchmarks.training_jax import COLUMNS, SETUPS, Row

__all__ = ["BACKENDS", "KerasRow", "training_keras"]

BACKENDS = ("torch", "jax")
"""The backends of Keras that train, and whose arrays `convsv` takes."""

MODULE = "benchmarks.training_keras_steps"

EXPLANATION = (
    "compile: the first step less the median of the measured ones, with the seconds that a method adds; first step: "
    "with all tracing and compilation; added: to the time of the plain step of the same turn, median and quartiles; "
    "norm: the largest after the last step over the bound, certified for every input size; circular: norm of the "
    "paper's operator."
)


@dataclass(frozen=True)
class KerasRow(Row):
    """Hold the figures of one method on one backend of Keras.

    Attributes
    ----------
    backend : str
    """

    backend: str


@click.command("training-keras")
@size_options("A few steps of each method, in about a minute.")
@click.option(
    "--backend",
    "backends",
    type=click.Choice(BACKENDS),
    multiple=True,
    default=BACKENDS,
    show_default=True,
    help="Backend of Keras; may be given several times.",
)
@json_option()
def training_keras(size: Size, backends: Sequence[str], json_path: Path | None) -> None:
    """Time training steps of a small network with Keras, with and without a bound on the norms.

    Keras has one backend a process, so that each backend has its own. There every method trains its own copy of one
    network of four convolutions, a step of each in turn.
    """
    if find_spec("keras") is None:
        raise click.ClickException("the benchmark trains with Keras: pip install 'convsv[keras]'")
    chosen = [name for name in dict.fromkeys(backends) if find_spec(name) is not None]
    if not chosen:
        raise click.ClickException(f"none of Keras's backends {', '.join(backends)} is installed: wanted one of them")
    for name in backends:
        if name not in chosen:
            say(f"{name} is not installed: its steps are not measured", "yellow")
    setup = SETUPS[size]
    load_before = load_average()
    rows = [row for name in chosen for row in _measure(name, size)]
    machine = describe([open_library(name) for name in chosen], load_before)
    machine["versions"]["keras"] = version("keras")
    show_machine(machine)
    show_table(rows, (words("backend"), *COLUMNS), EXPLANATION)
    arguments = {"size": size.value, "quick": size is Size.QUICK, "backends": chosen} | asdict(setup)
    write_json(json_path, "training-keras", arguments, machine=machine, rows=rows)


def _measure(backend: str, size: Size) -> list[KerasRow]:
    """Return the rows of one backend, which a process of its own measures and prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", MODULE, size.value],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"{backend}: the process ended with status {done.returncode}; its error is above")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return [KerasRow(backend=backend, **{**row, "quartiles": tuple(row["quartiles"])}) for row in found]
