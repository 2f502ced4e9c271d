"""Dask kernels: lazy, in blocks of the budget, and the same values on threads, processes and after a worker's death."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import convsv_core as convsv
from convsv_core import penalties

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")
distributed = pytest.importorskip("dask.distributed")

EPS = float(np.finfo("float32").eps)
CONV = convsv.Conv("OIHW", stride=2)
EXTENTS = (16, 12)

CALLS: dict[str, Callable[[Any], Any]] = {
    "singular_values": lambda kernel: convsv.singular_values(kernel, EXTENTS, CONV),
    "frequency_singular_values": lambda kernel: convsv.frequency_singular_values(kernel, EXTENTS, CONV),
    "operator_norm": lambda kernel: convsv.operator_norm(kernel, EXTENTS, CONV),
    "norm_upper_bound": lambda kernel: convsv.norm_upper_bound(kernel, CONV),
    "frobenius_norm": lambda kernel: convsv.frobenius_norm(kernel, EXTENTS, CONV),
    "condition_number": lambda kernel: convsv.condition_number(kernel, EXTENTS, CONV),
    "symbol": lambda kernel: convsv.symbol(kernel, EXTENTS, CONV),
    "clip": lambda kernel: convsv.clip(kernel, EXTENTS, CONV, 3.0),
    "orthogonality": lambda kernel: penalties.orthogonality(kernel, EXTENTS, CONV),
    "zero padding": lambda kernel: convsv.operator_norm(kernel, (6, 5), convsv.Conv("OIHW", padding_mode="zeros")),
}


@pytest.fixture(scope="module")
def kernel() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 4, 3, 3)).astype("float32")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def lazy(kernel: np.ndarray) -> Any:
    return da.from_array(kernel, chunks=(2, 4, 3, 2))


@pytest.mark.parametrize("name", CALLS)
def test_values_are_those_of_numpy_on_threads_and_processes(name: str, kernel: np.ndarray, client: Any) -> None:
    call = CALLS[name]
    expected = np.asarray(call(kernel))
    result = call(lazy(kernel))
    assert isinstance(result, da.Array)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    found = [
        np.asarray(result.compute(scheduler="synchronous")),
        np.asarray(result.compute(scheduler="threads", num_workers=2)),
        np.asarray(client.compute(result).result()),
    ]
    for one in found:
        np.testing.assert_array_equal(one, found[0])
        np.testing.assert_allclose(one, expected, rtol=0, atol=40 * EPS * float(np.abs(expected).max()))


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    def fail() -> np.ndarray:
        raise RuntimeError("computed")

    kernel = da.from_delayed(dask.delayed(fail)(), (6, 4, 3, 3), "float32")
    for name, call in CALLS.items():
        result = call(kernel)
        with pytest.raises(RuntimeError, match="computed"):
            result.compute(scheduler="synchronous")
        assert isinstance(result, da.Array), name


def test_blocks_are_of_the_budget_and_no_chunk_is_of_the_symbol_s_size(kernel: np.ndarray) -> None:
    largest = 0

    class Watch(dask.callbacks.Callback):
        def _posttask(self, key: Any, result: Any, *_: Any) -> None:
            nonlocal largest
            largest = max(largest, getattr(result, "nbytes", 0))

    extents, budget = (64, 64), 1 << 16
    conv = convsv.Conv("OIHW")
    values = convsv.frequency_singular_values(lazy(kernel), extents, conv, max_bytes=budget)
    with Watch():
        found = values.compute(scheduler="synchronous", optimize_graph=False)
    symbol = 64 * 64 * 6 * 4 * 8
    assert found.nbytes < symbol / 8
    assert largest <= 2 * found.nbytes
    tasks = len(convsv.singular_values(lazy(kernel), extents, conv, max_bytes=budget).__dask_graph__())
    assert tasks > 64 * 64 / 2 * 500 / budget  # a frequency takes more than 500 bytes of work


def test_a_kernel_that_is_not_finite_gives_nan(kernel: np.ndarray) -> None:
    broken = kernel.copy()
    broken[0, 0, 0, 0] = np.inf
    for name in ("singular_values", "operator_norm", "clip", "zero padding"):
        assert np.all(np.isnan(CALLS[name](lazy(broken)).compute(scheduler="synchronous"))), name


def test_what_looks_at_values_computes_the_kernel(kernel: np.ndarray) -> None:
    with dask.config.set(scheduler="synchronous"):
        bounds, expected = convsv.norm_bounds(lazy(kernel), CONV), convsv.norm_bounds(kernel, CONV)
        assert isinstance(bounds.upper, da.Array)
        assert float(bounds.lower.compute()) == float(expected.lower)
        assert bounds.converged
        projected = convsv.project(lazy(kernel), EXTENTS, CONV, 1.0, method="rescale")
        reference = convsv.project(kernel, EXTENTS, CONV, 1.0, method="rescale")
        np.testing.assert_array_equal(projected.kernel.compute(), reference.kernel)


def test_a_worker_that_is_killed_changes_nothing(kernel: np.ndarray, client: Any) -> None:
    conv, extents = convsv.Conv("OIHW"), (128, 128)
    values = convsv.singular_values(lazy(kernel), extents, conv, max_bytes=1 << 18)
    expected = values.compute(scheduler="synchronous")
    future = client.compute(values)
    while not any(client.processing().values()):
        time.sleep(0.005)
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
    np.testing.assert_array_equal(future.result(timeout=120), expected)
    client.wait_for_workers(2, timeout=60)
