"""``python -m benchmarks network-projection``: processor seconds of the projection of a network's layers."""

from __future__ import annotations

import contextlib
import importlib.resources
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np

from benchmarks.command import json_option, progress, write_json
from benchmarks.libraries import open_library
from benchmarks.machine import describe, load_average, show_machine
from benchmarks.tables import figures, integers, show_table, words
from convsv_core import project
from convsv_core._projection import dykstra, restoration
from convsv_core.layers import Layer, ReadOptions, lattice
from convsv_core.reports import read_model

__all__ = ["network_projection"]

BUNDLED = importlib.resources.files("convsv_adapters") / "data" / "digits.onnx"

MOST_ITERATIONS = 200
"""Largest number of iterations, as in `convsv project`."""

COLUMNS = (
    words("layer"),
    words("kernel"),
    figures("rescale, s", lambda row: f"{row.rescale_seconds:.2f}"),
    figures("plain, s", lambda row: f"{row.plain_seconds:.2f}"),
    figures("now, s", lambda row: f"{row.seconds:.2f}"),
    figures("plain / now", lambda row: f"{row.plain_seconds / max(row.seconds, 1e-3):.1f}"),
    integers("iterations"),
    figures("distance", lambda row: f"{row.distance:.5g}"),
    figures("plain", lambda row: f"{row.plain_distance:.5g}"),
    figures("reached", lambda row: {True: "yes", False: "no"}[row.converged]),
)
EXPLANATION = (
    "Processor seconds of all threads, the least of all repeats; plain: the accelerated iteration on all frequencies "
    "near the bound, in double precision, with a decomposition of each matrix, and a rescaling at the end; reached: "
    "whether the certified gap was reached in 200 iterations."
)


@dataclass(frozen=True)
class Row:
    """Hold the figures of one layer, or the sums of all layers.

    Attributes
    ----------
    layer, kernel : str
    rescale_seconds, plain_seconds, seconds : float
        Processor seconds.
    iterations, plain_iterations : int
    distance, plain_distance : float
        Frobenius norms of the changes of the weights.
    converged, plain_converged : bool
    """

    layer: str
    kernel: str
    rescale_seconds: float
    plain_seconds: float
    seconds: float
    iterations: int
    plain_iterations: int
    distance: float
    plain_distance: float
    converged: bool
    plain_converged: bool


@click.command("network-projection")
@click.argument("model", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bound", type=float, default=1.0, show_default=True, help="Largest norm of a layer.")
@click.option("--rtol", type=float, default=1e-2, show_default=True, help="Certified gap, as for `convsv project`.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="The least time is taken.")
@json_option()
def network_projection(model: Path | None, bound: float, rtol: float, repeats: int, json_path: Path | None) -> None:
    """Time the projection of MODEL, or of the network that comes along, beside a plain form of it and a rescaling.

    Both projections end at the same certified gap, for every input size.
    """
    load_before = load_average()
    with importlib.resources.as_file(BUNDLED) as bundled:
        layers = [layer for layer in read_model(model or bundled, ReadOptions()) if layer.conv is not None]
    with progress() as tell:
        rows = []
        for layer in layers:
            tell(layer.name)
            rows.append(_measure(layer, bound, rtol, repeats))
    rows.append(_total(rows))
    machine = describe([open_library("numpy")], load_before)
    show_machine(machine)
    show_table(rows, COLUMNS, EXPLANATION)
    arguments = {"model": None if model is None else model.name, "bound": bound, "rtol": rtol, "repeats": repeats}
    write_json(json_path, "network-projection", arguments, machine=machine, rows=rows)


def _measure(layer: Layer, bound: float, rtol: float, repeats: int) -> Row:
    """Return the figures of a layer."""
    kernel = np.asarray(layer.kernel)
    assert layer.conv is not None
    conv = lattice(layer.conv)

    def timed(**options: Any) -> Any:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            found = project(kernel, None, conv, bound, rtol=rtol, max_iterations=MOST_ITERATIONS, **options)
            times.append(time.process_time() - start)
        return found, min(times)

    _, rescale_seconds = timed(method="rescale")
    with _plain():
        plain, plain_seconds = timed()
    found, seconds = timed()
    return Row(
        layer=layer.name,
        kernel="x".join(map(str, kernel.shape)),
        rescale_seconds=rescale_seconds,
        plain_seconds=plain_seconds,
        seconds=seconds,
        iterations=found.iterations,
        plain_iterations=plain.iterations,
        distance=float(found.distance),
        plain_distance=float(plain.distance),
        converged=bool(found.converged),
        plain_converged=bool(plain.converged),
    )


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Return a context in which a projection uses all frequencies, decompositions, and no steps after the dual."""
    with (
        mock.patch.object(dykstra, "_coarse", lambda problem, places: places),
        mock.patch.object(dykstra, "NARROW_RTOL", math.inf),
        mock.patch.object(dykstra, "first_columns", return_value=0),
        mock.patch.object(restoration, "ROUNDS", 1),
    ):
        yield


def _total(rows: list[Row]) -> Row:
    """Return the sums of the rows; its distances are those of the whole network."""
    return Row(
        layer="total",
        kernel="",
        rescale_seconds=sum(row.rescale_seconds for row in rows),
        plain_seconds=sum(row.plain_seconds for row in rows),
        seconds=sum(row.seconds for row in rows),
        iterations=sum(row.iterations for row in rows),
        plain_iterations=sum(row.plain_iterations for row in rows),
        distance=math.hypot(*(row.distance for row in rows)),
        plain_distance=math.hypot(*(row.plain_distance for row in rows)),
        converged=all(row.converged for row in rows),
        plain_converged=all(row.plain_converged for row in rows),
    )
