"""One operator on many processes or devices: memory on a Dask cluster, and the shares of a mesh of JAX's."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import convsv_core as convsv
from benchmarks.memory import peak_resident_bytes

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)

CONV = convsv.Conv("OIHW")


@dataclass(frozen=True)
class GridRun:
    """One quantity of one convolution, computed on a cluster of processes of this machine.

    Attributes
    ----------
    what : str
    channels : int
    extents : tuple of int
    workers : int
        Processes, of one thread each.
    worker_limit_bytes : int
        At which the cluster would end a worker.
    symbol_bytes : int
        What the whole symbol takes in complex64.
    tasks : int
        Of the graph that the cluster was given.
    seconds : float
        From the call to the answer on the client.
    worker_peak_bytes, client_peak_bytes : int
        Peak resident memory of the largest worker; of this process, the scheduler in it.
    worker_start_bytes : int
        Peak of a worker before: the interpreter and its libraries.
    answer : list of float
        The norm, or the quantiles of `QUANTILES`, or the largest and smallest value.
    check : str
        What the answer was compared with.
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


def grid(
    channels: int = 128,
    extents: tuple[int, int] = (512, 512),
    reduced: int = 16,
    workers: int = 2,
    worker_limit_bytes: int = 2 << 30,
) -> list[GridRun]:
    """Take the norm and the quantiles of a large grid, and the whole spectrum for fewer channels.

    Each on a fresh cluster, so that each peak is of one computation.
    """
    kernel = _kernel(channels)
    settings = (workers, worker_limit_bytes)
    bounds = convsv.norm_bounds(kernel, CONV, input_shape=extents)

    norm = _run("operator norm", kernel, extents, lambda lazy: convsv.operator_norm(lazy, extents, CONV), *settings)
    found = float(norm.pop("result"))
    runs = [
        GridRun(
            **norm,
            answer=[found],
            check="certified bounds of norm_bounds",
            agrees=bool(bounds.lower <= found <= bounds.upper),
        )
    ]

    def quantiles_of(lazy: Any) -> Any:
        import dask.array as da

        return da.quantile(convsv.singular_values(lazy, extents, CONV), QUANTILES)

    spread = _run("quantiles", kernel, extents, quantiles_of, *settings)
    quantiles = np.asarray(spread.pop("result"))
    error = abs(float(quantiles[-1]) - found)
    eps = float(np.finfo(np.float32).eps)
    runs.append(
        GridRun(
            **spread,
            answer=quantiles.tolist(),
            check="in order, the last of them the norm",
            agrees=bool(np.all(np.diff(quantiles) >= 0) and error <= 4 * eps * found),
        )
    )

    small = _kernel(reduced)
    whole = _run(
        "all singular values", small, extents, lambda lazy: convsv.singular_values(lazy, extents, CONV), *settings
    )
    values = whole.pop("result")
    runs.append(
        GridRun(
            **whole,
            answer=[float(values[0]), float(values[-1])],
            check="those of NumPy, bit for bit",
            agrees=bool(np.array_equal(values, convsv.singular_values(small, extents, CONV))),
        )
    )
    return runs


@dataclass(frozen=True)
class ShardedRun:
    """The singular values of one convolution on a mesh of virtual devices of JAX's, and on one device.

    Attributes
    ----------
    devices, channels : int
    extents : tuple of int
    visited : int
        Complex matrices that are decomposed, of all devices together on one.
    share : int
        Of them, those that the compiled program decomposes on each device of the mesh.
    symbol_bytes, largest_collective_bytes : int
        What the visited symbol takes, and the largest array that one device gets from others.
    collectives : list of str
        Every exchange between devices in the compiled program, with the type and shape of what it gives.
    error_eps : float
        Largest difference from the values on one device, in eps of float32 times the norm.
    seconds, seconds_one_device : float
        The devices are threads of this machine, so that what they gain is what its processors leave to gain.
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


def sharded_jax(devices: int = 8, channels: int = 64, extents: tuple[int, int] = (64, 64)) -> ShardedRun:
    """Compile and run on a mesh in a process of its own, since JAX makes its devices when it starts."""
    code = f"from benchmarks.scale_arrays import _measure_sharded; _measure_sharded({channels}, {extents})"
    # NPROC: on few processors XLA starts fewer threads than devices wait with in two collectives at once.
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "64", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | flags, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"JAX on {devices} devices: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return ShardedRun(**found | {"extents": tuple(found["extents"])})


def _measure_sharded(channels: int, extents: tuple[int, int]) -> None:
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
        error_eps=float(np.max(np.abs(values[1] - values[0])) / (np.finfo(np.float32).eps * values[0][0])),
        seconds=seconds[1],
        seconds_one_device=seconds[0],
    )
    print(json.dumps(asdict(run)))


def show(sharded: ShardedRun, runs: Sequence[GridRun]) -> None:
    """Print what was measured, a line each."""
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


def _kernel(channels: int) -> np.ndarray[Any, Any]:
    kernel = np.random.default_rng(0).standard_normal((channels, channels, 3, 3))
    return (kernel / math.sqrt(9 * channels)).astype(np.float32)


def _run(
    what: str,
    kernel: np.ndarray[Any, Any],
    extents: tuple[int, int],
    function: Any,
    workers: int,
    worker_limit_bytes: int,
) -> dict[str, Any]:
    import dask.array as da

    with _cluster(workers, worker_limit_bytes) as client:
        before = client.run(peak_resident_bytes)
        start = time.perf_counter()
        lazy = function(da.from_array(kernel, chunks=-1))
        result = lazy.compute()
        seconds = time.perf_counter() - start
        after = client.run(peak_resident_bytes)
    return {
        "what": what,
        "channels": len(kernel),
        "extents": extents,
        "workers": workers,
        "worker_limit_bytes": worker_limit_bytes,
        "symbol_bytes": 8 * kernel.shape[0] * kernel.shape[1] * math.prod(extents),
        "tasks": len(lazy.__dask_graph__()),
        "seconds": seconds,
        "worker_peak_bytes": max(after.values()),
        "client_peak_bytes": peak_resident_bytes(),
        "worker_start_bytes": max(before.values()),
        "result": result,
    }


@contextlib.contextmanager
def _cluster(workers: int, worker_limit_bytes: int) -> Iterator[Any]:
    from dask.distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=worker_limit_bytes,
            dashboard_address=":0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
