"""The paper's experiments run, in short; what they find is not asserted, only what holds of any training."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SLACK = 1 + 1e-6

torch = pytest.importorskip("torch")
for name in ("sklearn", "click", "matplotlib", "onnx", "safetensors"):
    pytest.importorskip(name)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples, which are not installed; undo what their commands set for the process."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield lambda name: importlib.import_module(f"examples.paper.{name}")
    torch.set_num_threads(threads)


@pytest.fixture
def run(module: Callable[[str], ModuleType], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run an experiment in short and return its numbers."""
    from click.testing import CliRunner

    def run(experiment: str, *options: str) -> dict[str, Any]:
        command = module("__main__").paper
        result = CliRunner().invoke(
            command, [experiment, "--quick", "--seeds", "1", "--output", str(tmp_path), *options]
        )
        assert result.exit_code == 0, result.output
        assert (tmp_path / f"{experiment}.png").read_bytes().startswith(b"\x89PNG")
        content: dict[str, Any] = json.loads((tmp_path / f"{experiment}.json").read_text())
        assert content["experiment"] == experiment
        return content

    return run


@pytest.mark.thorough
def test_certified_has_a_run_of_every_kind(run: Callable[..., dict[str, Any]], module: Callable[[str], Any]) -> None:
    runs = run("certified")["runs"]
    kinds = module("certified").KINDS
    assert [(one["batch_norm"], one["kind"]) for one in runs] == [(b, kind) for b in (False, True) for kind in kinds]
    for one in runs:
        assert one["lower"] <= one["upper"]
        assert one["kind"] != "network bound 1" or one["upper"] <= 1
        assert one["accuracy"] == sorted(one["accuracy"], reverse=True)


def test_no_change_within_the_certified_radius_alters_a_label(module: Callable[[str], Any]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 3))
    images, labels = torch.randn(64, 1, 3, 3), torch.randint(3, (64,))
    norm = float(torch.linalg.matrix_norm(model[1].weight.detach().double(), 2))
    radii = module("certified").certified_radii(model, images, labels, norm)
    right = model(images).argmax(dim=1) == labels
    assert torch.equal(radii >= 0, right)
    assert 10 < int(right.sum()) < 50
    weight = model[1].weight.detach()
    with torch.inference_mode():
        for image, label, radius in zip(images[right], labels[right], radii[right], strict=True):
            for other in set(range(3)) - {int(label)}:  # the direction in which a linear map changes its label first
                direction = torch.nn.functional.normalize(weight[other] - weight[label], dim=0).view_as(image)
                assert int(model(image + 0.999 * float(radius) * direction).argmax()) == int(label)


def test_robustness_has_a_run_of_every_kind(run: Callable[..., dict[str, Any]]) -> None:
    runs = run("robustness")["runs"]
    assert {(one["batch_norm"], one["bound"]) for one in runs} == {
        (b, c) for b in (True, False) for c in (0.5, 1, None)
    }
    for one in runs:
        assert 0 <= one["test_error"] <= 1
        assert one["bound"] is None or one["norm"] <= one["bound"] * SLACK


def test_cost_tells_the_norms_between_projections(run: Callable[..., dict[str, Any]]) -> None:
    runs = {one["every"]: one for one in run("cost")["runs"]}
    assert set(runs) == {1, 10, 100, None}
    assert runs[None]["projection_seconds"] == 0
    assert all(one["projection_seconds"] > 0 for every, one in runs.items() if every is not None)
    assert all(len(one["norms"]) == len(one["steps"]) > 0 for one in runs.values())
    assert min(runs[None]["norms"]) > 1


def test_spectra_are_bounded_where_they_should_be(run: Callable[..., dict[str, Any]]) -> None:
    content = run("spectra")
    assert {row["when"] for row in content["layers"]} == {"before training", "after, no bound", "after, bound 1.0"}
    for row in content["layers"]:
        assert row["quantiles"] == sorted(row["quantiles"])
        assert row["norm"] == pytest.approx(row["quantiles"][-1])
        if row["when"] == "after, bound 1.0":
            assert row["norm"] <= SLACK


