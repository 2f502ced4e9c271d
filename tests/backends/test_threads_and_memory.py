"""Threads are the user's to limit and are given back; memory is the result and the budget."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from convsv_backends import _numpy, _threads, _torch
from convsv_backends._threads import SharedLimit, UserLimit, map_in_threads
from threadpoolctl import ThreadpoolController, threadpool_limits

import convsv_core as convsv
from convsv_core.backend import split_rows
from convsv_core.plugins import get_backend

CONV = convsv.Conv("OIHW")


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()]


@pytest.fixture
def kernel() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(16, 16, 3, 3)).astype("float32")


def test_calls_from_several_threads_agree_and_give_the_limits_back(kernel: np.ndarray) -> None:
    alone = convsv.singular_values(kernel, (32, 32), CONV)
    before = blas_threads(), torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: convsv.singular_values(kernel, (32, 32), CONV), range(12)))
        torch_results = list(
            pool.map(lambda _: convsv.singular_values(torch.tensor(kernel), (32, 32), CONV), range(12))
        )
    assert all(np.array_equal(result, alone) for result in results)
    assert all(torch.equal(result, torch_results[0]) for result in torch_results)
    assert (blas_threads(), torch.get_num_threads()) == before


def test_limits_come_back_after_an_error(kernel: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    before = blas_threads()

    def fail(array: np.ndarray) -> np.ndarray:
        raise np.linalg.LinAlgError("planted")

    backend = get_backend("numpy")
    monkeypatch.setattr(backend, "eigvalsh", fail, raising=False)
    with pytest.raises(np.linalg.LinAlgError, match="planted"):
        convsv.singular_values(kernel, (32, 32), CONV)
    assert blas_threads() == before


@pytest.mark.parametrize("limit", [1, 2])
def test_the_users_own_limit_is_kept(kernel: np.ndarray, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    running: set[int] = set()
    most = 0
    backend = get_backend("numpy")
    original = backend.eigvalsh

    def watched(array: np.ndarray) -> np.ndarray:
        nonlocal most
        running.add(threading.get_ident())
        most = max(most, len(running))
        if len(array) > 1:  # a single matrix is left to BLAS's own threads
            assert {library["num_threads"] for library in _numpy._blas().info()} == {1}
        try:
            return original(array)
        finally:
            running.remove(threading.get_ident())

    monkeypatch.setattr(backend, "eigvalsh", watched, raising=False)
    monkeypatch.setattr(_threads, "usable_processors", lambda: 2)
    with threadpool_limits(limits=limit, user_api="blas"):
        before = blas_threads()
        assert max(before) == limit  # a BLAS that another test has loaded may know one thread only
        convsv.singular_values(kernel, (64, 64), CONV)
        assert blas_threads() == before
    assert 1 <= most <= limit


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_one_thread_gives_the_same_bits_whatever_the_limit(kernel: np.ndarray, name: str) -> None:
    backend = get_backend(name)
    array = backend.asarray(kernel)
    before = torch.get_num_threads()
    found = []
    for limit in (1, 2):
        torch.set_num_threads(limit)
        with threadpool_limits(limits=limit, user_api="blas"):
            inside = blas_threads()
            with backend.single_threaded():
                used = blas_threads() if name == "numpy" else [torch.get_num_threads()]
                assert set(used) == {1}
                found.append(backend.to_numpy(convsv.singular_values(array, (64, 64), CONV)))
            assert (blas_threads(), torch.get_num_threads()) == (inside, limit)
    torch.set_num_threads(before)
    np.testing.assert_array_equal(*found)


WITH_SCIPY = """
import sys
import numpy as np
import convsv_core as convsv
from convsv_core.plugins import get_backend
from threadpoolctl import ThreadpoolController

def threads():
    return [library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()]

def load_scipy():
    global loaded
    import scipy.linalg
    loaded = len(threads())

kernel = np.random.default_rng(0).normal(size=(16, 16, 3, 3)).astype("float32")
found = []
if sys.argv[1] == "first":
    load_scipy()
