"""Dask kernels: lazy, in blocks, on every scheduler, the same values as NumPy."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convsv_backends import _dask

import convsv_core as convsv
from convsv_core import penalties

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")

CONV = convsv.Conv("OIHW")
EXTENTS = (24, 24)
SMALL_BLOCKS = 1 << 18


@pytest.fixture
def kernel() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 8, 3, 3)).astype("float32")


@pytest.fixture
def lazy(kernel: np.ndarray) -> Any:
    return da.from_array(kernel, chunks=(3, 8, 3, 2))  # in parts, as a stored array may be


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    distributed = pytest.importorskip("dask.distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "function",
    [
        lambda k: convsv.singular_values(k, EXTENTS, CONV, max_bytes=SMALL_BLOCKS),
        lambda k: convsv.frequency_singular_values(k, EXTENTS, CONV, max_bytes=SMALL_BLOCKS),
        lambda k: convsv.symbol(k, EXTENTS, CONV),
        lambda k: convsv.operator_norm(k, EXTENTS, CONV),
        lambda k: convsv.operator_norm(k, (9, 9), convsv.Conv("OIHW", padding_mode="zeros")),
        lambda k: convsv.condition_number(k, EXTENTS, CONV),
        lambda k: convsv.log_abs_det(k, EXTENTS, CONV),
        lambda k: convsv.clip(k, EXTENTS, CONV, 2.0),
        lambda k: convsv.clip(k, EXTENTS, CONV, 3.0, lower=2.0),
        lambda k: penalties.spectrum_hinge(k, EXTENTS, CONV, 1.0),
    ],
)
def test_nothing_is_computed_until_it_is_asked_for(
    function: Any, kernel: np.ndarray, lazy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dask.config.set(scheduler=lambda *arguments, **options: pytest.fail("computed")):
        result = function(lazy)
    expected = function(kernel)
    assert isinstance(result, da.Array)
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    got = result.compute()
    assert type(np.asarray(got)) is np.ndarray
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=20 * np.finfo(np.float32).eps * float(np.max(np.abs(expected)))
    )


def test_a_bound_for_every_input_size_is_lazy(kernel: np.ndarray, lazy: Any) -> None:
    with dask.config.set(scheduler=lambda *arguments, **options: pytest.fail("computed")):
        bound = convsv.norm_upper_bound(lazy, CONV, rtol=0.1)
    norms = convsv.norm_bounds(kernel, CONV)
    assert isinstance(bound, da.Array)
    # Both bounds include their own rounding errors, which differ: NumPy's search tests in single precision.
    np.testing.assert_allclose(bound.compute(), convsv.norm_upper_bound(kernel, CONV, rtol=0.1), rtol=1e-4)
    assert norms.lower <= bound.compute() <= 1.1001 * norms.upper


def test_singular_vectors_are_lazy_images(kernel: np.ndarray, lazy: Any) -> None:
    decomposition = convsv.svd(lazy, (6, 5), CONV)
    u, s, vh = dask.compute(*decomposition)
    np.testing.assert_allclose((u * s[..., None, :]) @ vh, convsv.symbol(kernel, (6, 5), CONV), atol=1e4 * 2.0**-23)
    image, value, _ = decomposition.singular_vectors(3)
    assert isinstance(image, da.Array)
    assert float(value) == pytest.approx(float(convsv.svd(kernel, (6, 5), CONV).singular_vectors(3)[1]))


def test_a_block_is_one_task_within_the_budget(lazy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    apply = _dask._apply

    def watched(rows: np.ndarray, bound: Any) -> Any:
        sizes.append(len(rows))
        return apply(rows, bound)

    monkeypatch.setattr(_dask, "_apply", watched)
    values = convsv.singular_values(lazy, EXTENTS, CONV, max_bytes=SMALL_BLOCKS)
    sizes.clear()  # of the look ahead
    values.compute(scheduler="synchronous")
    assert sum(sizes) == EXTENTS[0] * EXTENTS[1] // 2 + 2  # each conjugate pair once
    row_bytes = (2 * 9 + 3 * 64) * 16
    assert max(sizes) * row_bytes <= SMALL_BLOCKS
    assert len(sizes) == 1 + -(-(sum(sizes) - 4) // max(sizes))  # the four that are their own conjugates are apart


def test_results_keep_to_chunks_of_the_budget() -> None:
    """What is as large as the symbol has no chunk larger than a block's budget, and is never in one piece."""
    lazy = da.zeros((32, 32, 3, 3), dtype="float32", chunks=-1)
    symbol = convsv.symbol(lazy, (512, 512), CONV)
    u, _, _ = convsv.svd(lazy, (128, 128), CONV, max_bytes=8 << 20)
    assert symbol.nbytes == 512 * 512 * 32 * 32 * 8
    assert max(np.prod([max(sizes) for sizes in symbol.chunks]) * 8, 0) <= 256 << 20
    assert max(np.prod([max(sizes) for sizes in u.chunks]) * 8, 0) <= 8 << 20