@pytest.mark.thorough
def test_frameworks_end_with_the_same_norms(run: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("equinox")
    pytest.importorskip("optax")
    content = run("frameworks", "--framework", "jax")
    assert [row["bound"] for row in content["comparisons"]] == [None, 1.0]
    for row in content["comparisons"]:
        assert row["difference"] <= row["tolerance"], row
    assert content["comparisons"][1]["largest_norm"] <= SLACK


@pytest.mark.thorough
def test_keras_ends_with_the_same_norms(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")  # read at the first import of Keras
    pytest.importorskip("keras")
    rows = run("frameworks", "--framework", "keras")["comparisons"]
    assert [row["bound"] for row in rows] == [None, 1.0]
    for row in rows:
        assert row["difference"] <= row["tolerance"], row


def test_another_training_is_told_from_the_same(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    pytest.importorskip("equinox")
    pytest.importorskip("optax")
    frameworks, reference = module("frameworks"), module("torch_run")

    def run(problem: Any) -> dict[str, Any]:
        """Train without the first batch."""
        return reference.run(dataclasses.replace(problem, batches=problem.batches[1:]))

    monkeypatch.setattr(module("jax_run"), "run", run)
    arguments = ["--quick", "--seeds", "1", "--framework", "jax", "--output", str(tmp_path)]
    result = CliRunner().invoke(frameworks.frameworks, arguments)
    assert result.exit_code == 1
    assert "jax differs from PyTorch" in result.output


def test_a_gan_is_measured_within_what_is_certified(
    run: Callable[..., dict[str, Any]], module: Callable[[str], Any]
) -> None:
    runs, kinds = run("gan")["runs"], module("gan").KINDS
    assert [one["kind"] for one in runs] == list(kinds)
    for one in runs:
        assert len(one["measurements"]) == 2
        for found in one["measurements"]:
            attained = max(found[name] for name in ("lower", "real", "generated", "between"))
            assert 0 < attained <= found["upper"] * SLACK
            assert "network_bound" not in kinds[one["kind"]] or found["upper"] <= 1
            assert abs(found["difference"]) <= found["upper"] * found["wasserstein"] * SLACK


def test_runs_of_a_gan_differ_in_the_bound_alone(module: Callable[[str], Any]) -> None:
    training, images = module("gan_training"), module("data").load(None, 64)
    recipe = training.GanRecipe(width=2, batch=16, epochs=1)

    def weights(watch: Callable[[Any], Any], **bound: Any) -> list[Any]:
        trained = training.train_gan(images, dataclasses.replace(recipe, **bound), watch, 2)
        assert trained.steps == 4
        return list(trained.generator.parameters())

    def measured(trained: Any) -> None:
        assert trained.critic.training
        module("gan").measure(trained, images)

    free = weights(lambda _: None)
    for other in (weights(measured), weights(lambda _: None, network_bound=1e9)):
        assert all(map(torch.equal, free, other))
    assert not all(map(torch.equal, free, weights(lambda _: None, network_bound=0.1)))
    beginnings: list[Any] = []
    for bound in module("gan").KINDS.values():
        weights(lambda now: beginnings.append(copy.deepcopy(now.generator)), **bound)
    first, *others = (list(one.parameters()) for one in beginnings[::3])
    assert all(all(map(torch.equal, first, other)) for other in others)


def test_distances_of_images_are_those_of_known_sets(module: Callable[[str], Any]) -> None:
    gan = module("gan")
    torch.manual_seed(0)
    some, shift = torch.randn(40, 1, 3, 3), torch.full((1, 1, 3, 3), 0.5)
    assert gan.wasserstein(some, some.flip(0)) == 0
    assert gan.wasserstein(some, some.flip(0) + shift) == pytest.approx(1.5)
    # Between two points at 0 and 1 and two at 5 and 7 the mean distance is 5.5; within the pairs it is 1 and 2.
    points = (torch.tensor(values).view(2, 1, 1, 1) for values in ([0.0, 1.0], [5.0, 7.0]))
    assert gan.energy_distance(*points) == pytest.approx(2 * 5.5 - 1 - 2)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 1))
    norms = gan.gradient_norms(linear, some)
    assert torch.allclose(norms, linear[1].weight.detach().norm().expand(40))


def test_network_is_the_one_of_the_paper(module: Callable[[str], ModuleType]) -> None:
    from convsv_adapters.torch import conv_layers

    resnet = module("resnet")
    model = resnet.ResNet(**resnet.RESNET_32)
    assert len(conv_layers(model)) == 31
    assert sum(parameter.numel() for parameter in model.parameters()) == 464_154  # 0.46 million, He et al., table 6
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_attack_raises_the_loss_within_its_size(module: Callable[[str], ModuleType]) -> None:
    training = module("training")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    images, labels = torch.rand(20, 1, 8, 8), torch.randint(10, (20,))
    moved = training.attacked(model, images, labels, 0.1)
    assert float((moved - images).abs().max()) <= 0.1 * SLACK
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    before, after = (torch.nn.functional.cross_entropy(model(x), labels, reduction="none") for x in (images, moved))
    assert bool((after >= before).all())  # the loss of a linear model is convex


@pytest.fixture
def cifar10(tmp_path: Path, module: Callable[[str], ModuleType]) -> Path:
    """Ten images in each file, whose pixels tell label, channel, row and column."""
    data = module("data")
    for name in (*data.TRAIN_FILES, data.TEST_FILE):
        label, channel, row, column = np.ogrid[:10, :3, :32, :32]
        pixels = (20 * label + 64 * channel + 2 * row + column) % 256
        records = np.concatenate([np.arange(10)[:, None], pixels.reshape(10, -1)], axis=1)
        (tmp_path / name).write_bytes(records.astype(np.uint8).tobytes())
    return tmp_path


def test_cifar10_is_read(module: Callable[[str], ModuleType], cifar10: Path) -> None:
    images = module("data").load(cifar10)
    assert images.train_images.shape == (50, 3, 32, 32)
    assert images.test_images.dtype == torch.float32
    assert images.test_labels.tolist() == list(range(10))
    assert float(images.train_images[2, 1, 3, 4]) == pytest.approx((40 + 64 + 6 + 4) / 255)
    assert [len(part) for part in module("data").load(cifar10, 7)] == [7] * 4


def test_what_is_not_cifar10_is_refused(module: Callable[[str], ModuleType], cifar10: Path) -> None:
    import click

    read, path = module("data").read_cifar10, cifar10 / "test_batch.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(click.ClickException, match=r"multiple of 3073"):
        read(path)
    path.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(click.ClickException, match=r"label of 10"):
        read(path)
    path.rename(cifar10 / "test_batch")
    with pytest.raises(click.ClickException, match=r"pickles are not read"):
        read(path)
