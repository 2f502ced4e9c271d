"""Measure one operator on many processes or devices: its memory on a Dask cluster, its shares on a mesh of JAX's."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

import convsv_core as convsv
from benchmarks.memory import peak_resident_bytes
from benchmarks.shapes import HostArray

__all__ = ["QUANTILES", "GridRun", "ShardedRun", "grid", "sharded_jax", "show"]

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
"""Shares of the singular values below each quantile."""

LARGEST_ERROR = 4
"""Largest difference of two computations of the norm, in eps of float32: a guess."""

WORKER_LIMIT_BYTES = 2 << 30
"""Memory at which the cluster ends a worker: far below the largest symbol, which takes 34 GB."""

DEVICES = 8
CONV = convsv.Conv("OIHW")
EPS = float(np.finfo(np.float32).eps)


class _Verdict(NamedTuple):
    """Hold the answer of a computation, the name of its check, and whether it passes the check."""

    answer: list[float]
    check: str
    agrees: bool


@dataclass(frozen=True)
class GridRun:
    """Record one quantity of one convolution, computed on a cluster of processes of this machine.

    Attributes
    ----------
    what : str
    channels : int
    extents : tuple of int
    workers : int
        Processes, of one thread each.
    worker_limit_bytes : int
        Memory at which the cluster ends a worker.
    symbol_bytes : int
        Memory of the whole symbol in complex64.
    tasks : int
        Tasks of the graph that the cluster was given.
    seconds : float
        Time from the call to the answer on the client.
    worker_peak_bytes, client_peak_bytes : int
        Peak resident memory of the largest worker, and of this process, which holds the scheduler.
    worker_start_bytes : int
        Peak of a worker before the call: the interpreter and its libraries.
    answer : list of float
        The norm, or the quantiles of `QUANTILES`, or the largest and smallest value.
    check : str
        The values that the answer was compared with.
    agrees : bool
    """

    what: str
    channels: int
    extents: tuple[int, ...]
    workers: int
    worker_limit_bytes: int
    symbol_bytes: int
    tasks: int
    seconds: float
    worker_peak_bytes: int
    client_peak_bytes: int
    worker_start_bytes: int
    answer: list[float]
    check: str
    agrees: bool


def grid(channels: int, extents: tuple[int, int], reduced: int, workers: int) -> list[GridRun]:
    """Compute the norm and the quantiles of a large grid, and the whole spectrum for `reduced` channels.

    Each computation has a fresh cluster, so that each peak is that of one computation.
    """
    kernel, small = _kernel(channels), _kernel(reduced)
    bounds = convsv.norm_bounds(kernel, CONV, input_shape=extents)

    def norm_of(lazy: Any) -> Any:
        return convsv.operator_norm(lazy, extents, CONV)

    def judge_norm(result: Any) -> _Verdict:
        found = float(result)
        return _Verdict([found], "certified bounds of norm_bounds", bool(bounds.lower <= found <= bounds.upper))

    norm = _run("operator norm", kernel, extents, workers, norm_of, judge_norm)

    def quantiles_of(lazy: Any) -> Any:
        import dask.array as da

        return da.quantile(values_of(lazy), QUANTILES)

    def judge_quantiles(result: Any) -> _Verdict:
        (largest,) = norm.answer
        near = abs(float(result[-1]) - largest) <= LARGEST_ERROR * EPS * largest
        agrees = bool(np.all(np.diff(result) >= 0) and near)
        return _Verdict(np.asarray(result).tolist(), "in order, the last of them the norm", agrees)

    def values_of(lazy: Any) -> Any:
        return convsv.singular_values(lazy, extents, CONV)

    def judge_values(result: Any) -> _Verdict:
        agrees = bool(np.array_equal(result, values_of(small)))
        return _Verdict([float(result[0]), float(result[-1])], "those of NumPy, bit for bit", agrees)

    return [
        norm,
        _run("quantiles", kernel, extents, workers, quantiles_of, judge_quantiles),
        _run("all singular values", small, extents, workers, values_of, judge_values),
    ]


@dataclass(frozen=True)
class ShardedRun:
    """Compare the singular values of one convolution on a mesh of virtual devices of JAX's with those on one device.

    Attributes
    ----------
    devices, channels : int
    extents : tuple of int
    visited : int
        Complex matrices that are decomposed on one device.
    share : int
        Matrices that the compiled program decomposes on each device of the mesh.
    symbol_bytes, largest_collective_bytes : int
        Memory of the visited symbol, and of the largest array that one device gets from others.
    collectives : list of str
        Every exchange between devices in the compiled program, with the type and shape of its result.
    error_eps : float
        Largest difference from the values on one device, in eps of float32 times the norm.
    seconds, seconds_one_device : float
        Times of a run. The devices are threads of this machine, so that they gain no more than its processors allow.
    """

    devices: int
    channels: int
    extents: tuple[int, ...]
    visited: int
    share: int
    symbol_bytes: int
    largest_collective_bytes: int
    collectives: list[str]
    error_eps: float
    seconds: float
    seconds_one_device: float


def sharded_jax(channels: int, extents: tuple[int, int]) -> ShardedRun:
    """Compile and run on a mesh in a process of its own, since JAX makes its devices when it starts."""
    code = f"from benchmarks.scale_arrays import _measure_sharded; _measure_sharded({channels}, {extents})"
    # Every device holds a thread while it waits in a collective. XLA starts NPROC threads, by default one for each
    # processor, which are too few for two collectives at once.
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}", "NPROC": "64", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | flags, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"JAX on {DEVICES} devices: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return ShardedRun(**found | {"extents": tuple(found["extents"])})


def _measure_sharded(channels: int, extents: tuple[int, int]) -> None:
    """Print a `ShardedRun` as JSON: the work of the process that `sharded_jax` starts."""
    import jax

    host = jax.numpy.asarray(_kernel(channels))
    mesh = jax.make_mesh((jax.device_count(),), ("frequencies",))
    split = jax.device_put(host, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    values, seconds, text = [], [], ""
    for kernel in (host, split):
        program = jax.jit(lambda kernel: convsv.singular_values(kernel, extents, CONV)).lower(kernel).compile()
        program(kernel).block_until_ready()
        start = time.perf_counter()
        values.append(np.asarray(program(kernel).block_until_ready()))
        seconds.append(time.perf_counter() - start)
        text = program.as_text()
    exchanged = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-\w+|collective-\w+|reduce-scatter)\(", text)
    sizes = [
        max(1, int(re.sub(r"\D", "", dtype) or 8) // 8) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape, _ in exchanged
    ]
    shares = [int(n) for n in re.findall(r"= \(c64\[(\d+),1,\d+,\d+\].*lapack_c\w+", text)]
    visited = math.prod(extents) // 2 - 2
    run = ShardedRun(
        devices=jax.device_count(),
        channels=channels,
        extents=extents,
        visited=visited,
        share=sum(shares),
        symbol_bytes=8 * visited * channels**2,
        largest_collective_bytes=max(sizes),
        collectives=[f"{name} {dtype}[{shape}]" for dtype, shape, name in exchanged],
        error_eps=float(np.max(np.abs(values[1] - values[0])) / (EPS * values[0][0])),
        seconds=seconds[1],
        seconds_one_device=seconds[0],
    )
    print(json.dumps(asdict(run)))


def show(sharded: ShardedRun, runs: Sequence[GridRun]) -> None:
    """Print one line for each measurement."""
    click.echo(
        f"JAX, {sharded.devices} devices: {sharded.share} of {sharded.visited} matrices on each, at most "
        f"{sharded.largest_collective_bytes / 1e6:.3g} MB exchanged at once where the symbol has "
        f"{sharded.symbol_bytes / 1e6:.3g} MB, {sharded.error_eps:.1f} eps from one device"
    )
    for run in runs:
        click.echo(
            f"{run.what} of {run.channels} channels on {'x'.join(map(str, run.extents))}: a symbol of "
            f"{run.symbol_bytes / 1e9:.3g} GB, {run.worker_peak_bytes / 2**20:.0f} MiB at most on each of "
            f"{run.workers} workers ({run.worker_start_bytes / 2**20:.0f} at their start), "
            f"{run.client_peak_bytes / 2**20:.0f} on the client, {run.tasks} tasks, {run.seconds:.1f} s; "
            f"{run.check}: {'yes' if run.agrees else 'NO'}"
        )


def _kernel(channels: int) -> HostArray:
    """Return a Gaussian kernel whose norm hardly depends on the channels."""
    kernel = np.random.default_rng(0).standard_normal((channels, channels, 3, 3))
    return (kernel / math.sqrt(9 * channels)).astype(np.float32)


def _run(
    what: str,
    kernel: HostArray,
    extents: tuple[int, int],
    workers: int,
    function: Callable[[Any], Any],
    judge: Callable[[Any], _Verdict],
) -> GridRun:
    """Apply `function` to a Dask array on a fresh cluster, and check the result by `judge`."""
    import dask.array as da

    with _cluster(workers) as client:
        before = client.run(peak_resident_bytes)
        start = time.perf_counter()
        lazy = function(da.from_array(kernel, chunks=-1))
        result = lazy.compute()
        seconds = time.perf_counter() - start
        after = client.run(peak_resident_bytes)
    return GridRun(
        what=what,
        channels=len(kernel),
        extents=extents,
        workers=workers,
        worker_limit_bytes=WORKER_LIMIT_BYTES,
        symbol_bytes=8 * kernel.shape[0] * kernel.shape[1] * math.prod(extents),
        tasks=len(lazy.__dask_graph__()),
        seconds=seconds,
        worker_peak_bytes=max(after.values()),
        client_peak_bytes=peak_resident_bytes(),
        worker_start_bytes=max(before.values()),
        **judge(result)._asdict(),
    )


@contextlib.contextmanager
def _cluster(workers: int) -> Iterator[Any]:
    from dask.distributed import Client, LocalCluster

    settings = {"threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with (
        LocalCluster(n_workers=workers, memory_limit=WORKER_LIMIT_BYTES, **settings) as cluster,
        Client(cluster) as client,
    ):
        yield client
