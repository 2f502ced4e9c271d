"""One operator on many processes or devices: memory on a Dask cluster, and the shares of a mesh of JAX's."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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

    count = channels * math.prod(extents)
    places = np.rint((1 - np.asarray(QUANTILES)) * (count - 1)).astype(int)
    spread = _run(
        "quantiles",
        kernel,
        extents,
        lambda lazy: convsv.singular_values(lazy, extents, CONV)[places],
        *settings,
    )
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
            dashboard_address=None,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


# ---- a mesh of JAX's ---------------------------------------------------------------------------------------

DEVICES = 8

ON_A_MESH = """
import json, re, sys, time
import jax, jax.numpy as jnp, numpy as np
import convsv_core as convsv

channels, extent = map(int, sys.argv[1:])
conv = convsv.Conv("OIHW")
kernel = jnp.asarray(np.random.default_rng(0).normal(size=(channels, channels, 3, 3)).astype("float32"))
function = jax.jit(lambda kernel: convsv.singular_values(kernel, (extent, extent), conv))
alone = np.asarray(function(kernel))
mesh = jax.make_mesh((jax.device_count(),), ("frequencies",), axis_types=(jax.sharding.AxisType.Auto,))
with jax.set_mesh(mesh):
    program = jax.jit(lambda kernel: convsv.singular_values(kernel, (extent, extent), conv)).lower(kernel).compile()
    shared = np.asarray(program(kernel))
text = program.as_text()
batches = [int(n) for n in re.findall(r"= \\(c64\\[(\\d+),1,\\d+,\\d+\\].*lapack_c\\w+", text)]
gathered = re.findall(r"= \\(?(\\w+)\\[([\\d,]*)\\]\\S* (?:all-\\w+|collective-\\w+|reduce-scatter)\\(", text)
sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for _, shape in gathered]
print(json.dumps({
    "devices": jax.device_count(),
    "largest_error_eps": float(np.max(np.abs(shared - alone)) / alone[0] / np.finfo("float32").eps),
    "matrices_a_device": batches,
    "gathered_dtypes": sorted({dtype for dtype, _ in gathered}),
    "largest_gathered": max(sizes, default=0),
    "values": int(alone.size),
    "symbol_entries": extent * extent * channels * channels,
}))
"""


@dataclass(frozen=True)
class MeshRun:
    """All singular values of one layer over a mesh of virtual devices of the host, compiled.

    Attributes
    ----------
    devices : int
    largest_error_eps : float
        From one device, in eps(float32) times the norm.
    matrices_a_device : list of int
        Of each batched decomposition in the compiled program that is not one of the few real matrices.
    gathered_dtypes : list of str
        What collective operations pass on; the symbol would be complex.
    largest_gathered : int
        Entries of the largest such array.
    values, symbol_entries : int
        Singular values, and what the symbol has.
    """

    devices: int
    largest_error_eps: float
    matrices_a_device: list[int]
    gathered_dtypes: list[str]
    largest_gathered: int
    values: int
    symbol_entries: int


def sharded_jax(channels: int = 16, extent: int = 32) -> MeshRun:
    """In a process of its own, as JAX reads the number of devices when it starts."""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "NPROC": "64",  # threads for eight devices that wait for each other, on few processors
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", ON_A_MESH, str(channels), str(extent)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return MeshRun(**json.loads(output.splitlines()[-1]))
