"""The baselines of the benchmarks compute what they claim to compute."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import convsv_core as convsv

ERROR_EPS = 20


def test_polyphase_kernel_has_the_values_of_the_operator(shapes: ModuleType, baselines: ModuleType) -> None:
    for shape in shapes.QUICK:
        kernel = shape.kernel()
        folded = baselines.polyphase(shape, kernel)
        transform = np.fft.fftn(folded, s=shape.grid, axes=tuple(range(len(shape.grid))))
        wanted = convsv.singular_values(kernel, shape.extents, shape.conv).astype(np.float64)
        found = np.zeros_like(wanted)
        values = np.sort(np.linalg.svd(transform, compute_uv=False), axis=None)[::-1]
        found[: values.size] = values
        tolerance = ERROR_EPS * np.finfo(np.float32).eps * wanted[0]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance, err_msg=shape.name)
        frequencies = np.arange(0, math.prod(shape.grid), 7)
        direct = baselines.matrices_at(folded, shape.grid, frequencies)
        rows = transform.reshape(-1, *transform.shape[-3:])[frequencies]
        np.testing.assert_allclose(rows, direct, rtol=0, atol=tolerance, err_msg=shape.name)


def test_whole_matrix_has_the_values_of_the_operator(shapes: ModuleType, baselines: ModuleType) -> None:
    shape = shapes.square("test", 3, 2, 3, 5)
    found = np.linalg.svd(baselines.dense_matrix(shape).astype(np.float64), compute_uv=False)
    wanted = convsv.singular_values(shape.kernel(), shape.extents, shape.conv)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ERROR_EPS * np.finfo(np.float32).eps * wanted[0])


def test_extrapolation_weighs_what_was_sampled(
    import_benchmark: Any, shapes: ModuleType, baselines: ModuleType
) -> None:
    library = import_benchmark("libraries").open_library("numpy")
    shape = shapes.square("test", 3, 4, 4, 16)
    full = baselines.TwoLines(library, shape, limit=math.inf, sample_seconds=0.0).prepare()
    assert not full.extrapolated
    sampled = baselines.TwoLines(library, shape, limit=0.0, sample_seconds=0.0).prepare()
    assert sampled.extrapolated
    assert sampled.sampled == 2
    assert sampled.combine({"fft": [1.0, 2.0], "svd": [0.5, 0.25]}) == [1 + 0.5 * 128, 2 + 0.25 * 128]


def test_times_are_taken_in_turns(import_benchmark: Any) -> None:
    timing = import_benchmark("timing")
    order: list[str] = []
    tasks = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.alternate(tasks, dict.fromkeys("ab", 1.0), repeats=4)
    assert order == list("abbaabba")
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4}


def test_networks_are_complete(shapes: ModuleType) -> None:
    def held(listed: list[Any]) -> int:
        return sum(shape.multiplicity for shape in listed)

    assert held(shapes.RESNET_50) == 53
    assert held(shapes.RESNET_32) == 31
    assert held(shapes.MOBILENET_V2) == 17
    assert held(shapes.VGG_16) == 13
    assert held(shapes.R3D_18) == 20
    everything = [*shapes.NETWORKS, *shapes.QUICK]
    assert all(one == other or one.name != other.name for one, other in itertools.combinations(everything, 2))
    grouped = {shape.name for group in shapes.GROUPS.values() for shape in group}
    assert {shape.name for shape in everything} <= grouped


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_convolutions_are_alike_and_have_adjoints(import_benchmark: Any, shapes: ModuleType, name: str) -> None:
    library = pytest.importorskip(name) and import_benchmark("libraries").open_library(name)
    judge = import_benchmark("libraries").open_library("numpy")
    dilated = shapes.Shape("test", (3, 1), 2, 3, (7, 5), (1, 1), (2, 1))
    for shape in (shapes.square("test", 3, 2, 3, 6, 2), shapes.square("test", 2, 3, 2, 5), dilated):
        image = np.random.default_rng(0).standard_normal((shape.inputs, *shape.extents)).astype(np.float32)
        sizes = []
        for one in (library, judge):
            apply, adjoint, start = one.convolution(one.asarray(shape.kernel()), shape, image)
            result = apply(start)
            sizes.append(float((result**2).sum()))
            assert float((start * adjoint(result)).sum()) == pytest.approx(sizes[-1], rel=1e-5)
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_polyphase_kernel_returns_to_its_taps(shapes: ModuleType, baselines: ModuleType) -> None:
    for shape in shapes.QUICK:
        if all(d * (k - 1) < n for d, k, n in zip(shape.dilation, shape.taps, shape.extents, strict=True)):
            kernel = shape.kernel()
            np.testing.assert_array_equal(baselines.from_polyphase(shape, baselines.polyphase(shape, kernel)), kernel)


def test_plain_dykstra_ends_where_project_does(import_benchmark: Any, shapes: ModuleType) -> None:
    plain, gap = import_benchmark("clip_baselines").plain_dykstra, 1e-3
    for shape in (
        shapes.square("test", 3, 2, 3, 6),
        shapes.square("test", 3, 4, 4, 8, 2, groups=2),
        shapes.convolution("test", (3,), 2, 2, 9, dilation=2),
    ):
        kernel = shape.kernel().astype(np.float64)
        bound = 0.5 * float(convsv.operator_norm(kernel, shape.extents, shape.conv))
        found = plain(shape, kernel, bound, gap, 2000)
        wanted = convsv.project(kernel, shape.extents, shape.conv, bound, rtol=gap)
        assert found.gap <= gap
        assert float(convsv.operator_norm(found.kernel, shape.extents, shape.conv)) <= bound * (1 + 1e-12)
        distance = float(convsv.frobenius_norm(found.kernel - kernel, shape.extents, shape.conv))
        assert distance == pytest.approx(float(wanted.distance), rel=gap)


def test_simulation_counts_what_each_task_waits_for(import_benchmark: Any) -> None:
    simulation = import_benchmark("simulation")
    jobs = [simulation.Job(1.0, size=10, layers=[[1.0, 1.0], [2.0]], combine=0.5)] * 3

    def seconds(**engine: float) -> float:
        free = {"workers": 1, "service": 0.0, "overhead": 0.0, "bytes_per_second": math.inf}
        return float(simulation.simulate(jobs, simulation.Engine(**(free | engine))).seconds)

    work, count = 3 * jobs[0].seconds, 3 * jobs[0].tasks
    assert (work, count) == (18.0, 18)
    assert seconds() == pytest.approx(work)
    assert seconds(service=0.1) == seconds(overhead=0.1) == pytest.approx(work + count * 0.1)
    assert seconds(bytes_per_second=10.0) == pytest.approx(work + 9)  # the survey's and two layers' files
    assert seconds(workers=1000) == pytest.approx(1 + 2 + 0.5)
    assert seconds(workers=1000, service=1.0) >= count
    assert [job.survey for job in simulation.packed([simulation.Job(0.25)] * 7, 1.0)] == [1.0, 0.75]
