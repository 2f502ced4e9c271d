"""Project the weights of a training once more: shape by shape, and by two processes that share the layers."""

from __future__ import annotations

import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from convsv_adapters.torch import ConvLayer, StepProjection, conv_layers
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import in_turns
from benchmarks.training_setup import Setup
from benchmarks.training_steps import Snapshot, geometry
from examples.paper.resnet import ResNet

__all__ = ["RanksRow", "Replay", "ShapeRow", "by_shape", "load", "on_ranks"]

RANKS = 2
TIMEOUT = datetime.timedelta(minutes=30)
"""Time that one process waits for the other: a guess, far above the time of the whole replay."""


class Replay(NamedTuple):
    """Hold the weights before each projection, and the bound of the projections."""

    snapshots: Sequence[Snapshot]
    bound: float


@dataclass(frozen=True)
class ShapeRow:
    """Record the layers of one kernel shape and stride: an entry of ``layers`` in the JSON.

    Attributes
    ----------
    count : int
        Such layers in the network.
    moved : float
        Such layers that a projection changed, on average.
    seconds : float
        Time of one layer's projection: median over the steps of the mean over the layers.
    """

    case: str
    label: str
    count: int
    moved: float
    seconds: float
    times: list[float]


@dataclass(frozen=True)
class RanksRow:
    """Compare one process with two: an entry of ``ranks`` in the JSON.

    Attributes
    ----------
    alone_seconds : float
        Median time in which one process on one processor projects every layer.
    shared_seconds : float
        Median time in which two processes, on one processor each, share the layers and exchange the results: that of
        the slower process.
    ratio : float
        Median of the steps' ratios, shared over alone.
    """

    case: str
    alone_seconds: float
    shared_seconds: float
    ratio: float
    alone_times: list[float]
    shared_times: list[float]


def by_shape(case: str, model: nn.Module, replay: Replay, setup: Setup) -> list[ShapeRow]:
    """Project the weights of every step again, the layers of each shape by themselves."""
    layers = conv_layers(model)
    groups: dict[str, list[ConvLayer]] = {}
    for layer in layers:
        groups.setdefault(_label(layer), []).append(layer)
    rows = []
    for label, members in groups.items():
        projection = StepProjection(model, replay.bound, layers=members)
        times, moved = [], []
        for snapshot in _within(setup.limit / len(groups), replay.snapshots):
            load(layers, snapshot)
            began = time.perf_counter()
            projection.project()
            times.append((time.perf_counter() - began) / len(members))
            before = dict(zip([layer.name for layer in layers], snapshot, strict=True))
            moved.append(sum(not torch.equal(before[layer.name], layer.weight) for layer in members))
        times, moved = times[setup.settle :] or times, moved[setup.settle :] or moved
        rows.append(ShapeRow(case, label, len(members), statistics.mean(moved), statistics.median(times), times))
    return rows


def on_ranks(replays: Mapping[str, Replay], setup: Setup) -> list[RanksRow]:
    """Project the weights of every step again, in one process and in two in turns, each held to one processor.

    Parameters
    ----------
    replays : mapping of str to Replay
        By case.
    setup : Setup
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save((setup, dict(replays)), folder / "input.pt")
        torch.multiprocessing.spawn(_rank, (folder,), nprocs=RANKS)
        found = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    rows = []
    for case in replays:
        alone = found[0][case]["alone"]
        shared = [max(pair) for pair in zip(*(one[case]["shared"] for one in found), strict=True)]
        alone, shared = (times[setup.settle :] or times for times in (alone, shared))
        ratio = statistics.median(s / a for s, a in zip(shared, alone, strict=True))
        rows.append(RanksRow(case, statistics.median(alone), statistics.median(shared), ratio, alone, shared))
    return rows


def _rank(rank: int, folder: Path) -> None:
    if hasattr(os, "sched_setaffinity"):
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {usable[rank % len(usable)]})
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    setup, replays = torch.load(folder / "input.pt", weights_only=False)  # this program has written the file
    found = {case: _replay(rank, setup, replay) for case, replay in replays.items()}
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)  # at the usual end of a process, a thread of gloo that still runs at times aborts the process


def _replay(rank: int, setup: Setup, replay: Replay) -> dict[str, list[float]]:
    """Return the seconds of each step, "alone" and "shared"."""
    alone, shared = ResNet(setup.widths, setup.blocks), ResNet(setup.widths, setup.blocks)
    projections = {
        "alone": (alone, StepProjection(alone, replay.bound)),
        "shared": (shared, StepProjection(DistributedDataParallel(shared), replay.bound)),
    }
    times: dict[str, list[float]] = {name: [] for name in projections}
    spent = torch.zeros(())
    for turn, snapshot in enumerate(replay.snapshots):
        if float(spent) > setup.limit:
            break
        for name in in_turns(projections, turn):
            model, projection = projections[name]
            load(conv_layers(model), snapshot)
            distributed.barrier()
            began = time.perf_counter()
            if name == "shared" or rank == 0:
                projection.project()
            times[name].append(time.perf_counter() - began)
            spent += times[name][-1]
        distributed.broadcast(spent, 0)  # both ranks must end at the same step
    return times


def load(layers: Sequence[ConvLayer], snapshot: Snapshot) -> None:
    """Give the layers these weights."""
    with torch.no_grad():
        for layer, weight in zip(layers, snapshot, strict=True):
            layer.weight.copy_(weight)


def _label(layer: ConvLayer) -> str:
    outputs, inputs, *taps = layer.weight.shape
    stride = max(geometry(layer).strides)
    return f"{'x'.join(map(str, taps))} {inputs}->{outputs}" + (f" s{stride}" if stride > 1 else "")


def _within(limit: float, snapshots: Sequence[Snapshot]) -> Iterator[Snapshot]:
    """Yield the snapshots from the first on, until the caller has spent `limit` seconds."""
    began = time.perf_counter()
    for snapshot in snapshots:
        yield snapshot
        if time.perf_counter() - began > limit:
            return
