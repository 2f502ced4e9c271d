"""``python -m benchmarks network-projection``: processor seconds of the projection of a network's layers."""

from __future__ import annotations

import importlib.resources
import time
from pathlib import Path
from unittest import mock

import click
import numpy as np

from benchmarks.command import progress
from convsv_core import project
from convsv_core._projection import dykstra
from convsv_core.layers import ReadOptions, lattice
from convsv_core.reports import read_model

__all__ = ["network_projection"]

BUNDLED = importlib.resources.files("convsv_adapters") / "data" / "digits.onnx"


@click.command("network-projection")
@click.argument("model", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bound", type=float, default=1.0, show_default=True, help="Largest norm of a layer.")
@click.option("--rtol", type=float, default=1e-2, show_default=True, help="Certified gap, as for `convsv project`.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="The least time is taken.")
def network_projection(model: Path | None, bound: float, rtol: float, repeats: int) -> None:
    """Time the projection of MODEL, or of the network that comes along, with and without a coarse grid first.

    Both ways end at the same certified gap, for every input size. Times are processor seconds of all threads.
    """
    with importlib.resources.as_file(BUNDLED) as bundled:
        layers = [layer for layer in read_model(model or bundled, ReadOptions()) if layer.conv is not None]
    totals = np.zeros(2)
    click.echo(f"{'layer':24}{'all, s':>9}{'coarse, s':>11}{'ratio':>7}{'distances':>22}")
    for layer in layers:
        kernel, seconds, distances = np.asarray(layer.kernel), [], []
        assert layer.conv is not None
        for coarse in (_all_places, dykstra._coarse):
            with progress() as tell, mock.patch.object(dykstra, "_coarse", coarse):
                tell(layer.name)
                times = []
                for _ in range(repeats):
                    start = time.process_time()
                    found = project(kernel, None, lattice(layer.conv), bound, rtol=rtol, max_iterations=200)
                    times.append(time.process_time() - start)
            seconds.append(min(times))
            distances.append(f"{float(found.distance):.5g}{'' if found.converged else '*'}")
        totals += seconds
        click.echo(_line(layer.name, *seconds, " ".join(distances)))
    click.echo(_line("total", *totals, ""))
    click.echo("* the gap was not reached in 200 iterations")


def _all_places(problem: object, places: object) -> object:
    return places


def _line(name: str, before: float, after: float, distances: str) -> str:
    return f"{name[:23]:24}{before:9.2f}{after:11.2f}{before / after:7.1f}{distances:>22}"
