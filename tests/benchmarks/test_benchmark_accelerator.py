"""The benchmark of an accelerator runs to its end on the processor, and keeps its time."""

from __future__ import annotations

import collections
import sys
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import convsv_core as convsv

WORKER = """
import json, sys, time
request = json.loads(sys.argv[1])
tell = lambda **event: print(json.dumps(event), flush=True)
tell(event="library", device="cpu", model="", version="1", threads=1)
for section in request["sections"]:
    tell(event="begin", section=section, seconds=0.0)
    tell(event="row", section=section, kind="methods", row={"section": section})
    if section == "hangs":
        time.sleep(600)
    if section == "dies":
        sys.exit(3)
    tell(event="end", section=section, seconds=0.0, left_out=["one"] if section == "slow" else [], failures=[])
"""


@pytest.fixture
def processes(import_benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: ModuleType = import_benchmark("accelerator_processes")
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    return module


@pytest.fixture
def run_worker(processes: ModuleType, import_benchmark: Any) -> Any:
    request = import_benchmark("accelerator_setup").Request

    def run(*sections: str, seconds: float = 60.0, script: str = WORKER) -> Any:
        asked = request("torch", "cpu", "tiny", dict.fromkeys(sections, 1.0), time.time() + seconds)
        return processes.measure_library(asked, lambda message: None, (sys.executable, "-c", script))

    return run


@pytest.mark.thorough
def test_the_tiny_form_runs_to_its_end_on_the_processor(measure: Any) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    found = measure("accelerator", "--device", "cpu", "--minutes", "9", shows="conformance", plot=False)
    libraries = {row["library"]: row for row in found["libraries"]}
    assert found["device"] == found["machine"]["processor"]
    assert "cupy" in libraries["cupy"]["skipped"]  # CuPy has no processor
    sections = {(row["library"], row["section"]): row for row in found["sections"]}
    assert set(sections) == {
        *(("torch", name) for name in ("conformance", "layers", "derivatives", "training")),
        *(("jax", name) for name in ("conformance", "layers", "derivatives")),
    }
    assert all(row["status"] == "complete" and not row["failures"] for row in sections.values()), sections
    checks = collections.Counter()
    for cell in found["conformance"]:
        checks[cell["backend"]] += cell["checks"]
        assert not cell["failures"]
        assert cell["of"] > cell["checks"]
    assert checks == {"torch": 6, "jax": 6}
    assert any(row["library"] == "torch" for row in found["conformance_skips"])
    methods = collections.Counter(row["library"] for row in found["methods"])
    assert methods == {"torch": 2 * (6 + 3), "jax": 2 * (6 + 1)}
    for row in found["methods"]:
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["ours_seconds"])
        assert row["first_seconds"] > 0
        if row["peak_share"] is not None:
            speed = row["operations"] / row["ours_seconds"]
            assert row["peak_share"] == pytest.approx(speed / libraries[row["library"]]["peak"]["flops"], rel=1e-6)
        if row["method"] in ("singular_values", "operator_norm"):
            assert row["error_eps"] <= 20
    steps = {(row["network"], row["method"]): row for row in found["steps"]}
    assert len(steps) == 6 + 5
    for (_, method), row in steps.items():
        assert len(row["times"]) == len(row["plain_times"]) == 2
        assert row["overhead"] == pytest.approx(np.median(np.asarray(row["times"]) / row["plain_times"] - 1))
        assert (row["norm"] is not None) == (method in ("project", "parametrization"))
        assert row["norm"] is None or row["norm"] <= 1 + 1e-6


def test_a_section_that_hangs_or_dies_is_ended_and_the_others_run(run_worker: Any) -> None:
    found = run_worker("first", "hangs", "slow", "dies", "last")
    assert [(row.section, row.status, row.crashed) for row in found.sections] == [
        ("first", "complete", False),
        ("hangs", "ended", False),
        ("slow", "out of time", False),
        ("dies", "ended", True),
        ("last", "complete", False),
    ]
    assert "status 3" in found.sections[3].reason
    assert [row["section"] for row in found.rows["methods"]] == ["first", "hangs", "slow", "dies", "last"]


def test_no_section_runs_after_the_end_of_the_time(
    run_worker: Any, processes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 60.0)
    began = time.time()
    found = run_worker("hangs", "last", seconds=1.0)
    assert time.time() - began < 30
    assert [(row.section, row.status) for row in found.sections][-1] == ("last", "not run")


def test_a_process_that_does_not_start_is_told(run_worker: Any) -> None:
    found = run_worker("first", "last", script="raise SystemExit(2)")
    assert [(row.section, row.status) for row in found.sections] == [("first", "not run"), ("last", "not run")]
    assert not found.facts


@pytest.mark.parametrize(
    ("devices", "wanted", "found"),
    [
        (("cpu", "cuda:0", "cuda:1"), None, "cuda:0"),
        (("cpu", "cuda:0", "cuda:1"), "cuda:1", "cuda:1"),
        (("cpu", "cuda:0"), "cuda", "cuda:0"),
        (("gpu:0", "gpu:1"), "cuda:1", "gpu:1"),
        (("cpu:0",), None, None),
        (("cpu:0",), "cpu", "cpu:0"),
        (("cpu",), "cuda:0", None),
        (("cuda:0",), "cpu", None),
    ],
)
def test_a_device_is_found_under_the_name_that_the_library_has_for_it(
    import_benchmark: Any, devices: tuple[str, ...], wanted: str | None, found: str | None
) -> None:
    class Stub(convsv.Backend):
        def devices(self) -> tuple[str, ...]:
            return devices

    assert import_benchmark("accelerator_worker").find_device(Stub(), wanted) == found


def test_the_bottleneck_network_has_the_convolutions_of_resnet_50(import_benchmark: Any, shapes: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    from convsv_adapters.torch import conv_layers

    import_benchmark("shapes")  # so that the examples can be imported, too
    from examples.paper.resnet import RESNET_50, BottleneckResNet

    model = BottleneckResNet(**RESNET_50)
    found = collections.Counter(
        (*layer.module.kernel_size, *layer.weight.shape[1::-1], *layer.input_shape, *layer.module.stride)
        for layer in conv_layers(model, torch.zeros(1, 3, 224, 224))
    )
    wanted = {
        (*shape.taps, shape.inputs, shape.outputs, *shape.extents, *shape.stride): shape.multiplicity
        for shape in shapes.RESNET_50
    }
    assert found == wanted
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 25_557_032  # of ResNet-50 with 1000 classes


def test_gram_operations_of_a_dense_layer(import_benchmark: Any, shapes: ModuleType) -> None:
    layers = import_benchmark("accelerator_layers")
    shape = shapes.square("any", 3, 4, 8, 6)
    assert layers.gram_flops(shape) == 8 * 8 * 4**2 * 20  # 20 of 36 frequencies: conjugate ones have equal values
    assert layers.gram_flops(shapes.square("any", 3, 4, 4, 6, groups=4)) is None