for _ in range(2):
    before = threads()
    with get_backend("numpy").single_threaded():
        assert set(threads()) == {1}, threads()
        found.append(convsv.singular_values(kernel, (64, 64), convsv.Conv("OIHW")))
    assert threads() == before
    if sys.argv[1] == "later":
        load_scipy()
assert len(threads()) == loaded
np.testing.assert_array_equal(*found)
"""


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_blas_that_another_package_loads_is_limited_too(when: str) -> None:
    """SciPy brings a BLAS of its own, before the first call or after it."""
    pytest.importorskip("scipy")
    done = subprocess.run([sys.executable, "-c", WITH_SCIPY, when], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_limit_holds_in_whichever_thread_asks(kernel: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """threadpoolctl ignores every thread but the first that has set a limit."""
    convsv.singular_values(kernel, (64, 64), CONV)
    backend, seen = get_backend("numpy"), []
    original = backend.eigvalsh

    def watched(array: np.ndarray) -> np.ndarray:
        if len(array) > 1:
            seen.append(max(library["num_threads"] for library in _numpy._blas().info()))
        return original(array)

    monkeypatch.setattr(backend, "eigvalsh", watched, raising=False)
    before = blas_threads()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(convsv.singular_values, kernel, (64, 64), CONV).result()
    assert set(seen) == {1}
    assert blas_threads() == before


def test_work_within_a_task_starts_no_threads(kernel: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "usable_processors", lambda: 4)
    monkeypatch.setattr(_numpy, "map_in_threads", lambda *arguments, **options: pytest.fail("threads were started"))
    backend = get_backend("numpy")
    with backend.single_threaded(), backend.single_threaded():
        pass
    with backend.single_threaded():
        convsv.singular_values(kernel, (64, 64), CONV)


def test_a_shared_limit_ends_with_its_last_holder() -> None:
    events: list[str] = []

    def limit() -> UserLimit:
        events.append("set")
        return UserLimit(1, lambda: events.append("restored"))

    shared = SharedLimit(limit)
    shared.__enter__()
    with shared:
        assert events == ["set"]
    assert events == ["set"]
    shared.__exit__(None, None, None)
    assert events == ["set", "restored"]


def test_blocks_share_the_budget() -> None:
    rows = np.arange(1000)[:, None]
    sizes = map_in_threads(lambda block: np.asarray([len(block)]), rows, 2, row_bytes=10, budget=400)
    assert max(int(size[0]) for size in sizes) <= 20  # half of the budget for each thread
    assert sum(int(size[0]) for size in sizes) == 1000
    assert np.array_equal(np.concatenate(list(split_rows(rows, 7))), rows)


def test_an_error_in_a_block_is_raised_and_the_threads_serve_the_next_call() -> None:
    rows = np.arange(64)[:, None]

    def fail(block: np.ndarray) -> np.ndarray:
        if 40 in block:
            raise ValueError("planted")
        return block

    for initializer in (None, int):
        with pytest.raises(ValueError, match="planted"):
            map_in_threads(fail, rows, 2, row_bytes=1 << 20, budget=1 << 30, initializer=initializer)
        found = map_in_threads(np.copy, rows, 2, row_bytes=1 << 20, budget=1 << 30, initializer=initializer)
        assert np.array_equal(np.concatenate(found), rows)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_groups_are_cut_for_threads_and_keep_their_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = {"numpy": _numpy._blas_limit, "torch": _torch._torch_limit}[name]
    monkeypatch.setattr(limit, "_limit", lambda: UserLimit(2, lambda: None))
    monkeypatch.setattr(_threads, "usable_processors", lambda: 2)
    groups, sizes, threads = [list(range(7)), [7], [8, 9]], [], set()

    def double(group: list[int]) -> list[int]:
        sizes.append(len(group))
        threads.add(threading.current_thread().name)
        for one in (_numpy._blas_limit, limit):  # Blocks within a group start no threads.
            assert one.__enter__() == 1
            one.__exit__(None, None, None)
        return [2 * member for member in group]

    backend = get_backend(name)
    like = backend.asarray(np.ones(1))
    wanted = [[2 * member for member in group] for group in groups]
    assert backend.map_groups(double, groups, [7e8, 1e8, 2e8], like) == wanted
    assert sorted(sizes) == [1, 2, 3, 4]
    assert threads <= {"convsv"} | ({threading.current_thread().name} if name == "numpy" else set())
    with pytest.raises(ZeroDivisionError):
        backend.map_groups(lambda group: [1 // 0 for _ in group], groups, [1e9, 1e9, 1e9], like)
    callers = backend.map_groups(lambda group: [threading.current_thread() for _ in group], groups, [1.0] * 3, like)
    assert {thread for group in callers for thread in group} == {threading.current_thread()}  # too little for threads


def test_a_forked_child_starts_threads_of_its_own() -> None:
    script = (
        "import multiprocessing, numpy as np, convsv_core as convsv\n"
        "kernel = np.random.default_rng(0).normal(size=(16, 16, 3, 3)).astype('float32')\n"
        "def norm(_): return float(convsv.operator_norm(kernel, (64, 64), convsv.Conv('OIHW')))\n"
        "here = norm(0)\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "    assert pool.map_async(norm, [0]).get(timeout=60) == [here]\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_which_matrices_have_a_cholesky_factor() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 5, 5)) + 1j * rng.normal(size=(6, 5, 5))
    definite = vectors @ np.conj(vectors.swapaxes(-1, -2)) + np.eye(5)
    definite[[1, 4]] -= 3 * np.eye(5) * np.linalg.eigvalsh(definite)[[1, 4], -1, None, None]
    expected = [True, False, True, True, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_backend("numpy").is_positive_definite(definite).tolist() == expected
    factors = _numpy._cholesky_one_by_one(definite)  # what stands in where NumPy's own function is not to be had
    assert np.isfinite(factors[:, -1, -1]).tolist() == expected
    assert np.array_equal(factors[0], np.linalg.cholesky(definite[0]))


MEASURE = """
import sys
import numpy as np
import convsv_core as convsv

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

