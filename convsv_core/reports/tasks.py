"""The tasks of `analyze_many`: pure functions of small arguments, which the workers of a cluster run.

A survey reads the file of a model, and computes layers until the work of one task is done. The layers that are left
are put into packs of about that work. A layer that alone is more than a task is split into blocks of frequencies. The
cuts depend on the geometry alone, and every task has one thread, so that a figure has the same bits whichever worker
computes it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convsv_core._geometry.plan import HostArray, IntArray, Plan, make_plan
from convsv_core._spectrum.numbers import frobenius_norm
from convsv_core._spectrum.values import (
    BlockValues,
    decompositions,
    make_spectral_operand,
    sorted_values,
)
from convsv_core._symbol.operand import Operand
from convsv_core._symbol.polynomial import BLOCK_BYTES
from convsv_core._symbol.small_matrices import real_and_complex
from convsv_core.layers import Layer, ModelError, ReadOptions, lattice
from convsv_core.plugins import get_backend, one_line
from convsv_core.reports.analysis import describe, layer_reports, with_bounds, with_spectrum
from convsv_core.reports.live_models import COMPUTING_FAILS
from convsv_core.reports.model_files import read_model
from convsv_core.reports.placement import Placement
from convsv_core.reports.report import Bounds, LayerReport

__all__ = [
    "Block",
    "Split",
    "Survey",
    "TaskOptions",
    "block_values",
    "bound",
    "combine",
    "cut",
    "load",
    "measure",
    "prepare",
    "survey",
    "work_per_frequency",
]

WORK_PER_TASK = 2e10
"""Work of one task, in operations as `work_per_frequency` counts them.

