"""The machine that figures were taken on, and its limit: the speed of a matrix product."""

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
from benchmarks.shapes import Shape
from benchmarks.timing import time_once
from convsv_core._geometry.plan import make_plan
from convsv_core._symbol.small_matrices import CLOSED_FORM_SIDE


def describe(libraries: Sequence[Library]) -> dict[str, Any]:
    """Describe processor, cores, versions and threads; call it when the libraries have been loaded."""
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
    }


def processor() -> str:
    """Model of the processor."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for row in listing.read_text().splitlines():
            name, _, value = row.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def load_average() -> float | None:
    """Processes that wanted a processor in the last minute, or None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def computing_dtype(library: Library) -> str:
    """The dtype in which float32 kernels are decomposed."""
    wide = library.backend.has_fast_float64(library.asarray(np.zeros(1, np.float32)))
    return "complex128" if wide else "complex64"


def product_peak(library: Library, dtype: str, side: int, repeats: int = 5) -> float:
    """Operations a second (real ones, ``8 side^3`` a product) of the best of several products, on all threads."""
    rng = np.random.default_rng(0)
    host = (rng.standard_normal((side, side)) + 1j * rng.standard_normal((side, side))).astype(dtype)
    matrix = library.asarray(host)
    run, _ = library.compile(lambda a: a @ a, matrix)
    library.wait(run(matrix))
    best = min(time_once(lambda: library.wait(run(matrix))) for _ in range(repeats))
    return 8 * side**3 / best


def decomposition_flops(shape: Shape, dtype: str) -> float | None:
    """Least real operations of a kernel's decompositions by the standard algorithms.

    Per visited frequency (half of them, for a real kernel, less those that are all alike), with a block of
    m x n, n the smaller side:

    - in double precision, eigenvalues of the Gram matrix: the reduction to tridiagonal form, 16/3 n^3
      (4/3 n^3 in complex arithmetic, at 4 real operations for each);
    - in single precision, singular values: the reduction to bidiagonal form, 16 m n^2 - 16/3 n^3, or where it
      is less QR first, 8 m n^2 + 8 n^3.

    What is of second order in n, and all of making the matrices, is left out. Half of the operations of a
    reduction are matrix-vector products, which run at the speed of memory or cache, so that a share
    of 1 is not to be had by this algorithm. None for blocks with closed forms.
    """
    plan = make_plan(shape.kernel_shape, True, shape.extents, shape.conv)
    n, m = sorted(plan.block)
    if n <= CLOSED_FORM_SIDE:
        return None
    each = 16 / 3 * n**3 if dtype == "complex128" else min(16 * m * n**2 - 16 / 3 * n**3, 8 * m * n**2 + 8 * n**3)
    return len(plan.frequencies) * plan.groups * each