def test_values_that_are_not_there_yet_may_be_nan(kernel: np.ndarray) -> None:
    kernel[0, 0, 0, 0] = np.inf
    lazy = da.from_array(kernel)
    for result in (
        convsv.singular_values(lazy, EXTENTS, CONV),
        convsv.operator_norm(lazy, (9, 9), convsv.Conv("OIHW", padding_mode="zeros")),
        convsv.clip(lazy, EXTENTS, CONV, 1.0),
    ):
        assert np.isnan(result.compute()).all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        convsv.project(lazy, EXTENTS, CONV, 1.0)
    with pytest.raises(ValueError, match="bound=-1"):
        convsv.clip(lazy, EXTENTS, CONV, -1.0)
    with pytest.raises(ValueError, match="padding"):  # at the call, not at compute
        convsv.operator_norm(lazy, (2, 2), convsv.Conv("OIHW", padding=2, padding_mode="reflect"))


def test_what_looks_at_values_computes_the_kernel(kernel: np.ndarray, lazy: Any) -> None:
    bounds, expected = convsv.norm_bounds(lazy, CONV), convsv.norm_bounds(kernel, CONV)
    assert isinstance(bounds.upper, da.Array)
    assert (float(bounds.lower), float(bounds.upper)) == (float(expected.lower), float(expected.upper))
    assert (bounds.frequency, bounds.converged) == (expected.frequency, expected.converged)
    nearest = convsv.project(lazy, (8, 8), CONV, da.from_array(np.float32(4.0)))
    again = convsv.project(lazy, (8, 8), CONV, 4.0, state=nearest.state)
    assert isinstance(nearest.kernel, da.Array)
    assert isinstance(nearest.state.dual, da.Array)
    assert again.iterations <= nearest.iterations
    assert float(nearest.norm) <= 4.0 * (1 + 1e-6)
    assert isinstance(convsv.nearest_orthogonal(lazy, (8, 8), CONV, max_iterations=10).kernel, da.Array)


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_schedulers_agree_bit_for_bit(scheduler: str, kernel: np.ndarray, lazy: Any) -> None:
    values = convsv.singular_values(lazy, EXTENTS, CONV, max_bytes=SMALL_BLOCKS)
    got = values.compute(scheduler=scheduler, num_workers=2)
    assert np.array_equal(got, convsv.singular_values(kernel, EXTENTS, CONV))


def test_a_cluster_gives_the_same(client: Any, kernel: np.ndarray, lazy: Any) -> None:
    results = (
        convsv.singular_values(lazy, EXTENTS, CONV, max_bytes=SMALL_BLOCKS),
        convsv.clip(lazy, EXTENTS, CONV, 2.0),
        *convsv.svd(lazy, (6, 6), CONV, max_bytes=SMALL_BLOCKS),
    )
    expected = (
        convsv.singular_values(kernel, EXTENTS, CONV),
        convsv.clip(kernel, EXTENTS, CONV, 2.0),
        *convsv.svd(kernel, (6, 6), CONV),
    )
    for got, wanted in zip(client.gather(client.compute(results)), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=20 * np.finfo(np.float32).eps * np.max(np.abs(wanted)))
    with client.as_current():
        assert float(convsv.norm_bounds(lazy, CONV).upper) == float(convsv.norm_bounds(kernel, CONV).upper)


def _slow(rows: np.ndarray, started: str) -> np.ndarray:
    """A dependency of the kernel that takes long enough for a worker to be killed meanwhile."""
    with open(started, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    return rows


def test_a_worker_that_is_killed_changes_nothing(
    client: Any, kernel: np.ndarray, lazy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    values = convsv.singular_values(lazy, EXTENTS, CONV, max_bytes=SMALL_BLOCKS)
    slowed = values.map_blocks(_slow, str(started), dtype=values.dtype)
    frequencies = convsv.frequency_singular_values(lazy, EXTENTS, CONV, max_bytes=SMALL_BLOCKS)
    slowed_too = frequencies.map_blocks(_slow, str(started), dtype=values.dtype)
    pids = list(client.run(os.getpid).values())

    def kill() -> None:
        while not started.exists() or len(started.read_text().split()) < 3:
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    got, by_frequency = client.gather(client.compute([slowed, slowed_too]))
    killer.join()
    assert pids[0] not in client.run(os.getpid).values()
    assert np.array_equal(got, convsv.singular_values(kernel, EXTENTS, CONV))
    assert np.array_equal(by_frequency, convsv.frequency_singular_values(kernel, EXTENTS, CONV))