Measured: a block of this work takes 0.4 to 1.5 s of one processor (docs/scaling.md).
"""

MOST_BLOCKS = 1000
"""Largest number of blocks of one layer, for which one task waits. Layers of more work have larger blocks. A guess."""


@dataclass(frozen=True)
class TaskOptions:
    """The options that every task needs; see `analyze_many`."""

    read: ReadOptions
    backend: str
    bounds: Bounds
    dtype: str | None
    device: str | None

    def placement(self) -> Placement:
        """Return the backend, dtype and device on the worker."""
        return Placement(get_backend(self.backend), self.dtype, self.device)

    def reports(self, layers: Sequence[Layer]) -> list[LayerReport]:
        """Compute the figures of whole layers, without their curves, which no table holds."""
        backend = get_backend(self.backend)
        with backend.single_threaded():
            rows = layer_reports(layers, backend, bounds=self.bounds, dtype=self.dtype, device=self.device)
            return [replace(row, curve=None) for row in rows]


class Block(NamedTuple):
    """Consecutive frequencies of a layer: ``frequencies[first:last]`` in the part `part` of `real_and_complex`."""

    part: int
    first: int
    last: int


@dataclass(frozen=True)
class Split:
    """The layer `index` of a model, to be computed in blocks. Its `report` has no figures yet."""

    index: int
    report: LayerReport
    blocks: tuple[Block, ...]


@dataclass
class Survey:
    """The figures of a model so far, and the tasks that are left.

    Attributes
    ----------
    reports : list of LayerReport or None
        One report a layer; None where its figures are still to come.
    packs : list of list of int
        Indices of layers that are left, in groups for one task each.
    splits : list of Split
        Layers that are left and have the work of one task each, or more.
    failure : str
        Why the model has no figures, or "".
    seconds : float
        Time that the survey took.
    """

    reports: list[LayerReport | None] = field(default_factory=list)
    packs: list[list[int]] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0


class Prepared(NamedTuple):
    """A layer's kernel, checked and ready, and functions that give its singular values at frequencies.

    Attributes
    ----------
    operand : Operand
    parts : list of pairs
        Functions from frequencies to singular values, each with the frequencies that it is for.
    frobenius : float
        Frobenius norm of the layer's circular operator.
    """

    operand: Operand
    parts: list[tuple[BlockValues, IntArray]]
    frobenius: float


def survey(paths: Sequence[Path], options: TaskOptions) -> list[Survey]:
    """Read models, and compute as many layers of each as the work of one task allows."""
    return [_survey(path, options) for path in paths]


def measure(path: Path, indices: Sequence[int], options: TaskOptions) -> list[LayerReport]:
    """Compute some layers of a model."""
    layers = read_model(path, options.read)
    return options.reports([layers[index] for index in indices])


def load(path: Path, index: int, options: TaskOptions) -> Layer:
    """Read one layer of a model."""
    return read_model(path, options.read)[index]


def prepare(layer: Layer, options: TaskOptions) -> Prepared:
    """Compute once what all blocks of a layer need."""
    placement, report = options.placement(), describe(layer)
    backend = placement.backend
    assert layer.conv is not None
    assert layer.kernel is not None
    assert report.input_shape is not None
    conv = lattice(layer.conv)
    with backend.single_threaded():
        kernel = placement.array(layer.kernel, placement.dtype_of(layer.kernel))
        operand = make_spectral_operand(kernel, report.input_shape, conv, "auto")
        frobenius = float(backend.to_numpy(frobenius_norm(kernel, report.input_shape, conv)))
        return Prepared(operand, decompositions(operand, "auto"), frobenius)


def block_values(block: Block, prepared: Prepared) -> HostArray:
    """Compute the singular values at the frequencies of a block: shape (frequencies, groups, values)."""
    values_of, frequencies = prepared.parts[block.part]
    operand = prepared.operand
    backend = operand.backend
    with backend.single_threaded():
        values = backend.map_blocks(
            values_of,
            frequencies[block.first : block.last],
            operand.kernel,
            row_bytes=values_of.evaluate.row_bytes,
            budget=BLOCK_BYTES,
        )
        return backend.to_numpy(values)


def bound(layer: Layer, options: TaskOptions) -> LayerReport:
    """Describe a layer, with its bounds and the norm of the reshaped kernel."""
    placement = options.placement()
    with placement.backend.single_threaded():
        return with_bounds(describe(layer), layer, placement, options.bounds)


def combine(report: LayerReport, prepared: Prepared, values: Sequence[HostArray]) -> LayerReport:
    """Add the figures that follow from the values of all blocks, in their order."""
    operand = prepared.operand
    backend = operand.backend
    with backend.single_threaded():
        visited = backend.asarray_like(np.concatenate(list(values)), operand.kernel)
        every = backend.to_numpy(sorted_values(operand, visited))
    return replace(with_spectrum(report, every, prepared.frobenius), curve=None)


def work_per_frequency(plan: Plan) -> float:
    """Estimate the operations of one frequency's matrices and their decompositions.

    Operations on small matrices take a few times longer than on large ones. The estimate is near enough to cut tasks.
    """
    rows, columns = plan.block
    side = min(rows, columns)
    return float(plan.groups * (8 * rows * columns * plan.offset_count + 16 * max(rows, columns) * side**2))


def cut(plan: Plan) -> tuple[Block, ...]:
    """Return blocks of about `WORK_PER_TASK` that hold every visited frequency once, in order."""
    size = max(1, int(WORK_PER_TASK / work_per_frequency(plan)), -(-len(plan.frequencies) // MOST_BLOCKS))
    return tuple(
        Block(part, first, min(first + size, len(frequencies)))
        for part, (_, frequencies) in enumerate(real_and_complex(plan))
        for first in range(0, len(frequencies), size)
    )


def _survey(path: Path, options: TaskOptions) -> Survey:
    start = time.perf_counter()
    found = Survey()
    try:
        layers = read_model(path, options.read)
    except ModelError as error:
        return Survey(failure=str(error), seconds=time.perf_counter() - start)
    except Exception as error:  # A damaged file can make a reader fail in any way, and costs no other model.
        reason = f"{path}: {one_line(error, with_type=True)}"
        return Survey(failure=reason, seconds=time.perf_counter() - start)
    now: list[int] = []
    done = pending = 0.0
    for index, layer in enumerate(layers):
        plan = _plan(layer)
        work = 0.0 if plan is None else len(plan.frequencies) * work_per_frequency(plan)
        if plan is not None and work > 2 * WORK_PER_TASK:
            found.splits.append(Split(index, describe(layer), cut(plan)))
        elif done + work <= WORK_PER_TASK or not now:
            now.append(index)
            done += work
        elif found.packs and pending + work <= WORK_PER_TASK:
            found.packs[-1].append(index)
            pending += work
        else:
            found.packs.append([index])
            pending = work
    reports = dict(zip(now, options.reports([layers[index] for index in now]), strict=True))
    found.reports = [reports.get(index) for index in range(len(layers))]
    found.failure = "" if layers else f"{path}: no convolution found"
    found.seconds = time.perf_counter() - start
    return found


def _plan(layer: Layer) -> Plan | None:
    """Return the plan of a layer's circular operator, or None where there is none, as the layer's report explains."""
    extents, conv, kernel = describe(layer).input_shape, layer.conv, layer.kernel
    if extents is None or conv is None or kernel is None:
        return None
    try:
        return make_plan(tuple(kernel.shape), kernel.dtype.kind != "c", extents, lattice(conv))
    except COMPUTING_FAILS:
        return None
