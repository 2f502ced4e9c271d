"""Describe the machine that figures were taken on, and measure its limit: the speed of a matrix product."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

import convsv_core
from benchmarks.libraries import Library
from benchmarks.tables import say
from benchmarks.timing import time_once

__all__ = [
    "computing_dtype",
    "describe",
    "load_average",
    "memory_bytes",
    "processor",
    "product_peak",
    "show_machine",
    "usable_processors",
]

BUSY = 0.5
"""Load before the run, for each usable processor, above which a warning is printed: a guess."""


def describe(libraries: Sequence[Library], load_before: float | None) -> dict[str, Any]:
    """Describe processor, cores, versions, threads and load; call it when the libraries have been loaded.

    Parameters
    ----------
    libraries : sequence of Library
    load_before : float or None
        The `load_average` before the first measurement.
    """
    versions = {"python": platform.python_version(), "convsv": convsv_core.__version__, "numpy": np.__version__}
    kept = ("user_api", "internal_api", "version", "num_threads", "threading_layer", "architecture")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "processors_usable": usable_processors(),
        "memory_bytes": memory_bytes(),
        "versions": versions | {library.name: library.version() for library in libraries},
        "thread_pools": [{key: pool[key] for key in kept if key in pool} for pool in threadpool_info()],
        "library_threads": {library.name: library.threads() for library in libraries},
        "load_average": [load_before, load_average()],
    }


def show_machine(machine: dict[str, Any], peaks: dict[str, dict[str, Any]] | None = None) -> None:
    """Print what the figures were taken on.

    Parameters
    ----------
    machine : dict
        The answer of `describe`.
    peaks : dict, optional
        For each library the speed of a matrix product: ``dtype``, ``side`` and ``flops`` a second.
    """
    pools = [f"{pool.get('internal_api')} {pool.get('num_threads')}" for pool in machine["thread_pools"]]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    say(f"{machine['processor']}, {machine['processors_usable']} processors usable, {machine['date']}")
    say(f"{versions}; threads: {', '.join(pools) or 'unknown'}")
    before, _ = machine["load_average"]
    if before is not None and before > BUSY * machine["processors_usable"]:
        say(f"The machine was busy (load {before:.1f}): libraries that thread small matrices suffer most.", "yellow")
    for library, peak in (peaks or {}).items():
        say(f"{library}: {peak['flops'] / 1e9:.0f} GFLOP/s in a {peak['dtype']} product of side {peak['side']}")


def processor() -> str:
    """Return the model of the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for row in listing.read_text().splitlines():
            name, _, value = row.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_processors() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Return the physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def load_average() -> float | None:
    """Return how many processes wanted a processor in the last minute, or None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def computing_dtype(library: Library) -> str:
    """Return the dtype in which float32 kernels are decomposed."""
    wide = library.backend.has_fast_float64(library.asarray(np.zeros(1, np.float32)))
    return "complex128" if wide else "complex64"


def product_peak(library: Library, dtype: str, side: int, repeats: int = 5) -> float:
    """Return the operations a second of the best of several complex matrix products, on all threads.

    A product has ``8 side^3`` real operations.
    """
    rng = np.random.default_rng(0)
    host = (rng.standard_normal((side, side)) + 1j * rng.standard_normal((side, side))).astype(dtype)
    matrix = library.asarray(host)
    run = library.compile(lambda a: a @ a, matrix).run
    library.wait(run(matrix))
    best = min(time_once(lambda: library.wait(run(matrix))) for _ in range(repeats))
    return 8 * side**3 / best