kernel = np.random.default_rng(0).normal(size=(32, 32, 3, 3)).astype("float32")
conv = convsv.Conv("OIHW")
convsv.singular_values(kernel, (8, 8), conv)
before = peak()
values = convsv.singular_values(kernel, (192, 192), conv, max_bytes=8 << 20)
print(peak() - before, values.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory that Linux records")
def test_memory_is_the_result_and_the_budget() -> None:
    output = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    grown, result = map(int, output.split())
    symbol = 192 * 192 * 32 * 32 * 8
    # The values by frequency, their two copies while they are joined and sorted, and the tables of the plan,
    # some twenty integers a frequency, stand beside the budget.
    assert grown <= (8 << 20) + 6 * result + 20 * 8 * 192 * 192 < symbol


INTERRUPTED = """
import os, random, signal, threading, time
import numpy as np
from convsv_backends._threads import map_in_threads

armed, interrupts, ends = False, 0, time.monotonic() + 2

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

def poke():
    while time.monotonic() < ends:
        time.sleep(random.uniform(0, 1e-3))
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, interrupt)
threading.Thread(target=poke, daemon=True).start()
while time.monotonic() < ends:
    try:
        armed = True
        map_in_threads(lambda block: 2 * block, np.arange(64), 2, row_bytes=1 << 20, budget=1 << 30)
        armed = False
    except KeyboardInterrupt:
        armed = False
        interrupts += 1
    finally:
        armed = False
parts = map_in_threads(lambda block: 2 * block, np.arange(64), 2, row_bytes=1 << 20, budget=1 << 30)
assert np.array_equal(np.concatenate(parts), 2 * np.arange(64))
print(interrupts)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_keyboard_interrupts_leave_no_thread_that_never_ends() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_what_a_helper_or_its_initializer_raises_is_raised() -> None:
    def fail(*_: object) -> object:
        raise ArithmeticError("wanted")

    for function, initializer in ((fail, None), (lambda block: block, fail), (fail, lambda: None)):
        with pytest.raises(ArithmeticError, match="wanted"):
            map_in_threads(function, np.arange(8), 2, row_bytes=1 << 24, budget=1 << 30, initializer=initializer)
