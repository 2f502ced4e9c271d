"""What `analyze_many` runs on the workers of an engine: pure functions of small arguments.

A model is surveyed: its file is read, and its layers are computed until the work of one task is done. The layers
that are left are put into packs of about that work, and a layer that alone is more than a task is split into blocks of
frequencies. Where it is cut depends on its geometry alone, and every task has one thread, so that a figure has the
same bits whichever worker computes what.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convsv_core.backend import Backend
from convsv_core.evaluation import BLOCK_BYTES
from convsv_core.layers import Layer, ModelError, ReadOptions
from convsv_core.operand import Operand
from convsv_core.plan import HostArray, IntArray, Plan, make_plan
from convsv_core.plugins import get_backend
from convsv_core.reports.analyze import (
    COMPUTING_FAILS,
    Bounds,
    LayerReport,
    analyse,
    circular_like,
    compute_dtype,
    describe,
    read_model,
    with_bounds,
    with_spectrum,
)
from convsv_core.spectrum import (
    BlockValues,
    decompositions,
    frobenius_norm,
    make_spectral_operand,
    real_and_complex,
    sorted_values,
)

WORK_PER_TASK = 2e10
"""Operations, as `work_per_frequency` counts them, that one task is to have: about a second of one processor."""

MOST_BLOCKS = 1000
"""Blocks of one layer: that of more work has larger ones, so that one task can wait for them all."""


@dataclass(frozen=True)
class Settings:
    """What every task needs to know; see `analyze_many`."""

    options: ReadOptions
    backend: str
    bounds: Bounds
    dtype: str | None
    device: str | None

    def computing(self) -> Backend:
        """The backend, on the worker."""
        return get_backend(self.backend)

    def analyse(self, layers: Sequence[Layer]) -> list[LayerReport]:
        """The figures of whole layers, without their curves, which no table holds."""
        backend = self.computing()
        with backend.single_threaded():
            rows = analyse(layers, backend, bounds=self.bounds, dtype=self.dtype, device=self.device)
            return [replace(row, curve=None) for row in rows]


class Block(NamedTuple):
    """Consecutive frequencies: of the part `part` of `real_and_complex`, from `first` to before `last`."""

    part: int
    first: int
    last: int


@dataclass(frozen=True)
class Split:
    """A layer, number `index` of its model, to be computed in blocks; `report` has no figures yet."""

    index: int
    report: LayerReport
    blocks: tuple[Block, ...]


@dataclass
class Survey:
    """What is known of a model, and what is left to do.

    Attributes
    ----------
    reports : list of LayerReport or None
        One a layer; None where its figures are still to come.
    packs : list of list of int
        Layers that are left, by their index, in groups for one task each.
    splits : list of Split
        Layers that are a task each or more.
    note : str
        Why the model cannot be read, or "".
    seconds : float
        That the survey took.
    """

    reports: list[LayerReport | None] = field(default_factory=list)
    packs: list[list[int]] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0


class Prepared(NamedTuple):
    """A layer's kernel, checked and ready, and the functions that give its singular values at frequencies."""

    operand: Operand
    parts: list[tuple[BlockValues, IntArray]]
    frobenius: float


def survey(paths: Sequence[Path], settings: Settings) -> list[Survey]:
    """Read models, and compute of each as many layers as one task's work allows."""
    return [_survey(path, settings) for path in paths]


def measure(path: Path, indices: Sequence[int], settings: Settings) -> list[LayerReport]:
    """Compute some layers of a model."""
    layers = read_model(path, settings.options)
    return settings.analyse([layers[index] for index in indices])


def load(path: Path, index: int, settings: Settings) -> Layer:
    """Read one layer of a model."""
    return read_model(path, settings.options)[index]


def prepare(layer: Layer, settings: Settings) -> Prepared:
    """Do once what the blocks of a layer have in common."""
    backend, report = settings.computing(), describe(layer)
    assert layer.conv is not None
    assert report.input_shape is not None
    conv = circular_like(layer.conv)
    with backend.single_threaded():
        dtype = compute_dtype(layer.kernel, backend, settings.dtype, settings.device)
        kernel = backend.asarray(layer.kernel, dtype=dtype, device=settings.device)
        operand = make_spectral_operand(kernel, report.input_shape, conv, "auto")
        frobenius = float(backend.to_numpy(frobenius_norm(kernel, report.input_shape, conv)))
        return Prepared(operand, decompositions(operand, "auto"), frobenius)


def block_values(block: Block, prepared: Prepared) -> HostArray:
    """Singular values at the frequencies of a block: shape (frequencies, groups, values)."""
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


def bound(layer: Layer, settings: Settings) -> LayerReport:
    """Describe a layer, with its bounds and the norm of the reshaped kernel."""
    backend = settings.computing()
    with backend.single_threaded():
        return with_bounds(
            describe(layer), layer, backend, bounds=settings.bounds, dtype=settings.dtype, device=settings.device
        )


def combine(report: LayerReport, prepared: Prepared, values: Sequence[HostArray]) -> LayerReport:
    """Add the figures that follow from the values of all blocks, in their order."""
    operand = prepared.operand
    backend = operand.backend
    with backend.single_threaded():
        visited = backend.constant(np.concatenate(list(values)), operand.kernel)
        every = backend.to_numpy(sorted_values(operand, visited))
    return replace(with_spectrum(report, every, prepared.frobenius), curve=None)


def work_per_frequency(plan: Plan) -> float:
    """Estimate the operations of one frequency's matrices and their decompositions.

    The rate at which they are done differs by a factor of a few from small matrices to large ones, which
    is near enough to cut tasks by.
    """
    rows, columns = plan.block
    side = min(rows, columns)
    offsets = math.prod(len(axis.offsets) for axis in plan.axes)
    return float(plan.groups * (8 * rows * columns * offsets + 16 * max(rows, columns) * side**2))


def cut(plan: Plan) -> tuple[Block, ...]:
    """Blocks of about `WORK_PER_TASK` that hold every visited frequency once, in order."""
    size = max(1, int(WORK_PER_TASK / work_per_frequency(plan)), -(-len(plan.frequencies) // MOST_BLOCKS))
    return tuple(
        Block(part, first, min(first + size, len(frequencies)))
        for part, (_, frequencies) in enumerate(real_and_complex(plan))
        for first in range(0, len(frequencies), size)
    )


def _survey(path: Path, settings: Settings) -> Survey:
    start = time.perf_counter()
    found = Survey()
    try:
        layers = read_model(path, settings.options)
    except ModelError as error:
        return Survey(note=str(error), seconds=time.perf_counter() - start)
    except Exception as error:  # whatever a reader meets in a damaged file is the fault of that file alone
        reason = " ".join(f"{path}: {type(error).__name__}: {error}".split())
        return Survey(note=reason, seconds=time.perf_counter() - start)
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
    reports = dict(zip(now, settings.analyse([layers[index] for index in now]), strict=True))
    found.reports = [reports.get(index) for index in range(len(layers))]
    found.note = "" if layers else f"{path}: no convolution found"
    found.seconds = time.perf_counter() - start
    return found


def _plan(layer: Layer) -> Plan | None:
    """The plan of a layer's circular operator, or None where there is none, which its report then explains."""
    extents, conv, kernel = describe(layer).input_shape, layer.conv, layer.kernel
    if extents is None or conv is None or kernel is None:
        return None
    try:
        return make_plan(tuple(kernel.shape), kernel.dtype.kind != "c", extents, circular_like(conv))
    except COMPUTING_FAILS:
        return None
